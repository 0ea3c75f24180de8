"""Landmarks ↔ maps whose expectation is the landmark: integral regression (arXiv 1711.08229).

Letters as in :mod:`d2ext.codecs.landmarks`. Cell coordinates count from the centre of the first cell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from d2ext.codecs.landmarks import (
    Decoded,
    Encoded,
    LandmarkCodec,
    Size,
    inside,
    to_cells,
    to_pixels,
)

DEBIAS_FORMULAS = ("exact", "published")
# A flat map has no peak that could be freed.
_FLAT = 1e-6
# Smallest probability that has a logarithm.
_LEAST = 1e-30


def mean_cell(probabilities: Tensor) -> Tensor:
    """Mean position under maps (N, K, h, w) that sum to 1: cell coordinates (N, K, 2)."""
    height, width = probabilities.shape[-2:]
    columns = torch.arange(width, device=probabilities.device, dtype=torch.float32)
    rows = torch.arange(height, device=probabilities.device, dtype=torch.float32)
    x = (probabilities.sum(dim=-2) * columns).sum(dim=-1)
    y = (probabilities.sum(dim=-1) * rows).sum(dim=-1)
    return torch.stack([x, y], dim=-1)


@dataclass(frozen=True)
class IntegralCodec(LandmarkCodec):
    """The expectation over a map. Prediction: one tensor (N, K, h, w), not normalised.

    The point is the mean of the cells' positions under softmax(beta * map), so never a point outside the
    outermost cells' centres, and, as every cell has some weight, one that lies too near the middle.
    ``debias`` takes out the share that a map which is 0 away from its peak gives to all cells alike.
    With C the sum of exp(beta * map), ``formula`` is

    - "exact": x' = (x - m n/C) / (1 - n/C), n the number of cells and m the mean of their positions: of
      the mass C, n lies evenly on all cells, and what remains is the peak's;
    - "published": x' = C/(C - 1) * (x - 1/(2C)), x from 0 to 1, as the published code of debiased
      integral regression has it. That takes out the mass of one cell instead of n, so about 1/n of the
      bias, and as cell i of w is at i/w, its middle 1/2 is half a cell beyond that of the positions.

    The score is the probability within two cells of the point, in 0..1.

    For maps whose softmax is a bump of deviation sigma, points at least 3 sigma inside the map are
    decoded within 0.05 cells.

    Attributes:
        map_size: (w, h).
        beta: factor on maps.
        debias, formula: see above. Maps of which the share that is to be taken out is more than half
            are left as they are: they have no peak.
        geometry: see :func:`d2ext.codecs.landmarks.to_cells`.
    """

    input_size: Size
    map_size: Size
    beta: float = 1.0
    debias: bool = False
    geometry: str = "continuous"
    formula: str = "exact"

    def __post_init__(self) -> None:
        if self.formula not in DEBIAS_FORMULAS:
            raise ValueError(
                f"MODEL.LANDMARKS.INTEGRAL.DEBIAS_FORMULA is one of {DEBIAS_FORMULAS}, not "
                f"'{self.formula}'."
            )

    def encode(self, points: Tensor, labelled: Tensor) -> Encoded:
        """One target (N, K, 2): x/W, y/H. Landmarks outside the crop do not count."""
        weights = labelled & inside(points, self.input_size)
        return Encoded((points.float() / points.new_tensor(self.input_size),), weights.float())

    def probabilities(self, maps: Tensor) -> Tensor:
        """(N, K, h, w) → the same, float32, sum 1 for each landmark."""
        return (self.beta * maps.float()).flatten(2).softmax(dim=-1).view_as(maps)

    def log_mass(self, maps: Tensor) -> Tensor:
        """(N, K, h, w) → (N, K), the logarithm of the sum of exp(beta * map)."""
        return (self.beta * maps.float()).flatten(2).logsumexp(dim=-1)

    def average(self, one: Tensor, other: Tensor) -> Tensor:
        """A map (N, K, h, w) that has the mean probabilities of two and their mean :meth:`log_mass`.

        Without the latter ``debias`` would not know how much of the mass is the peak's. A map averaged
        with itself gives that map.
        """
        mean = (self.probabilities(one) + self.probabilities(other)) / 2
        mass = (self.log_mass(one) + self.log_mass(other)) / 2
        return (mean.clamp(min=_LEAST).log() + mass[..., None, None]) / self.beta

    def points(self, maps: Tensor) -> Tensor:
        """(N, K, h, w) → pixel coordinates (N, K, 2); can be differentiated."""
        cells = mean_cell(self.probabilities(maps))
        if self.debias:
            exact = self.formula == "exact"
            width, height = self.map_size
            # What lies evenly on all cells, and its share of the whole mass.
            even = math.log(width * height) if exact else 0.0
            share = torch.exp(even - self.log_mass(maps))
            middle = [(size - 1) / 2 if exact else size / 2 for size in self.map_size]
            freed = [
                (cells[..., axis] - middle[axis] * share) / (1 - share).clamp(min=_FLAT)
                for axis in (0, 1)
            ]
            cells = torch.where(share[..., None] < 0.5, torch.stack(freed, dim=-1), cells)
        return to_pixels(cells, self.input_size, self.map_size, self.geometry)

    def decode(self, prediction: tuple[Tensor, ...]) -> Decoded:
        (maps,) = prediction
        points = self.points(maps)
        cells = to_cells(points, self.input_size, self.map_size, self.geometry)
        width, height = self.map_size
        dx = torch.arange(width, device=maps.device) - cells[..., :1]
        dy = torch.arange(height, device=maps.device) - cells[..., 1:]
        near = (dy**2)[..., :, None] + (dx**2)[..., None, :] <= 4
        scores = (self.probabilities(maps) * near).sum(dim=(-2, -1)).clamp(max=1)
        return Decoded(points, scores)

    def mirror(self, prediction: tuple[Tensor, ...], partners: Tensor) -> tuple[Tensor, ...]:
        (maps,) = prediction
        return (maps[:, partners].flip(-1),)
