"""Which part of an image a landmark network is trained on, and the affine map between the two.

Coordinates are Detectron2's: pixel i covers [i, i + 1] and its centre is i + 0.5, in the image and in
the crop. Published code counts pixels by index, which is 0.5 less.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from d2ext.codecs.landmark_crops import pad_boxes

# How a padded box of width b becomes a crop of w pixels:
# "continuous": edges onto edges, as in the model's own crops;
# "index": pixel indices scale by w / b, as if the box's edges were pixels (HRNet and most others);
# "udp": indices scale by (w - 1) / b, so that the box's edges fall on the centres of the crop's first
#        and last pixel (arXiv 1911.07524).
# They differ by less than a pixel, for image and landmarks alike.
GEOMETRIES = ("continuous", "index", "udp")


def pad_box(box: np.ndarray, size: tuple[int, int], padding: float = 1.25) -> np.ndarray:
    """:func:`~d2ext.codecs.landmark_crops.pad_boxes`, the published rule, for one box: the short side
    grows until the box has the crop's shape, then both are multiplied.

    Args:
        box: (4,) XYXY; sides below one pixel count as one.
        size: (h, w) of the crop.
        padding: factor on both sides; published 1.25.

    Returns:
        (4,) float64 XYXY of aspect ratio w / h, which may reach outside the image.
    """
    boxes = torch.from_numpy(np.asarray(box, dtype=np.float64))[None]
    return pad_boxes(boxes, size, padding)[0].numpy()


def crop_matrix(
    box: np.ndarray,
    size: tuple[int, int],
    geometry: str = "continuous",
    rotation: float = 0.0,
    flip: bool = False,
) -> np.ndarray:
    """Affine map from the image to the crop of a padded box.

    Args:
        box: (4,) XYXY, as :func:`pad_box` gives it.
        size: (h, w) of the crop.
        geometry: one of :data:`GEOMETRIES`.
        rotation: degrees; positive turns the content clockwise about the middle of the crop.
        flip: mirror the crop afterwards.

    Returns:
        (2, 3) float64, image to crop, both in continuous coordinates.

    Raises:
        ValueError: unknown geometry, or a box without area or not finite.
    """
    if geometry not in GEOMETRIES:
        raise ValueError(f"geometry is {geometry!r}; choose from {', '.join(GEOMETRIES)}.")
    box = np.asarray(box, dtype=np.float64)
    sides = box[2:] - box[:2]
    if not (np.isfinite(box).all() and (sides > 0).all()):
        raise ValueError(f"A crop needs a finite box whose sides are positive, not {box.tolist()}.")
    target = np.array([size[1], size[0]], dtype=np.float64)
    scale = (target - 1 if geometry == "udp" else target) / sides
    cos, sin = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
    linear = np.array([[cos, -sin], [sin, cos]]) * scale
    center, middle = (box[:2] + box[2:]) / 2, sides * scale / 2
    if geometry != "continuous":  # then box and crop are in indices
        center, middle = center + 0.5, middle + 0.5
    offset = middle - linear @ center
    if flip:
        linear, offset = linear * [[-1], [1]], np.array([size[1] - offset[0], offset[1]])
    return np.concatenate([linear, offset[:, None]], axis=1)
