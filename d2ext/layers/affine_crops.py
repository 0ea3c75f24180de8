"""Crops of images by affine maps: all crops of a batch in one call of the sampler.

Coordinates are continuous pixels: (0, 0) is the outer corner of the first pixel.

Letters: B images, n crops of each, C channels, h, w size of a crop.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def affine_crops(images: Tensor, matrices: Tensor, size: tuple[int, int]) -> Tensor:
    """Warp images, bilinearly, without low-pass; 0 outside the image.

    The same as OpenCV's ``warpAffine`` with a black border, except that OpenCV rounds positions to
    1/32 pixel.

    Args:
        images: (B, C, H, W), any dtype.
        matrices: (B, n, 2, 3), crop to image.
        size: (h, w).

    Returns:
        (B, n, C, h, w) float32.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(images, matrices, 4, (2, 3))
    height, width = size
    columns = torch.arange(width, device=images.device, dtype=torch.float32) + 0.5
    rows = torch.arange(height, device=images.device, dtype=torch.float32) + 0.5
    m = matrices.to(torch.float32)[..., None, None]  # (B, n, 2, 3, 1, 1)
    grid = m[:, :, :, 0] * columns + m[:, :, :, 1] * rows[:, None] + m[:, :, :, 2]
    return _sample(images, grid[:, :, 0], grid[:, :, 1])


def truncated_crops(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut boxes out at whole pixels and resize the cuts, as the published stacked hourglass does.

    Corners are truncated toward zero. What lies outside the image is 0. The cut is resized like
    OpenCV's bilinear ``resize``, which repeats the outermost pixels of the cut.

    Args:
        images: (B, C, H, W), any dtype.
        boxes: (B, n, 4) XYXY, float64 if their corners come near whole numbers.
        size: (h, w).

    Returns:
        (B, n, C, h, w) float32.
    """
    _check(images, boxes, 3, (4,))
    corners = boxes.trunc()
    axes = []
    for axis, count in ((0, size[1]), (1, size[0])):
        first = corners[..., axis, None]
        length = corners[..., 2 + axis, None] - first
        steps = torch.arange(count, device=boxes.device, dtype=boxes.dtype) + 0.5
        inner = (steps * (length / count)).clamp(min=0.5)
        axes.append((first + torch.minimum(inner, length - 0.5)).float())
    shape = (*boxes.shape[:2], *size)
    return _sample(images, axes[0][:, :, None, :].expand(shape), axes[1][..., None].expand(shape))


def _check(images: Tensor, regions: Tensor, dims: int, last: tuple[int, ...]) -> None:
    if (
        images.dim() != 4
        or regions.dim() != dims
        or tuple(regions.shape[2:]) != last
        or len(regions) != len(images)
    ):
        raise ValueError(
            f"Crops take images (B, C, H, W) and regions (B, n, {', '.join(map(str, last))}), not "
            f"{tuple(images.shape)} and {tuple(regions.shape)}."
        )


def _sample(images: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Values of images (B, C, H, W) at positions (B, n, h, w): (B, n, C, h, w) float32."""
    batch, count, height, width = xs.shape
    channels = images.shape[1]
    if xs.numel() == 0 or images.numel() == 0:
        return torch.zeros((batch, count, channels, height, width), device=images.device)
    # grid_sample wants coordinates from -1 to 1 between the outer corners.
    grid = torch.stack([xs * (2 / images.shape[3]) - 1, ys * (2 / images.shape[2]) - 1], dim=-1)
    # An image's crops are stacked vertically, so that the image need not be repeated.
    grid = grid.view(batch, count * height, width, 2)
    sampled = F.grid_sample(images.float(), grid, align_corners=False)
    return sampled.view(batch, channels, count, height, width).transpose(1, 2).contiguous()
