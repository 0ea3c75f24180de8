"""Stacked hourglass network for landmarks (Newell et al., arXiv 1603.06937), as the published PyTorch
code builds it.

Every stack outputs features and, with ``num_maps`` > 0, score maps, which are supervised; both are
added, each through a 1x1 convolution, to the input of the next stack. The maps are therefore part of
the backbone: a head uses them unchanged.

Letters: B images, H, W their size, C channels, K maps, i = 1..n stack. Every convolution has a bias,
even where a norm follows. Width and height must be multiples of 4 * 2^depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.config import CONFIG_REGISTRY
from d2ext.modeling.fusion import conv_relu, take_bias

# A name that Detectron2's get_norm knows, or channels → the norm.
Norm = str | Callable[[int], nn.Module]


@CONFIG_REGISTRY.register()
def add_newell_hourglass_config(cfg: CfgNode) -> None:
    """Add the keys of :class:`NewellHourglass` to ``cfg``, in place; defaults as published."""
    hourglass = cfg.MODEL.NEWELL_HOURGLASS = CfgNode()
    # Number of hourglasses, one after the other; published models have 8 and 2.
    hourglass.NUM_STACKS = 2
    # Maps that each stack predicts, one for each landmark; 0: none. LandmarkNet sets this to suit its
    # head.
    hourglass.NUM_MAPS = 16
    # Channels between the hourglasses and inside them.
    hourglass.CHANNELS = 256
    # Channels after the 7x7 convolution and after the stem's first and second residual block.
    hourglass.STEM_CHANNELS = [64, 128, 128]
    # How often an hourglass halves its resolution.
    hourglass.DEPTH = 4
    # Channels by which the inner levels of an hourglass are wider than its outermost one.
    hourglass.INCREASE = 0
    # Whether each level is INCREASE wider than the one around it. False, as published: only the
    # second level widens, and those inside it have the same width.
    hourglass.INCREASE_EVERY_LEVEL = False
    # Norm, a name that Detectron2's get_norm knows. "" is not possible.
    hourglass.NORM = "BN"


class PreActivationResidual(nn.Module):
    """Bottleneck with norm and ReLU before each convolution: 1x1 to half the width, 3x3, 1x1, sum.

    The shortcut is the input itself, or a 1x1 convolution of it where the widths differ. The second
    and third norm belong to the convolution before them, so that inference can fold them.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: Norm) -> None:
        super().__init__()
        inner = out_channels // 2
        self.pre_norm = get_norm(norm, in_channels)
        self.conv1 = Conv2d(in_channels, inner, 1, norm=get_norm(norm, inner))
        self.conv2 = Conv2d(inner, inner, 3, padding=1, norm=get_norm(norm, inner))
        self.conv3 = Conv2d(inner, out_channels, 1)
        self.shortcut = (
            nn.Identity() if in_channels == out_channels else Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, h, w) → (B, out, h, w)."""
        inner = conv_relu(self.conv1, F.relu(self.pre_norm(x)))
        return self.shortcut(x) + self.conv3(conv_relu(self.conv2, inner))

    def fold_biases(self, offset: Tensor) -> Tensor:
        """Expect ``x - offset`` as input from now on, and leave the sum's biases out of the output.

        Args:
            offset: (in,), for each channel.

        Returns:
            (out,), the offset by which the output is now too small.
        """
        self.pre_norm.running_mean.sub_(offset)
        missing = take_bias(self.conv3)
        if isinstance(self.shortcut, nn.Identity):
            return missing + offset
        passed = self.shortcut.weight[:, :, 0, 0] @ offset
        return missing + take_bias(self.shortcut) + passed


class Hourglass(nn.Module):
    """One recursive hourglass: a branch at full resolution plus one at half resolution.

    Args:
        channels: of input and output.
        increases: for each of the ``depth`` levels below the first, outermost first, by how many
            channels it is wider than the one around it.
        norm: see :class:`PreActivationResidual`.
    """

    def __init__(self, channels: int, increases: Sequence[int], norm: Norm) -> None:
        super().__init__()
        inner = channels + increases[0]
        self.up = PreActivationResidual(channels, channels, norm)
        self.low1 = PreActivationResidual(channels, inner, norm)
        self.low2: nn.Module = (
            Hourglass(inner, increases[1:], norm)
            if len(increases) > 1
            else PreActivationResidual(inner, inner, norm)
        )
        self.low3 = PreActivationResidual(inner, channels, norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) → the same shape."""
        low = self.low3(self.low2(self.low1(F.max_pool2d(x, 2))))
        return self.up(x) + F.interpolate(low, scale_factor=2, mode="nearest")

    def fold_biases(self, offset: Tensor) -> Tensor:
        """See :meth:`PreActivationResidual.fold_biases`; pooling and resizing preserve an offset."""
        low = offset
        for part in (self.low1, self.low2, self.low3):
            assert isinstance(part, PreActivationResidual | Hourglass)
            low = part.fold_biases(low)
        return self.up.fold_biases(offset) + low


