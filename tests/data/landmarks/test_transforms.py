"""Crops of landmarks: image and points move together, exactly."""

import cv2
import numpy as np
import pytest

from d2ext.data.landmarks.geometry import GEOMETRIES, crop_matrix, pad_box
from d2ext.data.landmarks.mapper import random_cutout
from d2ext.data.landmarks.transforms import (
    AffineCropTransform,
    CutoutTransform,
    RandomCropGeometry,
    crop_transform,
    half_body_box,
)


def blob_center(image: np.ndarray) -> np.ndarray:
    """Centre of mass of the bright pixels, continuous coordinates."""
    image = image.astype(np.float64)
    ys, xs = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
    return np.array([(image * xs).sum(), (image * ys).sum()]) / image.sum()


def spot(x: float, y: float, size: int = 160) -> np.ndarray:
    """A smooth spot at a continuous position."""
    ys, xs = np.mgrid[:size, :size] + 0.5
    return (255 * np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / 18)).astype(np.float32)


def test_padding_keeps_centre_and_reaches_the_inputs_shape():
    # 40 x 30 to the shape 256 x 192 (3:4): the height grows to 40 / 0.75, then both by 1.25.
    box = pad_box(np.array([10.0, 20, 50, 50]), (256, 192))
    np.testing.assert_allclose(box, [30 - 25, 35 - 100 / 3, 30 + 25, 35 + 100 / 3])
    # A box without area counts as a pixel.
    np.testing.assert_allclose(pad_box(np.array([5.0, 5, 5, 5]), (64, 64), 2.0), [4, 4, 6, 6])


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("rotation", [0.0, 37.0])
def test_points_stay_on_the_picture(geometry, flip, rotation):
    box = np.array([31.0, 20.0, 103.0, 116.0])
    transform = crop_transform(box, (128, 96), geometry, rotation, flip)
    for point in ((60.3, 70.9), (72.0, 55.5)):
        seen = blob_center(transform.apply_image(spot(*point)))
        mapped = transform.apply_coords(np.array([point]))[0]
        np.testing.assert_allclose(seen, mapped, atol=0.05)


def test_geometries_are_the_published_ones():
    box = np.array([10.0, 20.0, 74.0, 84.0])  # 64 pixels wide
    index = np.array([10.0, 30.0, 74.0])  # x of pixel indices
    for geometry, expected in (
        ("index", (index - 10) * 2),
        ("udp", (index - 10) * 127 / 64),
        ("continuous", (index + 0.5 - 10) * 2 - 0.5),
    ):
        matrix = crop_matrix(box, (128, 128), geometry)
        mapped = (index + 0.5) * matrix[0, 0] + 25.5 * matrix[0, 1] + matrix[0, 2] - 0.5
        np.testing.assert_allclose(mapped, expected)


def test_rotation_is_clockwise_about_the_middle():
    matrix = crop_matrix(np.array([0.0, 0, 64, 64]), (64, 64), rotation=90)
    np.testing.assert_allclose(matrix @ (48, 32, 1), (32, 48), atol=1e-9)  # right goes down


def test_new_area_is_black_and_labels_are_not_mixed():
    transform = crop_transform(np.array([-32.0, 0, 32, 64]), (64, 64))
    image = np.full((64, 64, 3), 200, np.uint8)
    crop = transform.apply_image(image)
    assert (crop[:, :31] == 0).all() and (crop[:, 33:] == 200).all()
    labels = np.random.default_rng(0).choice([0, 5], (64, 64)).astype(np.uint8)
    turned = crop_transform(np.array([0.0, 0, 64, 64]), (96, 96), rotation=20)
    assert set(np.unique(turned.apply_segmentation(labels))) <= {0, 5}


@pytest.mark.parametrize("box", [[0, 0, 0, 5], [0, 0, np.nan, 5], [9, 9, 5, 5]])
def test_impossible_crops_are_errors(box):
    with pytest.raises(ValueError, match="positive"):
        crop_matrix(np.array(box, dtype=float), (64, 64))
    with pytest.raises(ValueError, match="choose from"):
        crop_matrix(np.array([0.0, 0, 4, 4]), (64, 64), "plain")


