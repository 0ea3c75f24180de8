"""Exported files: writing them, and running what is in them.

A file carries :func:`metadata` as JSON: in ONNX under the key ``d2ext`` of ``metadata_props``, in the
``.pt2`` of ``torch.export`` as the extra file ``d2ext.json``, in the ``.pt2`` of AOTInductor under the
metadata's key ``d2ext``.
"""

from __future__ import annotations

import functools
import json
import os
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn import functional as F

from d2ext.config import ConfigError, get_cfg
from d2ext.data.saved_metadata import class_metadata, known_metadata, save_metadata, saved_metadata
from d2ext.export.graph import MAX_SIDE, MIN_SIDE, exportable
from d2ext.export.onnx_format import need, to_onnx
from d2ext.modeling.export_form import ExportForm, Outputs
from d2ext.modeling.inference import InferenceNetwork
from d2ext.modeling.meta_arch import MetaArch
from d2ext.version import __version__

_KEY, _EXTRA_FILE = "d2ext", "d2ext.json"
FORMATS = {"onnx": ".onnx", "torch": ".pt2", "aoti": ".pt2"}
"""Format → how the file's name ends."""
# What of the classes' metadata is of use without d2ext.
_CLASSES = ("thing_classes", "thing_colors", "keypoint_names", "keypoint_connection_rules")
# What the two files of a model with memory do not have in common.
_OF_ONE_FILE = ("frames", "outputs")


def is_exported(path: object) -> bool:
    """Whether the name of a file says that it is one of these."""
    return isinstance(path, (str, os.PathLike)) and str(path).endswith(tuple(FORMATS.values()))


def later_path(path: str) -> str:
    """Of a model with memory: "edge.onnx" → "edge.later.onnx", the file of the frames after the key
    frames."""
    stem, ending = os.path.splitext(path)
    return f"{stem}.later{ending}"


def metadata(
    cfg: CfgNode, form: ExportForm, program: ExportedProgram, device: str
) -> dict[str, Any]:
    """What a file says of itself.

    ``config`` (YAML) and ``classes``; ``input``: name, ``shape`` (None: any), ``dtype``, ``channels``,
    and of what sides are multiples; ``outputs``: their names, in order; ``frames``: "every", "key" or
    "later", those after a key frame; ``memory``: which outputs of key frames the later ones take;
    ``results`` and ``options``: the function of ``numpy_results.py`` that comes after, its arguments.
    """
    cfg = cfg.clone()
    cfg.defrost()
    known = [x for x in known_metadata(cfg) if x.get("thing_classes")]
    if saved_metadata(cfg) is None and known:
        save_metadata(cfg, known[0].name)
    classes = class_metadata(cfg)
    cfg.MODEL.WEIGHTS = cfg.MODEL.FLOW.WEIGHTS = ""
    cfg.MODEL.DEVICE, cfg.OUTPUT_DIR = device, get_cfg().OUTPUT_DIR
    (images,) = (node for node in program.graph.nodes if node.name == "images")
    value = images.meta["val"]
    return {
        "d2ext": __version__,
        "architecture": cfg.MODEL.META_ARCHITECTURE,
        "input": {
            "name": "images",
            "shape": [side if isinstance(side, int) else None for side in value.shape],
            "dtype": str(value.dtype).removeprefix("torch."),
            "channels": cfg.INPUT.FORMAT,
            "multiple": form.multiple,
            "less": form.less,
            "sizes": form.sizes,
        },
        "outputs": output_names(program),
        "frames": "key" if form.later else "later" if form.memory else "every",
        "memory": list((form.later or form).memory),
        "results": form.results,
        "options": form.options,
        "classes": {key: classes.get(key) for key in _CLASSES if classes.get(key)},
        "config": cfg.dump(),
    }


def output_names(program: ExportedProgram) -> list[str]:
    """Names of a graph's outputs, in order."""
    return list(program.call_spec.out_spec.unflatten(program.graph_signature.user_outputs))


