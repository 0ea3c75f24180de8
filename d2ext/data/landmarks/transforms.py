"""The geometry and the look of one landmark crop, as Detectron2 transforms.

All random numbers come from ``numpy.random``. Coordinates are continuous (the centre of the first pixel
is 0.5), floating point throughout: landmarks are never rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from fvcore.transforms.transform import Transform

from d2ext.data.augmentations.base import PixelTransform
from d2ext.data.landmarks.geometry import GEOMETRIES, crop_matrix


class AffineCropTransform(Transform):
    """An affine map with an output of its own size; new area is black, as published."""

    def __init__(self, matrix: np.ndarray, size: tuple[int, int]) -> None:
        """
        Args:
            matrix: (2, 3) float64, image to crop, continuous coordinates
            size: (h, w) of the crop
        """
        super().__init__()
        self.matrix, self.size = np.asarray(matrix, dtype=np.float64), size

    def apply_image(self, img: np.ndarray, interp: int = cv2.INTER_LINEAR) -> np.ndarray:
        """(H, W, C), any type that OpenCV takes → (h, w, C) of the same type."""
        indices = self.matrix.copy()  # OpenCV counts pixels
        indices[:, 2] += indices[:, :2].sum(axis=1) * 0.5 - 0.5
        height, width = self.size
        result = cv2.warpAffine(img, indices, (width, height), flags=interp)
        return result.reshape(height, width, *img.shape[2:])

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """(N, 2) image → crop."""
        return np.asarray(coords, dtype=np.float64) @ self.matrix[:, :2].T + self.matrix[:, 2]

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """(H, W) labels; new area is 0."""
        return self.apply_image(segmentation, cv2.INTER_NEAREST)


class CutoutTransform(PixelTransform):
    """Paints a rectangle over the crop. Landmarks stay where they are; :meth:`covers` tells which
    are hidden now."""

    def __init__(self, box: Sequence[float], fill: np.ndarray) -> None:
        """
        Args:
            box: XYXY in whole pixels
            fill: colour (C,), or pixels that broadcast to the rectangle
        """
        super().__init__()
        self.box, self.fill = tuple(int(v) for v in box), fill

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        x0, y0, x1, y1 = self.box
        img = img.copy()
        img[y0:y1, x0:x1] = self.fill
        return img

    def covers(self, points: np.ndarray) -> np.ndarray:
        """(N,) bool: which of the points (N, 2) lie under the rectangle."""
        x0, y0, x1, y1 = self.box
        return ((points >= (x0, y0)) & (points < (x1, y1))).all(axis=1)


class RandomCropGeometry:
    """Draws rotation, scale, shift and flip of a crop, about its middle, as the published pose and face
    recipes do; one affine map does all of it, so the image is interpolated once."""

    def __init__(
        self,
        size: tuple[int, int],
        geometry: str = "continuous",
        *,
        rotation: float = 30.0,
        rotation_prob: float = 0.6,
        scale: float = 0.25,
        shift: float = 0.0,
        flip_prob: float = 0.5,
    ) -> None:
        """
        Args:
            size: (h, w) of the crop
            geometry: see :mod:`d2ext.data.landmarks.geometry`
            rotation: standard deviation, degrees; limited to twice of it
            rotation_prob: probability of a rotation
            scale: standard deviation of the factor on the box's sides about 1, and its limit
            shift: largest shift, fraction of the box's sides
            flip_prob: probability of a flip
        """
        if geometry not in GEOMETRIES:
            raise ValueError(
                f"INPUT.LANDMARKS.CROP_GEOMETRY is {geometry!r}; choose from {', '.join(GEOMETRIES)}."
            )
        self.size, self.geometry = size, geometry
        self.rotation, self.rotation_prob = rotation, rotation_prob
        self.scale, self.shift, self.flip_prob = scale, shift, flip_prob

    def __call__(self, box: np.ndarray) -> tuple[AffineCropTransform, bool]:
        """
        Args:
            box: (4,) padded XYXY

        Returns:
            the transform, and whether it mirrors
        """
        # Always the same count of numbers, so that switching one thing off changes nothing else.
        factor = float(np.clip(1 + np.random.randn() * self.scale, 1 - self.scale, 1 + self.scale))
        limit = 2 * self.rotation
        angle = float(np.clip(np.random.randn() * self.rotation, -limit, limit))
        if np.random.uniform() >= self.rotation_prob:
            angle = 0.0
        offset = np.random.uniform(-1, 1, 2) * self.shift
        flip = bool(np.random.uniform() < self.flip_prob)
        sides = box[2:] - box[:2]
        center = (box[:2] + box[2:]) / 2 + offset * sides
        box = np.concatenate([center - sides * factor / 2, center + sides * factor / 2])
        return crop_transform(box, self.size, self.geometry, angle, flip), flip


def crop_transform(
    box: np.ndarray,
    size: tuple[int, int],
    geometry: str = "continuous",
    rotation: float = 0.0,
    flip: bool = False,
) -> AffineCropTransform:
    """:func:`~d2ext.data.landmarks.geometry.crop_matrix` as a transform."""
    return AffineCropTransform(crop_matrix(box, size, geometry, rotation, flip), size)


def half_body_box(
    points: np.ndarray, upper: np.ndarray, size: tuple[int, int], min_points: int
) -> np.ndarray | None:
    """A box about the upper or the lower half of a body, drawn at random.

    The constants are those of HRNet's pose code: the half must have more than two labelled points, its
    extent times 1.5 is the crop, without further padding.

    Args:
        points: (K, 3) x, y, v in the image
        upper: (K,) bool
        size: (h, w) of the crop
        min_points: only instances with more labelled points are cut

    Returns:
        (4,) XYXY of the crop's shape, or None if there is no such half
    """
    prefers_upper = np.random.randn() < 0.5
    labelled = points[:, 2] > 0
    if labelled.sum() <= min_points:
        return None
    halves = [points[labelled & upper, :2], points[labelled & ~upper, :2]]
    half = halves[0] if prefers_upper and len(halves[0]) > 2 else halves[1]
    if len(half) <= 2:
        half = halves[0]
    if len(half) < 2:
        return None
    low, high = half.min(axis=0), half.max(axis=0)
    center = half.mean(axis=0)
    ratio = size[1] / size[0]
    height = 1.5 * max(high[1] - low[1], (high[0] - low[0]) / ratio)
    if not height > 0:
        return None
    half = np.array([height * ratio, height]) / 2
    return np.concatenate([center - half, center + half])
