"""Landmarks ↔ predictions: the interface of the codecs, geometry, and coordinate regression.

A codec turns points in the network's input into training targets, and predictions into points. Points
are continuous pixel coordinates of the crop: (0, 0) is the outer corner of the first pixel, whose
centre is (0.5, 0.5), as in Detectron2's ``Keypoints``.

Letters: N crops, K landmarks, W, H size of the crop in pixels, w, h of a map in cells.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

GEOMETRIES = ("continuous", "index", "udp")
Size = tuple[int, int]
"""(width, height)."""


class Encoded(NamedTuple):
    """Training targets."""

    targets: tuple[Tensor, ...]
    """float32; their meaning depends on the codec."""
    weights: Tensor
    """(N, K) float32 in 0..1; 0: the landmark does not count."""


class Decoded(NamedTuple):
    """Landmarks decoded from crops."""

    points: Tensor
    """(N, K, 2) float32, continuous pixel coordinates of the crop."""
    scores: Tensor
    """(N, K) float32."""


class LandmarkCodec(ABC):
    """One encoding of landmarks as a network's output.

    A prediction is a tuple of tensors, each with N and K as its first dimensions.
    """

    input_size: Size

    @abstractmethod
    def encode(self, points: Tensor, labelled: Tensor) -> Encoded:
        """Training targets.

        Args:
            points: (N, K, 2) float, also outside the crop; any finite value where not labelled.
            labelled: (N, K) bool.
        """

    @abstractmethod
    def decode(self, prediction: tuple[Tensor, ...]) -> Decoded:
        """Landmarks of a prediction."""

    @abstractmethod
    def mirror(self, prediction: tuple[Tensor, ...], partners: Tensor) -> tuple[Tensor, ...]:
        """Turn the prediction for a mirrored crop into one for the crop.

        Args:
            partners: (K,) int64, the landmark that each one becomes when mirrored.
        """


def to_cells(points: Tensor, input_size: Size, map_size: Size, geometry: str) -> Tensor:
    """Pixels of the crop → cells of a map, where the centre of cell i is at i.

    Args:
        points: (..., 2) continuous pixel coordinates.
        geometry: "continuous": pixels and cells are areas, x/W*w - 0.5, without bias; "index": pixel
            index times w/W, the usual way, in which mirrored maps are off by one cell less one pixel;
            "udp": pixel index times (w-1)/(W-1), which aligns the corner pixels' and cells' centres
            (arXiv 1911.07524).

    Raises:
        ValueError: another geometry.
    """
    (sx, tx), (sy, ty) = _scales_and_shifts(input_size, map_size, geometry)
    return torch.stack([points[..., 0] * sx + tx, points[..., 1] * sy + ty], dim=-1)


def to_pixels(cells: Tensor, input_size: Size, map_size: Size, geometry: str) -> Tensor:
    """Inverse of :func:`to_cells`."""
    (sx, tx), (sy, ty) = _scales_and_shifts(input_size, map_size, geometry)
    return torch.stack([(cells[..., 0] - tx) / sx, (cells[..., 1] - ty) / sy], dim=-1)


def _scales_and_shifts(
    input_size: Size, map_size: Size, geometry: str
) -> list[tuple[float, float]]:
    """(scale, shift) from pixels to cells, of x and of y, as numbers: a tensor would have to be copied
    to the device, which a CUDA graph cannot do."""
    if geometry not in GEOMETRIES:
        raise ValueError(f'The geometry of maps is one of {GEOMETRIES}, not "{geometry}".')
    less = 1 if geometry == "udp" else 0
    result = []
    for cells, pixels in zip(map_size, input_size, strict=True):
        scale = (cells - less) / (pixels - less)
        result.append((scale, -0.5 if geometry == "continuous" else -0.5 * scale))
    return result


def inside(points: Tensor, size: Size) -> Tensor:
    """(..., 2) points → (...,) bool: within 0..W and 0..H."""
    return ((points >= 0) & (points <= points.new_tensor(size))).all(dim=-1)


@dataclass(frozen=True)
class RegressionCodec(LandmarkCodec):
    """Coordinates as numbers: x/W and y/H. Prediction: one tensor (N, K, 2). Exact anywhere.

    The prediction has no information for a score: it is 1.
    """

    input_size: Size

    def encode(self, points: Tensor, labelled: Tensor) -> Encoded:
        """One target (N, K, 2). Landmarks outside the crop count too."""
        return Encoded((points.float() / points.new_tensor(self.input_size),), labelled.float())

    def decode(self, prediction: tuple[Tensor, ...]) -> Decoded:
        (values,) = prediction
        width, height = self.input_size
        values = values.float()
        points = torch.stack([values[..., 0] * width, values[..., 1] * height], dim=-1)
        return Decoded(points, torch.ones_like(points[..., 0]))

    def mirror(self, prediction: tuple[Tensor, ...], partners: Tensor) -> tuple[Tensor, ...]:
        (values,) = prediction
        values = values[:, partners]
        return (torch.stack([1 - values[..., 0], values[..., 1]], dim=-1),)
