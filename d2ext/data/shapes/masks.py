"""Masks as COCO stores them: polygons and run-length encodings."""

from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_util

__all__ = ["mask_to_polygons", "mask_to_rle"]

# Polygons of masks from this area on (pixels) are simplified; below, every corner counts.
_SIMPLIFY_FROM = 400
_TOLERANCE = 0.6  # how far a simplified outline may leave the traced one, in pixels


def mask_to_rle(mask: np.ndarray, x0: int, y0: int, height: int, width: int) -> dict[str, Any]:
    """Compressed RLE (`counts` is bytes) of a uint8 mask at (x0, y0) in a height x width image."""
    full = np.zeros((height, width), np.uint8, order="F")
    full[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]] = mask
    return mask_util.encode(full)


def mask_to_polygons(mask: np.ndarray, x0: int, y0: int) -> list[list[float]]:
    """COCO polygons, [x, y, x, y, ...] in image coordinates, along the pixel edges of a mask.

    A COCO polygon has no holes, so a piece with a hole is cut in two along a column through the
    hole. The polygons of a piece share that edge and do not overlap otherwise.

    Args:
        mask: (h, w) uint8, 0 or 1.
        x0, y0: where the mask's first column and row lie in the image.
    """
    # On a grid of half pixels the closed squares of the mask's pixels are an image whose outermost
    # points lie exactly on the pixel edges. Contours of that image pass every pixel centre on the
    # right side.
    height, width = mask.shape
    grid = np.zeros((2 * height + 1, 2 * width + 1), np.uint8)
    grid[1::2, 1::2] = mask
    grid = cv2.dilate(grid, np.ones((3, 3), np.uint8))
    contours, hierarchy = cv2.findContours(grid, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    simplify = int(np.count_nonzero(mask)) >= _SIMPLIFY_FROM
    polygons: list[list[float]] = []
    for index, contour in enumerate(contours):
        _, _, hole, parent = hierarchy[0][index]
        if parent >= 0:
            continue
        if hole >= 0:
            polygons.extend(_cut(mask, contour, contours[hole], x0, y0))
            continue
        if simplify:
            contour = cv2.approxPolyDP(contour, 2 * _TOLERANCE, True)
        if len(contour) >= 3:
            points = contour.reshape(-1, 2) * 0.5 + (x0, y0)
            polygons.append(points.reshape(-1).tolist())
    return polygons


def _cut(
    mask: np.ndarray, outer: np.ndarray, hole: np.ndarray, x0: int, y0: int
) -> list[list[float]]:
    """Polygons of the piece inside `outer` (half-pixel contour), cut through its hole."""
    left, top, width, height = cv2.boundingRect(outer)  # left and top are even: pixel edges
    inside = np.zeros((height, width), np.uint8)
    cv2.drawContours(inside, [outer - (left, top)], 0, 1, cv2.FILLED)
    piece = inside[1::2, 1::2]  # pixel centres
    px, py = left // 2, top // 2
    piece = piece & mask[py : py + piece.shape[0], px : px + piece.shape[1]]
    hole_left, _, hole_width, _ = cv2.boundingRect(hole)
    column = (2 * hole_left + hole_width) // 4 - px
    return mask_to_polygons(piece[:, :column], x0 + px, y0 + py) + mask_to_polygons(
        piece[:, column:], x0 + px + column, y0 + py
    )
