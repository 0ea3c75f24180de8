"""UPSNet's backbone (arXiv 1901.03784, section 3.1): caffe-style ResNet and FPN with global context.

"Caffe-style" is Detectron2's ``MODEL.RESNETS.STRIDE_IN_1X1``: the stride of res3 to res5 lies in each
stage's first 1x1 convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.modeling.backbone.resnet import (
    BasicStem,
    BottleneckBlock,
    ResNet,
    build_resnet_backbone,
)
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.layers.deform_conv import DeformConv

# Blocks of the stages res2..res5, table 1 of arXiv 1512.03385.
_BLOCKS_PER_STAGE = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class DeformBottleneck(BottleneckBlock):
    """Detectron2's bottleneck with a deformable convolution (v1, without bias) as its 3x3."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bottleneck_channels: int,
        stride: int,
        stride_in_1x1: bool,
        norm: str,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            bottleneck_channels=bottleneck_channels,
            stride=stride,
            stride_in_1x1=stride_in_1x1,
            norm=norm,
        )
        self.conv2: nn.Module = DeformConv(
            bottleneck_channels,
            bottleneck_channels,
            stride=1 if stride_in_1x1 else stride,
            bias=False,
            norm=get_norm(norm, bottleneck_channels),
        )


def build_deform_resnet(
    *,
    depth: int,
    in_channels: int = 3,
    norm: str = "FrozenBN",
    stride_in_1x1: bool = True,
    deform_on_per_stage: Sequence[bool] = (False, True, True, True),
    out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
    freeze_at: int = 2,
) -> ResNet:
    """A bottleneck ResNet whose selected stages are deformable in every block.

    Raises:
        ValueError: ``depth`` has no bottleneck variant.
    """
    if depth not in _BLOCKS_PER_STAGE:
        raise ValueError(
            f"A deformable ResNet has depth {sorted(_BLOCKS_PER_STAGE)}, not {depth}: set "
            "MODEL.RESNETS.DEPTH, or MODEL.RESNETS.DEFORM_ON_PER_STAGE to all False."
        )
    stem = BasicStem(in_channels=in_channels, out_channels=64, norm=norm)
    stages, channels = [], 64
    for i, num_blocks in enumerate(_BLOCKS_PER_STAGE[depth]):
        width = 64 * 2**i
        block = DeformBottleneck if deform_on_per_stage[i] else BottleneckBlock
        stages.append(
            [
                block(
                    channels if j == 0 else 4 * width,
                    4 * width,
                    bottleneck_channels=width,
                    stride=2 if i > 0 and j == 0 else 1,
                    stride_in_1x1=stride_in_1x1,
                    norm=norm,
                )
                for j in range(num_blocks)
            ]
        )
        channels = 4 * width
    return ResNet(stem, stages, out_features=list(out_features)).freeze(freeze_at)


class GlobalContextFPN(FPN):
    """Detectron2's FPN; a linear layer on the globally pooled coarsest feature is added to that
    feature's lateral map, before it goes down and before its output convolution."""

    def __init__(self, bottom_up: Backbone, in_features: Sequence[str], out_channels: int) -> None:
        super().__init__(bottom_up, list(in_features), out_channels, top_block=LastLevelMaxPool())
        coarsest = bottom_up.output_shape()[in_features[-1]].channels
        self.fpn_context = nn.Linear(coarsest, out_channels)
        nn.init.normal_(self.fpn_context.weight, std=0.01)
        nn.init.zeros_(self.fpn_context.bias)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """As the base class: images (B, 3, H, W) → p2..p6."""
        bottom_up = self.bottom_up(x)
        coarsest = bottom_up[self.in_features[-1]]
        context = self.fpn_context(coarsest.mean(dim=(2, 3)))
        merged = self.lateral_convs[0](coarsest) + context[:, :, None, None]
        results = [self.output_convs[0](merged)]
        for name, lateral, output in zip(
            self.in_features[-2::-1], self.lateral_convs[1:], self.output_convs[1:], strict=True
        ):
            merged = lateral(bottom_up[name]) + F.interpolate(merged, scale_factor=2.0)
            results.insert(0, output(merged))
        results.extend(self.top_block(results[-1]))
        return dict(zip(self._out_features, results, strict=True))


@BACKBONE_REGISTRY.register()
def build_upsnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """ResNet of ``MODEL.RESNETS`` (deformable where ``DEFORM_ON_PER_STAGE`` says) with the FPN of
    ``MODEL.FPN``, with global context if ``MODEL.UPSNET.GLOBAL_CONTEXT``."""
    resnet, fpn = cfg.MODEL.RESNETS, cfg.MODEL.FPN
    if any(resnet.DEFORM_ON_PER_STAGE):
        bottom_up = build_deform_resnet(
            depth=resnet.DEPTH,
            in_channels=input_shape.channels,
            norm=resnet.NORM,
            stride_in_1x1=resnet.STRIDE_IN_1X1,
            deform_on_per_stage=resnet.DEFORM_ON_PER_STAGE,
            out_features=resnet.OUT_FEATURES,
            freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        )
    else:
        bottom_up = build_resnet_backbone(cfg, input_shape)
    if cfg.MODEL.UPSNET.GLOBAL_CONTEXT:
        if fpn.NORM or fpn.FUSE_TYPE != "sum":
            raise ValueError(
                "MODEL.UPSNET.GLOBAL_CONTEXT goes with MODEL.FPN.NORM: '' and FUSE_TYPE: 'sum'."
            )
        return GlobalContextFPN(bottom_up, fpn.IN_FEATURES, fpn.OUT_CHANNELS)
    return FPN(
        bottom_up,
        fpn.IN_FEATURES,
        fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=fpn.FUSE_TYPE,
    )


__all__ = [
    "DeformBottleneck",
    "GlobalContextFPN",
    "build_deform_resnet",
    "build_upsnet_fpn_backbone",
]
