"""Published CornerNet parameter names → ours."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from d2ext.checkpoint.convert import (
    ConversionError,
    Rule,
    StateDict,
    apply_rules,
    register_converter,
)
from d2ext.checkpoint.cornernet_hourglass import add_counters, hourglass_rules, name_fire_parts

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
_BACKBONE = "backbone."
_HEAD = "head."


def _one_of(names: dict[str, str]) -> str:
    """A group that matches each of the names."""
    return "(" + "|".join(re.escape(name) for name in names) + ")"


def _head_rules(pooling: str, kinds: Sequence[str], parts: dict[str, str]) -> tuple[Rule, ...]:
    """Rules for the heads of these kinds of points; published pooling modules end in ``pooling``."""
    kind = _one_of({name: _KINDS[name] for name in kinds})
    return (
        Rule(
            rf"{kind}_{pooling}\.(\d)\.{_one_of(parts)}\.(\w+)",
            lambda m: f"{_HEAD}{_KINDS[m[1]]}.{m[2]}.pooling.{parts[m[3]]}.{m[4]}",
        ),
        Rule(
            rf"{kind}_{_one_of(_PREDICTIONS)}\.(\d)\.{_one_of(_LAYERS)}\.(\w+)",
            lambda m: f"{_HEAD}{_KINDS[m[1]]}.{m[3]}.{_PREDICTIONS[m[2]]}.{_LAYERS[m[4]]}.{m[5]}",
        ),
    )


def corner_rules(
    kinds: Sequence[str] = ("tl", "br"), extra_parts: dict[str, str] | None = None
) -> tuple[Rule, ...]:
    """Names of the CornerNet repository and of those derived from it.

    Args:
        kinds: of points, "tl", "br" and "ct".
        extra_parts: further parts of the pooling modules, published name → ours.
    """
    parts = {**_POOLING_PARTS, **(extra_parts or {})}
    return (*hourglass_rules("", _BACKBONE), *_head_rules("cnvs", kinds, parts))


# Names of the CornerNet-Lite repository: CornerNet, Squeeze and Saccade.
_LITE_RULES = (
    *hourglass_rules(r"hg\.", _BACKBONE),
    *_head_rules("modules", ("tl", "br"), _POOLING_PARTS),
    Rule(
        rf"att_modules\.(\d)\.(\d)\.{_one_of(_LAYERS)}\.(\w+)",
        lambda m: f"{_HEAD}attention.{m[1]}.{m[2]}.{_LAYERS[m[3]]}.{m[4]}",
    ),
)


@register_converter("cornernet")
def convert_cornernet(state_dict: StateDict) -> dict[str, Tensor]:
    """Published checkpoint of CornerNet, CornerNet-Squeeze or CornerNet-Saccade → ours.

    All published parameters are used (heads of stacks before the last one only in training).

    Raises:
        ConversionError: the names are not those of such a checkpoint.
    """
    if "pre.0.conv.weight" in state_dict:
        return add_counters(apply_rules(state_dict, corner_rules()))
    if "hg.pre.0.conv.weight" in state_dict:
        return add_counters(apply_rules(name_fire_parts(state_dict), _LITE_RULES))
    raise ConversionError(
        'A CornerNet checkpoint has "pre.0.conv.weight" or "hg.pre.0.conv.weight" and this one has '
        "neither: it belongs to another system, or is already converted."
    )
