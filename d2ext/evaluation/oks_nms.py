"""Suppression of instances whose keypoints are those of a better one, as published top-down systems
have it.

Letters: N instances of an image, K keypoints.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keypoint_similarity(points: Tensor, areas: Tensor, sigmas: Tensor) -> Tensor:
    """COCO's object keypoint similarity between predictions, each with each.

    exp(-d^2 / (2 a k^2)) with k = 2 sigma and a = the mean of both areas, averaged over all K
    keypoints, whatever their scores (the published code's rule).

    Args:
        points: (N, K, 2) in pixels.
        areas: (N,) square pixels.
        sigmas: (K,) COCO's constants.

    Returns:
        (N, N) float64 in 0..1.
    """
    points, areas = points.double(), areas.double()
    squares = (points[:, None] - points[None]).square().sum(dim=-1)
    mean_areas = (areas[:, None] + areas[None]) / 2
    scale = 2 * mean_areas[..., None] * (2 * sigmas.double()).square()
    return torch.exp(-squares / scale.clamp(min=torch.finfo(scale.dtype).eps)).mean(dim=-1)


def oks_nms(
    points: Tensor,
    scores: Tensor,
    areas: Tensor,
    sigmas: Tensor,
    threshold: float,
    classes: Tensor | None = None,
) -> Tensor:
    """Greedily, best first, select instances whose similarity to all that are selected is at most
    ``threshold``. Of equal scores the earlier one is better.

    Args:
        points: (N, K, 2) in pixels.
        scores: (N,).
        areas: (N,); published: of the padded crops.
        sigmas: (K,).
        threshold: published: 0.9.
        classes: (N,); instances of different classes leave each other alone. None: all are alike.

    Returns:
        indices (n,) int64 of those selected, ascending.
    """
    too_near = keypoint_similarity(points, areas, sigmas) > threshold
    if classes is not None:
        too_near &= classes[:, None] == classes[None]
    alive = torch.ones(len(points), dtype=torch.bool)
    for i in scores.argsort(descending=True, stable=True).tolist():
        if alive[i]:
            alive &= ~too_near[i]
            alive[i] = True
    return alive.nonzero()[:, 0]
