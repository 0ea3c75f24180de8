"""Prior boxes of SSD-style detectors (arXiv 1512.02325): their grid, box coding and matching.

All boxes are relative to the network input (0..1). Corner form is (x1, y1, x2, y2), centre form is
(cx, cy, w, h). Letters: A priors, N annotated objects, C crowd regions, P points of an object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.structures import Boxes, pairwise_ioa, pairwise_iou
from torch import Tensor

# Scale of the centre and of the size offsets (yolact/NOTES.md §4).
CENTER_VARIANCE = 0.1
SIZE_VARIANCE = 0.2

# Values of PriorMatches.labels that are not classes.
BACKGROUND = 0
NEUTRAL = -1


def prior_boxes(
    feature_sizes: Sequence[tuple[int, int]],
    scales: Sequence[Sequence[float]],
    aspect_ratios: Sequence[float],
    input_size: int | tuple[int, int],
    *,
    square: bool,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Priors of all levels, in centre form.

    Args:
        feature_sizes: (rows, columns) of each level.
        scales: side lengths in pixels of each level's priors.
        aspect_ratios: width / height; these vary faster than the scales.
        input_size: (height, width) of the network input in pixels, or the side of a square one; sides
            are divided by it.
        square: height = width = scale·sqrt(ratio), as in the published YOLACT models, instead of
            height = scale / sqrt(ratio) (yolact/NOTES.md §4 and §11).
        strides: side of each level's cells in pixels, where the input is no multiple of it
            (RetinaFace); None: the input is divided into equal cells.

    Returns:
        (A, 4) float32; a cell's priors vary fastest, then column, row, level.
    """
    if len(feature_sizes) != len(scales):
        raise ValueError(
            f"{len(feature_sizes)} feature levels but scales for {len(scales)}: "
            "ANCHORS.SCALES of the model needs one list per level."
        )
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    levels = []
    for level, ((rows, columns), level_scales) in enumerate(
        zip(feature_sizes, scales, strict=True)
    ):
        sides = [
            (scale * ratio**0.5, scale * ratio**0.5 if square else scale / ratio**0.5)
            for scale in level_scales
            for ratio in aspect_ratios
        ]
        size = torch.tensor(sides, dtype=torch.float64)
        size = size / torch.tensor([width, height], dtype=torch.float64)
        y = torch.arange(rows, dtype=torch.float64) + 0.5
        x = torch.arange(columns, dtype=torch.float64) + 0.5
        if strides is None:
            y, x = y / rows, x / columns
        else:
            y, x = y * strides[level] / height, x * strides[level] / width
        centers = torch.stack(
            [x.expand(rows, columns), y[:, None].expand(rows, columns)], dim=-1
        ).reshape(-1, 1, 2)
        centers = centers.expand(-1, len(sides), 2)
        levels.append(torch.cat([centers, size.expand_as(centers)], dim=-1).reshape(-1, 4))
    return torch.cat(levels).to(torch.float32)


def to_corners(boxes: Tensor) -> Tensor:
    """Centre form (..., 4) → corner form."""
    half = boxes[..., 2:] / 2
    return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], dim=-1)


def encode_boxes(boxes: Tensor, priors: Tensor) -> Tensor:
    """Offsets that :func:`decode_boxes` turns into ``boxes``.

    Args:
        boxes: (A, 4) in corner form, sides > 0.
        priors: (A, 4) in centre form.

    Returns:
        (A, 4): centre offsets in prior sides over 0.1, logarithms of the size ratios over 0.2.
    """
    size = boxes[:, 2:] - boxes[:, :2]
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    return torch.cat(
        [
            (center - priors[:, :2]) / (CENTER_VARIANCE * priors[:, 2:]),
            torch.log(size / priors[:, 2:]) / SIZE_VARIANCE,
        ],
        dim=1,
    )


def decode_boxes(offsets: Tensor, priors: Tensor) -> Tensor:
    """Boxes in corner form from offsets (..., A, 4) and priors (..., A, 4) in centre form."""
    center = priors[..., :2] + offsets[..., :2] * CENTER_VARIANCE * priors[..., 2:]
    size = priors[..., 2:] * torch.exp(offsets[..., 2:] * SIZE_VARIANCE)
    return to_corners(torch.cat([center, size], dim=-1))


def encode_points(points: Tensor, priors: Tensor) -> Tensor:
    """Points (A, P, 2) as offsets from their priors' centres, in prior sides over 0.1."""
    return (points - priors[:, None, :2]) / (CENTER_VARIANCE * priors[:, None, 2:])


def decode_points(offsets: Tensor, priors: Tensor) -> Tensor:
    """Points from offsets (..., A, P, 2) and priors (..., A, 4): the inverse of
    :func:`encode_points`."""
    return priors[..., None, :2] + offsets * CENTER_VARIANCE * priors[..., None, 2:]


