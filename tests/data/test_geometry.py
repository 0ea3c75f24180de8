"""Cutting polygons: exact areas and exact masks, also for concave polygons that fall apart."""

import numpy as np
import pytest
from detectron2.structures import polygons_to_bitmask

from d2ext.data.augmentations.geometry import clip_polygon, polygon_area
from tests.data.scenes import iou


def star(rng, points=14, scale=100.0):
    angles = np.sort(rng.uniform(0, 2 * np.pi, points))
    radius = rng.uniform(0.15, 0.5, points) * scale
    return np.stack([50 + radius * np.cos(angles), 50 + radius * np.sin(angles)], axis=1)


def test_area_by_hand():
    assert polygon_area(np.array([[0, 0], [4, 0], [4, 3]])) == 6
    assert polygon_area(np.array([[0, 0], [4, 3], [4, 0]])) == 6  # the other way round
    assert polygon_area(np.array([[1, 1], [2, 2], [3, 3]])) == 0


def test_square_in_window():
    square = np.array([[0, 0], [10, 0], [10, 10], [0, 10]])
    clipped = clip_polygon(square, (5, 2, 20, 8))
    assert polygon_area(clipped) == 5 * 6
    assert clipped.min(0).tolist() == [5, 2] and clipped.max(0).tolist() == [10, 8]
    np.testing.assert_array_equal(clip_polygon(square, (-1, -1, 11, 11)), square)


@pytest.mark.parametrize("window", [(20, 20, 30, 30), (10, 0, 20, 10), (-9, -9, 0, 0)])
def test_outside_or_touching_is_nothing(window):
    square = np.array([[0, 0], [10, 0], [10, 10], [0, 10]])
    assert clip_polygon(square, window).shape == (0, 2)


def test_concave_polygon_that_falls_apart():
    # A "U" whose two arms reach into the window.
    u = np.array([[0, 0], [2, 0], [2, 8], [6, 8], [6, 0], [8, 0], [8, 10], [0, 10]])
    clipped = clip_polygon(u, (-1, 0, 9, 5))
    assert polygon_area(clipped) == 2 * (2 * 5)
    mask = polygons_to_bitmask([clipped.reshape(-1)], 10, 10)
    expected = np.zeros((10, 10), bool)
    expected[0:5, 0:2] = expected[0:5, 6:8] = True
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("seed", range(30))
def test_mask_of_the_cut_polygon_is_the_cut_mask(seed):
    rng = np.random.default_rng(seed)
    polygon = star(rng)
    x0, y0 = rng.integers(0, 50, 2)
    x1, y1 = x0 + rng.integers(20, 50), y0 + rng.integers(20, 50)
    whole = polygons_to_bitmask([polygon.reshape(-1)], 100, 100)[y0:y1, x0:x1]
    clipped = clip_polygon(polygon, (x0, y0, x1, y1)) - [x0, y0]
    mask = polygons_to_bitmask([clipped.reshape(-1)] if len(clipped) else [], y1 - y0, x1 - x0)
    assert np.count_nonzero(mask != whole) <= 0.02 * whole.size
    assert iou(mask, whole) > 0.93 or whole.sum() < 60


def test_no_rounding_error_leaves_the_window():
    rng = np.random.default_rng(0)
    for _ in range(200):
        low, high = rng.uniform(20, 50, 2), rng.uniform(50, 80, 2)
        clipped = clip_polygon(star(rng), (*low, *high))
        assert (clipped >= low).all() and (clipped <= high).all()
