"""From outlines to pixels.

Coordinates are continuous: the pixel in column x and row y covers [x, x+1) x [y, y+1), so its
centre lies at (x + 0.5, y + 0.5). Matrices are 2 x 3 and map a thing's own frame (or the world) to
these coordinates.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np

from d2ext.data.shapes.classes import Outline

__all__ = ["Raster", "apply", "compose", "draw_details", "fixed_point", "invert", "rasterize"]

# OpenCV takes polygon corners as integers with this many binary digits behind the point.
_SHIFT = 4
# Sub-pixels per pixel side: a pixel belongs to a mask if at least half of its sub-pixels are
# covered. Things wider than 96 px take the coarser grid; there the edge is a small part of the
# area.
_FINE, _COARSE, _COARSE_FROM = 4, 2, 96


def compose(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """The 2 x 3 matrix of "first `inner`, then `outer`"."""
    result = outer[:, :2] @ inner
    result[:, 2] += outer[:, 2]
    return result


def invert(matrix: np.ndarray) -> np.ndarray:
    """Inverse of a 2 x 3 affine matrix."""
    (a, b, tx), (c, d, ty) = matrix.tolist()
    det = a * d - b * c
    a, b, c, d = d / det, -b / det, -c / det, a / det
    return np.array([[a, b, -(a * tx + b * ty)], [c, d, -(c * tx + d * ty)]])


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(n, 2) points through a 2 x 3 matrix."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def fixed_point(points: np.ndarray, x0: int, y0: int, factor: int = 1) -> np.ndarray:
    """Points as OpenCV's fixed-point pixel indices in a window at (x0, y0), refined by `factor`."""
    shifted = (points - (x0, y0)) * factor - 0.5
    return np.rint(shifted * (1 << _SHIFT)).astype(np.int32)


@dataclass(frozen=True)
class Raster:
    """A thing's pixels, before anything in front of it is taken away.

    Attributes:
        x0, y0: the window's first column and row in the image.
        alpha: (h, w) uint8, covered part of the pixel times 255.
        mask: (h, w) uint8, 1 where at least half of the pixel is covered.
        area: number of mask pixels.
        points: the outline's points in the image.
    """

    x0: int
    y0: int
    alpha: np.ndarray
    mask: np.ndarray
    area: int
    points: np.ndarray

    @property
    def window(self) -> tuple[slice, slice]:
        height, width = self.mask.shape
        return slice(self.y0, self.y0 + height), slice(self.x0, self.x0 + width)


def rasterize(outline: Outline, matrix: np.ndarray, height: int, width: int) -> Raster | None:
    """Pixels of a thing inside a height x width image; None if it covers no pixel of it."""
    points = apply(matrix, outline.points)
    # Marks lie inside the parts, so the points' bounds are the outline's.
    (left, top), (right, bottom) = points.min(0).tolist(), points.max(0).tolist()
    x0, y0 = max(math.floor(left), 0), max(math.floor(top), 0)
    x1, y1 = min(math.ceil(right) + 1, width), min(math.ceil(bottom) + 1, height)
    if x0 >= x1 or y0 >= y1:
        return None
    factor = _FINE if max(right - left, bottom - top) < _COARSE_FROM else _COARSE
    fine = np.zeros(((y1 - y0) * factor, (x1 - x0) * factor), np.uint8)
    shapes = outline.split(fixed_point(points, x0, y0, factor))
    for part in shapes[: len(outline.parts)]:
        cv2.fillPoly(fine, part, 255, shift=_SHIFT)
    alpha = cv2.resize(fine, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA)
    mask = cv2.threshold(alpha, 127, 1, cv2.THRESH_BINARY)[1]
    area = cv2.countNonZero(mask)
    return Raster(x0, y0, alpha, mask, area, points) if area else None


def draw_details(
    canvas: np.ndarray, outline: Outline, raster: Raster, tones: list[list[int]], edge: int
) -> None:
    """Paint a thing's marks and trace its parts in `canvas`, the window of `raster`, in place.

    Args:
        tones: colours of white, ink and accent.
        edge: thickness of the traced line in pixels; 0: no line.
    """
    shapes = outline.split(fixed_point(raster.points, raster.x0, raster.y0))
    n = len(outline.parts)
    for mark, contours in zip(outline.marks, shapes[n:], strict=True):
        cv2.fillPoly(canvas, contours, tones[mark.tone], lineType=cv2.LINE_AA, shift=_SHIFT)
    if edge:
        for part in shapes[:n]:
            cv2.polylines(canvas, part, True, tones[1], edge, cv2.LINE_AA, _SHIFT)
