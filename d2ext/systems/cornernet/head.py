"""CornerNet's corner pooling modules and predictions (arXiv 1808.01244, sections 3.3 and 3.4), and
CornerNet-Saccade's attention.

Shapes: B images, C classes, c channels of the backbone's output, p pooled channels, h×w cells, L levels
of an hourglass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from d2ext.codecs.corners import PointMaps
from d2ext.layers import corner_pool_pair
from d2ext.modeling.cornernet_hourglass import ConvNormReLU
from d2ext.modeling.fusion import conv_add_relu, conv_norm, conv_relu

# Initial bias of the heat maps' last layer: a probability of 0.1 (published code).
PRIOR_LOGIT = -2.19


class CornerNetPredictions(NamedTuple):
    """Predictions of one stack for a batch."""

    top_left: PointMaps
    bottom_right: PointMaps


class PoolingModule(nn.Module):
    """A residual block whose main path pools over rows and columns as subclasses define.

    Args:
        channels: c, of input and output.
        pool_channels: p.
        norm: after every convolution, a name that Detectron2's ``get_norm`` knows.
    """

    def __init__(self, channels: int, pool_channels: int, *, norm: str) -> None:
        super().__init__()
        self.vertical = ConvNormReLU(channels, pool_channels, 3, norm=norm)
        self.horizontal = ConvNormReLU(channels, pool_channels, 3, norm=norm)
        self.merge = conv_norm(pool_channels, channels, 3, norm=norm)
        self.skip = conv_norm(channels, channels, 1, norm=norm)
        self.output = ConvNormReLU(channels, channels, 3, norm=norm)

    def pool(self, x: Tensor) -> Tensor:
        """(B, c, h, w) → (B, p, h, w)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, h, w) → the same shape, not negative."""
        return self.output(conv_add_relu(self.merge, self.pool(x), self.skip(x)))


class CornerPooling(PoolingModule):
    """Pooling from an object's corner along its sides.

    Args:
        corner: "top_left" or "bottom_right".
    """

    def __init__(self, channels: int, pool_channels: int, *, corner: str, norm: str) -> None:
        super().__init__(channels, pool_channels, norm=norm)
        self.corner = corner

    def pool(self, x: Tensor) -> Tensor:
        return corner_pool_pair(self.vertical(x), self.horizontal(x), self.corner)


class Prediction(nn.Module):
    """k×k convolution, ReLU, 1×1 convolution; both with bias."""

    def __init__(self, channels: int, hidden: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(channels, hidden, kernel, padding=(kernel - 1) // 2)
        self.output = nn.Conv2d(hidden, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(conv_relu(self.hidden, x))


class PointHead(nn.Module):
    """Pooling module and predictions of one kind of point.

    Args:
        pooling: (B, c, h, w) → the same shape.
        channels: c.
        num_classes: C.
        hidden: channels of the predictions' hidden layers.
        kernel: side of their kernels.
        embedding: also predict embeddings (centres have none).
    """

    def __init__(
        self,
        pooling: nn.Module,
        *,
        channels: int,
        num_classes: int,
        hidden: int = 256,
        kernel: int = 3,
        embedding: bool = True,
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.heat = Prediction(channels, hidden, num_classes, kernel)
        self.offset = Prediction(channels, hidden, 2, kernel)
        self.embedding = Prediction(channels, hidden, 1, kernel) if embedding else None
        nn.init.constant_(self.heat.output.bias, PRIOR_LOGIT)

    def forward(self, x: Tensor) -> PointMaps:
        x = self.pooling(x)
        embedding = None if self.embedding is None else self.embedding(x)
        return PointMaps(self.heat(x), self.offset(x), embedding)


class CornerNetHead(nn.Module):
    """Corner modules and predictions on every stack of the backbone.

    Args:
        input_shape: the backbone's ``output_shape()``; :attr:`in_features` of it are used.
        pool_channels, norm: see :class:`PoolingModule`.
        point_head: ``num_classes``, ``hidden`` and ``kernel``, see :class:`PointHead`.
    """

    pooling: ClassVar[Callable[..., PoolingModule]] = CornerPooling

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        pool_channels: int = 128,
        norm: str = "BN",
        **point_head: Any,
    ) -> None:
        super().__init__()
        self.in_features = [name for name in input_shape if name.removeprefix("stack").isdigit()]
        self.num_stacks = len(self.in_features)
        channels = input_shape["stack1"].channels
        self.top_left, self.bottom_right = (
            nn.ModuleList(
                PointHead(
                    self.pooling(channels, pool_channels, corner=corner, norm=norm),
                    channels=channels,
                    **point_head,
                )
                for _ in range(self.num_stacks)
            )
            for corner in ("top_left", "bottom_right")
        )

    def predict(self, features: Sequence[Tensor], stack: int) -> Any:
        """Predictions of one stack."""
        x = features[stack]
        return CornerNetPredictions(self.top_left[stack](x), self.bottom_right[stack](x))

    def forward(self, features: Sequence[Tensor]) -> Any:
        """Features (B, c, h, w) in the order of :attr:`in_features` → in training a list with the
        predictions of every stack, otherwise those of the last one."""
        if not self.training:
            return self.predict(features, self.num_stacks - 1)
        return [self.predict(features, stack) for stack in range(self.num_stacks)]


class SaccadePredictions(NamedTuple):
    """CornerNet-Saccade's predictions of one stack for a batch."""

    top_left: PointMaps
    bottom_right: PointMaps
    attention: tuple[Tensor, ...]
    """L maps (B, 1, h, w) of logits, coarsest first."""


class SaccadeHead(CornerNetHead):
    """CornerNet's head and attention maps on every level of every stack (arXiv 1904.08900, section 3).

    Args:
        input_shape: of a backbone that also gives its levels, coarsest first.
        hidden: see :class:`PointHead`.
        corner_net: see :class:`CornerNetHead`.
    """

    def __init__(
        self, input_shape: Mapping[str, ShapeSpec], *, hidden: int = 256, **corner_net: Any
    ) -> None:
        super().__init__(input_shape, hidden=hidden, **corner_net)
        levels = [
            [name for name in input_shape if name.startswith(f"{stack}_s")]
            for stack in self.in_features
        ]
        self.num_levels = len(levels[0])
        if self.num_levels == 0:
            raise ValueError("CornerNetSaccade needs MODEL.CORNERNET_HOURGLASS.OUT_LEVELS True.")
        # As published, their kernels are always 3×3.
        self.attention = nn.ModuleList(
            nn.ModuleList(Prediction(input_shape[name].channels, hidden, 1, 3) for name in names)
            for names in levels
        )
        for level in (level for stack in self.attention for level in stack):
            nn.init.constant_(level.output.bias, PRIOR_LOGIT)
        self.in_features += [name for names in levels for name in names]

    def predict(self, features: Sequence[Tensor], stack: int) -> SaccadePredictions:
        first = self.num_stacks + stack * self.num_levels
        levels = zip(self.attention[stack], features[first:], strict=False)
        attention = tuple(predict(x) for predict, x in levels)
        top_left, bottom_right = super().predict(features, stack)
        return SaccadePredictions(top_left, bottom_right, attention)
