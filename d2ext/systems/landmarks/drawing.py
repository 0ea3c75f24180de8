"""Pictures of crops with their landmarks, for TensorBoard."""

from __future__ import annotations

import torch
from torch import Tensor

# Half side of a landmark's mark in pixels.
_RADIUS = 1
_TRUTH, _FOUND = (0.0, 255.0, 0.0), (255.0, 0.0, 0.0)


def mark_points(
    images: Tensor, points: Tensor, shown: Tensor, color: tuple[float, float, float]
) -> Tensor:
    """Paint small squares.

    Args:
        images: (n, 3, H, W) in 0..255; not changed.
        points: (n, K, 2), pixels.
        shown: (n, K) bool.
    """
    images = images.clone()
    height, width = images.shape[-2:]
    for image, own, wanted in zip(
        images, points.floor().long().tolist(), shown.tolist(), strict=True
    ):
        for (x, y), draw in zip(own, wanted, strict=True):
            if draw and 0 <= x < width and 0 <= y < height:
                area = image[
                    :, max(y - _RADIUS, 0) : y + _RADIUS + 1, max(x - _RADIUS, 0) : x + _RADIUS + 1
                ]
                area.copy_(torch.tensor(color, device=image.device)[:, None, None].expand_as(area))
    return images


def draw_training(
    images: Tensor, truth: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]
) -> Tensor:
    """Crops side by side, above with the truth, below with what is found: (3, 2 H, n W) in 0..1.

    Args:
        images: (n, 3, H, W) in 0..255.
        truth, found: points (n, K, 2) and which to show (n, K).
    """
    rows = [
        torch.cat(list(mark_points(images, *points, color)), dim=-1)
        for points, color in ((truth, _TRUTH), (found, _FOUND))
    ]
    return torch.cat(rows, dim=-2).clamp(0, 255).cpu() / 255
