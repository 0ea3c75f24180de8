"""Drawing scenes at random: what stands where, and how it looks.

All randomness comes from a counter-based generator keyed by (seed, split, kind) and index, so a
scene does not depend on which scenes were drawn before it, nor by which process. Only uniform
doubles are taken from it; everything else is computed from them here, so that a scene does not
change with NumPy's distributions.
"""

import hashlib
import math
from dataclasses import dataclass

import cv2
import numpy as np

from d2ext.data.shapes.classes import (
    STUFF_CLASSES,
    THING_CLASSES,
    blob_outline,
    thing_outline,
)
from d2ext.data.shapes.frame import Background, Frame, Layer, Region
from d2ext.data.shapes.raster import Raster, rasterize
from d2ext.data.shapes.textures import THING_TEXTURES, color_ramp

__all__ = [
    "IDENTITY",
    "REFERENCE_SIDE",
    "Draws",
    "Pose",
    "Stack",
    "draw_background",
    "draw_image",
    "draw_radius",
    "put_clutter",
    "put_thing",
]

IDENTITY = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
# Sizes below are for an image whose shorter side has this many pixels; they scale with it.
REFERENCE_SIDE = 256.0


class Draws:
    """The random numbers of one scene, in order.

    Args:
        seed: chooses the data set.
        split: name of the split; different names give unrelated scenes.
        kind: what is drawn (``"image"``, ``"clip"``).
        index: number of the scene, 0 and up.
    """

    def __init__(self, seed: int, split: str, kind: str, index: int) -> None:
        key = hashlib.blake2b(f"{seed}/{split}/{kind}".encode(), digest_size=8).digest()
        # As uint64: a list would go through float64 in NumPy 1, and lose digits.
        words = np.array([int.from_bytes(key, "little"), index], np.uint64)
        philox = np.random.Philox(key=words)
        self._generator = np.random.Generator(philox)
        self._block: list[float] = []

    def __call__(self) -> float:
        """The next number in [0, 1)."""
        if not self._block:
            self._block = self._generator.random(256).tolist()
        return self._block.pop()

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self()

    def log_uniform(self, low: float, high: float) -> float:
        return low * (high / low) ** self()

    def below(self, n: int) -> int:
        """An integer from 0 to n - 1."""
        return int(self() * n)

    def chance(self, probability: float) -> bool:
        return self() < probability

    def color(
        self, hues: tuple[float, float] = (0, 1), saturations: tuple[float, float] = (0.15, 1)
    ) -> np.ndarray:
        """(3,) float64 in [0, 255]; hue and saturation, in [0, 1], from the given ranges."""
        hue, saturation = self.uniform(*hues), self.uniform(*saturations)
        value = self.uniform(0.25, 1)
        channels = []
        for offset in (0, 4, 2):
            pure = min(max(abs((hue * 6 + offset) % 6 - 3) - 1, 0.0), 1.0)
            channels.append(255 * value * (1 - saturation * (1 - pure)))
        return np.array(channels)


@dataclass(frozen=True)
class Pose:
    """Where a thing is: centre, radius (pixels), width over height, clockwise angle (radians)."""

    x: float
    y: float
    radius: float
    aspect: float
    angle: float

    def matrix(self) -> np.ndarray:
        """2 x 3, the thing's own frame -> image (or world)."""
        stretch = math.sqrt(self.aspect)
        cos, sin = math.cos(self.angle) * self.radius, math.sin(self.angle) * self.radius
        return np.array(
            [
                [cos * stretch, -sin / stretch, self.x],
                [sin * stretch, cos / stretch, self.y],
            ]
        )


def draw_radius(draws: Draws) -> float:
    """Radius of a thing at the reference size: 5 % small, 35 % medium, 60 % large.

    The thing's diameter, hence, goes from 8 pixels to two thirds of the image.
    """
    u = draws()
    if u < 0.05:
        return draws.log_uniform(4, 13)
    if u < 0.4:
        return draws.log_uniform(22, 42)
    return draws.log_uniform(42, 85)


# Share of the things that have the usual hue of their class, and how far from it, in turns.
_USUAL_COLORS = 0.9
_HUE_SPREAD = 0.04


