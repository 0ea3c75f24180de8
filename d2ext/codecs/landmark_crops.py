"""Boxes → the parts of images that become crops, and the affine maps between crop and image.

Coordinates are continuous pixels: (0, 0) is the outer corner of the first pixel.

Letters: N boxes, P points, (h, w) size of the crop, that is of the network's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Coordinates of cropped boxes are clamped to this; no image is larger.
_FAR = 1e6


def has_side(boxes: Tensor) -> Tensor:
    """Which boxes can be cropped: finite, corners in order, width or height positive. (Padding gives a
    box without height, as of two points in a row, the shape of the input.)

    Args:
        boxes: (N, 4) XYXY.

    Returns:
        (N,) bool.
    """
    sides = boxes[:, 2:] - boxes[:, :2]
    return sides.isfinite().all(dim=1) & (sides >= 0).all(dim=1) & (sides > 0).any(dim=1)


def pad_boxes(boxes: Tensor, size: tuple[int, int], padding: float = 1.25) -> Tensor:
    """Boxes, widened about their centre to the crop's shape, then enlarged.

    Args:
        boxes: (N, 4) XYXY. Sides below one pixel count as one.
        size: (h, w).
        padding: factor on both sides: 1.25 in the published top-down systems.

    Returns:
        (N, 4) XYXY of the aspect ratio w / h; they may reach outside the image.
    """
    ratio = size[1] / size[0]
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    width, height = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1).unbind(dim=1)
    height = torch.maximum(height, width / ratio) * padding
    half = torch.stack([height * ratio, height], dim=1) / 2
    return torch.cat([center - half, center + half], dim=1)


def crop_to_image(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps from crops to the image, the crop's edges on the box's: (N, 2, 3).

    Args:
        boxes: (N, 4) XYXY, padded, with area.
        size: (h, w).
    """
    scale = (boxes[:, 2:] - boxes[:, :2]) / boxes.new_tensor([size[1], size[0]])
    return torch.cat([torch.diag_embed(scale), boxes[:, :2, None]], dim=2)


def apply_affine(points: Tensor, matrices: Tensor) -> Tensor:
    """Map points (..., P, 2) by matrices (..., 2, 3)."""
    return points @ matrices[..., :2].transpose(-1, -2) + matrices[..., None, :, 2]


class CropRegions(NamedTuple):
    """N boxes of a batch of images, in the order of the images."""

    images: Tensor
    """(N,) int64, the number of each box's image."""
    boxes: Tensor
    """(N, 4) XYXY, float64, as given."""
    classes: Tensor
    """(N,) int64."""
    scores: Tensor
    """(N,) float32."""
    padded: Tensor
    """(N, 4) float64, what is cropped."""
    matrices: Tensor
    """(N, 2, 3) float64, crop to image."""
    valid: Tensor
    """(N,) bool: see :func:`has_side`, and not wholly outside the image."""

    def select(self, index: Tensor) -> CropRegions:
        """The regions at an increasing index."""
        return CropRegions(*(field[index] for field in self))


def crop_regions(
    detections: Sequence[tuple[Tensor, Tensor, Tensor]],
    image_sizes: Sequence[tuple[int, int]],
    size: tuple[int, int],
    padding: float,
) -> CropRegions:
    """How the boxes of a batch become crops.

    Args:
        detections: for each image its boxes (n, 4) XYXY float64, their classes and scores (n,).
        image_sizes: (height, width) of each.
        size: (h, w).
        padding: see :func:`pad_boxes`.
    """
    # All boxes at once: operators on each image's few boxes would take longer than a small network.
    nothing = torch.zeros((0, 4), dtype=torch.float64), torch.zeros(0).long(), torch.zeros(0)
    boxes, classes, scores = map(torch.cat, zip(nothing, *detections, strict=True))
    counts = torch.tensor([len(scores) for _, _, scores in detections], dtype=torch.int64)
    images = torch.arange(len(detections)).repeat_interleave(counts)
    limits = boxes.new_tensor(image_sizes).view(-1, 2).flip(1)[images]
    inside = ((boxes[:, 2:] > 0) & (boxes[:, :2] < limits)).all(dim=1)
    valid = has_side(boxes) & inside
    # An invalid box is replaced by some pixel: its result does not count.
    anywhere = boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
    cropped = torch.where(valid[:, None], boxes, anywhere).clamp(-_FAR, _FAR)
    padded = pad_boxes(cropped, size, padding)
    matrices = crop_to_image(padded, size)
    return CropRegions(images, boxes, classes, scores, padded, matrices, valid)
