"""UPSNet's backbone (arXiv 1901.03784, section 3.1): caffe-style ResNet and FPN with global context.

"Caffe-style" is Detectron2's ``MODEL.RESNETS.STRIDE_IN_1X1``: the stride of res3 to res5 lies in each
stage's first 1x1 convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.layers.deform_conv import DeformConv
from d2ext.modeling.resnet_dcn import build_deformable_resnet


class GlobalContextFPN(FPN):
    """Detectron2's FPN with global context: a linear layer of the globally pooled coarsest feature is
    added to that feature's lateral map, before the top-down path and the output convolution."""

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
    """ResNet of ``MODEL.RESNETS`` (deformable by ``DEFORM_ON_PER_STAGE``) with the FPN of
    ``MODEL.FPN``, with global context if ``MODEL.UPSNET.GLOBAL_CONTEXT``."""
    fpn = cfg.MODEL.FPN
    bottom_up = build_deformable_resnet(cfg, input_shape, partial(DeformConv, bias=False))
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
    "GlobalContextFPN",
    "build_upsnet_fpn_backbone",
]
