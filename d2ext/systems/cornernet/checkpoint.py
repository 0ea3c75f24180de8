"""Published CornerNet parameter names → ours (cornernet/NOTES.md, checkpoints and converter)."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from d2ext.checkpoint.convert import (
    ConversionError,
    Rule,
    StateDict,
    apply_rules,
    register_converter,
)

_LEVEL_PARTS = {"up1": "up", "low1": "down", "low2": "inner", "low3": "out", "up2": "upsample"}
# Of a residual block: its convolutions and their norms.
_BLOCK_PARTS = {
    "conv1": "conv1",
    "bn1": "conv1.norm",
    "conv2": "conv2",
    "bn2": "conv2.norm",
    "skip.0": "skip",
    "skip.1": "skip.norm",
}
# Of a fire module, as :func:`_name_fire_parts` calls them.
_FIRE_PARTS = {
    "fire_conv1": "squeeze",
    "fire_bn1": "squeeze.norm",
    "fire_conv_1x1": "expand1x1",
    "fire_conv_3x3": "expand3x3",
    "fire_bn2_1x1": "expand1x1.norm",
    "fire_bn2_3x3": "expand3x3.norm",
}
_POOLING_PARTS = {
    "p1_conv1.conv": "vertical.conv",
    "p1_conv1.bn": "vertical.conv.norm",
    "p2_conv1.conv": "horizontal.conv",
    "p2_conv1.bn": "horizontal.conv.norm",
    "p_conv1": "merge",
    "p_bn1": "merge.norm",
    "conv1": "skip",
    "bn1": "skip.norm",
    "conv2.conv": "output.conv",
    "conv2.bn": "output.conv.norm",
}
_KINDS = {"tl": "top_left", "br": "bottom_right", "ct": "center"}
_PREDICTIONS = {"heats": "heat", "tags": "embedding", "regrs": "offset", "offs": "offset"}
_LAYERS = {"0.conv": "hidden", "1": "output"}
_CONV_NORM = {"conv": "conv", "bn": "conv.norm"}


def _one_of(names: dict[str, str]) -> str:
    """A group that matches each of the names."""
    return "(" + "|".join(re.escape(name) for name in names) + ")"


def _hourglass_rules(prefix: str, stacks: str) -> tuple[Rule, ...]:
    """Of the backbone; ``prefix`` and ``stacks`` are what the repository calls it and its stacks."""
    ours = "network.backbone."

    def level(match: re.Match[str]) -> str:
        path = ".".join(_LEVEL_PARTS.get(part, part) for part in match[2].split("."))
        return f"{ours}stacks.{match[1]}.{path}"

    parts = {**_BLOCK_PARTS, **_FIRE_PARTS}
    path = r"((?:low2\.)*(?:up1|low1|low2|low3)\.\d+)"
    return (
        Rule(
            rf"{prefix}pre\.0\.{_one_of(_CONV_NORM)}\.(\w+)",
            lambda m: f"{ours}stem.0.{_CONV_NORM[m[1]]}.{m[2]}",
        ),
        Rule(
            rf"{prefix}pre\.([12])\.{_one_of(_BLOCK_PARTS)}\.(\w+)",
            lambda m: f"{ours}stem.{m[1]}.{_BLOCK_PARTS[m[2]]}.{m[3]}",
        ),
        Rule(
            rf"{prefix}{stacks}\.(\d)\.{path}\.{_one_of(parts)}\.(\w+)",
            lambda m: f"{level(m)}.{parts[m[3]]}.{m[4]}",
        ),
        # The transposed convolutions of Squeeze.
        Rule(rf"{prefix}{stacks}\.(\d)\.((?:low2\.)*up2)\.(\w+)", lambda m: f"{level(m)}.{m[3]}"),
        Rule(
            rf"{prefix}cnvs\.(\d)\.{_one_of(_CONV_NORM)}\.(\w+)",
            lambda m: f"{ours}convs.{m[1]}.{_CONV_NORM[m[2]]}.{m[3]}",
        ),
        Rule(
            rf"{prefix}inters\.(\d)\.{_one_of(_BLOCK_PARTS)}\.(\w+)",
            lambda m: f"{ours}links.{m[1]}.{_BLOCK_PARTS[m[2]]}.{m[3]}",
        ),
        Rule(rf"{prefix}inters_\.(\d)\.0\.(\w+)", rf"{ours}link_inputs.\1.\2"),
        Rule(rf"{prefix}inters_\.(\d)\.1\.(\w+)", rf"{ours}link_inputs.\1.norm.\2"),
        Rule(rf"{prefix}cnvs_\.(\d)\.0\.(\w+)", rf"{ours}link_outputs.\1.\2"),
        Rule(rf"{prefix}cnvs_\.(\d)\.1\.(\w+)", rf"{ours}link_outputs.\1.norm.\2"),
    )


def _head_rules(pooling: str, kinds: Sequence[str], parts: dict[str, str]) -> tuple[Rule, ...]:
    """Of the heads of these kinds of points; ``pooling`` ends the pooling modules' published names."""
    ours = "network.head."
    kind = _one_of({name: _KINDS[name] for name in kinds})
    return (
        Rule(
            rf"{kind}_{pooling}\.(\d)\.{_one_of(parts)}\.(\w+)",
            lambda m: f"{ours}{_KINDS[m[1]]}.{m[2]}.pooling.{parts[m[3]]}.{m[4]}",
        ),
        Rule(
            rf"{kind}_{_one_of(_PREDICTIONS)}\.(\d)\.{_one_of(_LAYERS)}\.(\w+)",
            lambda m: f"{ours}{_KINDS[m[1]]}.{m[3]}.{_PREDICTIONS[m[2]]}.{_LAYERS[m[4]]}.{m[5]}",
        ),
    )


