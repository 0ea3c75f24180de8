"""Which point of a mesh each pixel shows: an exact depth buffer, in NumPy."""

from dataclasses import dataclass

import numpy as np

__all__ = ["Shown", "shown_points"]

# Triangles overlap by this share of their size: rounding would leave cracks between them.
_EDGE = 1e-9


@dataclass(frozen=True)
class Shown:
    """What n pixels of a window show of a mesh.

    Attributes:
        pixels: (n,) int64, row times the window's width plus column; in order.
        triangles: (n,) int64.
        weights: (n, 3) float64 of the triangle's corners, sum 1.
    """

    pixels: np.ndarray
    triangles: np.ndarray
    weights: np.ndarray


def shown_points(
    points: np.ndarray, triangles: np.ndarray, window: tuple[int, int, int, int], factor: int = 1
) -> Shown:
    """The nearest point of a closed mesh behind the centre of each pixel, of those that have one.

    Args:
        points: (V, 3) float64: x, y in pixels (continuous), z larger is farther away.
        triangles: (T, 3), counter-clockwise from outside.
        window: left, top, width, height of the part of the image, pixels.
        factor: sub-pixels per pixel along a side; the window of the result is as much larger.
    """
    left, top, width, height = (v * factor for v in window)
    x, y = (points[:, :2] * factor - (left + 0.5, top + 0.5)).T  # centres at whole numbers
    z = points[:, 2]
    # Twice the area, negative for triangles that turn to the one who looks.
    xs, ys = x[triangles].T, y[triangles].T
    area = (xs[1] - xs[0]) * (ys[2] - ys[0]) - (ys[1] - ys[0]) * (xs[2] - xs[0])
    x0, x1 = np.ceil(xs.min(axis=0)).clip(0), np.floor(xs.max(axis=0)).clip(max=width - 1)
    y0, y1 = np.ceil(ys.min(axis=0)).clip(0), np.floor(ys.max(axis=0)).clip(max=height - 1)
    front = np.flatnonzero((area < -1e-9) & (x0 <= x1) & (y0 <= y1))
    xs, ys, area = xs[:, front], ys[:, front], area[front]
    x0, y0 = x0[front].astype(np.int64), y0[front].astype(np.int64)
    columns, rows = x1[front].astype(np.int64) - x0 + 1, y1[front].astype(np.int64) - y0 + 1
    # Every pixel of every triangle's bounds.
    number = np.repeat(np.arange(len(front)), columns * rows)
    offset = np.arange(len(number)) - np.repeat(
        np.cumsum(columns * rows) - columns * rows, columns * rows
    )
    row, column = np.divmod(offset, columns[number])
    px, py = x0[number] + column, y0[number] + row
    # Two of the three weights: p x + q y + r, 0 on the opposite edge.
    tables = []
    for a, b in ((1, 2), (2, 0)):
        dx, dy = (xs[b] - xs[a]) / area, (ys[b] - ys[a]) / area
        tables += [-dy, dx, dy * xs[a] - dx * ys[a]]
    p0, q0, r0, p1, q1, r1 = np.stack(tables)[:, number]
    first, second = p0 * px + q0 * py + r0, p1 * px + q1 * py + r1
    third = 1 - first - second
    inside = np.flatnonzero(np.minimum(np.minimum(first, second), third) >= -_EDGE)
    number = number[inside]
    weights = np.stack([first[inside], second[inside], third[inside]], axis=1)
    shown = front[number]
    depth = (z[triangles[shown]] * weights).sum(axis=1)
    pixel = py[inside] * width + px[inside]
    # Of a pixel's points the nearest.
    order = np.lexsort((depth, pixel))
    keep = order[np.diff(pixel[order], prepend=-1) > 0]
    return Shown(pixel[keep], shown[keep], weights[keep])
