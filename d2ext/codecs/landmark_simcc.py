"""Landmarks ↔ two one-dimensional classifications, one per axis (SimCC, arXiv 2107.03332).

Letters as in :mod:`d2ext.codecs.landmarks`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from d2ext.codecs.landmarks import Decoded, Encoded, LandmarkCodec, Size, inside


@dataclass(frozen=True)
class SimCCCodec(LandmarkCodec):
    """Bins of 1/ratio pixel along each axis. Prediction: logits (N, K, W*ratio), (N, K, H*ratio).

    decode(encode(x)) lies within 0.5/ratio pixels of x in x and in y for points inside the crop, and
    with ``refine`` within 0.02/ratio pixels for points at least one bin inside.

    Attributes:
        ratio: bins per pixel; 2 as published.
        sigma: deviation of the Gaussian labels in bins (published: 6 at 256x192).
        refine: one Newton step on the logarithm of the probabilities around the best bin.
    """

    input_size: Size
    ratio: float = 2.0
    sigma: float = 6.0
    refine: bool = False

    def __post_init__(self) -> None:
        if self.ratio <= 0 or self.sigma <= 0:
            raise ValueError(
                "MODEL.LANDMARKS.SIMCC needs a positive RATIO and SIGMA, not "
                f"{self.ratio} and {self.sigma}."
            )

    @property
    def bins(self) -> tuple[int, int]:
        """Bins along x and y."""
        return round(self.input_size[0] * self.ratio), round(self.input_size[1] * self.ratio)

    def encode(self, points: Tensor, labelled: Tensor) -> Encoded:
        """Two targets (N, K, bins), each with sum 1. Landmarks outside the crop do not count."""
        weights = labelled & inside(points, self.input_size)
        targets = []
        for axis, bins in enumerate(self.bins):
            places = points[..., axis, None].float() * self.ratio - 0.5
            index = torch.arange(bins, device=points.device)
            distance = (index - places.clamp(0, bins - 1)) / self.sigma
            target = torch.exp(-(distance**2) / 2)
            targets.append(target / target.sum(dim=-1, keepdim=True))
        return Encoded(tuple(targets), weights.float())

    def decode(self, prediction: tuple[Tensor, ...]) -> Decoded:
        """Best bin of each axis.

        The score is the smaller of the two axes' largest probabilities, divided by a label's value at
        its peak; at most 1.
        """
        # A label's peak, for a point at the middle of a bin.
        peak = min(1.0, 1 / (self.sigma * math.sqrt(2 * math.pi)))
        places, scores = [], []
        for logits in prediction:
            score, best = logits.float().softmax(dim=-1).max(dim=-1)
            place = best.float()
            if self.refine:
                place = place + self._step(logits.float(), best)
            places.append((place + 0.5) / self.ratio)
            scores.append((score / peak).clamp(max=1))
        return Decoded(torch.stack(places, dim=-1), torch.minimum(*scores))

    @staticmethod
    def _step(logits: Tensor, best: Tensor) -> Tensor:
        """Newton step in bins, at most half a bin; 0 at the ends and where there is no curvature."""
        last = logits.shape[-1] - 1
        around = torch.stack([best - 1, best, best + 1], dim=-1)
        left, middle, right = logits.gather(-1, around.clamp(0, last)).unbind(-1)
        curvature = left - 2 * middle + right
        usable = (best > 0) & (best < last) & (curvature < 0)
        step = (left - right) / 2 / torch.where(usable, curvature, torch.ones_like(curvature))
        return torch.where(usable, step.clamp(-0.5, 0.5), torch.zeros_like(step))

    def mirror(self, prediction: tuple[Tensor, ...], partners: Tensor) -> tuple[Tensor, ...]:
        along_x, along_y = prediction
        return along_x[:, partners].flip(-1), along_y[:, partners]
