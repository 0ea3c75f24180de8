"""Losses on maps, coordinates and bins of landmarks. All are computed in float32.

Letters: N crops, K landmarks, h, w cells of a map. ``weights`` (N, K): 0 takes a landmark out of the
sum, and out of the divisor if the loss divides by the landmarks that count.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

MapLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
PointLoss = Callable[[Tensor], Tensor]


def mse_loss(maps: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Weighted squared difference, mean over all landmarks, including those that do not count.

    With weights of 1 this is the published stacked hourglass's loss of a stack, averaged over images.
    """
    squared = (maps.float() - target) ** 2
    return (squared.mean(dim=(-2, -1)) * weights).sum() / max(weights.numel(), 1)


def adaptive_wing_loss(
    maps: Tensor,
    target: Tensor,
    weights: Tensor,
    *,
    alpha: float = 2.1,
    omega: float = 14.0,
    epsilon: float = 1.0,
    theta: float = 0.5,
    emphasis: float = 10.0,
) -> Tensor:
    """Adaptive wing loss (arXiv 1904.07399): steep near the target where the target is large.

    With d = |map - target| and p = alpha - target: omega ln(1 + (d/epsilon)^p) below theta, and the
    tangent there above it.

    Args:
        maps, target: (N, K, h, w).
        emphasis: cells where the target's 3x3 maximum exceeds 0.2 count 1 + emphasis times.
    """
    maps, target = maps.float(), target.float()
    distance = (maps - target).abs()
    power = alpha - target
    ratio = theta / epsilon
    slope = omega * power * ratio ** (power - 1) / ((1 + ratio**power) * epsilon)
    offset = theta * slope - omega * torch.log1p(ratio**power)
    # The power's gradient at a distance of 0 is not finite for all exponents.
    near = omega * torch.log1p((distance.clamp(min=1e-6) / epsilon) ** power)
    values = torch.where(distance < theta, near, slope * distance - offset)
    important = F.max_pool2d(target, 3, stride=1, padding=1) > 0.2
    values = values * (1 + emphasis * important)
    return (values.mean(dim=(-2, -1)) * weights).sum() / max(weights.numel(), 1)


def cross_entropy_loss(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """One classification over all cells of a landmark, against its target scaled to a sum of 1.

    Minus the target's entropy, so that the minimum is 0; mean over the landmarks that count.
    """
    expected = target.flatten(2)
    sums = expected.sum(dim=-1, keepdim=True)
    weights = weights * (sums[..., 0] > 0)
    return kl_loss(logits.flatten(2), expected / sums.clamp(min=1e-12), weights)


def kl_loss(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Kullback-Leibler divergence of softmax(logits) (N, K, bins) from ``target``.

    Mean over the landmarks that count.
    """
    divergence = F.kl_div(logits.float().log_softmax(dim=-1), target, reduction="none").sum(dim=-1)
    return (divergence * weights).sum() / weights.sum().clamp(min=1)


MAP_LOSSES: dict[str, MapLoss] = {
    "mse": mse_loss,
    "adaptive_wing": adaptive_wing_loss,
    "cross_entropy": cross_entropy_loss,
}


def l1(distance: Tensor) -> Tensor:
    """|d|."""
    return distance.abs()


def smooth_l1(distance: Tensor, beta: float = 2.0) -> Tensor:
    """d^2 / (2 beta) below ``beta`` pixels, |d| - beta/2 above."""
    return F.smooth_l1_loss(distance, torch.zeros_like(distance), reduction="none", beta=beta)


def wing(distance: Tensor, omega: float = 10.0, epsilon: float = 2.0) -> Tensor:
    """Wing loss (arXiv 1711.06753): omega ln(1 + |d|/epsilon) below omega pixels, |d| - C above."""
    distance = distance.abs()
    constant = omega - omega * math.log1p(omega / epsilon)
    return torch.where(
        distance < omega, omega * torch.log1p(distance / epsilon), distance - constant
    )


POINT_LOSSES: dict[str, PointLoss] = {"l1": l1, "smooth_l1": smooth_l1, "wing": wing}


def point_loss(name: str, points: Tensor, target: Tensor, weights: Tensor, width: int) -> Tensor:
    """Loss of coordinates, mean over x and y of the landmarks that count.

    Args:
        name: a key of :data:`POINT_LOSSES`, functions of a distance in pixels.
        points, target: (N, K, 2), in pixels of the crop.
        width: of the crop; the loss is divided by it, so that it does not grow with the crop.
    """
    values = POINT_LOSSES[name](points.float() - target).mean(dim=-1)
    return (values * weights).sum() / weights.sum().clamp(min=1) / width
