"""Losses on heat maps and on values at cells of maps.

Shared by CornerNet (arXiv 1808.01244), CenterNet with triplets (arXiv 1904.08189) and CenterNet with
points (arXiv 1904.07850). All are computed in float32.

Letters: B images, C channels, H x W cells, N object slots of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.codecs.heatmaps import gather_at

# Added to the number of objects or values that a regression loss is divided by (published codes).
_COUNT_EPSILON = 1e-4
# Focal loss (arXiv 1808.01244, section 3.2; published codes): exponents of the probability's distance
# from 1 or 0, and of the target's distance from 1; smallest probability.
_ALPHA, _BETA = 2.0, 4.0
_PROBABILITY_EPSILON = 1e-4


def penalty_reduced_focal_loss(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Focal loss against Gaussian targets (arXiv 1808.01244, equation 1).

    Cells where the target is exactly 1 are positives; the closer another cell's target is to 1, the
    less it counts. The sum is divided by the number of positives in this process's batch, if any.

    Args:
        logits: (..., H, W), before the sigmoid. Probabilities are clamped to [1e-4, 1 - 1e-4], without
            gradient outside.
        target: shape of ``logits``, in 0..1.
        mask: weight of each cell, broadcast to ``logits``; does not change the divisor.

    Returns:
        scalar float32.
    """
    probability = logits.float().sigmoid().clamp(_PROBABILITY_EPSILON, 1 - _PROBABILITY_EPSILON)
    positive = target == 1
    complement = 1 - probability
    # The probabilities of the wrong and of the right answer.
    distance = torch.where(positive, complement, probability)
    confidence = torch.where(positive, probability, complement)
    weight = torch.where(positive, torch.ones_like(target), (1 - target) ** _BETA)
    values = -torch.log(confidence) * distance**_ALPHA * weight
    if mask is not None:
        values = values * mask
    return values.sum() / positive.sum().clamp(min=1)


def l1_at_cells(prediction: Tensor, index: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference at cells, over the values that the mask selects (CenterNet).

    Args:
        prediction: (B, C, H, W).
        index: (B, N) int64 cells, y * W + x; any valid one in empty slots.
        target: (B, N, C).
        mask: (B, N), or (B, N, C) for each value: 1 or True where a target counts.

    Returns:
        scalar float32: sum / (number of values + 1e-4); an object counts C values.
    """
    if mask.dim() == 2:
        mask = mask[..., None]
    weight = mask.to(torch.float32).expand_as(target)
    difference = gather_at(prediction, index).float() * weight - target * weight
    return difference.abs().sum() / (weight.sum() + _COUNT_EPSILON)


def smooth_l1_at_cells(prediction: Tensor, index: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Smooth L1 (beta 1) at cells, divided by the number of objects (CornerNet).

    Args:
        prediction: (B, C, H, W).
        index: (B, N) int64 cells, y * W + x; any valid one in empty slots.
        target: (B, N, C).
        mask: (B, N), 1 or True where a slot holds an object.

    Returns:
        scalar float32: sum over objects and channels / (number of objects + 1e-4).
    """
    weight = mask.to(torch.float32)
    values = F.smooth_l1_loss(gather_at(prediction, index).float(), target, reduction="none")
    return (values * weight[..., None]).sum() / (weight.sum() + _COUNT_EPSILON)


def dense_l1(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference of whole maps, over the values that the mask selects.

    Args:
        prediction, target, mask: (B, C, H, W); mask 1 or True where a target counts.

    Returns:
        scalar float32: sum / (number of values + 1e-4).
    """
    weight = mask.to(torch.float32)
    difference = prediction.float() * weight - target * weight
    return difference.abs().sum() / (weight.sum() + _COUNT_EPSILON)
