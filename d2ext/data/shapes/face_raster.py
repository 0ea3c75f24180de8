"""A small painter of textured, shaded triangle meshes: OpenCV fills, NumPy shades."""

from dataclasses import dataclass

import cv2
import numpy as np

__all__ = ["Surface", "front_facing", "hides", "render"]

# A point lies behind a triangle from this difference in depth on, in head units.
_BEHIND = 0.04
# OpenCV takes polygon corners as integers with this many binary digits behind the point.
_SHIFT = 4
# Pixels that are computed at a time, so that they stay in the processor's cache. OpenCV's look-up takes
# fewer than 32,768.
_CHUNK = 8192


@dataclass(frozen=True)
class Surface:
    """A mesh as it is drawn.

    Attributes:
        points: (N, 3) float64: x, y in pixels, z in pixels, larger is farther away.
        triangles: (T, 3) integers, only those to draw.
        shade: (N,) float64 light on each vertex, 1 shows the texture as it is.
        places: (N, 2) float64 x, y in the texture, pixels.
        texture: (h, w, 3) uint8, RGB.
    """

    points: np.ndarray
    triangles: np.ndarray
    shade: np.ndarray
    places: np.ndarray
    texture: np.ndarray


def front_facing(points: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """(T,) bool: which triangles, counter-clockwise from outside, turn to the one who looks (-z)."""
    a, b, c = (points[triangles[:, i], :2] for i in range(3))
    (ux, uy), (vx, vy) = (b - a).T, (c - a).T
    return ux * vy - uy * vx < 0


def _planes(points: np.ndarray, triangles: np.ndarray) -> tuple[np.ndarray, ...]:
    """Coefficients (3, T) of two barycentric coordinates and of the depth, each p x + q y + r, and
    which triangles have an area, (T,) bool."""
    a, b, c = (points[triangles[:, i]] for i in range(3))
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    solid = np.abs(area) > 1e-9
    area = np.where(solid, area, 1.0)

    def edge(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        """The coordinate that is 0 on the line from p to q."""
        dx, dy = (q[:, 0] - p[:, 0]) / area, (q[:, 1] - p[:, 1]) / area
        return np.stack([-dy, dx, dy * p[:, 0] - dx * p[:, 1]])

    first, second = edge(b, c), edge(c, a)
    depth = first * (a[:, 2] - c[:, 2]) + second * (b[:, 2] - c[:, 2])
    depth[2] += c[:, 2]
    return first, second, depth, solid


def _bounds(corners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest (T, n) of (T, 3, n); NumPy's own reduction of so short an axis is slow."""
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    return np.minimum(np.minimum(a, b), c), np.maximum(np.maximum(a, b), c)


def hides(
    points: np.ndarray, triangles: np.ndarray, probes: np.ndarray, scale: float
) -> np.ndarray:
    """(n,) bool: which probes lie behind a triangle of a mesh, by more than a fraction of a head.

    Args:
        points: (N, 3), as in :class:`Surface`
        probes: (n, 3) points in the same coordinates; z of -inf lies in front of all, inf behind
        scale: pixels per head unit
    """
    hidden = np.zeros(len(probes), bool)
    x, y = probes[:, 0], probes[:, 1]
    left, top, _ = points.min(axis=0)
    right, bottom, _ = points.max(axis=0)
    within = np.flatnonzero((left <= x) & (x <= right) & (top <= y) & (y <= bottom))
    if not len(within):
        return hidden
    low, high = _bounds(points[triangles, :2])
    for i in within:
        probe = np.array([*probes[i, :2], 1.0])
        near = np.flatnonzero(((low <= probe[:2]) & (high >= probe[:2])).all(axis=1))
        first, second, depth, solid = _planes(points, triangles[near])
        first, second = probe @ first, probe @ second
        inside = solid & (first >= 0) & (second >= 0) & (first + second <= 1)
        front = probe @ depth < probes[i, 2] - _BEHIND * scale
        hidden[i] = bool((inside & front).any())
    return hidden


def render(
    surface: Surface, window: tuple[int, int, int, int], factor: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a surface, antialiased.

    Args:
        window: left, top, width, height of the part of the image, pixels.
        factor: sub-pixels per pixel along a side.

    Returns:
        color: (height, width, 3) float32 RGB, already times alpha
        alpha: (height, width) float32, covered part of each pixel
    """
    left, top, width, height = window
    fine_w, fine_h = max(round(width * factor), 1), max(round(height * factor), 1)
    zoom = np.array([fine_w / width, fine_h / height])
    points = surface.points.copy()
    points[:, :2] = (points[:, :2] - (left, top)) * zoom - 0.5  # centres at whole numbers
    # Farthest first: what is nearer is painted over it. Triangles are small within the head.
    distance = points[surface.triangles, 2].mean(axis=1)
    triangles = surface.triangles[np.argsort(-distance, kind="stable")]
    owner = np.zeros((fine_h, fine_w), np.int32)
    corners = np.rint(points[triangles, :2] * (1 << _SHIFT)).astype(np.int32)
    fill = cv2.fillConvexPoly
    for number, corner in enumerate(corners, 1):
        fill(owner, corner, number, 8, _SHIFT)
    canvas = _shaded(surface, points, triangles, owner)
    small = cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA)
    return small[:, :, :3], small[:, :, 3]


def _shaded(
    surface: Surface, points: np.ndarray, triangles: np.ndarray, owner: np.ndarray
) -> np.ndarray:
    """(h, w, 4) float32, colour and coverage, of pixels that show triangle `owner` - 1."""
    values = np.column_stack([surface.places, surface.shade])[triangles]
    first, second, _, solid = _planes(points, triangles)
    # Place and shade over a triangle: p x + q y + r.
    tilt = first[:, :, None] * (values[:, 0] - values[:, 2])
    tilt += second[:, :, None] * (values[:, 1] - values[:, 2])
    tilt[2] += values[:, 2]
    tilt[:, ~solid] = 0
    # A pixel's centre may lie a little outside of the triangle that it shows.
    table = np.concatenate([*tilt, *_bounds(values)], axis=1)
    table = np.ascontiguousarray(table.T, np.float32)
    canvas = [np.zeros(owner.size, np.float32) for _ in range(4)]
    flat = owner.reshape(-1)
    covered = np.flatnonzero(flat)
    for start in range(0, len(covered), _CHUNK):
        pixel = covered[start : start + _CHUNK]
        p, q, r, low, high = table.take(flat[pixel] - 1, axis=1).reshape(5, 3, -1)
        y = pixel // owner.shape[1]
        p *= (pixel - y * owner.shape[1]).astype(np.float32)
        q *= y.astype(np.float32)
        p += q
        p += r
        np.maximum(p, low, out=p)
        u, v, shade = np.minimum(p, high, out=p)
        color = cv2.remap(
            surface.texture, u[None], v[None], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )[0]
        for channel in range(3):
            canvas[channel][pixel] = np.minimum(color[:, channel] * shade, 255)
        canvas[3][pixel] = 1
    return cv2.merge(canvas).reshape(*owner.shape, 4)
