"""Published YOLACT parameter names → ours (yolact/NOTES.md §10)."""

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
from d2ext.checkpoint.torchvision import resnet_rules

BOTTOM_UP = "backbone.bottom_up."
# The published lists run from the coarsest level to the finest.
_LEVEL = {"0": 5, "1": 4, "2": 3}
_PROTO_LAYER = {"0": "conv1", "2": "conv2", "4": "conv3", "8": "conv4", "10": "output"}
_HEAD_LAYER = {
    "upfeature.0": "tower",
    "bbox_layer": "offsets",
    "conf_layer": "logits",
    "mask_layer": "coefficients",
}


def _mask_scorer_layer(match: re.Match[str]) -> str:
    index = int(match[1])
    layer = "output" if index == 10 else f"convs.{index // 2}"
    return f"mask_scorer.{layer}.{match[2]}"


PYRAMID_AND_HEADS = (
    Rule(r"fpn\.lat_layers\.([012])\.(\w+)", lambda m: f"backbone.lateral{_LEVEL[m[1]]}.{m[2]}"),
    Rule(r"fpn\.pred_layers\.([012])\.(\w+)", lambda m: f"backbone.output{_LEVEL[m[1]]}.{m[2]}"),
    Rule(
        r"fpn\.downsample_layers\.([01])\.(\w+)",
        lambda m: f"backbone.downsample{6 + int(m[1])}.{m[2]}",
    ),
    # version 1.0 saved more levels than it used
    Rule(r"fpn\.downsample_layers\.\d+\.\w+", None),
    Rule(
        r"proto_net\.(0|2|4|8|10)\.(\w+)", lambda m: f"head.prototypes.{_PROTO_LAYER[m[1]]}.{m[2]}"
    ),
    Rule(
        r"prediction_layers\.0\.(upfeature\.0|bbox_layer|conf_layer|mask_layer)\.(\w+)",
        lambda m: f"head.predictor.{_HEAD_LAYER[m[1]]}.{m[2]}",
    ),
    Rule(r"semantic_seg_conv\.(\w+)", r"head.semantic.\1"),
    Rule(r"maskiou_net\.maskiou_net\.(0|2|4|6|8|10)\.(\w+)", _mask_scorer_layer),
)


def _resnet_conv(match: re.Match[str]) -> str:
    return f"{BOTTOM_UP}res{int(match[1]) + 2}.{match[2]}"


RESNET = (
    *resnet_rules(r"backbone\.", r"backbone\.layers\.", BOTTOM_UP, first_stage=0),
    # deformable convolutions
    Rule(r"backbone\.layers\.(\d)\.(\d+\.conv\d\.bias)", _resnet_conv),
    Rule(
        r"backbone\.layers\.(\d)\.(\d+\.conv2)\.conv_offset_mask\.(\w+)",
        lambda m: f"{_resnet_conv(m)}.offset_mask.{m[3]}",
    ),
    # version 1.0 saved the weights under torchvision's names too
    Rule(r"backbone\.layer\d\..*", None),
)


def _darknet_leaf(index: str, leaf: str) -> str:
    """0 is a convolution, 1 its norm."""
    return leaf if index == "0" else f"norm.{leaf}"


_DARKNET = (
    Rule(
        r"backbone\._preconv\.([01])\.(\w+)",
        lambda m: f"{BOTTOM_UP}stem.{_darknet_leaf(m[1], m[2])}",
    ),
    Rule(
        r"backbone\.layers\.(\d)\.0\.([01])\.(\w+)",
        lambda m: f"{BOTTOM_UP}dark{int(m[1]) + 1}.0.{_darknet_leaf(m[2], m[3])}",
    ),
    Rule(
        r"backbone\.layers\.(\d)\.(\d+)\.conv([12])\.([01])\.(\w+)",
        lambda m: f"{BOTTOM_UP}dark{int(m[1]) + 1}.{m[2]}.conv{m[3]}.{_darknet_leaf(m[4], m[5])}",
    ),
)


@register_converter("yolact")
def convert_yolact(state_dict: StateDict) -> dict[str, Tensor]:
    """Published YOLACT or YOLACT++ checkpoint of any backbone → :class:`YOLACT`'s state dict.

    Superfluous weights of version 1.0 are dropped: ``backbone.layer*`` and
    ``fpn.downsample_layers.N`` for N >= 2.

    Raises:
        ConversionError: the names are not those of a YOLACT checkpoint.
    """
    if "prediction_layers.0.bbox_layer.weight" not in state_dict:
        raise ConversionError(
            'A YOLACT checkpoint has "prediction_layers.0.bbox_layer.weight" and this one has not: '
            "it belongs to another system, or is already converted."
        )
    backbone = _DARKNET if "backbone._preconv.0.weight" in state_dict else RESNET
    return apply_rules(state_dict, (*PYRAMID_AND_HEADS, *backbone))
