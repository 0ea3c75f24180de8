"""ResNet (arXiv 1512.03385) with modulated deformable convolutions (arXiv 1811.11168) in its blocks.

Detectron2's own deformable blocks need its compiled part; these need torchvision only.
"""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock, CNNBlockBase, ResNet
from torch import nn

from d2ext.config import CONFIG_REGISTRY
from d2ext.layers.deform_conv import ModulatedDeformConv

# Blocks of the stages res2..res5, table 1 of arXiv 1512.03385.
_BLOCKS_PER_STAGE = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


@CONFIG_REGISTRY.register()
def add_resnet_dcn_config(cfg: CfgNode) -> None:
    """Add the keys of :func:`build_resnet_dcn_backbone` to ``cfg``, in place."""
    # Within a stage that DEFORM_ON_PER_STAGE selects, block i is deformable iff i mod this is 0.
    cfg.MODEL.RESNETS.DEFORM_INTERVAL = 1


class ModulatedDeformBottleneck(BottleneckBlock):
    """Detectron2's bottleneck whose 3x3 convolution is a :class:`ModulatedDeformConv`.

    The deformable convolution has a bias although a norm follows, as published checkpoints do.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int,
        norm: str,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            bottleneck_channels=bottleneck_channels,
            stride=stride,
            norm=norm,
        )
        self.conv2: nn.Module = ModulatedDeformConv(
            bottleneck_channels,
            bottleneck_channels,
            stride=stride,
            norm=get_norm(norm, bottleneck_channels),
        )


def _make_stage(
    num_blocks: int,
    in_channels: int,
    bottleneck_channels: int,
    out_channels: int,
    stride: int,
    norm: str,
    deform: bool,
    interval: int,
) -> list[CNNBlockBase]:
    blocks: list[CNNBlockBase] = []
    for i in range(num_blocks):
        block = ModulatedDeformBottleneck if deform and i % interval == 0 else BottleneckBlock
        blocks.append(
            block(
                in_channels if i == 0 else out_channels,
                out_channels,
                bottleneck_channels=bottleneck_channels,
                stride=stride if i == 0 else 1,
                norm=norm,
            )
        )
    return blocks


def build_resnet_dcn(
    *,
    depth: int,
    in_channels: int = 3,
    norm: str = "BN",
    deform_on_per_stage: Sequence[bool] = (False, True, True, True),
    deform_interval: int = 1,
    out_features: Sequence[str] = ("res3", "res4", "res5"),
    freeze_at: int = 0,
) -> ResNet:
    """Build a ResNet of torchvision's layout (stride in the 3x3) with deformable blocks.

    Raises:
        ValueError: ``depth`` has no bottleneck variant, or the interval is not positive.
    """
    if depth not in _BLOCKS_PER_STAGE:
        raise ValueError(
            f"A deformable ResNet has depth {sorted(_BLOCKS_PER_STAGE)}, not {depth}: "
            "set MODEL.RESNETS.DEPTH."
        )
    if deform_interval < 1:
        raise ValueError(f"MODEL.RESNETS.DEFORM_INTERVAL must be positive, not {deform_interval}.")
    stem = BasicStem(in_channels=in_channels, out_channels=64, norm=norm)
    stages, channels = [], 64
    for i, num_blocks in enumerate(_BLOCKS_PER_STAGE[depth]):
        width = 64 * 2**i
        stages.append(
            _make_stage(
                num_blocks,
                channels,
                width,
                4 * width,
                stride=1 if i == 0 else 2,
                norm=norm,
                deform=deform_on_per_stage[i],
                interval=deform_interval,
            )
        )
        channels = 4 * width
    return ResNet(stem, stages, out_features=list(out_features), freeze_at=freeze_at)


@BACKBONE_REGISTRY.register()
def build_resnet_dcn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """:func:`build_resnet_dcn` from ``cfg.MODEL.RESNETS`` and ``cfg.MODEL.BACKBONE.FREEZE_AT``."""
    resnet = cfg.MODEL.RESNETS
    if resnet.STRIDE_IN_1X1:
        raise ValueError(
            "build_resnet_dcn_backbone has its strides in the 3x3 convolutions: "
            "set MODEL.RESNETS.STRIDE_IN_1X1 to False."
        )
    return build_resnet_dcn(
        depth=resnet.DEPTH,
        in_channels=input_shape.channels,
        norm=resnet.NORM,
        deform_on_per_stage=resnet.DEFORM_ON_PER_STAGE,
        deform_interval=resnet.DEFORM_INTERVAL,
        out_features=resnet.OUT_FEATURES,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )


__all__ = [
    "ModulatedDeformBottleneck",
    "add_resnet_dcn_config",
    "build_resnet_dcn",
    "build_resnet_dcn_backbone",
]
