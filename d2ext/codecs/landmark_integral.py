"""Landmarks ↔ maps whose expectation is the landmark: integral regression (arXiv 1711.08229).

Letters as in :mod:`d2ext.codecs.landmarks`. Cell coordinates count from the centre of the first cell.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from d2ext.codecs.landmarks import Decoded, Encoded, LandmarkCodec, Size, inside, to_pixels


def mean_cell(probabilities: Tensor) -> Tensor:
    """Mean position under maps (N, K, h, w) that sum to 1: cell coordinates (N, K, 2)."""
    height, width = probabilities.shape[-2:]
    columns = torch.arange(width, device=probabilities.device, dtype=torch.float32)
    rows = torch.arange(height, device=probabilities.device, dtype=torch.float32)
    x = (probabilities.sum(dim=-2) * columns).sum(dim=-1)
    y = (probabilities.sum(dim=-1) * rows).sum(dim=-1)
    return torch.stack([x, y], dim=-1)


def cell_probabilities(maps: Tensor) -> Tensor:
    """(N, K, h, w) → the same, float32, sum 1 for each landmark."""
    return maps.float().flatten(2).softmax(dim=-1).view_as(maps)


@dataclass(frozen=True)
class IntegralCodec(LandmarkCodec):
    """The expectation over a map. Prediction: one tensor (N, K, h, w), not normalised.

    The point is the mean of the cells' positions under softmax(map): it is never outside the outermost
    cells' centres and, as every cell has some weight, biased towards the middle. If softmax(map) is a
    bump of deviation sigma, points at least 3 sigma inside the map are decoded within 0.05 cells.

    The score is the probability within two cells of the point, in 0..1.

    Attributes:
        map_size: (w, h).
        geometry: see :func:`d2ext.codecs.landmarks.to_cells`.
    """

    input_size: Size
    map_size: Size
    geometry: str = "continuous"

    def encode(self, points: Tensor, labelled: Tensor) -> Encoded:
        """One target (N, K, 2): x/W, y/H. Landmarks outside the crop do not count."""
        weights = labelled & inside(points, self.input_size)
        return Encoded((points.float() / points.new_tensor(self.input_size),), weights.float())

    def points(self, maps: Tensor) -> Tensor:
        """(N, K, h, w) → pixel coordinates (N, K, 2); can be differentiated."""
        cells = mean_cell(cell_probabilities(maps))
        return to_pixels(cells, self.input_size, self.map_size, self.geometry)

    def decode(self, prediction: tuple[Tensor, ...]) -> Decoded:
        (maps,) = prediction
        probabilities = cell_probabilities(maps)
        cells = mean_cell(probabilities)
        width, height = self.map_size
        dx = torch.arange(width, device=maps.device) - cells[..., :1]
        dy = torch.arange(height, device=maps.device) - cells[..., 1:]
        near = (dy**2)[..., :, None] + (dx**2)[..., None, :] <= 4
        scores = (probabilities * near).sum(dim=(-2, -1)).clamp(max=1)
        return Decoded(to_pixels(cells, self.input_size, self.map_size, self.geometry), scores)

    def mirror(self, prediction: tuple[Tensor, ...], partners: Tensor) -> tuple[Tensor, ...]:
        (maps,) = prediction
        return (maps[:, partners].flip(-1),)
