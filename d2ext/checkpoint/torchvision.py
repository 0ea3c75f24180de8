"""Trained networks as backbones: torchvision's ResNets and MobileNetV2, the MobileNetV1 x0.25 that is
published with RetinaFace, and DLA-34, all of ImageNet; and the hourglass of a detector.

The result has the names of Detectron2's ResNet, or of d2ext's networks, without a prefix;
``DetectionCheckpointer`` finds where they belong by its name-matching heuristics.
"""

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
from d2ext.checkpoint.cornernet_hourglass import add_counters, hourglass_rules


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


# Blocks of MobileNetV2's groups, from the stem on (arXiv 1801.04381, table 2); what follows serves the
# classifier.
_GROUP_BLOCKS = (1, 1, 2, 3, 4, 3, 3)
_GROUP_OF = [(g, block) for g, blocks in enumerate(_GROUP_BLOCKS) for block in range(blocks)]
_MOBILENET_RULES = (
    Rule(rf"features\.({len(_GROUP_OF)}|{len(_GROUP_OF) + 1})\..*", None),
    Rule(r"features\.(\d+)\.(.*)", lambda m: "group{}.{}.".format(*_GROUP_OF[int(m[1])]) + m[2]),
    Rule(r"classifier\..*", None),
)


def mobilenet_v1_rules(source: str, target: str) -> tuple[Rule, ...]:
    """How the names of RetinaFace's MobileNetV1 become those of d2ext's.

    Args:
        source: regular expression before ``stage1``, without groups.
        target: prefix of d2ext's names.
    """

    def leaf(index: int, name: str) -> str:
        return f"norm.{name}" if index else name

    def block(match: re.Match[str]) -> str:
        # convolutions at 0 and 3, their norms at 1 and 4
        part, index = divmod(int(match[3]), 3)
        layer = ("depthwise", "pointwise")[part]
        return f"{target}stage{match[1]}.{match[2]}.{layer}.{leaf(index, match[4])}"

    return (
        Rule(
            rf"{source}stage1\.0\.([01])\.(\w+)",
            lambda m: f"{target}stage1.0.conv.{leaf(int(m[1]), m[2])}",
        ),
        Rule(rf"{source}stage([123])\.(\d)\.([0134])\.(\w+)", block),
    )


_DLA_PARTS = {"conv1": "conv1", "bn1": "conv1.norm", "conv2": "conv2", "bn2": "conv2.norm"}


def dla_rules(state_dict: StateDict, source: str, target: str) -> tuple[Rule, ...]:
    """How the names of DLA-34 become those of d2ext's.

    Args:
        state_dict: published names.
        source: before ``base_layer``.
        target: prefix of d2ext's names.
    """
    start = re.escape(source)
    tree = rf"{start}level(\d)\.((?:tree[12]\.)?)"
    two_levels = {
        m[1] for k in state_dict if (m := re.match(rf"{start}level(\d)\.tree1\.tree1\.", k))
    }

    def node(match: re.Match[str]) -> str:
        """Prefix of a tree's names: ``level3.tree1.``, or ``level2.`` if it has only one level."""
        return f"{target}level{match[1]}.{match[2]}"

    def conv_or_norm(part: str, leaf: str) -> str:
        """Leaf of a convolution (part 0 or ``conv``) or of its norm (1 or ``bn``)."""
        return leaf if part in ("0", "conv") else f"norm.{leaf}"

    return (
        # the ImageNet classifier
        Rule(rf"{start}fc\.(weight|bias)", None),
        # projections of two-level trees, which the published network computes but never uses
        Rule(rf"{start}level[{''.join(sorted(two_levels)) or 'x'}]\.project\..*", None),
        Rule(
            rf"{start}base_layer\.([01])\.(\w+)",
            lambda m: f"{target}stem.{conv_or_norm(m[1], m[2])}",
        ),
        Rule(
            rf"{start}level([01])\.([01])\.(\w+)",
            lambda m: f"{target}level{m[1]}.{conv_or_norm(m[2], m[3])}",
        ),
        Rule(
            rf"{tree}tree([12])\.(conv1|bn1|conv2|bn2)\.(\w+)",
            lambda m: f"{node(m)}block{m[3]}.{_DLA_PARTS[m[4]]}.{m[5]}",
        ),
        Rule(
            rf"{tree}root\.(conv|bn)\.(\w+)", lambda m: f"{node(m)}root.{conv_or_norm(m[3], m[4])}"
        ),
        Rule(
            rf"{tree}project\.([01])\.(\w+)",
            lambda m: f"{node(m)}project.{conv_or_norm(m[3], m[4])}",
        ),
    )


