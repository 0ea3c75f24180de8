"""The data preparation of the stacked hourglass, against what the published code computes."""

from pathlib import Path

import numpy as np
import pytest

from d2ext.data.landmarks.datasets import LANDMARK_DATASETS
from d2ext.data.landmarks.hourglass import (
    HourglassDraws,
    crop_person,
    draw_hourglass,
    hourglass_matrix,
    hourglass_sample,
    map_points,
)
from tests.reference.fixture import Fixture, draw_image

FLIP = [5, 4, 3, 2, 1, 0, 6, 7, 8, 9, 15, 14, 13, 12, 11, 10]
PERSON = ((186.4, 205.9), 1.613)


@pytest.fixture(scope="module")
def published() -> Fixture:
    folder = Path(__file__).resolve().parents[2] / "reference/hourglass/data_and_eval"
    return Fixture(folder)


def rgb(seed: int) -> np.ndarray:
    return draw_image(400, 360, seed=seed)[:, :, ::-1]


@pytest.mark.parametrize(("case", "seed"), [("a", 3), ("b", 4)])
def test_training_sample(published, case, seed):
    given = published.manifest["inputs"][f"sample_{case}"]
    numbers = given["random_numbers_in_order"]
    names = ("rotation", "scale", "hue", "saturation", "brightness", "contrast")
    draws = HourglassDraws(flip=case == "a", **{k: numbers[k] for k in names if k in numbers})
    points = np.array(given["keypoints_x_y_visible"], dtype=np.float64)
    image, joints = hourglass_sample(
        rgb(seed), points, given["center_xy"], given["scale"], FLIP, draws
    )
    assert published.compare(f"training_image_{case}", image.transpose(2, 0, 1)) < 1e-6
    expected = published.expected[f"training_keypoints_{case}"]
    np.testing.assert_allclose(joints, expected, atol=1e-5)


def test_quirk_mirrored_missing_joint_takes_its_partner_along(published):
    # Sample a has no joint 15 and is mirrored: its partner, which is there, is lost.
    joints = published.expected["training_keypoints_a"]
    assert (joints[15, :2] == 0).all() and joints[15, 2] == 1
    assert joints[10, 0] > 64 and joints[10, 2] == 0


def test_crops(published):
    people = [PERSON, ((15.45, 380.85), 1.217), ((330.2, 30.4), 0.7731)]
    for number, (center, scale) in enumerate(people):
        crop = crop_person(rgb(3), center, scale)
        assert published.compare(f"crop_{number}", crop.transpose(2, 0, 1)) < 1e-6


def test_maps(published):
    maps = [hourglass_matrix(*PERSON, 256, rotation) for rotation in (0, 30, -17.5)]
    np.testing.assert_allclose(maps, published.expected["transform_matrices"], atol=1e-5)
    points = np.array([(10, 20), (100.5, 77.3), (300.2, 250.9)])
    used = [maps[0], maps[1], np.linalg.inv(maps[0]), np.linalg.inv(maps[1])]
    mapped = [map_points(points, matrix, truncate=True) for matrix in used]
    np.testing.assert_array_equal(mapped, published.expected["transform_points"])


def test_a_crop_without_pixels_is_an_error():
    with pytest.raises(ValueError, match="no pixel"):
        crop_person(rgb(3), (10.2, 10.2), 0.001)


def test_half_of_the_draws_flip():
    np.random.seed(0)
    draws = [draw_hourglass() for _ in range(400)]
    assert 160 < sum(d.flip for d in draws) < 240
    assert {d.hue for d in draws if not d.flip} == {0.5}
    for name in ("hue", "saturation", "brightness", "contrast"):
        assert len({getattr(d, name) for d in draws if d.flip}) > 150


def test_the_middle_of_all_ranges_changes_no_colour():
    points = np.array([[200.0, 190.0, 1.0]])
    straight, mirrored = (
        hourglass_sample(rgb(3), points, *PERSON, [0], HourglassDraws(0.5, 0.5, flip))[0]
        for flip in (False, True)
    )
    np.testing.assert_allclose(mirrored[:, ::-1], straight, atol=1e-5)


def test_joints_are_mapped_where_x_is_positive():
    """A square of 200 pixels about (100, 100) becomes 256 pixels, cut to whole ones, then 64 cells."""
    points = np.array([[1.0, 50.0, 1.0], [0.0, 50.0, 1.0], [0.5, 50.0, 1.0]])
    draws = HourglassDraws(0.5, 0.5, flip=False)
    _, joints = hourglass_sample(rgb(3), points, (100, 100), 1.0, [0, 1, 2], draws)
    # The second keeps its place in the image as if it were one in the crop.
    expected = [[1 / 4, 64 / 4], [0, 50 / 4], [0, 64 / 4]]
    np.testing.assert_allclose(joints[:, :2], expected, atol=1e-9)


def test_mpii_pairs_are_the_published_permutation():
    permutation = list(range(16))
    for a, b in LANDMARK_DATASETS["mpii"].flip_pairs:
        permutation[a], permutation[b] = b, a
    assert permutation == FLIP


def test_corners_that_come_out_whole_are_cut_as_published():
    """Round centres and scales put corners on whole numbers, where the order of rounding decides."""
    rng = np.random.default_rng(0)
    whole = 0
    for _ in range(500):
        center, scale = rng.integers(20, 900, 2).tolist(), round(rng.uniform(0.3, 4), 2)
        side = 200 * scale
        t = np.zeros((3, 3))
        t[0, 0] = t[1, 1] = 256.0 / side
        t[0, 2], t[1, 2] = (256 * (-float(v) / side + 0.5) for v in center)
        t[2, 2] = 1
        back = np.linalg.inv(t)
        corners = np.array([np.dot(back, (v, v, 1.0))[:2].astype(int) for v in (0, 256)])
        own = np.linalg.inv(hourglass_matrix(center, scale, 256))
        mapped = map_points(np.array([[0, 0], [256, 256]]), own, truncate=True)
        np.testing.assert_array_equal(mapped, corners)
        exact = np.array(center) - 100 * scale
        whole += int((abs(exact - exact.round()) < 1e-9).all())
    assert whole > 100
