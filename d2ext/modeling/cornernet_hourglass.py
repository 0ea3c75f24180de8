"""The stacked hourglass of CornerNet (arXiv 1808.01244, section 3.5; CornerNet-Lite, arXiv 1904.08900).

Unlike Newell's, it downsamples with strided convolutions instead of pooling, and widens towards the
bottom. With residual blocks it is hourglass-104 (two stacks), -52 (one) or -54 (three shallow ones,
CornerNet-Saccade); with fire modules it is CornerNet-Squeeze's.

Shapes: input (B, 3, H, W); s stride of the stem (4 or 8), n reductions in a stack, C channels of the
output; every output ``stack{i}`` is (B, C, H/s, W/s), sizes rounded up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.config import CONFIG_REGISTRY
from d2ext.modeling.fusion import conv_add_relu, conv_norm, conv_relu


class ConvNormReLU(nn.Module):
    """k×k convolution, norm, ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, norm: str, stride: int = 1
    ) -> None:
        super().__init__()
        self.conv = conv_norm(in_channels, out_channels, kernel, norm=norm, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return conv_relu(self.conv, x)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions and a skip, which is 1×1 where stride or width change."""

    def __init__(self, in_channels: int, out_channels: int, *, norm: str, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv_norm(in_channels, out_channels, 3, norm=norm, stride=stride)
        self.conv2 = conv_norm(out_channels, out_channels, 3, norm=norm)
        self.skip = (
            None
            if stride == 1 and in_channels == out_channels
            else conv_norm(in_channels, out_channels, 1, norm=norm, stride=stride)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, h, w) → (B, out, h/stride, w/stride), not negative."""
        other = x if self.skip is None else self.skip(x)
        return conv_add_relu(self.conv2, conv_relu(self.conv1, x), other)


class FireBlock(nn.Module):
    """Block of CornerNet-Squeeze: 1×1 squeeze, then 1×1 and depth-wise 3×3 side by side.

    Published quirks: no ReLU after the squeeze, and no projection, so that only blocks with equal
    input and output shapes have a skip. The published norm over both halves is split into one for each
    half, which is equivalent.
    """

    def __init__(self, in_channels: int, out_channels: int, *, norm: str, stride: int = 1) -> None:
        super().__init__()
        if out_channels % 2:
            raise ValueError(f"A fire module has an even number of channels, not {out_channels}.")
        half = out_channels // 2
        self.squeeze = conv_norm(in_channels, half, 1, norm=norm)
        self.expand1x1 = conv_norm(half, half, 1, norm=norm, stride=stride)
        self.expand3x3 = conv_norm(half, half, 3, norm=norm, stride=stride, groups=half)
        self.has_skip = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, h, w) → (B, out, h/stride, w/stride), not negative."""
        squeezed = self.squeeze(x)
        y = torch.cat([self.expand1x1(squeezed), self.expand3x3(squeezed)], dim=1)
        return F.relu(y + x if self.has_skip else y)


Block = Callable[..., nn.Module]
BLOCKS: dict[str, Block] = {"residual": ResidualBlock, "fire": FireBlock}


def _upsample(block: str, channels: int) -> nn.Module:
    """Up-sampling by 2: transposed convolutions among fire modules, nearest elsewhere."""
    if block == "fire":
        return nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1)
    return nn.Upsample(scale_factor=2.0, mode="nearest")


class HourglassLevel(nn.Module):
    """One level of an hourglass and, inside it, all deeper ones.

    Args:
        channels: of this level, the next, ... and the bottom.
        blocks: number of blocks at each of them.
        block: "residual" or "fire".
        norm: see :class:`CornerNetHourglass`.
    """

    def __init__(
        self, channels: Sequence[int], blocks: Sequence[int], *, block: str, norm: str
    ) -> None:
        super().__init__()
        make = BLOCKS[block]
        here, below = channels[0], channels[1]
        count = blocks[0]
        self.up = nn.Sequential(*(make(here, here, norm=norm) for _ in range(count)))
        self.down = nn.Sequential(
            make(here, below, norm=norm, stride=2),
            *(make(below, below, norm=norm) for _ in range(count - 1)),
        )
        self.inner: nn.Module
        if len(channels) > 2:
            self.inner = HourglassLevel(channels[1:], blocks[1:], block=block, norm=norm)
        else:
            self.inner = nn.Sequential(*(make(below, below, norm=norm) for _ in range(blocks[1])))
        self.out = nn.Sequential(
            *(make(below, below, norm=norm) for _ in range(count - 1)),
            make(below, here, norm=norm),
        )
        self.upsample = _upsample(block, here)

    def forward(self, x: Tensor, levels: list[Tensor] | None = None) -> Tensor:
        """(B, c, h, w) → the same shape.

        Args:
            levels: a list that gets the result of every level, the deepest (smallest) first.
        """
        low = self.down(x)
        low = self.inner(low, levels) if isinstance(self.inner, HourglassLevel) else self.inner(low)
        merged = self.up(x) + self.upsample(self.out(low))
        if levels is not None:
            levels.append(merged)
        return merged


class CornerNetHourglass(Backbone):
    """CornerNet's stacked hourglass with intermediate outputs.

    Args:
        in_channels: of the image.
        num_stacks: number of hourglasses, one after the other.
        channels: at each level of an hourglass, n + 1 numbers; the first is the stem's output.
        blocks: at each level, n + 1 numbers.
        block: "residual" or "fire".
        stem_channels: of the 7×7 convolution.
        stem_blocks: residual blocks of stride 2 in the stem; its stride is 2 to the 1 + this.
        out_channels: C, of every stack's output.
        norm: after every convolution, a name that Detectron2's ``get_norm`` knows.
        out_levels: also return the merged maps of each level of each stack as
            ``stack{i}_s{stride}`` (CornerNet-Saccade looks for objects there).
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        num_stacks: int = 2,
        channels: Sequence[int] = (256, 256, 384, 384, 384, 512),
        blocks: Sequence[int] = (2, 2, 2, 2, 2, 4),
        block: str = "residual",
        stem_channels: int = 128,
        stem_blocks: int = 1,
        out_channels: int = 256,
        norm: str = "BN",
        out_levels: bool = False,
    ) -> None:
        super().__init__()
        if block not in BLOCKS:
            raise ValueError(
                f'MODEL.CORNERNET_HOURGLASS.BLOCK is one of {sorted(BLOCKS)}, not "{block}".'
            )
        if len(channels) != len(blocks) or len(channels) < 2 or min(blocks) < 1:
            raise ValueError(
                "MODEL.CORNERNET_HOURGLASS.CHANNELS and BLOCKS have one entry for each level and one "
                f"for the bottom, at least two; blocks are 1 or more: not {channels} and {blocks}."
            )
        if num_stacks < 1 or stem_blocks < 1:
            raise ValueError(
                "MODEL.CORNERNET_HOURGLASS.NUM_STACKS and STEM_BLOCKS are at least 1, not "
                f"{num_stacks} and {stem_blocks}."
            )
        width = channels[0]
        stem_widths = [stem_channels] + [width] * stem_blocks
        self.stem = nn.Sequential(
            ConvNormReLU(in_channels, stem_channels, 7, norm=norm, stride=2),
            *(ResidualBlock(i, o, norm=norm, stride=2) for i, o in pairwise(stem_widths)),
        )
        self.stacks = nn.ModuleList(
            HourglassLevel(channels, blocks, block=block, norm=norm) for _ in range(num_stacks)
        )
        self.convs = nn.ModuleList(
            ConvNormReLU(width, out_channels, 3, norm=norm) for _ in range(num_stacks)
        )
        links = range(num_stacks - 1)
        self.link_inputs = nn.ModuleList(conv_norm(width, width, 1, norm=norm) for _ in links)
        self.link_outputs = nn.ModuleList(
            conv_norm(out_channels, width, 1, norm=norm) for _ in links
        )
        self.links = nn.ModuleList(ResidualBlock(width, width, norm=norm) for _ in links)

        self.depth = len(channels) - 1
        self.stride = 2 ** (1 + stem_blocks)
        self.out_levels = out_levels
        self._out_features: list[str] = []
        self._out_feature_channels: dict[str, int] = {}
        self._out_feature_strides: dict[str, int] = {}
        for i in range(1, num_stacks + 1):
            self._add_feature(f"stack{i}", out_channels, self.stride)
            if out_levels:
                for level in reversed(range(self.depth)):
                    stride = self.stride * 2**level
                    self._add_feature(f"stack{i}_s{stride}", channels[level], stride)

    def _add_feature(self, name: str, channels: int, stride: int) -> None:
        self._out_features.append(name)
        self._out_feature_channels[name] = channels
        self._out_feature_strides[name] = stride

    @property
    def size_divisibility(self) -> int:
        """Image sides are a multiple of this, or one less, as in the published models."""
        return self.stride * 2**self.depth

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) → ``stack1``, ``stack2``, ... and, with ``out_levels``, the levels.

        Raises:
            ValueError: H or W does not fit :attr:`size_divisibility`.
        """
        unit = self.size_divisibility
        if any(size % unit not in (0, unit - 1) or size == 0 for size in x.shape[-2:]):
            raise ValueError(
                f"The hourglass takes images whose sides are a multiple of {unit}, or one less; "
                f"not {tuple(x.shape[-2:])}. Pad them."
            )
        outputs: dict[str, Tensor] = {}
        x = self.stem(x)
        for i, (stack, conv) in enumerate(zip(self.stacks, self.convs, strict=True)):
            levels: list[Tensor] | None = [] if self.out_levels else None
            out = conv(stack(x, levels))
            outputs[f"stack{i + 1}"] = out
            for depth, level in zip(reversed(range(self.depth)), levels or (), strict=False):
                outputs[f"stack{i + 1}_s{self.stride * 2**depth}"] = level
            if i < len(self.links):
                x = conv_add_relu(self.link_inputs[i], x, self.link_outputs[i](out))
                x = self.links[i](x)
        return outputs


@CONFIG_REGISTRY.register()
def add_cornernet_hourglass_config(cfg: CfgNode) -> None:
    """Add the keys of :func:`build_cornernet_hourglass_backbone` to ``cfg``, in place.

    The defaults are hourglass-104.
    """
    hourglass = cfg.MODEL.CORNERNET_HOURGLASS = CfgNode()
    # Number of hourglasses, one after the other.
    hourglass.NUM_STACKS = 2
    # Channels at each level, from the stem's output to the bottom; one more than reductions.
    hourglass.CHANNELS = [256, 256, 384, 384, 384, 512]
    # Blocks at each level.
    hourglass.BLOCKS = [2, 2, 2, 2, 2, 4]
    # "residual", or "fire" as in CornerNet-Squeeze (with transposed convolutions between levels).
    hourglass.BLOCK = "residual"
    # Channels of the stem's 7x7 convolution (stride 2).
    hourglass.STEM_CHANNELS = 128
    # Residual blocks of stride 2 in the stem: 1 for an output stride of 4, 2 for 8.
    hourglass.STEM_BLOCKS = 1
    # Channels of each stack's output.
    hourglass.OUT_CHANNELS = 256
    # Norm after every convolution.
    hourglass.NORM = "BN"
    # Also return the maps of every level of every stack (for CornerNet-Saccade's attention).
    hourglass.OUT_LEVELS = False


@BACKBONE_REGISTRY.register()
def build_cornernet_hourglass_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> CornerNetHourglass:
    """:class:`CornerNetHourglass` from ``cfg.MODEL.CORNERNET_HOURGLASS``."""
    c = cfg.MODEL.CORNERNET_HOURGLASS
    return CornerNetHourglass(
        in_channels=input_shape.channels,
        num_stacks=c.NUM_STACKS,
        channels=c.CHANNELS,
        blocks=c.BLOCKS,
        block=c.BLOCK,
        stem_channels=c.STEM_CHANNELS,
        stem_blocks=c.STEM_BLOCKS,
        out_channels=c.OUT_CHANNELS,
        norm=c.NORM,
        out_levels=c.OUT_LEVELS,
    )