def write(program: ExportedProgram, path: str, file_format: str, facts: dict[str, Any]) -> None:
    """Write a graph, captured for this format, and its :func:`metadata`; the file appears when it is
    complete."""
    text = json.dumps(facts)
    temporary = f"{path}.tmp-{os.getpid()}{FORMATS[file_format]}"
    try:
        if file_format == "onnx":
            state = ["sizes"] if facts["input"]["sizes"] else []
            # No input has the name of an output, see ExportForm.memory.
            taken = (f"last_{x}" if x in facts["outputs"] else x for x in facts["memory"])
            state += taken if facts["frames"] == "later" else ()
            onnx_program = to_onnx(program, ["images", *state], facts["outputs"])
            onnx_program.model.metadata_props[_KEY] = text
            onnx_program.save(temporary)
        elif file_format == "torch":
            torch.export.save(program, temporary, extra_files={_EXTRA_FILE: text})
        else:
            torch._inductor.aoti_compile_and_package(
                program,
                package_path=temporary,
                inductor_configs={"aot_inductor.metadata": {_KEY: text}},
            )
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


class ExportedFile:
    """An exported file, opened.

    As a checkpoint's code would, a ``.pt2`` runs code of the file (AOTInductor's is machine code): open
    those of people whom you trust. An ONNX file is data.

    Args:
        path: of a model with memory, the one of its key frames.
        later: it is the one of the frames after these.

    Attributes:
        facts: its :func:`metadata`. cfg: its config, which can still be changed.
        later: of key frames, the file of the frames after them; else None.

    Raises:
        ConfigError: there is no such file, it is not d2ext's, or it is ONNX and onnxruntime is not
            installed.
    """

    def __init__(self, path: str | os.PathLike[str], *, later: bool = False) -> None:
        self.path = os.fspath(path)
        if not os.path.isfile(self.path):
            which = (
                ", of the frames after key frames, beside the one that was given" if later else ""
            )
            raise ConfigError(f"There is no file '{self.path}'{which}.")
        self._run, text = _open(self.path, os.stat(self.path).st_mtime_ns)
        if not text:
            raise ConfigError(f"'{self.path}' was not written by d2ext: it has no metadata of it.")
        self.facts = json.loads(text)
        frames = self.facts.get("frames", "every")
        if (frames == "later") != later:
            which = "not for" if later else "for"
            raise ConfigError(
                f"'{self.path}' is {which} the frames after key frames. Such a file lies beside that of "
                "the key frames, which is the one to give, and has its name with .later before the end."
            )
        self.later: ExportedFile | None = None
        if frames == "key":
            self.later = ExportedFile(later_path(self.path), later=True)
            own, other = (
                {name: x for name, x in file.facts.items() if name not in _OF_ONE_FILE}
                for file in (self, self.later)
            )
            if own != other:
                raise ConfigError(f"'{self.path}' and '{self.later.path}' are not of one export.")
        self.cfg = get_cfg()
        self.cfg.merge_from_other_cfg(CfgNode(yaml.safe_load(self.facts["config"])))

    def __call__(self, images: Tensor, *state: Tensor) -> Outputs:
        """Images (B, 3, H, W) in 0..255, of any dtype → the named tensors.

        Args:
            state: of a file that takes them, ``sizes`` (B, 2), height and width without padding, by
                default H, W; of later frames the memory, in the order of ``facts["memory"]``.

        Raises:
            ConfigError: the file is for images of another size.
        """
        expected = self.facts["input"]
        batch, _, *size = expected["shape"]
        given = list(images.shape[2:])
        if expected.get("sizes"):
            sizes = state[0] if state else torch.tensor([given]).expand(len(images), 2)
            state = (sizes.to(images.device).float(), *state[1:])
            given = sizes.amax(dim=0).int().tolist()
            images = images[..., : size[0], : size[1]]
            fits = given[0] <= size[0] and given[1] <= size[1]
            missing = (0, size[1] - images.shape[3], 0, size[0] - images.shape[2])
            images, given = F.pad(images, missing), size if fits else given
        other = "a larger --size" if expected.get("sizes") else "--dynamic-size"
        needed = f"the {given[1]}x{given[0]} that this image needs"
        if size != [None, None] and size != given:
            raise ConfigError(
                f"'{self.path}' takes {size[1]}x{size[0]} pixels, not {needed}: give others, or "
                f"export with {other}."
            )
        if size == [None, None] and not all(MIN_SIDE <= side <= MAX_SIDE for side in given):
            raise ConfigError(
                f"'{self.path}' takes sides of {MIN_SIDE} to {MAX_SIDE} pixels, not {needed}."
            )
        if expected["dtype"] == "uint8":
            images = images.round().clamp(0, 255)
        # Compiled code does not look at strides.
        images = images.to(getattr(torch, expected["dtype"])).contiguous()
        batches = zip(*(x.split(batch or len(x)) for x in (images, *state)), strict=True)
        parts = [self._run(x, self.facts["outputs"]) for x in batches]
        return {name: _joined([part[name] for part in parts]) for name in parts[0]}

    def model(self, cfg: CfgNode) -> MetaArch:
        """The file's model: before and after the graph it does what the architecture does.

        Args:
            cfg: the file's config, perhaps with other data sets.
        """
        cfg = cfg.clone()
        cfg.defrost()
        # The graph normalises.
        cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]
        cfg.MODEL.INFERENCE.MODE, cfg.MODEL.INFERENCE.DTYPE = "eager", "float32"
        model = exportable(cfg, build_model(cfg)).eval()
        for parameter in model.parameters():  # those that count are in the file
            parameter.data = parameter.data.new_empty(0)
        form, network = model.export_form(), model.inference_network
        model.set_inference_network(ExportedNetwork(self, network, form))
        if self.later is not None:
            assert form.later is not None and form.later.network is not None
            later = ExportedNetwork(self.later, form.later.network, form.later)
            model.set_later_network(later)
        return model