_MOBILENET_V1_RULES = (
    *mobilenet_v1_rules("", ""),
    # the ImageNet classifier
    Rule(r"fc\.(weight|bias)", None),
)
# Converter → a name that tells its checkpoints, and the modules that these have: whole models, such as
# CenterNet's on a ResNet, have others beside them.
_MARKS = {
    "torchvision_resnet": ("layer1.0.conv1.weight", r"conv1|bn1|layer[1-4]|fc"),
    "torchvision_mobilenetv2": ("features.1.conv.1.weight", r"features|classifier"),
    "mobilenet_v1": ("stage3.1.3.weight", r"stage[1-3]|fc"),
    "dla": ("level5.tree1.conv1.weight", r"base_layer|level[0-5]|fc"),
}
# Converters whose result is a backbone.
BACKBONE_SYSTEMS = (*_MARKS, "cornernet_hourglass")


def torchvision_backbone(state_dict: StateDict) -> str:
    """The converter for one of these backbones, told by its names; "" for anything else."""
    modules = {name.split(".")[0] for name in state_dict}
    for system, (mark, own) in _MARKS.items():
        if mark in state_dict and all(re.fullmatch(own, x) for x in modules):
            return system
    return ""


@register_converter("mobilenet_v1")
def convert_mobilenet_v1(state_dict: StateDict) -> dict[str, Tensor]:
    """MobileNetV1 x0.25 published with RetinaFace → names of d2ext's, classifier left out."""
    return apply_rules(state_dict, _MOBILENET_V1_RULES)


@register_converter("dla")
def convert_dla(state_dict: StateDict) -> dict[str, Tensor]:
    """DLA-34 trained on ImageNet, with the names that CenterNet's files have below ``base`` → names of
    d2ext's; the classifier, and two projections that are never used, are left out."""
    return apply_rules(state_dict, dla_rules(state_dict, "", ""))


@register_converter("cornernet_hourglass")
def convert_cornernet_hourglass(state_dict: StateDict) -> dict[str, Tensor]:
    """The hourglass of a CornerNet, of either CenterNet, or of ExtremeNet, from whose weights the
    published CenterNet begins → names of d2ext's; all else, which is the heads, is left out.

    Raises:
        ConversionError: there is no such hourglass.
    """
    parts = ("pre.", "kps.", "cnvs.", "cnvs_.", "inters.", "inters_.")
    hourglass = {name: value for name, value in state_dict.items() if name.startswith(parts)}
    if "pre.0.conv.weight" not in hourglass:
        raise ConversionError(
            'A checkpoint with CornerNet\'s hourglass has "pre.0.conv.weight"; this one has not.'
        )
    return add_counters(apply_rules(hourglass, hourglass_rules(target="")))


@register_converter("torchvision_mobilenetv2")
def convert_torchvision_mobilenetv2(state_dict: StateDict) -> dict[str, Tensor]:
    """torchvision MobileNetV2 (width 1) → names of d2ext's, classifier left out."""
    return apply_rules(state_dict, _MOBILENET_RULES)


@register_converter("torchvision_resnet")
def convert_torchvision_resnet(state_dict: StateDict) -> dict[str, Tensor]:
    """torchvision ResNet (any depth) → names of Detectron2's ResNet, classifier left out."""
    return apply_rules(state_dict, _RULES)