def corner_rules(
    kinds: Sequence[str] = ("tl", "br"), extra_parts: dict[str, str] | None = None
) -> tuple[Rule, ...]:
    """Names of the CornerNet repository and of those that descend from it.

    Args:
        kinds: of points, "tl", "br" and "ct".
        extra_parts: further parts of the pooling modules, published name → ours.
    """
    parts = {**_POOLING_PARTS, **(extra_parts or {})}
    return (*_hourglass_rules("", "kps"), *_head_rules("cnvs", kinds, parts))


# Names of the CornerNet-Lite repository: CornerNet, Squeeze and Saccade.
_LITE_RULES = (
    *_hourglass_rules(r"hg\.", "hgs"),
    *_head_rules("modules", ("tl", "br"), _POOLING_PARTS),
    Rule(
        rf"att_modules\.(\d)\.(\d)\.{_one_of(_LAYERS)}\.(\w+)",
        lambda m: f"network.head.attention.{m[1]}.{m[2]}.{_LAYERS[m[3]]}.{m[4]}",
    ),
)


def _name_fire_parts(state_dict: StateDict) -> dict[str, Tensor]:
    """Give Squeeze's fire modules names of their own, and each of their two halves its own norm."""
    marker = ".conv_1x1.weight"
    modules = {name.removesuffix(marker) for name in state_dict if name.endswith(marker)}
    renamed: dict[str, Tensor] = {}
    for name, value in state_dict.items():
        path, _, leaf = name.rpartition(".")
        module, _, part = path.rpartition(".")
        if module not in modules:
            renamed[name] = value
        elif part == "bn2":
            halves = value.chunk(2) if value.dim() else (value, value)
            for half, own in zip(("1x1", "3x3"), halves, strict=True):
                renamed[f"{module}.fire_bn2_{half}.{leaf}"] = own.clone()
        else:
            renamed[f"{module}.fire_{part}.{leaf}"] = value
    return renamed


def with_counters(converted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the batch norms' counters if the checkpoint is older than they are (PyTorch 0.4.0)."""
    for name in list(converted):
        if name.endswith(".running_var"):
            counter = name.removesuffix("running_var") + "num_batches_tracked"
            converted.setdefault(counter, torch.tensor(0))
    return converted


@register_converter("cornernet")
def convert_cornernet(state_dict: StateDict) -> dict[str, Tensor]:
    """Published checkpoint of CornerNet, CornerNet-Squeeze or CornerNet-Saccade → ours.

    All published parameters are used; those of the stacks before the last one in training only.

    Raises:
        ConversionError: the names are not those of such a checkpoint.
    """
    if "pre.0.conv.weight" in state_dict:
        return with_counters(apply_rules(state_dict, corner_rules()))
    if "hg.pre.0.conv.weight" in state_dict:
        return with_counters(apply_rules(_name_fire_parts(state_dict), _LITE_RULES))
    raise ConversionError(
        'A CornerNet checkpoint has "pre.0.conv.weight" or "hg.pre.0.conv.weight" and this one has '
        "neither: it belongs to another system, or is already converted."
    )
