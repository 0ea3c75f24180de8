"""From YOLACT's raw predictions to detections (arXiv 1904.02689, section 5; yolact/NOTES.md §7).

Everything (except traditional NMS) has shapes that do not depend on the values, so that it can be
compiled or captured into a CUDA graph; empty slots have score -1.

Letters: B images, A priors, C thing classes, k prototypes, K candidates, D detection slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from d2ext.codecs.canvas import scale_points
from d2ext.layers import overlapped
from d2ext.layers.exporting import is_exporting

# Score of an empty slot and of a suppressed candidate.
EMPTY = -1.0


class Detections(NamedTuple):
    """Detections of a batch before their masks are assembled, best first."""

    boxes: Tensor
    """(B, D, 4) corner form, relative to the input, neither clipped nor ordered."""
    scores: Tensor
    """(B, D) in 0..1, or :data:`EMPTY`."""
    classes: Tensor
    """(B, D) int64, from 0."""
    coefficients: Tensor
    """(B, D, k)."""


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """values (B, A, v), index (B, ...) into A → (B, ..., v)."""
    flat = index.flatten(1)
    gathered = values.gather(1, flat[..., None].expand(-1, -1, values.shape[-1]))
    return gathered.reshape(*index.shape, values.shape[-1])


def topk_in_parts(scores: Tensor, count: int, parts: int) -> tuple[Tensor, Tensor]:
    """``scores.topk(count, dim=1)`` of (B, n), first of each of so many ``parts`` of a row."""
    size = scores.shape[1] // parts
    best, index = scores.unflatten(1, (parts, size)).topk(count, dim=2)
    index = index + size * torch.arange(parts, device=scores.device)[:, None]
    best, selected = best.flatten(1).topk(count, dim=1)
    return best, index.flatten(1).gather(1, selected)


def _take_best(
    boxes: Tensor, coefficients: Tensor, scores: Tensor, priors: Tensor, classes: Tensor, limit: int
) -> Detections:
    """The best ``limit`` of scored candidates.

    Args:
        boxes, coefficients: (B, A, 4), (B, A, k).
        scores, priors, classes: (B, n): score or EMPTY, index into A, class of each candidate.
    """
    candidates = scores.shape[1]
    count = min(limit, candidates)
    # A row of some thousand values is work of a single processor of a GPU.
    parts = math.gcd(candidates, 16)
    if scores.is_cuda and not is_exporting() and candidates // parts >= count:
        best, order = topk_in_parts(scores, count, parts)
    else:
        best, order = scores.topk(count, dim=1)
    selected = priors.gather(1, order)
    return Detections(
        _gather(boxes, selected), best, classes.gather(1, order), _gather(coefficients, selected)
    )


def fast_nms(
    boxes: Tensor,
    scores: Tensor,
    coefficients: Tensor,
    *,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.5,
    top_k: int = 200,
    max_detections: int = 100,
) -> Detections:
    """Fast NMS within each class: a suppressed box suppresses too, see :func:`overlapped`.

    As published, a prior whose best score exceeds ``score_threshold`` is a candidate in every class,
    whatever its score there; so nearly always ``max_detections`` are returned.

    Args:
        boxes: (B, A, 4) corner form.
        scores: (B, A, C), background left out.
        coefficients: (B, A, k).
    """
    num_classes = scores.shape[2]
    candidate = scores.amax(dim=2, keepdim=True) > score_threshold
    by_class = torch.where(candidate, scores, EMPTY).transpose(1, 2)
    best, priors = by_class.topk(min(top_k, by_class.shape[2]), dim=2)  # (B, C, K)
    best = best.masked_fill(overlapped(_gather(boxes, priors), iou_threshold), EMPTY)
    classes = torch.arange(num_classes, device=scores.device)[None, :, None].expand_as(priors)
    return _take_best(
        boxes, coefficients, best.flatten(1), priors.flatten(1), classes.flatten(1), max_detections
    )


def cross_class_fast_nms(
    boxes: Tensor,
    scores: Tensor,
    coefficients: Tensor,
    *,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.5,
    top_k: int = 200,
    max_detections: int = 100,
) -> Detections:
    """Fast NMS over each prior's best class; up to ``top_k`` detections.

    ``max_detections`` is not applied, as published (yolact/NOTES.md §7.3). Shapes as
    :func:`fast_nms`.
    """
    best, classes = scores.max(dim=2)
    best = torch.where(best > score_threshold, best, EMPTY)
    best, priors = best.topk(min(top_k, best.shape[1]), dim=1)
    best = best.masked_fill(overlapped(_gather(boxes, priors), iou_threshold), EMPTY)
    return _take_best(boxes, coefficients, best, priors, classes.gather(1, priors), top_k)


def traditional_nms(
    boxes: Tensor,
    scores: Tensor,
    coefficients: Tensor,
    *,
    score_threshold: float = 0.05,
    iou_threshold: float = 0.5,
    input_size: int = 550,
    max_detections: int = 100,
) -> Detections:
    """Greedy NMS within each class, counting whole pixels.

    Boxes are scaled by ``input_size``, sides and overlaps count one pixel more than their difference,
    and a box is suppressed if its IoU is at least ``iou_threshold`` (yolact/NOTES.md §7.4). Shapes as
    :func:`fast_nms`; the number of candidates depends on the values, so this one cannot be captured.
    """
    # "At least the threshold" is "above the number before it"; float64 keeps the comparison exact.
    below = torch.nextafter(
        torch.tensor(iou_threshold, dtype=torch.float64), torch.tensor(0.0).double()
    )
    results = []
    for image_boxes, image_scores, image_coefficients in zip(
        boxes, scores, coefficients, strict=True
    ):
        priors, classes = (image_scores > score_threshold).nonzero(as_tuple=True)
        scores_above = image_scores[priors, classes]
        pixels = image_boxes[priors].double() * input_size
        pixels[:, 2:] += 1
        keep = batched_nms(pixels, scores_above.double(), classes, float(below))[:max_detections]
        priors, classes = priors[keep], classes[keep]
        padding = (0, max_detections - len(keep))
        results.append(
            Detections(
                torch.nn.functional.pad(image_boxes[priors], (0, 0, *padding)),
                torch.nn.functional.pad(scores_above[keep], padding, value=EMPTY),
                torch.nn.functional.pad(classes, padding),
                torch.nn.functional.pad(image_coefficients[priors], (0, 0, *padding)),
            )
        )
    return Detections(*(torch.stack(part) for part in zip(*results, strict=True)))


def pixel_boxes(boxes: Tensor, height: int, width: int, *, truncate: bool) -> Tensor:
    """Relative boxes (N, 4) → ordered, clipped boxes in pixels of the image, float32.

    Coordinates are clipped to [0, width] and [0, height]; with ``truncate`` they are truncated to whole
    pixels, as the published evaluation does (yolact/NOTES.md §7.7).
    """
    first, second = boxes.float().clamp(0, 1).unflatten(-1, (2, 2)).unbind(-2)
    ordered = torch.cat([torch.minimum(first, second), torch.maximum(first, second)], dim=-1)
    pixels = scale_points(ordered, (width, height))
    return pixels.trunc() if truncate else pixels


NMS: dict[str, Callable[..., Detections]] = {
    "fast": fast_nms,
    "cross_class_fast": cross_class_fast_nms,
    "traditional": traditional_nms,
}
