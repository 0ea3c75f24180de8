"""Factors and sizes of resized images."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from d2ext.codecs.image_scale import axis_scales, scaled_size, short_side_scale


@pytest.mark.parametrize(
    ("size", "short", "longest", "scale"),
    [
        ((480, 640), 800, 1333, 800 / 480),
        ((640, 480), 800, 1333, 800 / 480),
        ((400, 700), 800, 1333, 1333 / 700),  # 1400 would be too long
        ((750, 1250), 800, 1333, 800 / 750),  # 1333.33 rounds to what is allowed
        ((750, 1251), 800, 1333, 1333 / 1251),  # 1334.4 does not
        ((37, 53), 0, 10, 1.0),
    ],
)
def test_the_short_side_decides_unless_the_long_one_is_too_long(
    size: tuple[int, int], short: int, longest: int, scale: float
) -> None:
    assert short_side_scale(size, short, longest) == scale


def test_sizes_are_opencvs() -> None:
    image = np.zeros((25, 45), np.uint8)
    for scale in (0.1, 0.5, 0.7, 1.1, 1.3, 2.5, 800 / 25):  # 25 * 0.1 = 2.5 rounds to 2
        expected = cv2.resize(image, None, fx=scale, fy=scale).shape
        assert scaled_size(image.shape, scale) == expected


def test_an_extreme_shape_keeps_a_pixel() -> None:
    scale = short_side_scale((1, 5000), 800, 1333)
    assert scaled_size((1, 5000), scale) == (1, 1333)
    assert axis_scales((1, 5000), scale) == (1.0, 1333 / 5000)
