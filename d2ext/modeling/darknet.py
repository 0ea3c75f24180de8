"""Darknet-53, the backbone of YOLOv3 (arXiv 1804.02767), as YOLACT uses it.

Shapes: input (B, 3, H, W); output ``dark{s}`` (B, C_s, H/2^s, W/2^s) for s = 1..5.
"""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.config import CONFIG_REGISTRY

# Residual blocks per stage (yolact/NOTES.md §2).
_BLOCKS_PER_STAGE = (1, 2, 8, 8, 4)
_STEM_CHANNELS = 32
# Slope of the activation for negative inputs (yolact/NOTES.md §2).
_NEGATIVE_SLOPE = 0.1


def _leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, _NEGATIVE_SLOPE, inplace=True)


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int, norm: str) -> Conv2d:
    """Convolution without bias, norm, leaky ReLU."""
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel,
        stride=stride,
        padding=kernel // 2,
        bias=False,
        norm=get_norm(norm, out_channels),
        activation=_leaky_relu,
    )
    nn.init.kaiming_normal_(conv.weight, a=_NEGATIVE_SLOPE, mode="fan_out")
    return conv


class DarknetBlock(nn.Module):
    """1x1 to half the width, 3x3 back, addition; no activation after the addition."""

    def __init__(self, channels: int, norm: str) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels // 2, 1, 1, norm)
        self.conv2 = _conv(channels // 2, channels, 3, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) → the same shape."""
        return x + self.conv2(self.conv1(x))


class Darknet53(Backbone):
    """Darknet-53.

    Args:
        in_channels: channels of the image.
        norm: norm after every convolution, a name that Detectron2's ``get_norm`` knows.
        out_features: which of ``dark1``..``dark5`` to return.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        norm: str = "BN",
        out_features: Sequence[str] = ("dark3", "dark4", "dark5"),
    ) -> None:
        super().__init__()
        self.stem = _conv(in_channels, _STEM_CHANNELS, 3, 1, norm)
        self._stage_names: list[str] = []
        self._out_feature_channels: dict[str, int] = {}
        self._out_feature_strides: dict[str, int] = {}
        channels = _STEM_CHANNELS
        for i, num_blocks in enumerate(_BLOCKS_PER_STAGE, start=1):
            name = f"dark{i}"
            blocks = [DarknetBlock(2 * channels, norm) for _ in range(num_blocks)]
            self.add_module(name, nn.Sequential(_conv(channels, 2 * channels, 3, 2, norm), *blocks))
            channels *= 2
            self._stage_names.append(name)
            self._out_feature_channels[name] = channels
            self._out_feature_strides[name] = 2**i
        unknown = set(out_features) - set(self._stage_names)
        if unknown:
            raise ValueError(f"Darknet-53 has no feature {sorted(unknown)}: {self._stage_names}.")
        self._out_features = list(out_features)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) → the features named in ``out_features``."""
        outputs = {}
        x = self.stem(x)
        for name in self._stage_names:
            x = getattr(self, name)(x)
            if name in self._out_features:
                outputs[name] = x
        return outputs


@CONFIG_REGISTRY.register()
def add_darknet_config(cfg: CfgNode) -> None:
    """Add the keys of :func:`build_darknet53_backbone` to ``cfg``, in place."""
    cfg.MODEL.DARKNET = CfgNode()
    # Norm after every convolution.
    cfg.MODEL.DARKNET.NORM = "BN"
    # Stages to return; dark3..dark5 have strides 8, 16, 32 and 256, 512, 1024 channels.
    cfg.MODEL.DARKNET.OUT_FEATURES = ["dark3", "dark4", "dark5"]


@BACKBONE_REGISTRY.register()
def build_darknet53_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Darknet53:
    """:class:`Darknet53` from ``cfg.MODEL.DARKNET``."""
    return Darknet53(
        in_channels=input_shape.channels,
        norm=cfg.MODEL.DARKNET.NORM,
        out_features=cfg.MODEL.DARKNET.OUT_FEATURES,
    )
