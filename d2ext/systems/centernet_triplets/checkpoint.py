"""Published parameter names of CenterNet with triplets → ours."""

from __future__ import annotations

from torch import Tensor

from d2ext.checkpoint.convert import ConversionError, StateDict, apply_rules, register_converter
from d2ext.checkpoint.cornernet_hourglass import add_counters
from d2ext.systems.cornernet.checkpoint import corner_rules

_CASCADE_PARTS = {
    "look_conv1.conv": "vertical_inward.conv",
    "look_conv1.bn": "vertical_inward.conv.norm",
    "look_conv2.conv": "horizontal_inward.conv",
    "look_conv2.bn": "horizontal_inward.conv.norm",
    "P1_look_conv": "vertical_side",
    "P2_look_conv": "horizontal_side",
}


@register_converter("centernet_triplets")
def convert_centernet_triplets(state_dict: StateDict) -> dict[str, Tensor]:
    """Published CenterNet-52 or -104 checkpoint → :class:`CenterNetTriplets`'s state dict.

    All published parameters are used (the heads of the 104 model's first stack only in training).

    Raises:
        ConversionError: the names are not those of such a checkpoint.
    """
    if "ct_heats.0.1.weight" not in state_dict or "pre.0.conv.weight" not in state_dict:
        raise ConversionError(
            'A checkpoint of CenterNet with triplets has "ct_heats.0.1.weight" and '
            '"pre.0.conv.weight" and this one has not: it belongs to another system, or is already '
            "converted."
        )
    return add_counters(apply_rules(state_dict, corner_rules(("tl", "br", "ct"), _CASCADE_PARTS)))
