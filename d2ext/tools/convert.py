"""Convert a published checkpoint to one that Detectron2 loads with nothing missing or unexpected.

    d2ext convert --config-file yolact/yolact_R_50_550.yaml \\
        yolact_resnet50_54_800000.pth yolact_R_50_550.pth

The config says which system, depth and class count the checkpoint is of; the model is built from it and
the converted weights must fit exactly. Set MODEL.WEIGHTS to the result.

    d2ext convert --config-file yolact/yolact_R_50_550.yaml \\
        --system torchvision_resnet resnet50.pth R-50_torchvision.pth

converts ImageNet weights of torchvision for the config's backbone, to start a training from.

No code that the file may contain is run. Exit status: 0; 1 if the result cannot be written; 2 if the
file, the config or the command is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY, build_model
from torch import Tensor, nn

from d2ext.checkpoint import ConversionError, available_converters, convert_state_dict, unwrap
from d2ext.checkpoint.io import as_tensors, load_untrusted
from d2ext.checkpoint.torchvision import BACKBONE_SYSTEMS, torchvision_backbone
from d2ext.config import add_options_argument, load_config
from d2ext.files import atomic_write
from d2ext.model_zoo import find_config_file
from d2ext.tools.command_line import add_config_argument, make_parser
from d2ext.utils.terminal import show_log

StateDict = Mapping[str, Tensor]

# Number of names shown of a list.
_SHOWN = 6


def read_state_dict(path: str) -> dict[str, Tensor]:
    """The state dict in a published file, as tensors."""
    return unwrap(as_tensors(load_untrusted(path)))


def system_of(cfg: CfgNode) -> str:
    """The converter's name for a config: that of the system which its meta-architecture belongs to, or,
    where that is Detectron2's own, its ROI heads.

    Raises:
        ConversionError: there is no converter of that name.
    """
    architecture = cfg.MODEL.META_ARCHITECTURE
    parts = [(META_ARCH_REGISTRY, architecture), (ROI_HEADS_REGISTRY, cfg.MODEL.ROI_HEADS.NAME)]
    for registry, part in parts:
        module = registry.get(part).__module__ if part in registry else ""
        own = module.startswith("d2ext.systems.")
        if own and (name := module.split(".")[2]) in available_converters():
            return name
    raise ConversionError(
        f"There is no converter for MODEL.META_ARCHITECTURE {architecture!r}: choose one with "
        f"--system, of {', '.join(available_converters())}."
    )


def listed(title: str, names: Iterable[str]) -> list[str]:
    """Lines that show the first of ``names``; none if there is none."""
    names = list(names)
    if not names:
        return []
    more = [f"  ... and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return [f"{len(names)} {title}:", *(f"  {name}" for name in names[:_SHOWN]), *more]


def is_counter(name: str) -> bool:
    """A batch norm's counter: frozen norms and old checkpoints have none, and nothing reads it."""
    return name.endswith(".num_batches_tracked")


def left_out(published: StateDict, converted: StateDict) -> list[str]:
    """Published parameters that are not in the result, compared by their memory.

    Converters rename; one that computes a new tensor shows its source here too.
    """
    used = {value.untyped_storage().data_ptr() for value in converted.values()}
    return [k for k, v in published.items() if v.untyped_storage().data_ptr() not in used]


