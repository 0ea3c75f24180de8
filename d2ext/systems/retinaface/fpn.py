"""RetinaFace's feature pyramid (arXiv 1905.00641, section 3.2; retinaface/NOTES.md).

Differences from Detectron2's FPN: every convolution has a norm and a (leaky) ReLU; the sum of a
lateral map and the coarser level passes its 3x3 convolution before it is upsampled further; the
coarsest level has none; the top-down path resizes to the exact size of the finer map, so any input size
works.

Shapes: image (B, 3, H, W); p{l} (B, C, h_l, w_l) with sides of ceil(H / 2^l), ceil(W / 2^l).
"""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.layers.deform_conv import ModulatedDeformConv
from d2ext.modeling.fusion import conv_norm, conv_relu

# Widest pyramid with leaky ReLUs, and their slope (published).
_LEAKY_CHANNELS = 64
_SLOPE = 0.1


def slope(channels: int) -> float:
    """Slope below zero of the activations of a pyramid with this many channels."""
    return _SLOPE if channels <= _LEAKY_CHANNELS else 0.0


def conv3x3(in_channels: int, out_channels: int, norm: str, *, deformable: bool) -> nn.Module:
    """3x3 convolution without bias and its norm."""
    if deformable:
        return ModulatedDeformConv(
            in_channels, out_channels, bias=not norm, norm=get_norm(norm, out_channels)
        )
    return conv_norm(in_channels, out_channels, 3, norm=norm)


def conv_leaky(conv: nn.Module, x: Tensor, negative_slope: float) -> Tensor:
    """Leaky ReLU of conv(x)."""
    if negative_slope == 0:
        return conv_relu(conv, x)
    return F.leaky_relu_(conv(x), negative_slope)


class RetinaFaceFPN(Backbone):
    """Feature pyramid with a merging convolution after each top-down sum.

    Args:
        bottom_up: network that computes ``in_features``.
        in_features: features of ``bottom_up``, finest first; their strides must double.
        out_channels: channels of every level.
        num_extra_levels: levels added by 3x3 convolutions of stride 2, the first on the coarsest
            feature.
        norm: norm after every convolution, a name that Detectron2's ``get_norm`` knows.
        deformable: the merging convolutions are deformable.
    """

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str],
        *,
        out_channels: int = 64,
        num_extra_levels: int = 0,
        norm: str = "BN",
        deformable: bool = False,
    ) -> None:
        super().__init__()
        self.bottom_up = bottom_up
        self.in_features = list(in_features)
        shapes = bottom_up.output_shape()
        missing = [name for name in in_features if name not in shapes]
        if missing or not in_features:
            raise ValueError(
                f"MODEL.RETINAFACE.IN_FEATURES is {list(in_features)} and the bottom-up net has "
                f"{sorted(shapes)}: set this key and the net's OUT_FEATURES to agree."
            )
        # log2(stride) names the level, as in Detectron2.
        self.levels = [shapes[name].stride.bit_length() - 1 for name in in_features]
        top = self.levels[-1]
        if self.levels != list(range(self.levels[0], top + 1)):
            raise ValueError(
                "Strides of MODEL.RETINAFACE.IN_FEATURES must double from one to the next, not "
                f"{[shapes[name].stride for name in in_features]}."
            )
        self.slope = slope(out_channels)
        for level, name in zip(self.levels, in_features, strict=True):
            lateral = conv_norm(shapes[name].channels, out_channels, 1, norm=norm)
            self.add_module(f"lateral{level}", lateral)
            if level < top:
                merge = conv3x3(out_channels, out_channels, norm, deformable=deformable)
                self.add_module(f"output{level}", merge)
        self.extra_levels = list(range(top + 1, top + 1 + num_extra_levels))
        channels = shapes[in_features[-1]].channels
        for level in self.extra_levels:
            conv = conv_norm(channels, out_channels, 3, norm=norm, stride=2)
            self.add_module(f"downsample{level}", conv)
            channels = out_channels
        self._out_features = [f"p{level}" for level in self.levels + self.extra_levels]
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        self._out_feature_strides = {
            f"p{level}": 2**level for level in self.levels + self.extra_levels
        }

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) → {"p3": (B, C, h, w), ...}, finest first."""
        features = self.bottom_up(images)
        outputs: dict[str, Tensor] = {}
        previous: Tensor | None = None
        for level, name in zip(self.levels[::-1], self.in_features[::-1], strict=True):
            x = conv_leaky(getattr(self, f"lateral{level}"), features[name], self.slope)
            if previous is not None:
                x = x + F.interpolate(previous, x.shape[-2:], mode="nearest")
                x = conv_leaky(getattr(self, f"output{level}"), x, self.slope)
            outputs[f"p{level}"] = previous = x
        x = features[self.in_features[-1]]
        for level in self.extra_levels:
            x = conv_leaky(getattr(self, f"downsample{level}"), x, self.slope)
            outputs[f"p{level}"] = x
        return {name: outputs[name] for name in self._out_features}


@BACKBONE_REGISTRY.register()
def build_retinaface_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> RetinaFaceFPN:
    """:class:`RetinaFaceFPN` over the registered backbone ``cfg.MODEL.RETINAFACE.BOTTOM_UP``."""
    face = cfg.MODEL.RETINAFACE
    return RetinaFaceFPN(
        BACKBONE_REGISTRY.get(face.BOTTOM_UP)(cfg, input_shape),
        face.IN_FEATURES,
        out_channels=face.FPN_CHANNELS,
        num_extra_levels=face.NUM_EXTRA_LEVELS,
        norm=face.NORM,
        deformable=face.DEFORMABLE,
    )
