"""Published stacked-hourglass parameter names → ours."""

from __future__ import annotations

import re

from torch import Tensor

from d2ext.checkpoint.convert import (
    ConversionError,
    Rule,
    StateDict,
    apply_rules,
    register_converter,
)

# A residual block's published layers. Its second and third norm are those of our first and second
# convolution.
_RESIDUAL = {
    "bn1": "pre_norm",
    "conv1.conv": "conv1",
    "bn2": "conv1.norm",
    "conv2.conv": "conv2",
    "bn3": "conv2.norm",
    "conv3.conv": "conv3",
    "skip_layer.conv": "shortcut",
}
_BLOCK = r"(bn[123]|conv[123]\.conv|skip_layer\.conv)\.(\w+)"
_HOURGLASS = r"hgs\.(\d+)\.0\.((?:low2\.)*)(up1|low1|low2|low3)\."
_STEM_BLOCK = {"1": "stem1", "3": "stem2", "4": "stem3"}


def _leaf(layer: str) -> str:
    return "norm." if layer == "bn" else ""


def _hourglass_block(match: re.Match[str]) -> str:
    branch = "up" if match[3] == "up1" else match[3]
    path = f"backbone.stacks.{match[1]}.hourglass.{match[2]}{branch}"
    return f"{path}.{_RESIDUAL[match[4]]}.{match[5]}"


_PREFIX = r"(?:model\.)?(?:module\.)?"
_RULES = (
    Rule(
        _PREFIX + r"pre\.0\.(conv|bn)\.(\w+)", lambda m: f"backbone.stem_conv.{_leaf(m[1])}{m[2]}"
    ),
    Rule(
        _PREFIX + r"pre\.([134])\." + _BLOCK,
        lambda m: f"backbone.{_STEM_BLOCK[m[1]]}.{_RESIDUAL[m[2]]}.{m[3]}",
    ),
    Rule(_PREFIX + _HOURGLASS + _BLOCK, _hourglass_block),
    Rule(
        _PREFIX + r"features\.(\d+)\.0\." + _BLOCK,
        lambda m: f"backbone.stacks.{m[1]}.residual.{_RESIDUAL[m[2]]}.{m[3]}",
    ),
    Rule(
        _PREFIX + r"features\.(\d+)\.1\.(conv|bn)\.(\w+)",
        lambda m: f"backbone.stacks.{m[1]}.conv.{_leaf(m[2])}{m[3]}",
    ),
    Rule(_PREFIX + r"outs\.(\d+)\.conv\.(\w+)", r"backbone.stacks.\1.predictor.\2"),
    Rule(
        _PREFIX + r"merge_features\.(\d+)\.conv\.conv\.(\w+)",
        r"backbone.stacks.\1.merge_features.\2",
    ),
    Rule(_PREFIX + r"merge_preds\.(\d+)\.conv\.conv\.(\w+)", r"backbone.stacks.\1.merge_maps.\2"),
)
# Every published residual block has a skip layer; where input and output are equally wide, it is never
# used or trained.
_SHORTCUT = re.compile(r"backbone\..*\.shortcut\.weight")


@register_converter("landmarks")
def convert_landmarks(state_dict: StateDict) -> dict[str, Tensor]:
    """Published stacked hourglass of any number of stacks → :class:`LandmarkNet`'s state dict.

    The skip layers that the published network has but never uses are dropped, those of blocks whose
    input and output are equally wide: ``skip_layer.conv.weight`` and ``.bias`` of ``pre.3``,
    ``features.N.0``, all blocks in ``hgs.N.0`` unless its levels differ in width, and ``pre.4`` if the
    network is 128 channels wide.

    Raises:
        ConversionError: the names are not those of a stacked hourglass.
    """
    if not any(name.endswith("hgs.0.0.up1.conv1.conv.weight") for name in state_dict):
        raise ConversionError(
            'A stacked hourglass has "hgs.0.0.up1.conv1.conv.weight" and this checkpoint has not: it '
            "belongs to another system, or is already converted."
        )
    converted = apply_rules(state_dict, _RULES)
    for name in [name for name in converted if _SHORTCUT.fullmatch(name)]:
        if converted[name].shape[0] == converted[name].shape[1]:
            del converted[name]
            converted.pop(name.removesuffix("weight") + "bias", None)
    return converted
