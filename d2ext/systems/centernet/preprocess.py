"""From an image to CenterNet's network input, and back from its cells (published code).

The published detector either pads the image to what the network divides, its size kept ("keep
resolution"), or warps it into a fixed size, its aspect ratio kept. Both are affine maps with one scale.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from d2ext.codecs.affine import affine_matrix, invert_affine
from d2ext.layers.opencv_resample import resize_like_opencv, warp_like_opencv


class CellsToImage(NamedTuple):
    """Cells of the output → pixels of the image: x, y → scale * x + x_shift, scale * y + y_shift."""

    scale: float
    x_shift: float
    y_shift: float

    def apply(self, points: Tensor) -> Tensor:
        """(..., 2n) coordinates x, y, x, y, ... → the same in pixels of the image."""
        pairs = points.unflatten(-1, (-1, 2))
        x = pairs[..., 0] * self.scale + self.x_shift
        y = pairs[..., 1] * self.scale + self.y_shift
        return torch.stack([x, y], dim=-1).flatten(-2)


class Placement(NamedTuple):
    """How an image lies in the network's input."""

    resized: tuple[int, int]
    """(height, width) of the image at the test scale."""
    canvas: tuple[int, int]
    """(height, width) of the network's input."""
    inverse: tuple[tuple[float, ...], ...] | None
    """Map of the warp from the canvas to the resized image; None: it is only moved, centre on centre."""
    back: CellsToImage
    """From cells of the output to pixels of the image before it was resized."""

    def draw(self, image: Tensor) -> Tensor:
        """(3, H, W) → (3, height, width) of the canvas in 0..255, zero where the image is not."""
        image = resize_like_opencv(image, *self.resized) if self._resizes(image) else image
        if self.inverse is not None:
            return warp_like_opencv(image, self.inverse, *self.canvas)
        canvas = image.new_zeros((image.shape[0], *self.canvas))
        top, left = (c // 2 - r // 2 for c, r in zip(self.canvas, self.resized, strict=True))
        canvas[:, top : top + self.resized[0], left : left + self.resized[1]] = image
        return canvas

    def _resizes(self, image: Tensor) -> bool:
        return tuple(image.shape[-2:]) != self.resized


def placement(
    size: tuple[int, int],
    test_scale: float,
    *,
    stride: int,
    divisibility: int,
    fixed_size: tuple[int, int] | None = None,
) -> Placement:
    """How an image of ``size`` (height, width) is shown to the network.

    The image is resized by ``test_scale`` first. Then, without ``fixed_size``, it is put on a canvas of
    the next size that is larger (published quirk: never equal) and divisible, centre on centre; or it
    is warped into ``fixed_size``, with the scale that the image had before it was resized (published
    quirk: ``test_scale`` therefore zooms).

    Args:
        stride: input pixels of an output cell.
        divisibility: of the network input.
        fixed_size: (height, width), both multiples of ``divisibility``.
    """
    height, width = (max(1, int(side * test_scale)) for side in size)
    inverse: tuple[tuple[float, ...], ...] | None = None
    if fixed_size is None:
        rows, columns = ((side // divisibility + 1) * divisibility for side in (height, width))
        center = (float(width // 2), float(height // 2))
        side = float(columns)
    else:
        rows, columns = fixed_size
        center = (width / 2, height / 2)
        side = float(max(size))
        matrix = affine_matrix(center, side, (columns, rows))
        inverse = tuple(map(tuple, invert_affine(matrix).tolist()))
    cells = (columns // stride, rows // stride)
    back = invert_affine(affine_matrix(center, side, cells)) / test_scale
    to_image = CellsToImage(float(back[0, 0]), float(back[0, 2]), float(back[1, 2]))
    return Placement((height, width), (rows, columns), inverse, to_image)