class HourglassStack(nn.Module):
    """An hourglass, the features and maps computed from it, and the input of the next stack.

    Args:
        channels, increases, norm: see :class:`Hourglass`.
        maps: K; 0 for a stack without maps.
        last: there is no next stack.
    """

    def __init__(
        self, channels: int, increases: Sequence[int], maps: int, norm: str, *, last: bool
    ) -> None:
        super().__init__()
        self.hourglass = Hourglass(channels, increases, norm)
        self.residual = PreActivationResidual(channels, channels, norm)
        self.conv = Conv2d(channels, channels, 1, norm=get_norm(norm, channels))
        self.predictor = Conv2d(channels, maps, 1) if maps else None
        self.merge_features = None if last else Conv2d(channels, channels, 1)
        self.merge_maps = Conv2d(maps, channels, 1) if maps and not last else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """(B, C, h, w) → features (B, C, h, w), maps (B, K, h, w) or None, the next stack's input."""
        features = conv_relu(self.conv, self.residual(self.hourglass(x)))
        maps = None if self.predictor is None else self.predictor(features)
        if self.merge_maps is not None and maps is not None:
            x = x + self.merge_maps(maps)
        if self.merge_features is not None:
            x = x + self.merge_features(features)
        return features, maps, x

    def fold_biases(self, offset: Tensor) -> Tensor:
        """See :meth:`PreActivationResidual.fold_biases`; features and maps keep their values, only the
        next stack's input is too small by the returned offset.

        Both merge convolutions are linear in the features, so they become one.
        """
        inner = self.residual.fold_biases(self.hourglass.fold_biases(offset))
        if self.conv.bias is not None:
            self.conv.bias.add_(self.conv.weight[:, :, 0, 0] @ inner)
        if self.merge_features is None:
            return offset
        if self.merge_maps is not None and self.predictor is not None:
            back = self.merge_maps.weight[:, :, 0, 0]
            self.merge_features.weight[:, :, 0, 0].add_(back @ self.predictor.weight[:, :, 0, 0])
            if self.predictor.bias is not None:
                offset = offset + back @ self.predictor.bias
            offset = offset + take_bias(self.merge_maps)
            self.merge_maps = None
        return offset + take_bias(self.merge_features)


