"""How an image is placed in a network's input, and how cells of its maps map back to the image.

Coordinates are continuous pixels and cells: (0, 0) is the outer corner of the first one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Canvas:
    """The input of a network, with a scaled image placed on it."""

    size: tuple[int, int]
    """(height, width) of the input."""
    content: tuple[int, int]
    """(height, width) of the scaled image."""
    scale: float
    """Pixels of the input per pixel of the image."""
    corner: tuple[float, float]
    """x, y of the input's corner, in pixels of the image."""

    def draw(self, images: Tensor) -> Tensor:
        """Images (..., h, w) of at most :attr:`content`, centred → (..., *size), zero elsewhere."""
        top, left = _margins(self.content, self.size)
        height, width = images.shape[-2:]
        canvas = images.new_zeros((*images.shape[:-2], *self.size))
        canvas[..., top : top + height, left : left + width] = images
        return canvas

    def map_size(self, stride: int) -> tuple[int, int]:
        """(height, width) in cells of maps of this stride; networks round it up."""
        return -(-self.size[0] // stride), -(-self.size[1] // stride)

    def to_image(self, points: Tensor, stride: int) -> Tensor:
        """Cells (..., 2n) x, y, x, y, ... of maps of this stride → pixels of the image.

        Published quirk: a cell's side is the input's side over the number of cells, which is a little
        less than the stride where the input's side is one less than a multiple of it.
        """
        return scale_points(points, self._cell(stride), self.corner)

    def affine(self, stride: int) -> Tensor:
        """:meth:`to_image` as (2, 3) float64."""
        (width, height), (x, y) = self._cell(stride), self.corner
        return torch.tensor([[width, 0, x], [0, height, y]], dtype=torch.float64)

    def _cell(self, stride: int) -> tuple[float, float]:
        """(width, height) of a cell in pixels of the image."""
        rows, columns = self.map_size(stride)
        return self.size[1] / columns / self.scale, self.size[0] / rows / self.scale


def centered(content: tuple[int, int], size: tuple[int, int], scale: float = 1.0) -> Canvas:
    """Canvas of ``size`` with an image of ``content`` (height, width), centre pixel on centre pixel."""
    top, left = _margins(content, size)
    return Canvas(size, content, scale, (-left / scale, -top / scale))


def _margins(content: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Rows above and columns left of the centred image."""
    return size[0] // 2 - content[0] // 2, size[1] // 2 - content[1] // 2


def scale_points(
    points: Tensor, scale: tuple[float, float], shift: tuple[float, float] = (0.0, 0.0)
) -> Tensor:
    """Coordinates (..., 2n) x, y, x, y, ... times ``scale`` plus ``shift``, both (x, y)."""
    # Numbers: tensors of them would wait for the device.
    x, y = points.unflatten(-1, (-1, 2)).unbind(-1)
    x, y = x * scale[0], y * scale[1]
    if shift != (0.0, 0.0):
        x, y = x + shift[0], y + shift[1]
    return torch.stack([x, y], dim=-1).flatten(-2)
