"""Pictures of surfaces of persons (DensePose): annotated points and masks; of predictions parts, U, V,
lines of equal U and V, and textures laid on them.

A *surface* is (3, H, W) uint8 of a whole image: part 1..24 (0: background), 255 U, 255 V.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from detectron2.utils.colormap import colormap

STYLES = ("parts", "u", "v", "isolines")
# Parts of a body.
_PARTS = 24
# Tiles of a published atlas: part 6 c + r + 1 lies in row r, column c.
_ROWS, _COLUMNS = 6, 4
# Opacity of colours, and of annotated masks.
_OPACITY, _MASK_OPACITY = 0.65, 0.45
# Binary digits behind the point of OpenCV's coordinates.
_SHIFT = 4
# Steps between lines of equal U and of equal V, and their colours, RGB.
_STEPS = 10
_U_LINES, _V_LINES, _BORDERS = (255, 90, 60), (60, 140, 255), (255, 255, 255)


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
    mixed = image * (1 - _MASK_OPACITY) + colors * _MASK_OPACITY
    return np.where(parts[:, :, None] > 0, mixed.round(), image).astype(np.uint8)


def atlas_tiles(atlas: np.ndarray) -> np.ndarray:
    """The tiles of an atlas, a picture of 6 rows and 4 columns: those of parts 1 to 6 below each other,
    7 to 12 beside them, and so on. U goes to the right, V up.

    Args:
        atlas: (6 S, 4 S, 3), published: S = 200

    Returns:
        (24, S, S, 3) view

    Raises:
        ValueError: of another shape
    """
    side = atlas.shape[1] // _COLUMNS
    if atlas.shape != (_ROWS * side, _COLUMNS * side, 3) or side == 0:
        raise ValueError(
            f"An atlas has 6 rows and 4 columns of square tiles and 3 colours; this one is an array of "
            f"{' x '.join(map(str, atlas.shape))}."
        )
    tiles = atlas.reshape(_ROWS, side, _COLUMNS, side, 3)
    return tiles.transpose(2, 0, 1, 3, 4).reshape(_PARTS, side, side, 3)


def texture_colors(
    tiles: np.ndarray, parts: np.ndarray, u: np.ndarray, v: np.ndarray
) -> np.ndarray:
    """Colours of points, bilinear within their tile: nothing of its neighbours.

    Args:
        tiles: (24, S, S, 3)
        parts: (n,) 1..24
        u, v: (n,) in [0, 1]

    Returns:
        (n, 3) float32
    """
    side = tiles.shape[1]
    column, row = u * (side - 1), (1 - v) * (side - 1)
    # The upper left of four cells, so that all of them are in the tile.
    left, top = (np.clip(x.astype(np.int64), 0, max(side - 2, 0)) for x in (column, row))
    right, bottom = (np.minimum(x + 1, side - 1) for x in (left, top))
    x, y = (column - left)[:, None], (row - top)[:, None]
    part = np.asarray(parts, np.int64) - 1
    upper = (1 - x) * tiles[part, top, left] + x * tiles[part, top, right]
    lower = (1 - x) * tiles[part, bottom, left] + x * tiles[part, bottom, right]
    return ((1 - y) * upper + y * lower).astype(np.float32)


def apply_texture(image: np.ndarray, surface: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """Lay a texture on the persons; a new image.

    Args:
        image: (H, W, 3) uint8
        surface: (3, H, W)
        tiles: (24, S, S, 3) of the same colours, see :func:`atlas_tiles`
    """
    result, there = image.copy(), surface[0] > 0
    parts, u, v = surface[:, there]
    result[there] = np.rint(texture_colors(tiles, parts, u / 255, v / 255))
    return result


@dataclass(frozen=True)
class SurfaceDrawer:
    """Draws surfaces on pictures."""

    style: str = "parts"
    """Of :data:`STYLES`."""
    tiles: np.ndarray | None = None
    """(24, S, S, 3), RGB: a texture, instead of a style."""
    alone: bool = False
    """Boxes and the like are not drawn, too."""

    def __call__(self, image: np.ndarray, surface: np.ndarray) -> np.ndarray:
        """Draw a surface on an image (H, W, 3), uint8, RGB; a new image."""
        if self.tiles is not None:
            return apply_texture(image, surface, self.tiles)
        if self.style == "isolines":
            return draw_isolines(image, surface)
        values, there = surface[STYLES.index(self.style)], surface[0] > 0
        values = values[there]
        colors = part_colors()[values] if self.style == "parts" else value_colors(values / 255)
        result = image.copy()
        result[there] = np.rint((1 - _OPACITY) * image[there] + _OPACITY * colors)
        return result


def draw_isolines(image: np.ndarray, surface: np.ndarray) -> np.ndarray:
    """Draw the lines of U and V = 0.1, 0.2, ... on each part, and the borders of the parts; a new image.

    Args:
        image: (H, W, 3) uint8, RGB
        surface: (3, H, W)
    """
    result = image.copy()
    parts = surface[0].astype(np.int64)
    levels = [parts * _STEPS + x.astype(np.int64) * _STEPS // 256 for x in surface[1:]]
    inside = parts > 0
    for values, color in ((levels[0], _U_LINES), (levels[1], _V_LINES), (parts, _BORDERS)):
        change = np.zeros_like(inside)
        change[:, 1:] |= values[:, 1:] != values[:, :-1]
        change[1:] |= values[1:] != values[:-1]
        if values is not parts:
            change &= inside
        result[change] = color
    return result
