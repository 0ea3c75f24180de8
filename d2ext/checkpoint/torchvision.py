"""torchvision's ImageNet ResNets as backbones.

The result has the names of Detectron2's ResNet without a prefix; ``DetectionCheckpointer`` finds
where they belong by its name-matching heuristics.
"""

from __future__ import annotations

import re

from torch import Tensor

from d2ext.checkpoint.convert import Rule, StateDict, apply_rules, register_converter


def _stage(match: re.Match[str]) -> str:
    # torchvision counts its stages from 1, Detectron2 names them after the paper's res2..res5
    return f"res{int(match[1]) + 1}.{match[2]}"


_RULES = (
    Rule(r"conv1\.weight", "stem.conv1.weight"),
    Rule(r"bn1\.(\w+)", r"stem.conv1.norm.\1"),
    Rule(r"layer(\d)\.(\d+\.conv\d\.weight)", _stage),
    Rule(
        r"layer(\d)\.(\d+)\.bn(\d)\.(\w+)",
        lambda m: f"res{int(m[1]) + 1}.{m[2]}.conv{m[3]}.norm.{m[4]}",
    ),
    Rule(
        r"layer(\d)\.(\d+)\.downsample\.0\.weight",
        lambda m: f"res{int(m[1]) + 1}.{m[2]}.shortcut.weight",
    ),
    Rule(
        r"layer(\d)\.(\d+)\.downsample\.1\.(\w+)",
        lambda m: f"res{int(m[1]) + 1}.{m[2]}.shortcut.norm.{m[3]}",
    ),
    # the ImageNet classifier
    Rule(r"fc\.(weight|bias)", None),
)


def is_torchvision_resnet(state_dict: StateDict) -> bool:
    """Whether the names are those of torchvision's ResNets."""
    return {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight"} <= set(state_dict)


@register_converter("torchvision_resnet")
def convert_torchvision_resnet(state_dict: StateDict) -> dict[str, Tensor]:
    """torchvision ResNet (any depth) → names of Detectron2's ResNet, classifier left out."""
    return apply_rules(state_dict, _RULES)
