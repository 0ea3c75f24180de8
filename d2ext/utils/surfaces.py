"""Pictures of annotated points on surfaces (DensePose)."""

from __future__ import annotations

import cv2
import numpy as np
from detectron2.utils.colormap import colormap

# Opacity of masks.
_OPACITY = 0.45
# Binary digits behind the point of OpenCV's coordinates.
_SHIFT = 4


def part_colors() -> np.ndarray:
    """(25, 3) uint8 RGB: background black, and the 24 fine parts (of coarse ones the first 14)."""
    colors = colormap(rgb=True, maximum=255).astype(np.uint8)
    return np.concatenate([np.zeros((1, 3), np.uint8), colors[:24]])


def value_colors(values: np.ndarray) -> np.ndarray:
    """(K,) from 0 to 1 → (K, 3) uint8 RGB, dark blue to yellow."""
    table = cv2.applyColorMap(np.arange(256, dtype=np.uint8), cv2.COLORMAP_VIRIDIS)[:, 0, ::-1]
    return table[np.rint(np.clip(values, 0, 1) * 255).astype(int)]


def draw_colored_points(image: np.ndarray, places: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Dots with a dark edge; a new image.

    Args:
        image: (H, W, 3) uint8, RGB
        places: (K, 2) x, y, pixels
        colors: (K, 3) uint8, RGB
    """
    result = np.ascontiguousarray(image).copy()
    radius = max(2, round(max(image.shape[:2]) / 160))
    for (x, y), color in zip((places - 0.5).tolist(), colors.tolist(), strict=True):
        place = round(x * (1 << _SHIFT)), round(y * (1 << _SHIFT))
        for size, shade in ((radius + 1, (0, 0, 0)), (radius, color)):
            cv2.circle(result, place, size << _SHIFT, shade, -1, cv2.LINE_AA, _SHIFT)
    return result


def overlay_part_mask(image: np.ndarray, mask: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Colour the parts of a mask that fills a box; a new image.

    Args:
        image: (H, W, 3) uint8, RGB
        mask: (S, S) uint8 parts, 0 background
        box: (4,) XYXY, pixels
    """
    height, width = image.shape[:2]
    matrix = np.array([[len(mask), 0], [0, len(mask)]]) / (box[2:] - box[:2])[:, None]
    # Pixels' centres in the image → in the mask.
    offset = (0.5 - box[:2]) * np.diag(matrix) - 0.5
    parts = cv2.warpAffine(
        mask,
        np.column_stack([matrix, offset]),
        (width, height),
        flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
    )
    colors = part_colors()[parts].astype(np.float32)
    mixed = image * (1 - _OPACITY) + colors * _OPACITY
    return np.where(parts[:, :, None] > 0, mixed.round(), image).astype(np.uint8)
