"""Bilinear resampling of images as OpenCV does it, on any device.

OpenCV resizes and warps bytes in integer arithmetic: positions are rounded to 1/32 pixel, weights to
1/2048 or 1/32768, results to bytes. Floats it resizes in floats. Published models were trained and
measured with it; doing the same here lets the image stay on its device.

Shapes: images (..., H, W): what is done to one is done to all. Sides of 0 pixels are a ValueError.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# OpenCV's constants: bits of a position between two pixels, bits of a step, and a weight of 1.
_PLACE_BITS = 5
_STEP_BITS = 10
_RESIZE_ONE = 2048


def _check_sizes(*sizes: int) -> None:
    if min(sizes) < 1:
        raise ValueError(f"Images have sides of at least one pixel, before and after; got {sizes}.")


def _bytes(image: Tensor) -> Tensor:
    """Whole numbers 0..255 in int32, whatever the dtype of the image."""
    if image.is_floating_point():
        image = image.nan_to_num(0.0).round().clamp(0, 255)
    return image.to(torch.int32)


def _resize_weights(
    new: int, old: Tensor, *, rows: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each new pixel the two old ones and their weights (2048 is 1).

    Args:
        new: pixels of the result.
        old: (..., 1) int64 pixels of lines, at least 1.
        rows: the lines are columns of rows, not rows of columns.

    Returns:
        four tensors (..., new), on the device of ``old``
    """
    pixels = torch.arange(new, dtype=torch.float64, device=old.device)
    place = ((pixels + 0.5) * (old.double() / new) - 0.5).float()
    first = place.floor()
    part = place - first
    # Beyond the centres of the outermost pixels there is nothing to interpolate with. OpenCV says so for
    # columns; of rows it takes the outermost twice, with rounded weights.
    if not rows:
        part[(first < 0) | (first >= old - 1)] = 0
    second = (first.long() + 1).clamp(min=0).minimum(old - 1)
    first = first.long().clamp(min=0).minimum(old - 1)
    weights = torch.stack([1 - part, part]).mul(_RESIZE_ONE).round().to(torch.int32)
    return first, second, weights[0], weights[1]


def resize_like_opencv(images: Tensor, height: int, width: int) -> Tensor:
    """``cv2.resize(image, (width, height))`` of bytes: bilinear, half-pixel centres, no low-pass.

    Args:
        images: (..., H, W), uint8 or float; the latter are rounded to bytes.

    Returns:
        (..., height, width) uint8.
    """
    _check_sizes(*images.shape[-2:], height, width)
    values = _bytes(images)
    if values.shape[-2:] == (height, width):
        return values.to(torch.uint8)
    left, right, left_weight, right_weight = (
        x.to(images.device) for x in _resize_weights(width, torch.tensor([values.shape[-1]]))
    )
    upper, lower, upper_weight, lower_weight = (
        x.to(images.device)
        for x in _resize_weights(height, torch.tensor([values.shape[-2]]), rows=True)
    )
    lines = values[..., left] * left_weight + values[..., right] * right_weight
    lines = lines >> 4
    above = (lines[..., upper, :] * upper_weight[:, None]) >> 16
    below = (lines[..., lower, :] * lower_weight[:, None]) >> 16
    return ((above + below + 2) >> 2).clamp(0, 255).to(torch.uint8)


