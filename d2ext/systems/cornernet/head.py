"""CornerNet's corner pooling modules and predictions (arXiv 1808.01244, sections 3.3 and 3.4).

Shapes: B images, C classes, c channels of the backbone's output, p pooled channels, h×w cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from d2ext.codecs.corners import PointMaps
from d2ext.layers import corner_pool_pair
from d2ext.modeling.cornernet_hourglass import ConvNormReLU, conv_norm
from d2ext.modeling.fusion import conv_add_relu, conv_relu

# Bias of the heat maps' last layer at the start: a probability of 0.1 (published code).
PRIOR_LOGIT = -2.19


class CornerNetPredictions(NamedTuple):
    """What the network says of a batch, from one of its stacks."""

    top_left: PointMaps
    bottom_right: PointMaps


class PoolingModule(nn.Module):
    """A residual block whose main path pools over rows and columns; subclasses say how.

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
    """Looks for an object's sides from its corner.

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
        hidden: channels of the predictions' hidden layers.
        kernel: side of their kernels.
        num_classes: C.
        embedding: also predict embeddings (centres have none).
    """

    def __init__(
        self,
        pooling: nn.Module,
        *,
        channels: int,
        hidden: int,
        kernel: int,
        num_classes: int,
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
        channels: c.
        num_stacks: stacks of the backbone.
        num_classes, pool_channels, hidden, kernel, norm: see the modules above.
    """

    def __init__(
        self,
        *,
        channels: int,
        num_stacks: int,
        num_classes: int,
        pool_channels: int = 128,
        hidden: int = 256,
        kernel: int = 3,
        norm: str = "BN",
    ) -> None:
        super().__init__()
        self.num_stacks = num_stacks

        def heads(pooling: Callable[[], nn.Module], embedding: bool = True) -> nn.ModuleList:
            return nn.ModuleList(
                PointHead(
                    pooling(),
                    channels=channels,
                    hidden=hidden,
                    kernel=kernel,
                    num_classes=num_classes,
                    embedding=embedding,
                )
                for _ in range(num_stacks)
            )

        self._build(heads, channels, pool_channels, norm)

    def _build(
        self, heads: Callable[..., nn.ModuleList], channels: int, pool_channels: int, norm: str
    ) -> None:
        """Make the heads of each kind of point; ``heads(pooling, embedding)`` gives one per stack."""
        self.top_left = heads(
            lambda: CornerPooling(channels, pool_channels, corner="top_left", norm=norm)
        )
        self.bottom_right = heads(
            lambda: CornerPooling(channels, pool_channels, corner="bottom_right", norm=norm)
        )

    def predict(self, stack: int, x: Tensor) -> tuple[PointMaps, ...]:
        """Predictions of one stack on its feature (B, c, h, w)."""
        return CornerNetPredictions(self.top_left[stack](x), self.bottom_right[stack](x))

    def forward(
        self, features: Sequence[Tensor], all_stacks: bool | None = None
    ) -> list[tuple[PointMaps, ...]]:
        """Features of the stacks → predictions.

        Args:
            features: ``num_stacks`` maps (B, c, h, w).
            all_stacks: of every stack, or of the last one only; default: every one in training.
        """
        if all_stacks is None:
            all_stacks = self.training
        first = 0 if all_stacks else self.num_stacks - 1
        return [self.predict(i, features[i]) for i in range(first, self.num_stacks)]


class CornerNetwork(nn.Module):
    """Backbone and head: images (B, 3, H, W) → predictions of the last stack."""

    def __init__(self, backbone: nn.Module, head: CornerNetHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.features = [f"stack{i + 1}" for i in range(head.num_stacks)]

    def forward(self, images: Tensor) -> tuple[PointMaps, ...]:
        return self.predictions(images, all_stacks=False)[-1]

    def predictions(self, images: Tensor, all_stacks: bool) -> list[tuple[PointMaps, ...]]:
        """Of all stacks, or of the last one only."""
        features = self.backbone(images)
        return self.head([features[name] for name in self.features], all_stacks)
