"""ResNet (arXiv 1512.03385) with deformable convolutions (arXiv 1703.06211, 1811.11168) in its blocks.

Detectron2's own deformable blocks need its compiled part; these need torchvision only.
"""

from __future__ import annotations

from collections.abc import Callable

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.resnet import ResNet, build_resnet_backbone
from torch import nn

from d2ext.config import CONFIG_REGISTRY
from d2ext.layers.deform_conv import ModulatedDeformConv


@CONFIG_REGISTRY.register()
def add_resnet_dcn_config(cfg: CfgNode) -> None:
    """Add the keys of :func:`build_deformable_resnet` to ``cfg``, in place."""
    # Within a stage that DEFORM_ON_PER_STAGE selects, block i is deformable iff i mod this is 0.
    cfg.MODEL.RESNETS.DEFORM_INTERVAL = 1


def build_deformable_resnet(
    cfg: CfgNode, input_shape: ShapeSpec, conv: Callable[..., nn.Module]
) -> ResNet:
    """Detectron2's ResNet from ``cfg.MODEL.RESNETS`` with some 3x3 convolutions replaced.

    Args:
        conv: (in_channels, out_channels, stride, norm) → a deformable 3x3 convolution, for the blocks
            that ``DEFORM_ON_PER_STAGE`` and ``DEFORM_INTERVAL`` select.
    """
    resnets = cfg.MODEL.RESNETS
    if resnets.DEFORM_INTERVAL < 1:
        raise ValueError(
            f"MODEL.RESNETS.DEFORM_INTERVAL must be positive, not {resnets.DEFORM_INTERVAL}."
        )
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False] * 4
    resnet = build_resnet_backbone(plain, input_shape)
    for stage, deform in zip(resnet.stages, resnets.DEFORM_ON_PER_STAGE, strict=False):
        for block in stage[:: resnets.DEFORM_INTERVAL] if deform else ():
            old = block.conv2
            block.conv2 = conv(
                old.in_channels, old.out_channels, stride=old.stride[0], norm=old.norm
            )
    return resnet.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)


@BACKBONE_REGISTRY.register()
def build_resnet_dcn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """ResNet with :class:`ModulatedDeformConv`, which has a bias although a norm follows, as in
    published checkpoints."""
    return build_deformable_resnet(cfg, input_shape, ModulatedDeformConv)