@BACKBONE_REGISTRY.register()
class NewellHourglass(Backbone):
    """Newell's stacked hourglass.

    Outputs, all of stride 4: ``stack{i}`` (B, C, H/4, W/4), the features of stack i = 1..n; and with
    ``num_maps`` > 0 ``maps{i}`` (B, K, H/4, W/4), its maps, without activation.
    """

    @configurable
    def __init__(
        self,
        *,
        num_stacks: int = 2,
        num_maps: int = 16,
        channels: int = 256,
        stem_channels: tuple[int, int, int] | list[int] = (64, 128, 128),
        depth: int = 4,
        increase: int = 0,
        increase_every_level: bool = False,
        norm: str = "BN",
        in_channels: int = 3,
    ) -> None:
        """Args:
        num_stacks: n.
        num_maps: K maps of every stack, as many as landmarks; 0 leaves the maps out.
        channels: C.
        stem_channels: after the 7x7 convolution and the stem's first two residual blocks.
        depth: levels below the first; 4 reaches 1/16 of the hourglass's input.
        increase: channels by which the second level is wider than the first.
        increase_every_level: deeper levels widen as well; in the published network they do not.
        norm: a name that Detectron2's ``get_norm`` knows.
        in_channels: of the images.

        Raises:
            ValueError: no stack, no depth, no norm, or odd channels.
        """
        super().__init__()
        if num_stacks < 1 or depth < 1 or not norm:
            raise ValueError(
                "MODEL.NEWELL_HOURGLASS needs a stack, a depth of 1 or more and a norm, "
                f"not NUM_STACKS {num_stacks}, DEPTH {depth}, NORM '{norm}'."
            )
        if len(stem_channels) != 3 or any(c % 2 for c in (channels, increase, *stem_channels)):
            raise ValueError(
                "MODEL.NEWELL_HOURGLASS: CHANNELS, INCREASE and the three STEM_CHANNELS must be even, "
                f"not {channels}, {increase}, {list(stem_channels)}."
            )
        first, second, third = stem_channels
        self.depth = depth
        self.num_maps = num_maps
        self.stem_conv = Conv2d(
            in_channels, first, 7, stride=2, padding=3, norm=get_norm(norm, first)
        )
        self.stem1 = PreActivationResidual(first, second, norm)
        self.stem2 = PreActivationResidual(second, third, norm)
        self.stem3 = PreActivationResidual(third, channels, norm)
        increases = [increase] + [increase if increase_every_level else 0] * (depth - 1)
        self.stacks = nn.ModuleList(
            HourglassStack(channels, increases, num_maps, norm, last=i == num_stacks - 1)
            for i in range(num_stacks)
        )
        self._out_feature_channels = {}
        for i in range(1, num_stacks + 1):
            self._out_feature_channels[f"stack{i}"] = channels
            if num_maps:
                self._out_feature_channels[f"maps{i}"] = num_maps
        self._out_features = list(self._out_feature_channels)
        self._out_feature_strides = dict.fromkeys(self._out_features, 4)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        hourglass = cfg.MODEL.NEWELL_HOURGLASS
        return {
            "num_stacks": hourglass.NUM_STACKS,
            "num_maps": hourglass.NUM_MAPS,
            "channels": hourglass.CHANNELS,
            "stem_channels": hourglass.STEM_CHANNELS,
            "depth": hourglass.DEPTH,
            "increase": hourglass.INCREASE,
            "increase_every_level": hourglass.INCREASE_EVERY_LEVEL,
            "norm": hourglass.NORM,
            "in_channels": input_shape.channels,
        }

    @property
    def size_divisibility(self) -> int:
        return 4 * 2**self.depth

    @torch.no_grad()
    def prepare_inference(self) -> None:
        """Remove the biases of residual sums for inference, in place, with the same outputs.

        PyTorch adds the bias of a convolution without ReLU in a separate pass, which takes as long as
        the convolution. Before a residual sum it only shifts the sum, and the next norm can undo the
        shift. Needs folded norms; if some are left, nothing is changed.
        """
        # All norms are of one kind: if those of convolutions were folded, the others have a mean too.
        if any(getattr(m, "norm", None) is not None for m in self.modules()):
            return
        offset = torch.zeros_like(self.stem1.pre_norm.running_mean)
        for stem in (self.stem1, self.stem2, self.stem3):
            offset = stem.fold_biases(offset)
        for stack in self.stacks:
            assert isinstance(stack, HourglassStack)
            offset = stack.fold_biases(offset)

    def stem(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, C, H/4, W/4)."""
        x = self.stem1(conv_relu(self.stem_conv, images))
        return self.stem3(self.stem2(F.max_pool2d(x, 2)))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) → ``stack{i}`` and ``maps{i}``, see the class.

        Raises:
            ValueError: H or W is no multiple of ``size_divisibility``.
        """
        height, width = images.shape[-2:]
        if height % self.size_divisibility or width % self.size_divisibility:
            raise ValueError(
                f"A stacked hourglass of depth {self.depth} takes images whose sides are multiples of "
                f"{self.size_divisibility}, not {height}x{width}: change MODEL.LANDMARKS.INPUT_SIZE or "
                "MODEL.NEWELL_HOURGLASS.DEPTH."
            )
        x = self.stem(images)
        outputs: dict[str, Tensor] = {}
        for i, stack in enumerate(self.stacks, start=1):
            features, maps, x = stack(x)
            outputs[f"stack{i}"] = features
            if maps is not None:
                outputs[f"maps{i}"] = maps
        return outputs