def resize_crops_like_opencv(masks: Tensor, index: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crops of masks, each resized as ``cv2.resize`` does with bytes of 0 and 1.

    Args:
        masks: (G, H, W) bool.
        index: (R,) int64 which mask to crop.
        boxes: (R, 4) int64 first and last column and row, x1, y1, x2, y2, inside the mask.
        size: side of the result.

    Returns:
        (R, size, size) bool.
    """
    _check_sizes(size)
    places, weights = [], []
    for low, high, rows in ((boxes[:, 1], boxes[:, 3], True), (boxes[:, 0], boxes[:, 2], False)):
        old = (high - low + 1).clamp(min=1)[:, None]
        first, second, *pair = _resize_weights(size, old, rows=rows)
        places.append((first + low[:, None], second + low[:, None]))
        weights.append(pair)
    which = index[:, None, None]
    result = torch.zeros((), dtype=torch.int32, device=masks.device)
    for row, row_weight in zip(*(x[0] for x in (places, weights)), strict=True):
        line = torch.zeros((), dtype=torch.int32, device=masks.device)
        for column, weight in zip(*(x[1] for x in (places, weights)), strict=True):
            line = line + masks[which, row[:, :, None], column[:, None, :]] * weight[:, None, :]
        result = result + (((line >> 4) * row_weight[:, :, None]) >> 16)
    return ((result + 2) >> 2) > 0


def resize_float_like_opencv(
    images: Tensor, size: tuple[int, int], scales: tuple[float, float]
) -> Tensor:
    """``cv2.resize(image, None, fx=scales[1], fy=scales[0])`` of float32: bilinear, no low-pass.

    The step between pixels is 1 / scale, not the ratio of the sizes, of which one is rounded.

    Args:
        images: (B, C, H, W), any dtype.
        size: (height, width) of the result, H and W times the scales, rounded.
        scales: of height and width.

    Returns:
        (B, C, height, width) float32, within 1e-4 grey levels of OpenCV with IPP, its default on x86.
        (Without IPP it rounds positions to float32, and differs from itself by 0.03.)
    """
    _check_sizes(*images.shape[-2:], *size)
    if images.shape[-2:] == size:
        return images.float()  # what OpenCV does, whatever the scales
    # float64: a position beyond 1000 in float32 would be 6e-5 off. `F.interpolate` takes a size or
    # scales, not both.
    resized = torch.ops.aten.upsample_bilinear2d(images.double(), size, False, *scales)
    return resized.float()


def warp_like_opencv(
    images: Tensor, inverse: Sequence[Sequence[float]], height: int, width: int
) -> Tensor:
    """``cv2.warpAffine`` of bytes: bilinear, zeros outside.

    Args:
        images: (..., H, W), uint8 or float; the latter are rounded to bytes.
        inverse: (2, 3) map from indices (x, y) of the result to those of the image.

    Returns:
        (..., height, width) uint8.
    """
    _check_sizes(*images.shape[-2:], height, width)
    values = F.pad(_bytes(images), (1, 1, 1, 1))
    one, half = 1 << _STEP_BITS, 1 << (_STEP_BITS - _PLACE_BITS - 1)
    places = []
    for along_x, along_y, shift in inverse:
        # Without a turn a place depends on the column or the row alone, and one of each is enough.
        xs = torch.arange(width if along_x else 1, dtype=torch.float64)
        ys = torch.arange(height if along_y else 1, dtype=torch.float64)
        columns = (along_x * xs * one).round().long()
        rows = ((along_y * ys + shift) * one).round().long() + half
        places.append((rows[:, None] + columns) >> (_STEP_BITS - _PLACE_BITS))
    x, y = (place.to(images.device) for place in places)
    parts = 1 << _PLACE_BITS
    x_part, y_part = (x & (parts - 1)).int(), (y & (parts - 1)).int()
    # The padding shifts indices by one; what lies farther outside reads the padding.
    x0, y0 = (x >> _PLACE_BITS) + 1, (y >> _PLACE_BITS) + 1
    rows_in, columns_in = values.shape[-2:]
    result = values.new_zeros((*values.shape[:-2], height, width))
    for dy, y_weight in ((0, parts - y_part), (1, y_part)):
        for dx, x_weight in ((0, parts - x_part), (1, x_part)):
            at = (y0 + dy).clamp(0, rows_in - 1), (x0 + dx).clamp(0, columns_in - 1)
            result += values[..., at[0], at[1]] * (x_weight * y_weight)
    bits = 2 * _PLACE_BITS
    return ((result + (1 << (bits - 1))) >> bits).to(torch.uint8)
