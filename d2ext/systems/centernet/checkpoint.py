"""Published CenterNet parameter names → ours."""

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
from d2ext.checkpoint.cornernet_hourglass import hourglass_rules
from d2ext.checkpoint.torchvision import dla_rules, resnet_rules

_HEADS = {
    "hm": "heatmap",
    "wh": "size",
    "reg": "offset",
    "hps": "joints",
    "hm_hp": "joint_heatmap",
    "hp_offset": "joint_offset",
}
_HEAD = rf"({'|'.join(_HEADS)})"


def _branch(layer: str, head: int = 1, stack: int | None = None) -> Callable[[re.Match[str]], str]:
    """Our name of a head's layer, from the numbers of the groups with head and stack; the last group
    is the leaf."""

    def name(match: re.Match[str]) -> str:
        number = "0" if stack is None else match[stack]
        return f"head.stacks.{number}.{_HEADS[match[head]]}.{layer}.{match[match.re.groups]}"

    return name


_HEAD_RULES = (
    # of ResNet and DLA: <head>.<layer>
    Rule(rf"{_HEAD}\.0\.(weight|bias)", _branch("conv")),
    Rule(rf"{_HEAD}\.2\.(weight|bias)", _branch("output")),
    # of the hourglass: <head>.<stack>.<layer>
    Rule(rf"{_HEAD}\.(\d)\.0\.conv\.(weight|bias)", _branch("conv", stack=2)),
    Rule(rf"{_HEAD}\.(\d)\.1\.(weight|bias)", _branch("output", stack=2)),
)


def _deformable(match: re.Match[str], target: str) -> str:
    """``target`` and the leaf (last group) of a modulated deformable convolution."""
    leaf = match[match.re.groups].replace("conv_offset_mask", "offset_mask")
    return f"{target}.{leaf}"


_DEFORMABLE_LEAF = r"((?:conv_offset_mask\.)?(?:weight|bias))"


def _deconv_rules(layers: int) -> tuple[Rule, ...]:
    """Up-sampling stages of ``layers`` published layers: 6 with deformable convolutions, else 3."""

    def stage(match: re.Match[str]) -> tuple[str, int]:
        number, layer = divmod(int(match[1]), layers)
        return f"backbone.stages.{number}", layer + 6 - layers

    def rename(match: re.Match[str]) -> str:
        ours, layer = stage(match)
        if layer == 0:
            return _deformable(match, f"{ours}.reduce.conv")
        part = {1: "reduce.conv.norm", 3: "up", 4: "up_norm"}[layer]
        return f"{ours}.{part}.{match[match.re.groups]}"

    return (Rule(r"deconv_layers\.(\d+)\.((?:conv_offset_mask\.)?\w+)", rename),)


def _aggregation(match: re.Match[str]) -> str:
    """Our name of a step of ``dla_up.ida_<i>`` or ``ida_up``."""
    where = "fusion" if match[1] == "ida_up" else f"steps.{match[1][-1]}"
    lists = {"proj": "projections", "up": "ups", "node": "nodes"}
    return f"backbone.{where}.{lists[match[2]]}.{int(match[3]) - 1}"


_DLA_UP_RULES = (
    Rule(
        r"(?:dla_up\.)?(ida_\w+?)\.(proj|node)_(\d)\.actf\.0\.(\w+)",
        lambda m: f"{_aggregation(m)}.conv.norm.{m[4]}",
    ),
    Rule(
        rf"(?:dla_up\.)?(ida_\w+?)\.(proj|node)_(\d)\.conv\.{_DEFORMABLE_LEAF}",
        lambda m: _deformable(m, f"{_aggregation(m)}.conv"),
    ),
    Rule(
        r"(?:dla_up\.)?(ida_\w+?)\.(up)_(\d)\.(weight)",
        lambda m: f"{_aggregation(m)}.weight",
    ),
)


@register_converter("centernet")
def convert_centernet(state_dict: StateDict) -> dict[str, Tensor]:
    """Published CenterNet checkpoint → :class:`CenterNet`'s state dict.

    For ctdet and multi_pose models with resdcn_N, res_N, dla_34 and hourglass. Of DLA, unused weights
    are dropped: the ImageNet classifier ``base.fc``, and ``base.level3.project`` and
    ``base.level4.project``.

    Raises:
        ConversionError: the names are not those of a CenterNet checkpoint.
    """
    if "hm.2.weight" not in state_dict and "hm.0.1.weight" not in state_dict:
        raise ConversionError(
            'A CenterNet checkpoint has "hm.2.weight" or "hm.0.1.weight" and this one has neither: it '
            "belongs to another system, or is already converted."
        )
    backbone: tuple[Rule, ...]
    if "base.base_layer.0.weight" in state_dict:
        backbone = (*dla_rules(state_dict, "base.", "backbone.bottom_up."), *_DLA_UP_RULES)
    elif "pre.0.conv.weight" in state_dict:
        backbone = hourglass_rules()
    else:
        deformable = "deconv_layers.0.conv_offset_mask.weight" in state_dict
        backbone = (
            *resnet_rules("", "layer", "backbone.bottom_up.", first_stage=1),
            *_deconv_rules(6 if deformable else 3),
        )
    return apply_rules(state_dict, (*_HEAD_RULES, *backbone))
