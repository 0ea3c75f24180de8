"""Grey textures and colour ramps of `shapes`.

Every texture is a periodic grey tile, computed once per process from a fixed seed; a scene shows it
through an affine map and a ramp of 256 colours. So a texture costs one warp and one table look-up
per region, and moves with what it covers.

A tile spans 256 x 256 texture pixels and is stored at twice that resolution, so that taking the
nearest stored value (a third of the cost of interpolating) is as good as linear interpolation to a
quarter of a pixel.
"""

import math
from collections.abc import Callable
from functools import cache, lru_cache

import cv2
import numpy as np

from d2ext.data.shapes.classes import STUFF_CLASSES

__all__ = [
    "STORED_PER_PIXEL",
    "THING_TEXTURES",
    "color_ramp",
    "light_field",
    "noise_field",
    "stuff_texture",
    "thing_texture",
]

TILE = 256  # side of a tile, in texture pixels; all patterns below have a period that divides it
STORED_PER_PIXEL = 2
THING_TEXTURES = ("plain", "stripes", "checks", "dots", "blotches", "shade")

_Y, _X = np.mgrid[0:TILE, 0:TILE].astype(np.float64) * (2 * math.pi / TILE)


def _noise(seed: int, sigma_x: float, sigma_y: float) -> np.ndarray:
    """Periodic noise with the given correlation lengths in pixels; mean 0, deviation 1."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    white = np.fft.rfft2(rng.random((TILE, TILE)) - 0.5)
    fy = np.fft.fftfreq(TILE)[:, None]
    fx = np.fft.rfftfreq(TILE)[None, :]
    white *= np.exp(-2 * (math.pi**2) * ((fx * sigma_x) ** 2 + (fy * sigma_y) ** 2))
    noise = np.fft.irfft2(white, (TILE, TILE))
    noise -= noise.mean()
    return noise / noise.std()


def _grey(values: np.ndarray) -> np.ndarray:
    """[0, 1] to uint8, clipped."""
    return np.clip(values * 255 + 0.5, 0, 255).astype(np.uint8)


def _sky() -> np.ndarray:
    return _grey(0.45 + 0.2 * _noise(1, 28, 12) + 0.05 * _noise(2, 6, 3))


def _water() -> np.ndarray:
    phase = 14 * _Y + 0.9 * _noise(3, 22, 8)
    return _grey(0.5 + 0.3 * np.sin(phase) + 0.08 * _noise(4, 5, 1))


def _grass() -> np.ndarray:
    return _grey(0.45 + 0.2 * _noise(5, 0.8, 4) + 0.08 * _noise(6, 16, 16))


def _sand() -> np.ndarray:
    return _grey(0.6 + 0.12 * _noise(7, 0.5, 0.5) + 0.06 * _noise(8, 10, 10))


def _brick() -> np.ndarray:
    height, width, mortar = 16, 32, 2
    y, x = np.mgrid[0:TILE, 0:TILE]
    row = y // height
    shifted = (x + (row % 2) * (width // 2)) % TILE
    tone = np.random.Generator(np.random.Philox(key=9)).random((TILE // height, TILE // width))
    bricks = 0.4 + 0.3 * tone[row, shifted // width]
    joint = (y % height < mortar) | (shifted % width < mortar)
    return _grey(np.where(joint, 0.98, bricks) + 0.04 * _noise(10, 0.7, 0.7))


def _wood() -> np.ndarray:
    width, gap = 64, 3
    x = np.mgrid[0:TILE, 0:TILE][1]
    tone = np.random.Generator(np.random.Philox(key=11)).random(TILE // width)[x // width]
    grain = 0.12 * np.sin(24 * _X + 1.6 * _noise(12, 6, 40)) + 0.06 * _noise(13, 0.7, 12)
    return _grey(np.where(x % width < gap, 0.02, 0.45 + 0.25 * tone + grain))


_STUFF: dict[str, Callable[[], np.ndarray]] = {
    "sky": _sky,
    "water": _water,
    "grass": _grass,
    "sand": _sand,
    "brick": _brick,
    "wood": _wood,
}


def _stored(tile: np.ndarray) -> np.ndarray:
    """A tile at the resolution at which it is stored."""
    padded = cv2.copyMakeBorder(tile, 1, 1, 1, 1, cv2.BORDER_WRAP)
    fine = cv2.resize(padded, None, fx=STORED_PER_PIXEL, fy=STORED_PER_PIXEL)
    return np.ascontiguousarray(
        fine[STORED_PER_PIXEL:-STORED_PER_PIXEL, STORED_PER_PIXEL:-STORED_PER_PIXEL]
    )


@cache
def stuff_texture(category: int) -> np.ndarray:
    """(512, 512) uint8 stored tile of the stuff class with contiguous index `category`."""
    return _stored(_STUFF[STUFF_CLASSES[category]]())


@cache
def thing_texture(kind: int) -> np.ndarray:
    """(512, 512) uint8 stored tile; `kind` indexes :data:`THING_TEXTURES`."""
    name = THING_TEXTURES[kind]
    if name == "plain":
        values = 0.4 + 0.04 * _noise(20, 1, 1)
    elif name == "stripes":
        values = 0.5 + 0.45 * np.clip(2.5 * np.sin(8 * _X), -1, 1)
    elif name == "checks":
        values = 0.5 + 0.4 * np.sign(np.sin(6 * _X) * np.sin(6 * _Y))
    elif name == "dots":
        values = 0.2 + 0.7 * (np.cos(8 * _X) + np.cos(8 * _Y) > 0.9)
    elif name == "blotches":
        values = 0.5 + 0.25 * _noise(21, 9, 9)
    else:
        values = 0.5 + 0.45 * np.sin(2 * _X)
    return _stored(_grey(values))


@lru_cache(maxsize=4)
def light_field(height: int, width: int) -> np.ndarray:
    """Smooth (height + 256, width + 256, 3) uint8 around 128, of which a frame shows a window."""
    tile = np.clip(128 + 34 * _noise(30, 48, 48), 0, 255).astype(np.uint8)
    return cv2.copyMakeBorder(cv2.merge([tile] * 3), 0, height, 0, width, cv2.BORDER_WRAP)


@lru_cache(maxsize=4)
def noise_field(height: int, width: int) -> np.ndarray:
    """Rough (height + 256, width + 256, 3) uint8 around 128, of which a frame shows a window."""
    channels = [np.clip(128 + 16 * _noise(31 + c, 0.4, 0.4), 0, 255) for c in range(3)]
    tile = np.stack(channels, axis=2).astype(np.uint8)
    return cv2.copyMakeBorder(tile, 0, height, 0, width, cv2.BORDER_WRAP)


_STEPS = np.linspace(0, 1, 256)[:, None]


def color_ramp(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """(256, 1, 3) uint8 table for cv2.applyColorMap: colour `low` at grey 0 to `high` at 255."""
    return np.clip(low + _STEPS * (high - low) + 0.5, 0, 255).astype(np.uint8)[:, None]
