"""A small U-Net (arXiv 1505.04597) of plain convolutions with norms: fast on CPU cores, and quickly
trained from random weights. As a backbone it gives the image beside its features, for heads that look at
it themselves.

Letters: B images, C channels, H, W size. Width and height must be multiples of the coarsest stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.config import CONFIG_REGISTRY
from d2ext.modeling.fusion import conv_norm


@CONFIG_REGISTRY.register()
def add_unet_config(cfg: CfgNode) -> None:
    """Add the keys of :class:`UNetBackbone` to ``cfg``, in place."""
    unet = cfg.MODEL.UNET = CfgNode()
    # Channels of each level on the way down, finest first; every level halves the resolution.
    unet.CHANNELS = [16, 32, 64, 128]
    # Stride of the first convolution, and so of the finest level: 2 or 4.
    unet.STEM_STRIDE = 2
    # Channels on the way up, and of the result.
    unet.OUT_CHANNELS = 64
    # Norm, a name that Detectron2's get_norm knows.
    unet.NORM = "BN"


def _conv_relu(
    in_channels: int, out_channels: int, norm: str, kernel: int = 3, stride: int = 1
) -> Conv2d:
    conv = conv_norm(in_channels, out_channels, kernel, norm=norm, stride=stride)
    conv.activation = F.relu_
    return conv


class _Level(nn.Module):
    """A convolution that halves the resolution, and a residual block of two."""

    def __init__(self, in_channels: int, channels: int, norm: str) -> None:
        super().__init__()
        self.reduce = _conv_relu(in_channels, channels, norm, stride=2)
        self.conv1 = _conv_relu(channels, channels, norm)
        self.conv2 = conv_norm(channels, channels, 3, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.reduce(x)
        return F.relu_(x + self.conv2(self.conv1(x)))


class UNet(nn.Module):
    """(B, C, H, W) → (B, out_channels, H / stride, W / stride). The way up ends at the second level."""

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        out_channels: int,
        *,
        stem_stride: int = 2,
        norm: str = "BN",
    ) -> None:
        """Args:
        in_channels: C.
        channels: of each level on the way down, finest first.
        out_channels: of the levels on the way up, and of the result.
        stem_stride: of the finest level.
        norm: as in :func:`detectron2.layers.get_norm`.
        """
        super().__init__()
        self.stride = 2 * stem_stride
        self.size_divisibility = stem_stride * 2 ** (len(channels) - 1)
        self.stem = nn.Sequential(
            _conv_relu(
                in_channels, channels[0], norm, kernel=2 * stem_stride - 1, stride=stem_stride
            ),
            _conv_relu(channels[0], channels[0], norm),
        )
        self.down = nn.ModuleList(
            _Level(before, after, norm) for before, after in pairwise(channels)
        )
        used = channels[1:]
        self.lateral = nn.ModuleList(nn.Conv2d(c, out_channels, 1) for c in used)
        self.up = nn.ModuleList(_conv_relu(out_channels, out_channels, norm) for _ in used)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        levels = [self.stem(x)]
        for down in self.down:
            levels.append(down(levels[-1]))
        result: Tensor | None = None
        for level, lateral, up in reversed(
            list(zip(levels[1:], self.lateral, self.up, strict=True))
        ):
            level = lateral(level)
            if result is not None:
                level = level + F.interpolate(result, scale_factor=2.0, mode="nearest")
            result = up(level)
        assert result is not None
        return result


@BACKBONE_REGISTRY.register()
class UNetBackbone(Backbone):
    """A :class:`UNet`. Outputs: ``unet`` (B, OUT_CHANNELS, H/s, W/s), s = 2 STEM_STRIDE, and ``image``
    (B, C, H, W), the normalised image itself."""

    @configurable
    def __init__(self, in_channels: int, *args: Any, **options: Any) -> None:
        """Args: of :class:`UNet`."""
        super().__init__()
        self.unet = UNet(in_channels, *args, **options)
        self._out_features = ["image", "unet"]
        self._out_feature_channels = {"image": in_channels, "unet": self.unet.up[0].out_channels}
        self._out_feature_strides = {"image": 1, "unet": self.unet.stride}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        unet = cfg.MODEL.UNET
        return {
            "in_channels": input_shape.channels,
            "channels": unet.CHANNELS,
            "out_channels": unet.OUT_CHANNELS,
            "stem_stride": unet.STEM_STRIDE,
            "norm": unet.NORM,
        }

    @property
    def size_divisibility(self) -> int:
        return self.unet.size_divisibility

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, C, H, W) → ``image`` and ``unet``, see the class."""
        return {"image": images, "unet": self.unet(images)}
