"""ResNet with transposed convolutions back to stride 4 (arXiv 1804.06208), as CenterNet extends it
with deformable convolutions (arXiv 1904.07850, section 5).

Shapes: input (B, 3, H, W), H and W multiples of 32; output ``deconv`` (B, C, H/4, W/4).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.resnet import build_resnet_backbone
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.config import CONFIG_REGISTRY
from d2ext.modeling.upsampling import DeformConvNormReLU, upsampling


class DeconvStage(nn.Module):
    """(Deformable) convolution to the new width, and a transposed one that doubles the resolution."""

    def __init__(self, in_channels: int, out_channels: int, *, deform: bool, norm: str) -> None:
        super().__init__()
        if deform:
            self.reduce: nn.Module | None = DeformConvNormReLU(in_channels, out_channels, norm=norm)
            self.up = upsampling(out_channels, 2, depthwise=False)
        else:
            # Published: the transposed convolution changes the width itself.
            self.reduce = None
            self.up = nn.ConvTranspose2d(
                in_channels, out_channels, 4, stride=2, padding=1, bias=False
            )
            nn.init.normal_(self.up.weight, std=0.001)
        # Not called `norm`, so that fold_norms does not take it for the norm of a convolution.
        self.up_norm = get_norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, h, w) → (B, out, 2h, 2w), not negative."""
        if self.reduce is not None:
            x = self.reduce(x)
        return F.relu(self.up_norm(self.up(x)))


class ResNetDeconv(Backbone):
    """A bottom-up net and stages that double the resolution of its coarsest feature.

    Args:
        bottom_up: network that computes ``in_feature``.
        in_feature: its feature to start from.
        channels: of each stage.
        deform: put a deformable convolution before each transposed one.
        norm: of the stages, a name that Detectron2's ``get_norm`` knows.
    """

    def __init__(
        self,
        bottom_up: Backbone,
        *,
        in_feature: str = "res5",
        channels: Sequence[int] = (256, 128, 64),
        deform: bool = True,
        norm: str = "BN",
    ) -> None:
        super().__init__()
        shapes = bottom_up.output_shape()
        if in_feature not in shapes:
            raise ValueError(
                f"The bottom-up net has no feature {in_feature}, only {sorted(shapes)}: set "
                "MODEL.DECONV.IN_FEATURE and the bottom-up net's OUT_FEATURES to agree."
            )
        if not channels:
            raise ValueError("MODEL.DECONV.CHANNELS needs one number for each stage.")
        self.bottom_up = bottom_up
        self.in_feature = in_feature
        widths = [shapes[in_feature].channels, *channels]
        self.stages = nn.ModuleList(
            DeconvStage(i, o, deform=deform, norm=norm) for i, o in pairwise(widths)
        )
        self.coarsest_stride = shapes[in_feature].stride
        self._out_features = ["deconv"]
        self._out_feature_channels = {"deconv": widths[-1]}
        self._out_feature_strides = {"deconv": self.coarsest_stride // 2 ** len(channels)}

    @property
    def size_divisibility(self) -> int:
        """Image sides are multiples of this: the coarsest map is enlarged by powers of 2."""
        return self.coarsest_stride

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) → {"deconv": (B, C, H/4, W/4)}."""
        x = self.bottom_up(x)[self.in_feature]
        for stage in self.stages:
            x = stage(x)
        return {"deconv": x}


@CONFIG_REGISTRY.register()
def add_resnet_deconv_config(cfg: CfgNode) -> None:
    """Add the keys of :func:`build_resnet_deconv_backbone` to ``cfg``, in place."""
    deconv = cfg.MODEL.DECONV = CfgNode()
    # Feature of the ResNet (MODEL.RESNETS) to start from.
    deconv.IN_FEATURE = "res5"
    # Channels of each stage; a stage doubles the resolution. Without deformable convolutions the
    # published net has 256, 256, 256.
    deconv.CHANNELS = [256, 128, 64]
    # A modulated deformable convolution before each transposed one.
    deconv.DEFORM = True
    # Norm after every convolution of the stages.
    deconv.NORM = "BN"


@BACKBONE_REGISTRY.register()
def build_resnet_deconv_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNetDeconv:
    """:class:`ResNetDeconv` on Detectron2's ResNet: ``cfg.MODEL.RESNETS``, ``cfg.MODEL.DECONV``."""
    deconv = cfg.MODEL.DECONV
    return ResNetDeconv(
        build_resnet_backbone(cfg, input_shape),
        in_feature=deconv.IN_FEATURE,
        channels=deconv.CHANNELS,
        deform=deconv.DEFORM,
        norm=deconv.NORM,
    )
