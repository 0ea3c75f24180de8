"""Between the pyramid and the predictor: the decoder, and the heads on pooled regions.

Parameters are called what Detectron2's DensePose checkpoints call them.

Letters: R regions, C channels, s side of a pooled region.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from fvcore.common.registry import Registry
from fvcore.nn import weight_init
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.modeling.unet import UNet

DENSEPOSE_HEAD_REGISTRY = Registry("DENSEPOSE_HEAD")
DENSEPOSE_HEAD_REGISTRY.__doc__ = """
Heads: ``head(in_channels, num_convs=, channels=, kernel=)`` maps pooled features (R, C, s, s) to
(R, channels, s, s).
"""

# Dilations of the 3x3 convolutions of the pyramid pooling. 56 is more than the side of a pooled region,
# so that only the middle of that kernel ever sees anything (published).
_DILATIONS = (6, 12, 56)
_ASPP_CHANNELS = 256
_GROUPS = 32


def he_init(module: nn.Module) -> None:
    """He-normal weights by fan-out, zero biases: how the published heads begin."""
    for name, value in module.named_parameters():
        if name.endswith("weight"):
            nn.init.kaiming_normal_(value, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.zeros_(value)


class DensePoseDecoder(nn.Module):
    """A pyramid → one map at the stride of its finest level.

    Each level goes through convolutions and bilinear upsamplings by two until it is there; the sum of
    all through a 1x1 convolution.
    """

    def __init__(
        self, input_shape: Mapping[str, ShapeSpec], *, channels: int, norm: str = ""
    ) -> None:
        """Args:
        input_shape: the levels, finest first.
        channels: of the convolutions and of the result.
        norm: of the convolutions but the last, as in :func:`detectron2.layers.get_norm`.
        """
        super().__init__()
        self.in_features = list(input_shape)
        self.stride = input_shape[self.in_features[0]].stride
        for name, shape in input_shape.items():
            ups = int(math.log2(shape.stride // self.stride))
            layers: list[nn.Module] = []
            for i in range(max(1, ups)):
                conv = Conv2d(
                    shape.channels if i == 0 else channels,
                    channels,
                    kernel_size=3,
                    padding=1,
                    bias=not norm,
                    norm=get_norm(norm, channels),
                    activation=F.relu,
                )
                weight_init.c2_msra_fill(conv)
                layers.append(conv)
                if i < ups:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.add_module(name, nn.Sequential(*layers))
        self.predictor = Conv2d(channels, channels, kernel_size=1)
        weight_init.c2_msra_fill(self.predictor)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Maps of the levels, finest first → (B, C, H, W)."""
        levels = zip(self.in_features, features, strict=True)
        return self.predictor(sum(getattr(self, name)(x) for name, x in levels))


class _ConvStack(nn.Module):
    """``body_conv_fcn1``, ...: convolutions of one size, each with ReLU."""

    def _add_convs(
        self, in_channels: int, num_convs: int, channels: int, kernel: int, norm: str
    ) -> None:
        self.num_convs = num_convs
        for i in range(num_convs):
            conv = Conv2d(
                in_channels if i == 0 else channels,
                channels,
                kernel_size=kernel,
                padding=kernel // 2,
                bias=not norm,
                norm=get_norm(norm, channels),
                activation=F.relu,
            )
            self.add_module(f"body_conv_fcn{i + 1}", conv)

    def _convs(self) -> list[nn.Module]:
        return [getattr(self, f"body_conv_fcn{i + 1}") for i in range(self.num_convs)]

    def forward(self, x: Tensor) -> Tensor:
        for conv in self._convs():
            x = conv(x)
        return x


@DENSEPOSE_HEAD_REGISTRY.register()
class DensePoseV1ConvXHead(_ConvStack):
    """Plain convolutions."""

    def __init__(self, in_channels: int, *, num_convs: int, channels: int, kernel: int) -> None:
        super().__init__()
        self._add_convs(in_channels, num_convs, channels, kernel, norm="")
        he_init(self)


@DENSEPOSE_HEAD_REGISTRY.register()
class DensePoseDeepLabHead(_ConvStack):
    """Atrous spatial pyramid pooling, then convolutions with group normalisation."""

    def __init__(self, in_channels: int, *, num_convs: int, channels: int, kernel: int) -> None:
        super().__init__()
        self.ASPP = ASPP(in_channels)
        self._add_convs(_ASPP_CHANNELS, num_convs, channels, kernel, norm="GN")
        for conv in self._convs():
            weight_init.c2_msra_fill(conv)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.ASPP(x))


@DENSEPOSE_HEAD_REGISTRY.register()
class DensePoseUNetHead(UNet):
    """A U-Net on each region, for those that are pooled from the image itself: (R, 3, s, s) →
    (R, channels, s/4, s/4).

    Not published; for small models that learn from random weights. ``num_convs`` is the number of its
    levels, the first of which has half of ``channels``, each other one twice as many as the one before:
    s is a multiple of 2^num_convs.
    """

    def __init__(self, in_channels: int, *, num_convs: int, channels: int, kernel: int) -> None:
        widths = [channels // 2 * 2**i for i in range(num_convs)]
        super().__init__(in_channels, widths, channels)


class ASPP(nn.Module):
    """DeepLab's pyramid pooling (arXiv 1706.05587), with group normalisation."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [
                _normed(nn.Conv2d(in_channels, _ASPP_CHANNELS, 1, bias=False)),
                *(
                    _normed(
                        nn.Conv2d(in_channels, _ASPP_CHANNELS, 3, padding=d, dilation=d, bias=False)
                    )
                    for d in _DILATIONS
                ),
                nn.Sequential(
                    nn.AdaptiveAvgPool2d(1),
                    *_normed(nn.Conv2d(in_channels, _ASPP_CHANNELS, 1, bias=False)),
                ),
            ]
        )
        # No normalisation here (published).
        joined = len(self.convs) * _ASPP_CHANNELS
        self.project = nn.Sequential(nn.Conv2d(joined, _ASPP_CHANNELS, 1, bias=False), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        maps = [conv(x) for conv in self.convs]
        maps[-1] = maps[-1].expand_as(maps[0])
        return self.project(torch.cat(maps, dim=1))


def _normed(conv: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(conv, nn.GroupNorm(_GROUPS, conv.out_channels), nn.ReLU())
