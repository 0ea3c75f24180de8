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


def place_image(
    image: Tensor,
    test_scale: float,
    *,
    stride: int,
    divisibility: int,
    fixed_size: tuple[int, int] | None = None,
) -> tuple[Tensor, CellsToImage]:
    """One image on the canvas that the network sees.

    The image is resized by ``test_scale`` first. Then, without ``fixed_size``, it is put on a canvas of
    the next size that is larger (published quirk: never equal) and divisible, centre on centre; or it
    is warped into ``fixed_size``, with the scale that the image had before it was resized (published
    quirk: ``test_scale`` therefore zooms).

    Args:
        image: (3, H, W), uint8 or float in 0..255.
        stride: input pixels of an output cell.
        divisibility: of the network input.
        fixed_size: (height, width), both multiples of ``divisibility``.

    Returns:
        (3, height, width) in 0..255, zero where the image is not; and the way back from cells of the
        output to pixels of ``image``.
    """
    full_height, full_width = image.shape[-2:]
    height = max(1, int(full_height * test_scale))
    width = max(1, int(full_width * test_scale))
    if (height, width) != (full_height, full_width):
        image = resize_like_opencv(image, height, width)
    if fixed_size is None:
        rows = (height // divisibility + 1) * divisibility
        columns = (width // divisibility + 1) * divisibility
        center = (float(width // 2), float(height // 2))
        side = float(columns)
        canvas = image.new_zeros((image.shape[0], rows, columns))
        top, left = rows // 2 - height // 2, columns // 2 - width // 2
        canvas[:, top : top + height, left : left + width] = image
    else:
        rows, columns = fixed_size
        side = float(max(full_height, full_width))
        center = (width / 2, height / 2)
        matrix = affine_matrix(center, side, (columns, rows))
        canvas = warp_like_opencv(image, invert_affine(matrix).tolist(), rows, columns)
    cells = (columns // stride, rows // stride)
    back = invert_affine(affine_matrix(center, side, cells)) / test_scale
    return canvas, CellsToImage(float(back[0, 0]), float(back[0, 2]), float(back[1, 2]))