class PriorMatches(NamedTuple):
    """Training target of each prior."""

    labels: Tensor
    """(A,) int64: class + 1 for positives, :data:`BACKGROUND`, or :data:`NEUTRAL` (not trained)."""
    objects: Tensor
    """(A,) int64: the object with which the prior overlaps most, or to which it was assigned."""


def match_priors(
    priors: Tensor,
    boxes: Tensor,
    classes: Tensor,
    crowd_boxes: Tensor,
    *,
    positive_iou: float = 0.5,
    negative_iou: float = 0.4,
    crowd_ioa: float = 0.7,
) -> PriorMatches:
    """Match priors with annotations (yolact/NOTES.md §5).

    A prior takes the object of highest IoU. It is positive from ``positive_iou`` up, background below
    ``negative_iou``, neutral in between. Then each object is assigned one prior, greedily by IoU over
    all (object, prior) pairs. A non-positive prior with more than ``crowd_ioa`` of its area in a crowd
    region is neutral.

    Args:
        priors: (A, 4) in centre form.
        boxes: (N, 4) in corner form; N may be 0.
        classes: (N,) int64, from 0.
        crowd_boxes: (C, 4) in corner form; C may be 0.
    """
    corners = Boxes(to_corners(priors))
    num_objects = len(boxes)
    if num_objects == 0:
        objects = torch.zeros(len(priors), dtype=torch.int64, device=priors.device)
        labels = torch.full_like(objects, BACKGROUND)
    else:
        iou = pairwise_iou(Boxes(boxes), corners)
        best_iou, objects = iou.max(dim=0)
        owners, owned = _force_best_priors(iou)
        objects[owned] = owners
        best_iou[owned] = 2.0
        labels = classes[objects] + 1
        labels[best_iou < positive_iou] = NEUTRAL
        labels[best_iou < negative_iou] = BACKGROUND
    if len(crowd_boxes) > 0:
        in_crowd = pairwise_ioa(Boxes(crowd_boxes), corners).amax(dim=0) > crowd_ioa
        labels[in_crowd & (labels <= 0)] = NEUTRAL
    return PriorMatches(labels, objects)


def _force_best_priors(iou: Tensor) -> tuple[Tensor, Tensor]:
    """Assign each object one prior: repeatedly the pair of highest IoU among those still free.

    Args:
        iou: (N, A).

    Returns:
        objects (n,), priors (n,) with n = min(N, A); both int64.
    """
    num_objects, num_priors = iou.shape
    # N objects take at most N priors, so one of an object's N best is always free: N·N numbers suffice
    # instead of N passes over N·A. Equal IoUs are common (priors inside a large object); the first prior
    # wins, as in a search for the maximum from the front. The decrement is below the spacing of float32
    # numbers above 0.02.
    tie_break = torch.arange(num_priors, device=iou.device, dtype=torch.float64) * 1e-14
    candidates = (iou.double() - tie_break).topk(min(num_objects, num_priors), dim=1).indices
    values = iou.gather(1, candidates)
    order = values.flatten().sort(descending=True, stable=True).indices.tolist()
    candidate_list, width = candidates.tolist(), candidates.shape[1]
    prior_of: dict[int, int] = {}
    taken: set[int] = set()
    for pair in order:
        obj, prior = pair // width, candidate_list[pair // width][pair % width]
        if obj not in prior_of and prior not in taken:
            prior_of[obj] = prior
            taken.add(prior)
    device = iou.device
    return (
        torch.tensor(list(prior_of.keys()), dtype=torch.int64, device=device),
        torch.tensor(list(prior_of.values()), dtype=torch.int64, device=device),
    )


def mine_negatives(
    logits: Tensor, labels: Tensor, negatives_per_positive: int, minimum: int = 0
) -> Tensor:
    """Select the hardest background priors of each image.

    Hardness is -log p(background). Neutral and positive priors are never selected.

    Args:
        logits: (B, A, classes + 1), background first.
        labels: (B, A) as :class:`PriorMatches`.
        minimum: negatives of an image with few positives, or none.

    Returns:
        (B, A) bool: in each image ``negatives_per_positive`` times its positives, or all negatives if
        there are fewer.
    """
    with torch.no_grad():
        hardness = logits.float().logsumexp(dim=2) - logits[..., 0].float()
        hardness = hardness.masked_fill(labels != BACKGROUND, -1.0)
        rank = hardness.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        wanted = negatives_per_positive * (labels > 0).sum(dim=1, keepdim=True)
        return (rank < wanted.clamp(min=minimum)) & (labels == BACKGROUND)
