"""From corner pairs and centres to detections (arXiv 1904.08189, section 3.1; published code).

Beside CornerNet's fields (:mod:`d2ext.systems.cornernet.postprocess`), the ``Instances`` have

- ``centers`` (N, 2) float32: the centre point that confirmed the box, x and y in pixels of the output.
- ``center_scores`` (N,) float32 in 0..1: that point's score. ``scores`` before soft-NMS is
  (top-left + bottom-right + centre) / 3.

Rows are CornerNet's with three more columns: x, y and score of the centre.

Letters: N rows of an image, M centres of an image, K best centres of a pass.
"""

from __future__ import annotations

import torch
from detectron2.structures import Instances
from torch import Tensor

from d2ext.codecs.canvas import Canvas, scale_points
from d2ext.codecs.corners import REJECTED, Points
from d2ext.systems.cornernet.postprocess import COLUMNS, without_rejected
from d2ext.systems.cornernet.postprocess import to_instances as corner_instances

_SCORE, _CLASS = 4, 7
# Boxes that extend this many pixels or more beyond the scaled image are rejected (published code).
OUTSIDE_MARGIN = 5.0
# A box of at most this area, in pixels of the image, needs a centre in its middle third, a larger one in
# its middle fifth (published code).
_SMALL_AREA = 150.0 * 150.0


def rows_of_centers(points: Points) -> Tensor:
    """(B, K, 4) float32: x, y in cells, score, class."""
    return torch.stack([points.xs, points.ys, points.scores, points.classes.to(points.xs)], dim=-1)


def image_centers(centers: Tensor, canvas: Canvas, stride: int) -> Tensor:
    """Centres of one pass in pixels of the image: (1 or 2, K, 4) in cells → (M, 4).

    Unlike boxes they are not clipped (the published code clips a copy); those outside the image confirm
    no box.
    """
    xs = centers[..., 0]
    if len(centers) == 2:
        xs = torch.stack([xs[0], canvas.map_size(stride)[1] - xs[1]])
    points = canvas.to_image(torch.stack([xs, centers[..., 1]], dim=-1), stride)
    return torch.cat([points, centers[..., 2:]], dim=-1).flatten(0, 1)


def confirm_by_centers(rows: Tensor, centers: Tensor) -> Tensor:
    """:func:`confirm_slots` without the rejected boxes, (N', COLUMNS + 3)."""
    return without_rejected(confirm_slots(rows, centers))


def confirm_slots(rows: Tensor, centers: Tensor) -> Tensor:
    """Keep the boxes that have a centre of their class in their middle.

    The middle is the middle third of both sides of a small box, the middle fifth of a larger one; the
    centre must be strictly inside. The new score is (2 * score + centre's score) / 3.

    Published quirks: it is the first such centre of the list, not the best one; and boxes were clipped
    to the image before.

    Args:
        rows: (N, COLUMNS) in pixels of the image.
        centers: (M, 4) x, y, score, class.

    Returns:
        (N, COLUMNS + 3), best first; the others' score is :data:`REJECTED`. No row at all where there is
        no centre.
    """
    if len(rows) == 0 or len(centers) == 0:
        return rows.new_zeros((0, COLUMNS + 3))
    low, high = rows[:, :2], rows[:, 2:4]
    small = ((high - low).prod(dim=1) <= _SMALL_AREA)[:, None]
    begin = torch.where(small, (2 * low + high) / 3, (3 * low + 2 * high) / 5)
    end = torch.where(small, (low + 2 * high) / 3, (2 * low + 3 * high) / 5)
    points = centers[None, :, :2]
    inside = ((points > begin[:, None]) & (points < end[:, None])).all(dim=-1)
    inside &= centers[None, :, 3] == rows[:, None, _CLASS]
    # Of equal values, argmax takes the first.
    first = inside.to(torch.uint8).argmax(dim=1)
    matched = centers[first]
    scores = (2 * rows[:, _SCORE] + matched[:, 2]) / 3
    scores = scores.masked_fill(~inside.any(dim=1) | (rows[:, _SCORE] <= REJECTED), REJECTED)
    rows = torch.cat([rows[:, :4], scores[:, None], rows[:, 5:], matched[:, :3]], dim=1)
    return rows[rows[:, _SCORE].argsort(descending=True, stable=True)]


def to_instances(
    rows: Tensor, image_size: tuple[int, int], output_size: tuple[int, int]
) -> Instances:
    """CornerNet's :func:`to_instances`, and the centres; rows (N, COLUMNS + 3)."""
    result = corner_instances(rows, image_size, output_size)
    scale = output_size[1] / image_size[1], output_size[0] / image_size[0]
    result.centers = scale_points(rows[:, COLUMNS : COLUMNS + 2], scale)
    result.center_scores = rows[:, COLUMNS + 2]
    return result
