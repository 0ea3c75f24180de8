"""Masks as COCO stores them: polygons and run-length encodings."""

from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_util

__all__ = ["mask_to_polygons", "mask_to_rle"]

# How far a simplified outline may leave the traced one, in pixels, for masks from this area on:
# so that mask and polygon keep an IoU of about 0.99. Of smaller masks every corner counts.
_TOLERANCES = ((2500, 0.5), (500, 0.3), (0, 0.0))

_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


def mask_to_rle(mask: np.ndarray, x0: int, y0: int, height: int, width: int) -> dict[str, Any]:
    """Compressed RLE (`counts` is bytes) of a uint8 mask at (x0, y0) in a height x width image."""
    full = np.zeros((height, width), np.uint8, order="F")
    full[y0 : y0 + mask.shape[0], x0 : x0 + mask.shape[1]] = mask
    return mask_util.encode(full)


def mask_to_polygons(mask: np.ndarray, x0: int, y0: int) -> list[list[float]]:
    """COCO polygons, [x, y, x, y, ...] in image coordinates, along the edges of a mask.

    A COCO polygon has no holes, so a piece with a hole is cut in two along a column through the
    hole. The polygons of a piece share that edge and do not overlap otherwise.

    Args:
        mask: (h, w) uint8, 0 or 1.
        x0, y0: where the mask's first column and row lie in the image.
    """
    # On a grid of half pixels, set the pixels' centres, the middles of their sides, and those of
    # their corners that two or more pixels share. The outline of that image goes through the
    # middles of the pixels' sides, so it runs straight along slanted edges, and passes every pixel
    # centre on the right side.
    height, width = mask.shape
    grid = np.zeros((2 * height + 1, 2 * width + 1), np.uint8)
    grid[1::2, 1::2] = mask
    grid = cv2.dilate(grid, _CROSS)
    padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT)
    pairs = padded[1:] + padded[:-1]
    grid[::2, ::2] = pairs[:, 1:] + pairs[:, :-1] >= 2
    contours, hierarchy = cv2.findContours(grid, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    area = int(np.count_nonzero(mask))
    tolerance = next(tolerance for smallest, tolerance in _TOLERANCES if area >= smallest)
    polygons: list[list[float]] = []
    for index, contour in enumerate(contours):
        _, _, hole, parent = hierarchy[0][index]
        if parent >= 0:
            continue
        if hole >= 0:
            holes = []
            while hole >= 0:
                holes.append(contours[hole])
                hole = hierarchy[0][hole][0]
            polygons.extend(_cut(contour, holes, x0, y0))
            continue
        if tolerance:
            contour = cv2.approxPolyDP(contour, 2 * tolerance, True)
        if len(contour) >= 3:
            points = contour.reshape(-1, 2) * 0.5 + (x0, y0)
            polygons.append(points.reshape(-1).tolist())
    return polygons


def _cut(outer: np.ndarray, holes: list[np.ndarray], x0: int, y0: int) -> list[list[float]]:
    """Polygons of the piece with these half-pixel contours, cut in two through its first hole."""
    left, top, width, height = cv2.boundingRect(outer)  # left and top are even: pixel edges
    grid = np.zeros((height, width), np.uint8)
    cv2.drawContours(grid, [outer - (left, top)], 0, 1, cv2.FILLED)
    for hole in holes:  # with what lies in it: islands are pieces of their own
        cv2.drawContours(grid, [hole - (left, top)], 0, 0, cv2.FILLED)
    piece = grid[1::2, 1::2]  # pixel centres
    hole_left, _, hole_width, _ = cv2.boundingRect(holes[0])
    column = (2 * (hole_left - left) + hole_width) // 4
    x0, y0 = x0 + left // 2, y0 + top // 2
    return mask_to_polygons(piece[:, :column], x0, y0) + mask_to_polygons(
        piece[:, column:], x0 + column, y0
    )
