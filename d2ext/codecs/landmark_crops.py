"""Boxes → crops for a network, and the way back.

Coordinates are continuous pixels: (0, 0) is the outer corner of the first pixel.

Letters: N boxes, K landmarks, C channels, W, H size of the crop.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.codecs.landmarks import Size

# Side of a person's box for a scale of 1, in pixels (MPII's convention).
SCALE_UNIT = 200.0
METHODS = ("affine", "hourglass")


class Regions(NamedTuple):
    """Axis-aligned parts of images that become crops."""

    centers: Tensor
    """(N, 2) x, y."""
    sizes: Tensor
    """(N, 2) width and height, positive."""


def regions_from_boxes(boxes: Tensor, input_size: Size, padding: float = 1.25) -> Regions:
    """Boxes, widened about their centre to the crop's aspect ratio, then enlarged.

    Args:
        boxes: (N, 4) XYXY.
        input_size: (W, H); its ratio is the crop's.
        padding: factor on both sides; 1.25 in the published top-down systems, 1 for boxes that are
            enlarged already.

    Returns:
        regions; those of boxes without area have sides of at least one pixel.
    """
    boxes = boxes.float()
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    width, height = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1.0).unbind(dim=1)
    aspect = input_size[0] / input_size[1]
    width, height = torch.maximum(width, height * aspect), torch.maximum(height, width / aspect)
    return Regions(centers, torch.stack([width, height], dim=1) * padding)


def regions_from_scales(centers: Tensor, scales: Tensor) -> Regions:
    """MPII's centres (N, 2) and scales (N,): squares of 200 * scale pixels."""
    return Regions(centers.float(), (SCALE_UNIT * scales.float())[:, None].expand(-1, 2))


def to_crop(points: Tensor, regions: Regions, input_size: Size) -> Tensor:
    """(N, K, 2) in the image → in the crops."""
    size = points.new_tensor(input_size)
    centers, sizes = regions.centers[:, None], regions.sizes[:, None]
    return (points - centers) * (size / sizes) + size / 2


def to_image(points: Tensor, regions: Regions, input_size: Size) -> Tensor:
    """(N, K, 2) in the crops → in the image; inverse of :func:`to_crop`."""
    size = points.new_tensor(input_size)
    centers, sizes = regions.centers[:, None], regions.sizes[:, None]
    return (points - size / 2) * (sizes / size) + centers


def crop(image: Tensor, regions: Regions, input_size: Size, method: str = "affine") -> Tensor:
    """Crops of one image, bilinear without low-pass; 0 outside the image.

    Args:
        image: (C, Height, Width), any dtype.
        regions: N of them, on the image's device.
        input_size: (W, H).
        method: "affine": as a warp of the region to the crop. "hourglass": as the published stacked
            hourglass cuts it: corners truncated toward zero to whole pixels, the cut resized as OpenCV
            does; points are mapped by the regions as they are, so that they may be off by a pixel.

    Returns:
        (N, C, H, W) float32.

    Raises:
        ValueError: another method.
    """
    return crop_images(image[None], Regions(*(x[None] for x in regions)), input_size, method)[0]


def crop_images(images: Tensor, regions: Regions, input_size: Size, method: str) -> Tensor:
    """:func:`crop` for B images of one size with n regions each: one call of the sampler.

    Args:
        images: (B, C, Height, Width).
        regions: centres and sizes (B, n, 2).

    Returns:
        (B, n, C, H, W) float32.
    """
    batch, count = regions.centers.shape[:2]
    channels = images.shape[1]
    width, height = input_size
    if batch * count == 0 or images.numel() == 0:
        return images.new_zeros((batch, count, channels, height, width), dtype=torch.float32)
    xs, ys = sampling_positions(regions, input_size, method)
    # The sampler counts from -1 to 1 between the outer corners.
    xs = xs * (2 / images.shape[3]) - 1
    ys = ys * (2 / images.shape[2]) - 1
    # All crops of an image below each other, so that the image is not repeated.
    grid = torch.stack(
        [
            xs[:, :, None, :].expand(batch, count, height, width),
            ys[:, :, :, None].expand(batch, count, height, width),
        ],
        dim=-1,
    ).view(batch, count * height, width, 2)
    sampled = F.grid_sample(images.float(), grid, align_corners=False)
    return sampled.view(batch, channels, count, height, width).transpose(1, 2).contiguous()


def sampling_positions(regions: Regions, input_size: Size, method: str) -> tuple[Tensor, Tensor]:
    """Where the crops' columns and rows lie in the image: (..., W) and (..., H).

    Args:
        regions: centres and sizes (..., 2).
        method: see :func:`crop`.
    """
    if method not in METHODS:
        raise ValueError(f'MODEL.LANDMARKS.CROP.METHOD is one of {METHODS}, not "{method}".')
    positions = []
    for axis, count in enumerate(input_size):
        center, size = regions.centers[..., axis, None], regions.sizes[..., axis, None]
        steps = torch.arange(count, device=center.device, dtype=center.dtype) + 0.5
        if method == "affine":
            positions.append((steps / count - 0.5) * size + center)
            continue
        first = (center.double() - size.double() / 2).trunc()
        length = (center.double() + size.double() / 2).trunc() - first
        # OpenCV repeats the outermost pixels of the cut.
        inner = torch.minimum((steps.double() * (length / count)).clamp(min=0.5), length - 0.5)
        positions.append((first + inner).float())
    return positions[0], positions[1]
