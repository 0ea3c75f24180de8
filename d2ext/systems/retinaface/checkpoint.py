"""Published RetinaFace parameter names → ours (retinaface/NOTES.md, "State dict")."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor

from d2ext.checkpoint.convert import (
    ConversionError,
    Rule,
    StateDict,
    apply_rules,
    register_converter,
)
from d2ext.checkpoint.torchvision import mobilenet_v1_rules, resnet_rules

BOTTOM_UP = "backbone.bottom_up."
# The published pyramid counts levels from 1, which is p3.
_FIRST_LEVEL = 3
_CONTEXT = {
    "conv3X3": "conv3x3",
    "conv5X5_1": "reduce",
    "conv5X5_2": "conv5x5",
    "conv7X7_2": "conv7x7_1",
    "conv7x7_3": "conv7x7_2",
}
_HEADS = {"ClassHead": "logits", "BboxHead": "offsets", "LandmarkHead": "points"}
# A convolution and its norm.
_LEAF = r"([01])\.(\w+)"


def _leaf(index: str, leaf: str) -> str:
    return leaf if index == "0" else f"norm.{leaf}"


def _level(name: str) -> Callable[[re.Match[str]], str]:
    return lambda m: f"backbone.{name}{int(m[1]) - 1 + _FIRST_LEVEL}.{_leaf(m[2], m[3])}"


_PYRAMID_AND_HEADS = (
    Rule(rf"fpn\.output([123])\.{_LEAF}", _level("lateral")),
    Rule(rf"fpn\.merge([12])\.{_LEAF}", _level("output")),
    Rule(
        rf"ssh([123])\.({'|'.join(_CONTEXT)})\.{_LEAF}",
        lambda m: f"head.context.{int(m[1]) - 1}.{_CONTEXT[m[2]]}.{_leaf(m[3], m[4])}",
    ),
    Rule(
        rf"({'|'.join(_HEADS)})\.([012])\.conv1x1\.(weight|bias)",
        lambda m: f"head.{_HEADS[m[1]]}.{m[2]}.{m[3]}",
    ),
)


@register_converter("retinaface")
def convert_retinaface(state_dict: StateDict) -> dict[str, Tensor]:
    """Published RetinaFace checkpoint, MobileNet-0.25 or ResNet-50 → :class:`RetinaFace`'s state dict.

    Raises:
        ConversionError: the names are not those of a RetinaFace checkpoint.
    """
    if "BboxHead.0.conv1x1.weight" not in state_dict:
        raise ConversionError(
            'A RetinaFace checkpoint has "BboxHead.0.conv1x1.weight" and this one has not: it belongs '
            "to another system (RetinaFace in newer insightface packages is SCRFD), or is already "
            "converted."
        )
    backbone = (
        mobilenet_v1_rules(r"body\.", BOTTOM_UP)
        if "body.stage1.0.0.weight" in state_dict
        else resnet_rules(r"body\.", r"body\.layer", BOTTOM_UP, first_stage=1)
    )
    return apply_rules(state_dict, (*_PYRAMID_AND_HEADS, *backbone))
