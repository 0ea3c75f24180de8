"""Boxes → the parts of images that become crops, and the affine maps between crop and image.

Coordinates are continuous pixels: (0, 0) is the outer corner of the first pixel.

Letters: N boxes, P points, (h, w) size of the crop, that is of the network's input.
"""

from __future__ import annotations

import torch
from torch import Tensor


def has_side(boxes: Tensor) -> Tensor:
    """Which boxes can be cropped: finite, corners in order, and a positive width or height. Padding
    gives a box without height (two points in a row) the shape of the input.

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
