"""torchvision's ImageNet ResNets as backbones.

The result has the names of Detectron2's ResNet without a prefix; ``DetectionCheckpointer`` finds
where they belong by its name-matching heuristics.
"""

from __future__ import annotations

import re

from torch import Tensor

from d2ext.checkpoint.convert import Rule, StateDict, apply_rules, register_converter


def resnet_rules(source: str, stages: str, target: str, first_stage: int) -> tuple[Rule, ...]:
    """How the names of a ResNet in torchvision's layout become those of Detectron2's.

    Args:
        source: regular expression before the stem's names, without groups.
        stages: regular expression before a stage's number, without groups.
        target: prefix of Detectron2's names.
        first_stage: number of the first stage; Detectron2 names it after the paper, res2.
    """

    def block(match: re.Match[str]) -> str:
        return f"{target}res{int(match[1]) - first_stage + 2}.{match[2]}"

    number = rf"{stages}(\d)\.(\d+)"
    return (
        Rule(rf"{source}conv1\.weight", f"{target}stem.conv1.weight"),
        Rule(rf"{source}bn1\.(\w+)", rf"{target}stem.conv1.norm.\1"),
        Rule(rf"{number}\.(conv\d)\.weight", lambda m: f"{block(m)}.{m[3]}.weight"),
        Rule(rf"{number}\.bn(\d)\.(\w+)", lambda m: f"{block(m)}.conv{m[3]}.norm.{m[4]}"),
        Rule(rf"{number}\.downsample\.0\.weight", lambda m: f"{block(m)}.shortcut.weight"),
        Rule(rf"{number}\.downsample\.1\.(\w+)", lambda m: f"{block(m)}.shortcut.norm.{m[3]}"),
    )


_RULES = (
    *resnet_rules("", "layer", "", first_stage=1),
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
