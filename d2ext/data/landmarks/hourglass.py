"""Data preparation of the published stacked hourglass for MPII (arXiv 1603.06937, the authors'
PyTorch code), with its quirks: coordinates cut to whole pixels, no low-pass before reduction, colours
that change only in mirrored pictures, mirroring half a heat-map pixel off.

Here coordinates are pixel indices, as in that code; ``center`` and ``scale`` are those of its HDF5
files: the box is a square of 200 · scale about the centre (MPII's own scale times 1.25).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

# Published ranges: ± 30 degrees; side factor 0.75 to 1.25; hue ± 0.2 of the circle; brightness ± 0.3;
# saturation and contrast factors 0.5 to 1.5.
_ROTATION, _SCALE_LOW, _SCALE_SPAN = 30.0, 0.75, 0.5
_HUE, _BRIGHTNESS, _FACTOR_LOW = 0.2, 0.3, 0.5


@dataclass(frozen=True)
class HourglassDraws:
    """Random numbers in [0, 1) in the published order; the last four only if ``flip``."""

    rotation: float
    scale: float
    flip: bool
    hue: float = 0.5
    saturation: float = 0.5
    brightness: float = 0.5
    contrast: float = 0.5


def draw_hourglass() -> HourglassDraws:
    """Draw from ``numpy.random``: rotation, scale, a coin, and four more if the coin says so."""
    rotation, scale = np.random.uniform(size=2).tolist()
    if np.random.randint(2) != 0:
        return HourglassDraws(rotation, scale, False)
    return HourglassDraws(rotation, scale, True, *np.random.uniform(size=4).tolist())


def hourglass_matrix(
    center: Sequence[float], scale: float, size: int, rotation: float = 0.0
) -> np.ndarray:
    """(3, 3) float64: image to a canvas of ``size`` pixels, turned about the canvas' middle.

    Args:
        rotation: degrees; positive turns the content counter-clockwise
    """
    side = 200.0 * scale
    # In the published order of operations: corners that come out whole, which those of round numbers
    # often do, must be cut to the same pixel.
    x, y = (size * (-value / side + 0.5) for value in center)
    matrix = np.array([[size / side, 0.0, x], [0.0, size / side, y], [0.0, 0.0, 1.0]])
    angle = -math.radians(rotation)
    cos, sin = math.cos(angle), math.sin(angle)
    middle = size / 2
    turn = np.array(
        [
            [cos, -sin, middle - cos * middle + sin * middle],
            [sin, cos, middle - sin * middle - cos * middle],
            [0.0, 0.0, 1.0],
        ]
    )
    return turn @ matrix


def map_points(points: np.ndarray, matrix: np.ndarray, truncate: bool = False) -> np.ndarray:
    """(N, 2) through (3, 3); with ``truncate`` cut toward zero to whole pixels."""
    mapped = np.asarray(points, dtype=np.float64) @ matrix[:2, :2].T + matrix[:2, 2]
    return np.trunc(mapped) if truncate else mapped


def crop_person(
    image: np.ndarray, center: Sequence[float], scale: float, size: int = 256
) -> np.ndarray:
    """The published crop: a rectangle of whole pixels, zero outside the image, resized bilinearly.

    Args:
        image: (H, W, C) of any type

    Returns:
        (size, size, C) float64, same range

    Raises:
        ValueError: the rectangle has no pixel.
    """
    inverse = np.linalg.inv(hourglass_matrix(center, scale, size))
    corners = map_points(np.array([[0, 0], [size, size]]), inverse, truncate=True)
    (left, top), (right, bottom) = corners.astype(int).tolist()
    if right <= left or bottom <= top:
        raise ValueError(f"The crop about {tuple(center)} of scale {scale} has no pixel.")
    canvas = np.zeros((bottom - top, right - left, image.shape[2]))
    x0, x1 = max(left, 0), min(right, image.shape[1])
    y0, y1 = max(top, 0), min(bottom, image.shape[0])
    if x0 < x1 and y0 < y1:
        canvas[y0 - top : y1 - top, x0 - left : x1 - left] = image[y0:y1, x0:x1]
    return cv2.resize(canvas, (size, size)).reshape(size, size, image.shape[2])


def hourglass_sample(
    image: np.ndarray,
    points: np.ndarray,
    center: Sequence[float],
    scale: float,
    flip_indices: Sequence[int],
    draws: HourglassDraws,
    *,
    size: int = 256,
    output_size: int = 64,
) -> tuple[np.ndarray, np.ndarray]:
    """One published training sample.

    Quirks: joints are cut to whole pixels of the crop before the augmentation. Which joints are set
    to zero because they are missing is looked up after mirroring by their old place, so the mirror
    partner of a missing joint is lost and the missing one is where pixel (0, 0) goes.

    Args:
        image: (H, W, 3) RGB, [0, 255]
        points: (K, 3) x, y, visible; x = y = 0 is missing
        flip_indices: (K,) which joint takes the place of each when mirrored
        draws: random numbers

    Returns:
        image: (size, size, 3) float32 in [0, 1]
        points: (K, 3) float64 in heat-map pixels; a map is drawn where x > 0 and the truncated
            position is inside
    """
    crop = crop_person(image, center, scale, size)
    to_crop = hourglass_matrix(center, scale, size)
    missing = (points[:, 0] == 0) & (points[:, 1] == 0)
    joints = points.astype(np.float64).copy()
    joints[:, :2] = np.where(
        points[:, :1] > 0, map_points(points[:, :2], to_crop, truncate=True), points[:, :2]
    )
    angle = (2 * draws.rotation - 1) * _ROTATION
    factor = size / 200.0 * (draws.scale * _SCALE_SPAN + _SCALE_LOW)
    middle = (size / 2, size / 2)
    warp = hourglass_matrix(middle, factor, size, angle)[:2]
    result = cv2.warpAffine(crop, warp, (size, size)).astype(np.float32) / np.float32(255)
    joints[:, :2] = map_points(joints[:, :2], hourglass_matrix(middle, factor, output_size, angle))
    if draws.flip:
        result = _jitter(result, draws)[:, ::-1]
        joints = joints[np.asarray(flip_indices)]
        joints[:, 0] = output_size - joints[:, 0]
    joints[missing, :2] = 0
    return np.ascontiguousarray(result), joints


def _jitter(image: np.ndarray, draws: HourglassDraws) -> np.ndarray:
    """Colour changes on RGB float32 in [0, 1]."""
    hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    hue = np.mod(hue + np.float32((2 * draws.hue - 1) * _HUE * 360), np.float32(360))
    saturation = np.clip(saturation * np.float32(draws.saturation + _FACTOR_LOW), 0, 1)
    image = cv2.cvtColor(cv2.merge((hue, saturation, value)), cv2.COLOR_HSV2RGB)
    image = image + np.float32((2 * draws.brightness - 1) * _BRIGHTNESS)
    mean = image.mean(axis=2, keepdims=True)  # of the pixel's channels, not of the image
    image = (image - mean) * np.float32(draws.contrast + _FACTOR_LOW) + mean
    return np.clip(image, 0, 1)
