"""RetinaFace's context modules and heads (arXiv 1905.00641, section 3.2; retinaface/NOTES.md).

Shapes: B images, C classes, P points, a priors at a cell, A priors over all levels, h×w cells of a
level, c channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.systems.retinaface.fpn import conv3x3, conv_leaky, slope
from d2ext.systems.retinaface.mesh import MeshHead


class RetinaFacePredictions(NamedTuple):
    """Predictions for a batch."""

    logits: Tensor
    """(B, A, C + 1); index 0 is the background."""
    offsets: Tensor
    """(B, A, 4) box offsets for ``codecs.prior_boxes.decode_boxes``."""
    points: Tensor | None
    """(B, A, P, 2) offsets for ``codecs.prior_boxes.decode_points``; None: no points."""
    vectors: Tensor | None
    """(B, A / a, c) context feature of each cell, for the mesh branch; None: it has none."""
    feature_sizes: tuple[tuple[int, int], ...]
    """(rows, columns) of each level, finest first."""
    input_size: tuple[int, int]
    """(height, width) of the network's input."""


class ContextModule(nn.Module):
    """Three branches of one, two and three 3x3 convolutions, which see 3, 5 and 7 cells (SSH, arXiv
    1708.03979). The last two share their first convolution.

    Args:
        channels: of input and output; the branches give a half and twice a quarter of them.
        norm: norm after every convolution.
        deformable: the convolutions are deformable.
    """

    def __init__(self, channels: int, norm: str, *, deformable: bool = False) -> None:
        super().__init__()
        if channels % 4:
            raise ValueError(f"MODEL.RETINAFACE.FPN_CHANNELS, {channels}, is no multiple of 4.")
        half, quarter = channels // 2, channels // 4
        self.slope = slope(channels)
        self.conv3x3 = conv3x3(channels, half, norm, deformable=deformable)
        self.reduce = conv3x3(channels, quarter, norm, deformable=deformable)
        self.conv5x5 = conv3x3(quarter, quarter, norm, deformable=deformable)
        self.conv7x7_1 = conv3x3(quarter, quarter, norm, deformable=deformable)
        self.conv7x7_2 = conv3x3(quarter, quarter, norm, deformable=deformable)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels, h, w) → the same shape, not negative."""
        reduced = conv_leaky(self.reduce, x, self.slope)
        largest = self.conv7x7_2(conv_leaky(self.conv7x7_1, reduced, self.slope))
        return F.relu_(torch.cat([self.conv3x3(x), self.conv5x5(reduced), largest], dim=1))


class RetinaFaceHead(nn.Module):
    """Context modules and 1x1 convolutions over the pyramid.

    Args:
        input_shape: the pyramid's levels, finest first, all of the same channels.
        num_classes: C.
        num_points: P; 0: no points.
        priors_per_cell: a.
        norm, deformable: see :class:`ContextModule`.
        shared: one set of 1x1 convolutions for all levels; the context modules are never shared.
        mesh: the mesh branch; None: no meshes.
    """

    def __init__(
        self,
        input_shape: Sequence[ShapeSpec],
        *,
        num_classes: int = 1,
        num_points: int = 5,
        priors_per_cell: int = 2,
        norm: str = "BN",
        deformable: bool = False,
        shared: bool = False,
        mesh: MeshHead | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_points = num_points
        self.strides = [int(shape.stride) for shape in input_shape]
        self.context = nn.ModuleList(
            ContextModule(shape.channels, norm, deformable=deformable) for shape in input_shape
        )

        def convs(values: int) -> nn.ModuleList:
            shapes = input_shape[:1] if shared else input_shape
            return nn.ModuleList(
                nn.Conv2d(shape.channels, priors_per_cell * values, 1) for shape in shapes
            )

        self.logits = convs(num_classes + 1)
        self.offsets = convs(4)
        self.points = convs(2 * num_points) if num_points > 0 else None
        self.mesh = mesh

    def forward(
        self, features: Sequence[Tensor], input_size: tuple[int, int]
    ) -> RetinaFacePredictions:
        """Features (B, c, h, w), finest first, of images of ``input_size`` → predictions.

        A cell's priors vary fastest, then column, row, level.
        """
        context = [module(x) for module, x in zip(self.context, features, strict=True)]
        points = None
        if self.points is not None:
            points = _predict(self.points, context, 2 * self.num_points).unflatten(2, (-1, 2))
        return RetinaFacePredictions(
            _predict(self.logits, context, self.num_classes + 1),
            _predict(self.offsets, context, 4),
            points,
            None if self.mesh is None else _flatten(context),
            tuple((x.shape[2], x.shape[3]) for x in features),
            input_size,
        )


def _predict(convs: nn.ModuleList, features: Sequence[Tensor], values: int) -> Tensor:
    """Features (B, c, h, w) of all levels → (B, A, values)."""
    outputs = [convs[level % len(convs)](x) for level, x in enumerate(features)]
    return _flatten(outputs).reshape(outputs[0].shape[0], -1, values)


def _flatten(features: Sequence[Tensor]) -> Tensor:
    """Maps (B, c, h, w) of all levels → (B, cells, c)."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in features], dim=1)
