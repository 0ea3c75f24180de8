"""Five points of other schemes."""

import numpy as np
import pytest

from d2ext.data.faces.points import FIVE_OF, five_points
from d2ext.data.landmarks.datasets import LANDMARK_DATASETS

KINDS = {68: "300w", 98: "wflw", 29: "cofw", 19: "aflw"}


@pytest.mark.parametrize("count", KINDS)
def test_sides_are_mirror_partners(count: int) -> None:
    dataset = LANDMARK_DATASETS[KINDS[count]]
    partner = {a: b for pair in dataset.flip_pairs for a, b in (pair, pair[::-1])}
    left, right, nose, left_mouth, right_mouth = FIVE_OF[count]
    assert {partner[i] for i in left} == set(right)
    assert partner[left_mouth[0]] == right_mouth[0]
    assert nose[0] not in partner  # on the axis


def test_eyes_are_the_mean_of_their_outline() -> None:
    points = np.zeros((2, 68, 3))
    points[..., 2] = 2
    points[:, 36:42, 0] = [10, 12, 14, 16, 14, 12]
    points[0, 40, 2] = 1
    points[1, 40, 2] = 0
    points[:, 30] = [20, 30, 2]
    result = five_points(points)
    assert result.shape == (2, 5, 3)
    assert result[0, 0].tolist() == [13, 0, 1]  # the least visible of them
    assert result[1, 0].tolist() == [0, 0, 0]
    assert result[1, 2].tolist() == [20, 30, 2]


def test_ears_of_aflw() -> None:
    """21 points are 19 with an ear before the nose and one behind it."""
    points = np.random.default_rng(0).uniform(1, 9, (21, 3))
    without = np.delete(points, [12, 16], axis=0)
    np.testing.assert_array_equal(five_points(points), five_points(without))


def test_unknown_scheme() -> None:
    with pytest.raises(ValueError, match="for 6 landmarks; known are schemes of 68"):
        five_points(np.zeros((6, 3)))
