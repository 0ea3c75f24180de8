"""Cascade corner pooling and center pooling (arXiv 1904.08189, section 3.2; published code).

Shapes: B images, c channels of the backbone's output, p pooled channels, h×w cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from d2ext.codecs.corners import PointMaps
from d2ext.layers import center_pool, corner_pool, corner_pool_pair
from d2ext.modeling.cornernet_hourglass import ConvNormReLU
from d2ext.systems.cornernet.head import CornerNetHead, PointHead, PoolingModule

# Directions in which a corner looks for its sides: vertical, horizontal.
_DIRECTIONS = {"top_left": ("top", "left"), "bottom_right": ("bottom", "right")}


class CenterNetTripletsPredictions(NamedTuple):
    """Predictions of one stack for a batch."""

    top_left: PointMaps
    bottom_right: PointMaps
    center: PointMaps
    """Without embedding."""


def _plain_conv(channels: int) -> nn.Conv2d:
    """3×3 without bias, norm and activation, so that pooled values may be negative."""
    return nn.Conv2d(channels, channels, 3, padding=1, bias=False)


class CascadeCornerPooling(PoolingModule):
    """Corner pooling along each side, and from there into the object.

    Args:
        corner: "top_left" or "bottom_right".
    """

    def __init__(self, channels: int, pool_channels: int, *, corner: str, norm: str) -> None:
        super().__init__(channels, pool_channels, norm=norm)
        self.corner = corner
        # Pooled in the other direction and added before pooling along a side.
        self.vertical_inward = ConvNormReLU(channels, pool_channels, 3, norm=norm)
        self.horizontal_inward = ConvNormReLU(channels, pool_channels, 3, norm=norm)
        self.vertical_side = _plain_conv(pool_channels)
        self.horizontal_side = _plain_conv(pool_channels)

    def pool(self, x: Tensor) -> Tensor:
        up_or_down, left_or_right = _DIRECTIONS[self.corner]
        inward = corner_pool(self.vertical_inward(x), left_or_right)
        vertical = self.vertical_side(self.vertical(x) + inward)
        inward = corner_pool(self.horizontal_inward(x), up_or_down)
        horizontal = self.horizontal_side(self.horizontal(x) + inward)
        return corner_pool_pair(vertical, horizontal, self.corner)


class CenterPooling(PoolingModule):
    """Maxima of the whole column and of the whole row, added."""

    def pool(self, x: Tensor) -> Tensor:
        return center_pool(self.vertical(x), self.horizontal(x))


class CenterNetTripletsHead(CornerNetHead):
    """CornerNet's head with cascade corner pooling, and centres; arguments as CornerNet's."""

    pooling = CascadeCornerPooling

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        *,
        pool_channels: int = 128,
        norm: str = "BN",
        **point_head: Any,
    ) -> None:
        super().__init__(input_shape, pool_channels=pool_channels, norm=norm, **point_head)
        channels = input_shape["stack1"].channels
        self.center = nn.ModuleList(
            PointHead(
                CenterPooling(channels, pool_channels, norm=norm),
                channels=channels,
                embedding=False,
                **point_head,
            )
            for _ in range(self.num_stacks)
        )

    def predict(self, features: Sequence[Tensor], stack: int) -> CenterNetTripletsPredictions:
        top_left, bottom_right = super().predict(features, stack)
        center = self.center[stack](features[stack])
        return CenterNetTripletsPredictions(top_left, bottom_right, center)