def test_unknown_geometry_is_refused():
    with pytest.raises(ValueError, match="CROP_GEOMETRY is 'exact'"):
        RandomCropGeometry((64, 64), "exact")


def test_random_geometry_draws_what_it_says():
    np.random.seed(0)
    box = np.array([20.0, 20, 84, 84])
    draw = RandomCropGeometry((64, 64), rotation=30, rotation_prob=0.6, scale=0.25, flip_prob=0.5)
    angles, factors, flips = [], [], []
    for _ in range(600):
        transform, flipped = draw(box)
        linear = transform.matrix[:, :2] * ([[-1], [1]] if flipped else 1)
        angles.append(np.degrees(np.arctan2(linear[1, 0], linear[0, 0])))
        factors.append(1 / np.hypot(*linear[0]))
        flips.append(flipped)
        # Without a shift the middle of the box stays in the middle of the crop.
        np.testing.assert_allclose(transform.apply_coords(np.array([[52.0, 52]])), [[32, 32]])
    angles, factors = np.array(angles), np.array(factors)
    assert 0.5 < (np.abs(angles) > 1e-9).mean() < 0.7
    assert np.abs(angles).max() <= 60 and 20 < angles[np.abs(angles) > 1e-9].std() < 32
    assert factors.min() >= 0.75 - 1e-9 and factors.max() <= 1.25 + 1e-9 and factors.std() > 0.15
    assert 0.4 < np.mean(flips) < 0.6


def test_cutout_hides_points_inside():
    np.random.seed(1)
    image = np.zeros((50, 40, 3), np.float32)
    cutout = random_cutout(image, (0.3, 0.5))
    x0, y0, x1, y1 = cutout.box
    assert 0 <= x0 < x1 <= 40 and 0 <= y0 < y1 <= 50
    assert 11 <= x1 - x0 <= 21 and 14 <= y1 - y0 <= 26
    painted = cutout.apply_image(image).any(axis=2)
    assert painted.sum() == (x1 - x0) * (y1 - y0) and not image.any()
    assert cutout.covers(np.array([[x0, y0], [x1, y1], [x1 - 0.1, y1 - 0.1]])).tolist() == [
        True,
        False,
        True,
    ]
    points = np.array([[1.5, 2.5]])
    assert CutoutTransform((0, 0, 2, 2), np.zeros(3)).apply_coords(points) is points


def test_half_body_is_about_one_half():
    np.random.seed(0)
    points = np.zeros((8, 3))
    points[:4] = [(10, 10, 2), (30, 10, 2), (20, 30, 2), (20, 20, 1)]
    points[4:] = [(10, 100, 2), (30, 100, 2), (20, 140, 2), (0, 0, 0)]
    upper = np.array([True] * 4 + [False] * 4)
    boxes = {tuple(half_body_box(points, upper, (64, 64), 5).round(6)) for _ in range(40)}
    # Extents 20 x 20 about (20, 17.5) and 20 x 40 about (20, 113.33), times 1.5.
    assert boxes == {
        (5.0, 2.5, 35.0, 32.5),
        (-10.0, 83.333333, 50.0, 143.333333),
    }
    assert half_body_box(points, upper, (64, 64), 7) is None  # too few labelled points
    points[:, :2] = 5
    assert half_body_box(points, upper, (64, 64), 5) is None  # no extent


def test_transform_takes_grey_and_many_channels():
    transform = AffineCropTransform(crop_matrix(np.array([0.0, 0, 8, 8]), (16, 16)), (16, 16))
    assert transform.apply_image(np.ones((8, 8), np.float32)).shape == (16, 16)
    assert transform.apply_image(np.ones((8, 8, 1), np.uint8)).shape == (16, 16, 1)
    assert transform.apply_image(np.ones((8, 8, 3), np.uint8), cv2.INTER_NEAREST).dtype == np.uint8
