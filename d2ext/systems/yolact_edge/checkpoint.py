"""Published YolactEdge parameter names → ours (yolact_edge/NOTES.md §7)."""

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
from d2ext.modeling.mobilenet import GROUPS
from d2ext.systems.yolact.checkpoint import BOTTOM_UP, PYRAMID_AND_HEADS, RESNET

_FLOW_LAYER = {"conv": "flow", "scale": "scale", "bias": "bias"}


def _level(number: str) -> int:
    """The published net counts levels from 1, the finest."""
    return int(number) - 1


_FLOW_NET = (
    Rule(r"flow_net_pre_convs\.convs\.0\.0\.(\w+)", r"flow_net.reduce.\1"),
    Rule(
        r"flow_net\.conv(\d)\.([01])\.0\.(\w+)",
        lambda m: f"flow_net.encoder.{_level(m[1])}.{m[2]}.{m[3]}",
    ),
    Rule(
        r"flow_net\.pred(\d)\.(conv|scale|bias)\.(\w+)",
        lambda m: f"flow_net.{_FLOW_LAYER[m[2]]}.{_level(m[1])}.{m[3]}",
    ),
    # from a level to the finer one
    Rule(
        r"flow_net\.upfeat(\d)\.(\w+)", lambda m: f"flow_net.up_features.{_level(m[1]) - 1}.{m[2]}"
    ),
    Rule(r"flow_net\.upflow(\d)\.(\w+)", lambda m: f"flow_net.up_flow.{_level(m[1]) - 1}.{m[2]}"),
    Rule(r"spa\.refine_convs\.(\d)\.0\.(\w+)", r"refinement.convs.\1.\2"),
)


def _mobilenet(match: re.Match[str]) -> str:
    return f"{BOTTOM_UP}group{match[1]}.{match[2]}.conv.{match[3]}"


_UNUSED = len(GROUPS)  # the first of the groups that serve the classifier
_MOBILENET = (
    Rule(r"backbone\.layers\.0\.([01])\.(\w+)", rf"{BOTTOM_UP}group0.0.\1.\2"),
    # computed but not used, yolact_edge/NOTES.md §2
    Rule(rf"backbone\.layers\.[{_UNUSED}{_UNUSED + 1}]\..*", None),
    Rule(r"backbone\.layers\.(\d)\.(\d+)\.conv\.(.*)", _mobilenet),
)
_OWN_NAMES = ((r"fpn_phase_1\.lat_layers\.", "fpn.lat_layers."), (r"fpn_phase_2\.", "fpn."))


@register_converter("yolact_edge")
def convert_yolact_edge(state_dict: StateDict) -> dict[str, Tensor]:
    """Published YolactEdge checkpoint of any configuration, or one of YOLACT → :class:`YolactEdge`'s.

    The groups of MobileNetV2 that nothing uses are left out.

    Raises:
        ConversionError: the names are not those of such a checkpoint.
    """
    if "prediction_layers.0.bbox_layer.weight" not in state_dict:
        raise ConversionError(
            'A YolactEdge checkpoint has "prediction_layers.0.bbox_layer.weight" and this one has not: '
            "it belongs to another system, or is already converted."
        )
    renamed = {}
    for name, value in state_dict.items():
        for pattern, replacement in _OWN_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    backbone = _MOBILENET if "backbone.layers.0.0.weight" in state_dict else RESNET
    return apply_rules(renamed, (*PYRAMID_AND_HEADS, *_FLOW_NET, *backbone))