def draw_layer(draws: Draws, category: int, radius: float, *, crowd: bool = False) -> Layer:
    """Look of a thing of the given class (-1: clutter).

    The outline tells the class. Nine in ten things have their class's usual colours as well, as
    many real things do; the others, and clutter, have any.
    """
    outline = blob_outline(draws) if category < 0 else thing_outline(category, draws)
    if category >= 0 and draws.chance(_USUAL_COLORS):
        hue = category / len(THING_CLASSES)
        palette = ((hue - _HUE_SPREAD, hue + _HUE_SPREAD), (0.6, 1.0))
        low, high = draws.color(*palette), draws.color(*palette)
    else:
        low, high = draws.color(), draws.color()
    if abs(float((high - low).sum())) < 120:  # too alike to show a texture
        high = 0.35 * high if float(high.sum()) > 300 else 255 - 0.4 * (255 - high)
    accent = np.zeros(3) if float((low + high).sum()) > 765 else np.full(3, 255.0)
    ink = draws.color() * 0.3
    # Texture pixels per radius: a period is an eighth to a half of a tile. Fine patterns on small
    # things would only alias.
    scale = min(draws.log_uniform(28, 80), 3 * radius)
    angle = draws.uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    texture_matrix = np.array([[cos, -sin, 256 * draws()], [sin, cos, 256 * draws()]])
    return Layer(
        category=category,
        outline=outline,
        texture=draws.below(len(THING_TEXTURES)),
        texture_matrix=texture_matrix,
        ramp=color_ramp(low, high),
        tones=[[250, 250, 250], ink.astype(int).tolist(), accent.astype(int).tolist()],
        # A figure's limbs are thin: a thick line would be all of them.
        edge=draws.uniform(0.03, 0.08)
        * (0.4 if len(outline.parts) > 1 else 1.0)
        * draws.chance(0.7),
        crowd=crowd,
    )


def draw_angle(draws: Draws) -> float:
    """Three in four stand within 40 degrees of upright, the others anyhow."""
    limit = math.radians(40) if draws.chance(0.75) else math.pi
    return draws.uniform(-limit, limit)


# Colours of a stuff class at grey 0 and at grey 255, before they are shifted at random.
_STUFF_RAMPS = {
    "sky": ((70, 130, 210), (230, 238, 250)),
    "water": ((15, 50, 105), (120, 170, 190)),
    "grass": ((20, 60, 15), (150, 190, 80)),
    "sand": ((120, 95, 55), (245, 225, 180)),
    "brick": ((90, 30, 20), (215, 200, 185)),
    "wood": ((40, 22, 10), (200, 150, 95)),
}


def draw_background(draws: Draws, height: int, width: int) -> Background:
    """Two to four stuff classes: one everywhere, the others cut in along wavy lines or as ponds."""
    unit = min(height, width)
    classes = list(range(len(STUFF_CLASSES)))
    regions = []
    for position in range(2 + draws.below(3)):
        category = classes.pop(draws.below(len(classes)))
        polygon = None
        if position > 0:
            shape = _pond if draws.chance(0.25) else _shore
            polygon = shape(draws, height, width)
        low, high = (np.array(c, float) for c in _STUFF_RAMPS[STUFF_CLASSES[category]])
        if draws.chance(0.15):
            low, high = 0.4 * draws.color(), 255 - 0.4 * draws.color()
        shift = np.array([draws.uniform(-25, 25) for _ in range(3)]) + draws.uniform(-25, 25)
        scale = draws.log_uniform(0.7, 1.8) * REFERENCE_SIDE / unit
        angle = draws.uniform(-0.35, 0.35)
        cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
        matrix = np.array([[cos, -sin, 256 * draws()], [sin, cos, 256 * draws()]])
        regions.append(Region(category, polygon, matrix, color_ramp(low + shift, high + shift)))
    return Background(
        regions,
        light=draws.uniform(0.1, 0.7),
        light_window=(draws.below(256), draws.below(256)),
        noise=draws.uniform(0.05, 0.6),
    )


def _shore(draws: Draws, height: int, width: int) -> np.ndarray:
    """Everything on one side of a wavy line through the image."""
    unit, reach = min(height, width), 3.0 * max(height, width)
    tilt = draws.uniform(-0.4, 0.4) + (math.pi / 2 if draws.chance(0.25) else 0)
    if draws.chance(0.5):
        tilt += math.pi
    along = np.linspace(-reach, reach, 160)
    across = np.zeros_like(along)
    for octave in (1, 2, 4):
        wave = 2 * math.pi * octave / (draws.uniform(0.6, 1.4) * unit)
        across += draws.uniform(0, 0.05) / octave * unit * np.sin(wave * along + 6.3 * draws())
    line = np.stack([along, across], axis=1)
    local = np.concatenate([line, [(reach, reach), (-reach, reach)]])
    cos, sin = math.cos(tilt), math.sin(tilt)
    centre = (draws.uniform(0.2, 0.8) * width, draws.uniform(0.2, 0.8) * height)
    return local @ np.array([[cos, sin], [-sin, cos]]) + centre


def _pond(draws: Draws, height: int, width: int) -> np.ndarray:
    """A closed wavy curve."""
    angle = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    radius = np.full(48, draws.uniform(0.2, 0.45) * min(height, width))
    for wave in (2, 3, 5):
        radius *= 1 + draws.uniform(0, 0.5 / wave) * np.sin(wave * angle + 6.3 * draws())
    circle = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return circle + (draws() * width, draws() * height)