def fit_model(converted: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state dict of ``model`` with all its values from ``converted``.

    Batch counters that only one side has are dropped, or left at the model's zero.

    Raises:
        ConversionError: parameters that are missing, unexpected or of another shape.
    """
    own = model.state_dict()
    converted = {k: v for k, v in converted.items() if k in own or not is_counter(k)}
    missing = [k for k in own if k not in converted and not is_counter(k)]
    unexpected = [k for k in converted if k not in own]
    shapes = [
        f"{k}: checkpoint {tuple(converted[k].shape)}, config {tuple(v.shape)}"
        for k, v in own.items()
        if k in converted and converted[k].shape != v.shape
    ]
    if missing or unexpected or shapes:
        if missing or unexpected:
            hint = (
                "Is the checkpoint of another depth, backbone or variant? Choose the config that it "
                "was trained with."
            )
        else:
            hint = (
                "All names agree: the class count differs, or the number of anchors or prototypes. "
                "Change it with --opts, for example --opts MODEL.YOLACT.NUM_CLASSES 20."
            )
        raise ConversionError(
            "\n".join(
                [
                    "The checkpoint does not fit the config's model.",
                    *listed("parameters of the model are not in the checkpoint", missing),
                    *listed("parameters of the checkpoint are not in the model", unexpected),
                    *listed("parameters have another shape", shapes),
                    hint,
                ]
            )
        )
    model.load_state_dict({**own, **converted}, strict=True)
    return {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}


def check_backbone(converted: dict[str, Tensor], model: nn.Module) -> list[str]:
    """Check that backbone weights find their places by Detectron2's matching of names.

    Returns:
        Parameters of the bottom-up net that keep their initial values (deformable layers have some that
        no ImageNet model has).

    Raises:
        ConversionError: weights of another depth or kind of net.
    """
    backbone = getattr(model, "backbone", None)
    if backbone is None:
        raise ConversionError("The config's model has no `backbone` to take these weights.")
    net = getattr(backbone, "bottom_up", backbone)
    own = {k: v for k, v in net.state_dict().items() if not is_counter(k)}
    weights = {k: v for k, v in converted.items() if not is_counter(k)}
    placed = align_and_update_state_dicts(own, weights, c2_conversion=False)
    filled = {k for k in own if k in placed and placed[k].shape == own[k].shape}
    sources = {placed[k].untyped_storage().data_ptr() for k in filled}
    unused = [k for k, v in weights.items() if v.untyped_storage().data_ptr() not in sources]
    # A block without any weights: the net is deeper than the checkpoint.
    blocks = {".".join(k.split(".")[:2]) for k in filled}
    missing = [k for k in own if ".".join(k.split(".")[:2]) not in blocks]
    if unused or missing:
        raise ConversionError(
            "\n".join(
                [
                    "The weights do not fit the config's bottom-up net.",
                    *listed("parameters of the net are not in the checkpoint", missing),
                    *listed("parameters of the checkpoint are not in the net", unused),
                    "Is it of another depth? Choose the config of the same ResNet.",
                ]
            )
        )
    return [k for k in own if k not in filled]


def convert(cfg: CfgNode, source: str, system: str | None) -> tuple[dict[str, object], list[str]]:
    """Read, convert and check a published checkpoint.

    Returns:
        what to save, and a summary, line by line.
    """
    cfg = cfg.clone()
    cfg.MODEL.DEVICE = "cpu"
    system = system or system_of(cfg)
    published = read_state_dict(source)
    backbone = torchvision_backbone(published)
    if backbone and system not in BACKBONE_SYSTEMS:
        raise ConversionError(
            f"'{source}' holds a backbone, not a whole {system} model: give "
            f"--system {backbone} to use it as one."
        )
    converted = convert_state_dict(system, published)
    model = build_model(cfg)
    author = {"__author__": f"{system}, converted by d2ext"}
    summary = [f"{len(converted)} of {len(published)} published parameters converted ({system})."]
    result: dict[str, object]
    if system in BACKBONE_SYSTEMS:
        initial = check_backbone(converted, model)
        result = {"model": converted, **author, "matching_heuristics": True}
        summary += listed("parameters of the net keep their initial values", initial)
    else:
        state = fit_model(converted, model)
        result = {"model": state, **author}
        numbers = sum(v.numel() for v in state.values())
        summary.append(f"The model takes {len(state)} tensors with {numbers:,} numbers: all match.")
        dropped = [k for k in converted if k not in state]
        summary += listed("batch counters dropped, for the config's norms are frozen", dropped)
    summary += listed("published parameters left out", left_out(published, converted))
    return result, summary


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("source", metavar="SRC", help="published checkpoint (.pth)")
    add("target", metavar="DST", help="file to write, .pth")
    add_config_argument(parser)
    add("--system", metavar="NAME", help="converter (default: the config's meta-architecture)")
    add("--overwrite", action="store_true", help="replace DST if it exists")
    add_options_argument(parser)
    return parser


def run(arguments: list[str] | None = None) -> int:
    """Run the tool; its exit status."""
    args = build_parser().parse_args(arguments)
    show_log("d2ext")
    target = Path(args.target)
    try:
        if target.suffix not in (".pth", ".pt"):
            # Detectron2 reads other names as other formats.
            raise ConversionError(f"DST '{target}' must end with .pth.")
        if target.exists() and not args.overwrite:
            raise ConversionError(f"'{target}' exists: give --overwrite to replace it.")
        if target.exists() and target.samefile(args.source):
            raise ConversionError("SRC and DST are the same file.")
        cfg = load_config(find_config_file(args.config_file), args.opts)
        result, summary = convert(cfg, args.source, args.system)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(target) as file:
            torch.save(result, file)
    except (OSError, RuntimeError) as error:
        # torch.save turns the OSError of a full disk into a RuntimeError
        print(f"error: cannot write '{target}': {error}", file=sys.stderr)
        return 1
    print("\n".join(summary))
    print(f"Written to {target}. Use it with MODEL.WEIGHTS {target}")
    return 0
