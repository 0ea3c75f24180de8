"""Losses of charts, with their published sums and means (NOTES.md, *Training targets and losses*).

Letters: R regions, K points in them, S side of the maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.codecs.densepose import ChartPredictions, SurfacePredictions
from d2ext.data.densepose.parts import COARSE_PARTS, NUM_COARSE_PARTS
from d2ext.systems.densepose.predictor import UV_CONFIDENCES
from d2ext.systems.densepose.targets import DensePoseTargets, GridPoints

_LOG_2PI = math.log(2 * math.pi)


def zero_loss(predictions: SurfacePredictions) -> Tensor:
    """0, from which all maps get gradients of 0."""
    return sum(x.float().sum() * 0 for x in predictions.maps().values())


def coarse_loss(
    predictions: SurfacePredictions, targets: DensePoseTargets, background_weight: float = 1.0
) -> Tensor:
    """Mean cross entropy of the coarse segmentation; 0 if a region of the batch has no mask.

    Args:
        background_weight: of pixels of the background in the mean, beside 1 of a person's
    """
    if targets.coarse is None or len(targets.coarse) == 0:
        return predictions.coarse_segm.float().sum() * 0
    logits = predictions.coarse_segm.float()
    weight = logits.new_ones(logits.shape[1])
    weight[0] = background_weight
    # Of two channels the second is all parts.
    return F.cross_entropy(logits, targets.coarse.clamp(max=logits.shape[1] - 1), weight)


def part_mask_loss(predictions: ChartPredictions, targets: DensePoseTargets) -> Tensor:
    """Mean negative log-likelihood of each pixel's coarse part, whose probability is the sum of its fine
    parts'; 0 if a region of the batch has no mask."""
    fine = predictions.fine_segm.float()
    if targets.coarse is None or len(targets.coarse) == 0:
        return fine.sum() * 0
    table = torch.tensor(COARSE_PARTS, device=fine.device)
    shape = (len(fine), NUM_COARSE_PARTS + 1, *fine.shape[2:])
    coarse = fine.new_zeros(shape).index_add(1, table, fine.softmax(dim=1))
    return F.nll_loss((coarse + 1e-6).log(), targets.coarse)


def isotropic_nll(u: Tensor, v: Tensor, epsilon: float, sigma_2: Tensor) -> Tensor:
    """Negative log-likelihood of errors of U and V, each (K,), with one variance; summed.

    The constant is published as log 2 pi, once for two dimensions.

    Args:
        u, v: estimate minus target
        epsilon: least variance
        sigma_2: before softplus
    """
    variance = F.softplus(sigma_2) + epsilon
    return 0.5 * (_LOG_2PI + 2 * variance.log() + (u**2 + v**2) / variance).sum()


def anisotropic_nll(
    u: Tensor, v: Tensor, epsilon: float, sigma_2: Tensor, kappa_u: Tensor, kappa_v: Tensor
) -> Tensor:
    """The same with a larger variance along (kappa_u, kappa_v): the covariance is
    sigma_2 I + kappa kappa^T."""
    variance = F.softplus(sigma_2) + epsilon
    determinant = variance * (variance + kappa_u**2 + kappa_v**2)
    along = (u * kappa_u + v * kappa_v) ** 2
    distance = (u**2 + v**2) / variance - along / determinant
    return 0.5 * (_LOG_2PI + determinant.log() + distance).sum()


@dataclass(frozen=True)
class ChartLoss:
    """Losses of :class:`ChartPredictions`: ``loss_densepose_I`` (parts at the points), ``_S`` (coarse
    segmentation) and ``_U`` and ``_V``, or ``_UV`` with a confidence."""

    part_weight: float = 1.0
    """Of I, a mean over points."""
    coarse_weight: float = 5.0
    """Of S, a mean over pixels."""
    background_weight: float = 1.0
    """See :func:`coarse_loss`."""
    uv_weight: float = 0.01
    """Of U, V and UV, sums over points (published: 0.0005 with a confidence)."""
    uv_confidence: str = ""
    """"", "iid_iso" or "indep_aniso"."""
    epsilon: float = 0.01
    """Least variance."""
    part_mask_weight: float = 0.0
    """Of the coarse parts of all pixels in I, a mean; 0, as published: I knows points only."""

    def __call__(
        self, predictions: ChartPredictions, targets: DensePoseTargets
    ) -> dict[str, Tensor]:
        """Losses of a batch. Without a point on any part all are zero, S too (published)."""
        points = targets.points.select(targets.points.points.parts >= 0)
        on_parts = points.select(points.points.parts > 0)
        if len(on_parts.points.parts) == 0:
            zero = zero_loss(predictions)
            losses = dict.fromkeys(("U", "V") if self.uv_confidence == "" else ("UV",), zero)
            losses |= {"I": zero, "S": zero}
        else:
            losses = self._uv_losses(predictions, on_parts)
            logits = points.sample(predictions.fine_segm)
            losses["I"] = self.part_weight * F.cross_entropy(logits, points.points.parts)
            losses["S"] = self.coarse_weight * coarse_loss(
                predictions, targets, self.background_weight
            )
            if self.part_mask_weight:
                losses["I"] += self.part_mask_weight * part_mask_loss(predictions, targets)
        return {f"loss_densepose_{name}": value for name, value in losses.items()}

    def _uv_losses(self, predictions: ChartPredictions, points: GridPoints) -> dict[str, Tensor]:
        parts = points.points.parts
        u = points.sample(predictions.u, parts) - points.points.u
        v = points.sample(predictions.v, parts) - points.points.v
        if self.uv_confidence == "":
            zero = torch.zeros_like(u)
            return {
                "U": self.uv_weight * F.smooth_l1_loss(u, zero, reduction="sum"),
                "V": self.uv_weight * F.smooth_l1_loss(v, zero, reduction="sum"),
            }
        confidences = UV_CONFIDENCES[self.uv_confidence]
        spread = [points.sample(getattr(predictions, name), parts) for name in confidences]
        nll: Callable[..., Tensor] = isotropic_nll if len(spread) == 1 else anisotropic_nll
        return {"UV": self.uv_weight * nll(u, v, self.epsilon, *spread)}
