"""From an image to CenterNet's network input, and back from its cells (published code).

The published detector either pads the image to a divisible size ("keep resolution"), or warps it into a
fixed size at its aspect ratio. Both are affine maps with one scale.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from d2ext.codecs.affine import affine_matrix, invert_affine
from d2ext.codecs.canvas import Canvas, centered
from d2ext.layers.opencv_resample import warp_like_opencv


@dataclass(frozen=True)
class WarpedCanvas(Canvas):
    """A canvas of fixed size, into which images are warped."""

    inverse: tuple[tuple[float, ...], ...]
    """Map from the canvas to the scaled image."""

    def draw(self, images: Tensor) -> Tensor:
        return warp_like_opencv(images, self.inverse, *self.size)


def padded_canvas(size: tuple[int, int], test_scale: float, divisibility: int) -> Canvas:
    """An image of ``size`` (height, width), resized by ``test_scale``, centred on a canvas of the next
    larger (published quirk: never equal) divisible size."""
    height, width = (max(1, int(side * test_scale)) for side in size)
    rows, columns = ((side // divisibility + 1) * divisibility for side in (height, width))
    return centered((height, width), (rows, columns), test_scale)


def warped_canvas(
    size: tuple[int, int], test_scale: float, canvas_size: tuple[int, int]
) -> WarpedCanvas:
    """An image of ``size`` (height, width), resized by ``test_scale`` and warped into ``canvas_size``.

    Published quirk: the warp's scale is that of the image before resizing, so ``test_scale`` zooms.
    """
    height, width = (max(1, int(side * test_scale)) for side in size)
    rows, columns = canvas_size
    matrix = affine_matrix((width / 2, height / 2), float(max(size)), (columns, rows))
    inverse = invert_affine(matrix)
    return WarpedCanvas(
        size=canvas_size,
        content=(height, width),
        scale=test_scale / float(inverse[0, 0]),
        corner=(float(inverse[0, 2]) / test_scale, float(inverse[1, 2]) / test_scale),
        inverse=tuple(map(tuple, inverse.tolist())),
    )
