"""From CornerNet's corner pairs to detections (arXiv 1808.01244, section 4.2; published code).

Beside ``pred_boxes``, ``scores`` and ``pred_classes``, the ``Instances`` of CornerNet have

- ``top_left_scores``, ``bottom_right_scores`` (N,) float32 in 0..1: the corners' scores. Without
  soft-NMS, ``scores`` would be their mean.
- ``embedding_distances`` (N,) float32, not negative: between the embeddings of the two corners.

Pairs are *rows* of :data:`COLUMNS` numbers, so that they leave the device in one copy.

Letters: B images, P pairs, N rows of an image.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn import functional as F

from d2ext.codecs.boxes import clip_boxes
from d2ext.codecs.canvas import Canvas, scale_points
from d2ext.codecs.corners import REJECTED, CornerPairs
from d2ext.layers import has_cuda_extension, soft_nms_merge, soft_nms_rows, soft_nms_slots
from d2ext.layers.exporting import needs_fixed_shapes
from d2ext.layers.soft_nms import EMPTY

# x1, y1, x2, y2, score, top-left score, bottom-right score, class, embedding distance
COLUMNS = 9
_SCORE, _TOP_LEFT, _BOTTOM_RIGHT, _CLASS, _DISTANCE = range(4, 9)


class SuppressionOptions(NamedTuple):
    """Options of :func:`suppress`; see ``MODEL.CORNERNET.TEST``."""

    sigma: float = 0.5
    score_threshold: float = 0.001
    merge: bool = False
    merge_exponent: float = 10.0
    keep_stale: bool = True
    max_detections: int = 100


def rows_of_pairs(pairs: CornerPairs) -> Tensor:
    """(B, P, COLUMNS) float32."""
    single = (
        pairs.scores,
        pairs.top_left_scores,
        pairs.bottom_right_scores,
        pairs.classes.to(pairs.scores),
        pairs.distances,
    )
    return torch.cat([pairs.boxes, torch.stack(single, dim=-1)], dim=-1)


def in_slots(rows: Tensor, options: SuppressionOptions) -> bool:
    """Whether rows stay on their device, in slots that hold rejected pairs too, until detections are
    known: on a GPU the host then waits once. Elsewhere, and to merge boxes, they go to the CPU."""
    return needs_fixed_shapes(rows) and has_cuda_extension() and not options.merge


def without_rejected(rows: Tensor) -> Tensor:
    """Rows (N, COLUMNS) without the rejected pairs."""
    return rows[rows[:, _SCORE] > REJECTED]


def image_rows(rows: Tensor, canvas: Canvas, stride: int, margin: float = math.inf) -> Tensor:
    """:func:`image_slots` without the rejected pairs, (N, COLUMNS)."""
    return without_rejected(image_slots(rows, canvas, stride, margin))


def image_slots(rows: Tensor, canvas: Canvas, stride: int, margin: float = math.inf) -> Tensor:
    """Rows of one pass, of the image and its mirror image (if given), in pixels of the image.

    Args:
        rows: (1 or 2, P, COLUMNS) in cells.
        margin: pairs that extend this many pixels or more beyond the scaled image are rejected.

    Returns:
        (1 or 2 times P, COLUMNS) clipped to the image, :data:`REJECTED` the score of rejected pairs.
    """
    boxes = rows[..., :4]
    if len(rows) == 2:
        x1, y1, x2, y2 = boxes[1].unbind(-1)
        columns = canvas.map_size(stride)[1]
        boxes = torch.stack([boxes[0], torch.stack([columns - x2, y1, columns - x1, y2], dim=-1)])
    boxes = canvas.to_image(boxes, stride)
    height, width = (side / canvas.scale for side in canvas.content)
    margin = margin / canvas.scale
    inside = (boxes[..., :2] > -margin).all(-1) & (rows[..., _SCORE] > REJECTED)
    inside &= (boxes[..., 2] < width + margin) & (boxes[..., 3] < height + margin)
    scores = torch.where(inside, rows[..., _SCORE], REJECTED)[..., None]
    boxes = clip_boxes(boxes, (height, width))
    return torch.cat([boxes, scores, rows[..., _TOP_LEFT:]], dim=-1).flatten(0, 1)


def suppress(rows: Tensor, options: SuppressionOptions) -> Tensor:
    """Soft-NMS within each class, and the best of the remaining rows.

    Published quirks: stale rows count (unless ``keep_stale`` is off), see :mod:`d2ext.layers.soft_nms`,
    and all rows that tie with the last one stay.

    Args:
        rows: (N, COLUMNS); rejected pairs are left out.

    Returns:
        (M, COLUMNS), best first.
    """
    rows = without_rejected(rows)
    arguments: dict[str, Any] = {"sigma": options.sigma, "score_threshold": options.score_threshold}
    classes = rows[:, _CLASS].long()
    if options.merge:
        result = soft_nms_merge(
            rows[:, :4],
            rows[:, _SCORE],
            rows[:, [_TOP_LEFT, _BOTTOM_RIGHT]],
            classes,
            weight_exp=options.merge_exponent,
            **arguments,
        )
    else:
        result = soft_nms_rows(rows[:, :4], rows[:, _SCORE], classes, **arguments)
    rows = rows[result.indices]
    rows = torch.cat([result.boxes, result.scores[:, None], rows[:, _TOP_LEFT:]], dim=1)
    if not options.keep_stale:
        rows = rows[result.keep]
    return best_rows(rows, options.max_detections)


def suppress_slots(rows: list[Tensor], options: SuppressionOptions) -> tuple[Tensor, Tensor]:
    """:func:`suppress` of several images at once, without waiting for the device or merging.

    Args:
        rows: for each image (n, columns).

    Returns:
        (B, N, columns), best first, N the largest n; and (B,) int64, how many of them are detections.
    """
    most = max(len(own) for own in rows)
    padded = [F.pad(own, (0, 0, 0, most - len(own)), value=REJECTED) for own in rows]
    slots = torch.stack(padded)
    result = soft_nms_slots(
        slots[..., :4],
        slots[..., _SCORE],
        slots[..., _CLASS].long(),
        slots[..., _SCORE] > REJECTED,
        sigma=options.sigma,
        score_threshold=options.score_threshold,
    )
    scores = result.scores
    if not options.keep_stale:
        scores = scores.masked_fill(~result.keep, EMPTY)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    inputs = _take(slots, result.indices.gather(1, order))
    slots = torch.cat(
        [_take(result.boxes, order), scores[..., None], inputs[..., _TOP_LEFT:]], dim=-1
    )
    detected = scores > EMPTY
    if 0 < options.max_detections < most:
        detected &= scores >= scores[:, options.max_detections - 1, None]
    return slots, detected.sum(dim=1)


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (B, N, c) at (B, N)."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))


def best_rows(rows: Tensor, limit: int) -> Tensor:
    """Rows (N, COLUMNS) by descending score: ``limit`` of them, or more where the last ones tie."""
    scores, order = rows[:, _SCORE].sort(descending=True, stable=True)
    if len(scores) > limit > 0:
        order = order[scores >= scores[limit - 1]]
    return rows[order]


def to_instances(
    rows: Tensor,
    image_size: tuple[int, int],
    output_size: tuple[int, int],
    *,
    clip: bool = True,
) -> Instances:
    """Rows in pixels of the model's image → instances at the size of the output.

    Args:
        rows: (N, COLUMNS).
        image_size, output_size: (height, width).
        clip: clip boxes to the output (CornerNet's exceed it only by rounding errors).
    """
    result = Instances(output_size)
    scale = output_size[1] / image_size[1], output_size[0] / image_size[0]
    boxes = scale_points(rows[:, :4], scale)
    result.pred_boxes = Boxes(clip_boxes(boxes, output_size) if clip else boxes)
    result.scores = rows[:, _SCORE]
    result.pred_classes = rows[:, _CLASS].long()
    result.top_left_scores = rows[:, _TOP_LEFT]
    result.bottom_right_scores = rows[:, _BOTTOM_RIGHT]
    result.embedding_distances = rows[:, _DISTANCE]
    return result
