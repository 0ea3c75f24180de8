"""Polygon geometry that augmentations need."""

import numpy as np


def polygon_area(polygon: np.ndarray) -> float:
    """Area enclosed by a closed polygon (shoelace formula), in square units of its coordinates.

    Args:
        polygon: (N, 2) corners (x, y); the last is joined to the first
    """
    x, y = polygon[:, 0], polygon[:, 1]
    return 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))


def clip_polygon(polygon: np.ndarray, window: tuple[float, float, float, float]) -> np.ndarray:
    """Cut a polygon to an axis-aligned window: Sutherland and Hodgman, CACM 17(1), 1974.

    Where a concave polygon falls apart, its pieces stay joined by edges that run along the window's
    border and back. They enclose no area, so the filled polygon is exactly the part inside.

    Args:
        polygon: (N, 2) corners (x, y)
        window: x0, y0, x1, y1

    Returns:
        (M, 2) float64 corners; M = 0 if nothing of the polygon's area lies inside
    """
    points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
    x0, y0, x1, y1 = window
    for axis, limit, sign in ((0, x0, 1.0), (0, x1, -1.0), (1, y0, 1.0), (1, y1, -1.0)):
        # Signed distance to the window's side, positive inside.
        distance = sign * (points[:, axis] - limit)
        if len(points) == 0 or (distance >= 0).all():
            continue
        points = _clip_half_plane(points, distance, axis, limit)
    if len(points) < 3 or polygon_area(points) == 0:
        return np.zeros((0, 2))
    return points


def _clip_half_plane(
    points: np.ndarray, distance: np.ndarray, axis: int, limit: float
) -> np.ndarray:
    """Keep the side of a polygon where ``distance`` ≥ 0; crossings get ``limit`` on ``axis``."""
    following = np.roll(points, -1, axis=0)
    following_distance = np.roll(distance, -1)
    inside = distance >= 0
    crosses = inside != (following_distance >= 0)
    span = np.where(crosses, distance - following_distance, 1.0)
    crossing = points + (following - points) * (distance / span)[:, None]
    crossing[:, axis] = limit
    # Every edge contributes its start point, if inside, and then its crossing, if it has one.
    candidates = np.stack([points, crossing], axis=1).reshape(-1, 2)
    return candidates[np.stack([inside, crosses], axis=1).reshape(-1)]


def random_center(length: int, border: int) -> int:
    """A uniform pixel of ``length``, at least ``border`` from both ends (halved until that is possible).

    How CornerNet and CenterNet place their random windows (published code).
    """
    parts = 1
    while length - border // parts <= border // parts:
        parts *= 2
    margin = border // parts
    return int(np.random.randint(margin, length - margin))