class Stack:
    """Layers put down front to back, each behind those before it."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.layers: list[Layer] = []
        self.poses: list[Pose] = []
        self.rasters: list[Raster | None] = []
        self._taken = np.zeros((height, width), np.uint8)

    def visible(self, raster: Raster | None) -> int:
        """Pixels of `raster` that would be seen behind the present layers."""
        if raster is None:
            return 0
        return raster.area - cv2.countNonZero(self._taken[raster.window] & raster.mask)

    def raster(self, layer: Layer, pose: Pose) -> Raster | None:
        return rasterize(layer.outline, pose.matrix(), self.height, self.width)

    def put(self, layer: Layer, pose: Pose, raster: Raster | None) -> None:
        self.layers.append(layer)
        self.poses.append(pose)
        self.rasters.append(raster)
        if raster is not None:
            self._taken[raster.window] |= raster.mask


# Things per image, as a cumulative distribution over 0, 1, 2, ...; the mean is about 2.5.
_THINGS = (0.01, 0.23, 0.56, 0.82, 0.94, 0.98, 0.99, 1.0)


def draw_image(seed: int, split: str, index: int, height: int, width: int) -> Frame:
    """Still number `index` of a split.

    Of every thing at least 50 % of what lies inside the image, and at least 20 pixels, can be seen;
    one image in 100 has no thing, one in 25 a crowd of 10 to 18 tiny things of one class.
    """
    draws = Draws(seed, split, "image", index)
    background = draw_background(draws, height, width)
    stack = Stack(height, width)
    unit = min(height, width) / REFERENCE_SIDE

    u = draws()
    radii = [draw_radius(draws) for _ in range(sum(u >= limit for limit in _THINGS))]
    # Front to back: small things tend to stand in front.
    radii.sort(key=lambda radius: radius * draws.log_uniform(0.3, 3))
    if draws.chance(0.1):
        put_clutter(draws, stack, unit)
    for radius in radii:
        put_thing(draws, stack, radius * unit)
    for _ in range(draws.below(3)):
        put_clutter(draws, stack, unit)
    if draws.chance(0.04):
        put_crowd(draws, stack, unit)
    return Frame(
        height,
        width,
        stack.layers,
        [pose.matrix() for pose in stack.poses],
        background,
        IDENTITY,
        (draws.below(256), draws.below(256)),
        stack.rasters,
    )


def put_thing(draws: Draws, stack: Stack, radius: float) -> None:
    """Put a thing where enough of it can be seen; after four misses the image does without it."""
    layer = draw_layer(draws, draws.below(len(THING_CLASSES)), radius)
    aspect, angle = draws.log_uniform(0.8, 1.25), draw_angle(draws)
    for _ in range(4):
        if stack.poses and draws.chance(0.3):  # near another thing, so that they overlap
            other = stack.poses[draws.below(len(stack.poses))]
            reach = (radius + other.radius) * draws.uniform(0.4, 1.1)
            direction = draws.uniform(0, 2 * math.pi)
            x, y = other.x + reach * math.cos(direction), other.y + reach * math.sin(direction)
        else:
            x = draws.uniform(0.04, 0.96) * stack.width
            y = draws.uniform(0.04, 0.96) * stack.height
        if not (0 <= x < stack.width and 0 <= y < stack.height):
            continue
        pose = Pose(x, y, radius, aspect, angle)
        raster = stack.raster(layer, pose)
        if raster is not None and stack.visible(raster) >= max(20, 0.5 * raster.area):
            stack.put(layer, pose, raster)
            return


def put_clutter(draws: Draws, stack: Stack, unit: float) -> None:
    radius = draws.log_uniform(12, 60) * unit
    layer = draw_layer(draws, -1, radius)
    x, y = draws() * stack.width, draws() * stack.height
    pose = Pose(x, y, radius, 1.0, draws.uniform(-math.pi, math.pi))
    stack.put(layer, pose, stack.raster(layer, pose))


def put_crowd(draws: Draws, stack: Stack, unit: float) -> None:
    category = draws.below(len(THING_CLASSES))
    x, y = draws.uniform(0.2, 0.8) * stack.width, draws.uniform(0.2, 0.8) * stack.height
    for _ in range(10 + draws.below(9)):
        radius = draws.uniform(4, 8) * unit
        layer = draw_layer(draws, category, radius, crowd=True)
        dx, dy = draws.uniform(-34, 34) * unit, draws.uniform(-26, 26) * unit
        pose = Pose(x + dx, y + dy, radius, 1.0, draw_angle(draws))
        stack.put(layer, pose, stack.raster(layer, pose))