def _joined(parts: list[Tensor]) -> Tensor:
    """Images one after the other; what has fewer rows than others gets zeros (``ExportForm.rows``)."""
    if len({x.shape[1:] for x in parts}) > 1:
        rows = max(x.shape[1] for x in parts)
        parts = [torch.cat([x, x.new_zeros(1, rows - x.shape[1], *x.shape[2:])], 1) for x in parts]
    return torch.cat(parts)


class ExportedNetwork(InferenceNetwork):
    """Runs a file in place of network and decoding."""

    def __init__(self, file: ExportedFile, network: InferenceNetwork, form: ExportForm) -> None:
        super().__init__(network.network, network.decode)
        self.file, self.form = file, form

    def __call__(self, images: Tensor, *state: Tensor) -> Any:
        if self.form.mirror:  # the graph makes the mirror images itself
            images = images[: len(images) // 2]
        outputs = self.file(images, *state)
        return self.form.unpack({name: x.to(images.device) for name, x in outputs.items()})


Run = Callable[[tuple[Tensor, ...], list[str]], Outputs]


@functools.lru_cache(maxsize=2)  # a command may ask for the config first
def _open(path: str, changed: int) -> tuple[Run, str]:
    """How the graph of a file is run, and its metadata. ``changed``: when the file was."""
    if path.endswith(".onnx"):
        return _open_onnx(path)
    if not zipfile.is_zipfile(path):
        raise ConfigError(f"'{path}' is no file of torch.export or AOTInductor.")
    with zipfile.ZipFile(path) as archive:
        compiled = any("aotinductor" in name for name in archive.namelist())
    if compiled:
        package = torch._inductor.aoti_load_package(path)
        return lambda inputs, _: package(*inputs), package.get_metadata().get(_KEY, "")
    extra = {_EXTRA_FILE: ""}
    module = torch.export.load(path, extra_files=extra).module()
    return lambda inputs, _: module(*inputs), extra[_EXTRA_FILE]


def _open_onnx(path: str) -> tuple[Run, str]:
    need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    providers = set(onnxruntime.get_available_providers())
    session = onnxruntime.InferenceSession(
        path,
        options,
        providers=[x for x in ("CUDAExecutionProvider", "CPUExecutionProvider") if x in providers],
    )

    inputs = [x.name for x in session.get_inputs()]

    def run(tensors: tuple[Tensor, ...], names: list[str]) -> Outputs:
        arrays = (np.ascontiguousarray(x.cpu().numpy()) for x in tensors)
        values = session.run(names, dict(zip(inputs, arrays, strict=True)))
        return {name: torch.from_numpy(x) for name, x in zip(names, values, strict=True)}

    return run, session.get_modelmeta().custom_metadata_map.get(_KEY, "")
