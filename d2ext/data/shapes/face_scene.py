"""Pictures of heads, drawn at random: who stands where, and how they look."""

import math
from dataclasses import replace

import cv2
import numpy as np

from d2ext.data.shapes.classes import THING_CLASSES, Outline, capsule
from d2ext.data.shapes.face_mesh import FACE_VERTICES, HeadShape
from d2ext.data.shapes.face_paint import HeadLook, Light
from d2ext.data.shapes.faces import FaceFrame, Head
from d2ext.data.shapes.frame import Frame, Layer
from d2ext.data.shapes.items import Cover
from d2ext.data.shapes.raster import rasterize
from d2ext.data.shapes.scene import (
    IDENTITY,
    REFERENCE_SIDE,
    Draws,
    Stack,
    draw_background,
    draw_layer,
    put_clutter,
    put_thing,
)
from d2ext.data.shapes.textures import color_ramp

__all__ = ["HAIRS", "SKINS", "between_colors", "draw_faces", "draw_light"]

# Lowest and highest height of a face, forehead to chin, in pixels of a picture of REFERENCE_SIDE.
_SMALLEST, _LARGEST = 8.0, 200.0
# Faces per picture, as a cumulative distribution over 0, 1, 2, ...; the mean is about 2.9.
_FACES = (0.08, 0.31, 0.52, 0.68, 0.79, 0.87, 0.93, 0.97, 1.0)
# A face stands where at least this share of it can be seen; behind an occluder the second one.
_SEEN, _SEEN_OCCLUDED = 0.65, 0.5

SKINS = ((252, 218, 192), (235, 188, 155), (205, 152, 112), (150, 100, 68), (92, 58, 42))
HAIRS = ((22, 18, 18), (52, 34, 24), (98, 62, 36), (200, 165, 100), (150, 70, 35), (170, 168, 165))
_IRISES = ((75, 50, 30), (90, 120, 150), (85, 115, 75), (60, 45, 35))


class _Scene:
    """Items put down front to back, and where they leave room."""

    def __init__(self, draws: Draws, height: int, width: int) -> None:
        self.draws, self.height, self.width = draws, height, width
        self.items: list[Head | Cover] = []
        self._taken = np.zeros((height, width), np.uint8)

    def seen(self, head: Head, also: np.ndarray | None = None) -> float:
        """Share of a face, as large as its convex hull, that nothing hides: what is there, or `also`."""
        hull = cv2.convexHull(head.solid.points[:FACE_VERTICES, :2].astype(np.float32))
        mask = np.zeros_like(self._taken)
        cv2.fillConvexPoly(mask, np.rint(hull * 16 - 8).astype(np.int32), 1, shift=4)
        hidden = self._taken if also is None else self._taken | also
        mask[hidden > 0] = 0
        return cv2.countNonZero(mask) / max(cv2.contourArea(hull), 1.0)

    def put(self, item: Head | Cover) -> None:
        self.items.append(item)
        if isinstance(item, Cover):
            self._taken[item.raster.window] |= item.raster.mask
        else:
            hull = cv2.convexHull(item.solid.points[:, :2].astype(np.float32))
            cv2.fillConvexPoly(self._taken, np.rint(hull * 16 - 8).astype(np.int32), 1, shift=4)

    def cover(self, layer: Layer, matrix: np.ndarray) -> Cover | None:
        raster = rasterize(layer.outline, matrix, self.height, self.width)
        return None if raster is None else Cover(layer, matrix, raster)

    def put_head(self, size: float, *, annotated: bool = True) -> None:
        """Put a head where its face can be seen; after six misses the picture does without it."""
        draws = self.draws
        shape, look = _draw_shape(draws), _draw_look(draws)
        pose = _draw_pose(draws)
        if not annotated:
            pose = (pose[0] + math.pi, pose[1] * 0.3, pose[2])
        head = Head(shape, look, pose, size / 2, (0.0, 0.0), annotated)
        for _ in range(6):
            centre = draws.uniform(0.02, 0.98) * self.width, draws.uniform(0.05, 0.95) * self.height
            head = head.moved(centre)
            if self.seen(head) >= _SEEN:
                break
        else:
            return
        if annotated and draws.chance(0.2):
            self._put_occluder(head)
        self.put(head)
        shoulders = _draw_shoulders(draws, head)
        if draws.chance(0.9):
            cover = self.cover(*shoulders)
            if cover is not None:
                self.put(cover)

    def _put_occluder(self, head: Head) -> None:
        """Something in front of the head; none if it would hide too much three times."""
        draws, size = self.draws, 2 * head.scale
        for _ in range(3):
            kind, radius = draws.below(3), size * draws.uniform(0.2, 0.42)
            if kind == 0:
                layer = draw_layer(draws, -1, radius)
            elif kind == 1:
                layer = draw_layer(draws, draws.below(len(THING_CLASSES)), radius)
            else:
                layer = _hand(head.look.skin, draws)
            angle = draws.uniform(-math.pi, math.pi)
            x = head.centre[0] + draws.uniform(-0.45, 0.45) * size
            y = head.centre[1] + draws.uniform(-0.45, 0.6) * size
            cos, sin = radius * math.cos(angle), radius * math.sin(angle)
            cover = self.cover(layer, np.array([[cos, -sin, x], [sin, cos, y]]))
            if cover is None:
                continue
            mask = np.zeros_like(self._taken)
            mask[cover.raster.window] = cover.raster.mask
            if self.seen(head, mask) >= _SEEN_OCCLUDED:
                self.put(cover)
                return


def between_colors(
    draws: Draws, colors: tuple[tuple[int, int, int], ...], spread: float
) -> np.ndarray:
    """Between two neighbours of a list of colours, lighter or darker by up to `spread`."""
    place = draws() * (len(colors) - 1)
    index = int(place)
    low, high = np.array(colors[index], float), np.array(colors[index + 1], float)
    return np.clip((low + (place - index) * (high - low)) * draws.uniform(1 - spread, 1), 0, 255)


def _draw_shape(draws: Draws) -> HeadShape:
    def either() -> float:
        return draws.uniform(-1, 1)

    opened = draws.uniform(0.7, 1)
    eyes = (opened, opened)
    if draws.chance(0.12):
        shut = draws.uniform(0, 0.3)
        eyes = ((shut, shut), (shut, shut), (shut, opened), (opened, shut))[draws.below(4)]
    return HeadShape(
        skull_width=either(),
        skull_height=either(),
        jaw_width=either(),
        chin=either(),
        nose_length=either(),
        nose_width=either(),
        nose_height=either(),
        brow=either(),
        eye_distance=either(),
        cheeks=either(),
        lips=either(),
        ears=either(),
        mouth_open=draws.uniform(0.1, 1) if draws.chance(0.4) else 0.0,
        smile=draws.uniform(-0.8, 1),
        brow_raise=either(),
        eyes_open=eyes,
    )


def _draw_look(draws: Draws) -> HeadLook:
    skin = between_colors(draws, SKINS, 0.1)
    hair = np.array(HAIRS[draws.below(len(HAIRS))], float) * draws.uniform(0.75, 1.15)
    if draws.chance(0.06):  # dyed
        hair = draws.color()
    lip = skin * np.array([draws.uniform(0.8, 1), draws.uniform(0.45, 0.68), 0.62])
    if draws.chance(0.15):  # lipstick
        lip = np.array([draws.uniform(130, 210), 25, draws.uniform(30, 90)])
    style, hat = draws(), None
    volume, fringe, length = draws.uniform(0.02, 0.12), draws.uniform(-0.98, -0.7), 0.35
    if style < 0.12:
        volume = -1.0
    elif style < 0.5:
        volume, length = draws.uniform(0.05, 0.25), draws.uniform(0.6, 1.8)
        fringe = draws.uniform(-0.95, -0.5)
    if draws.chance(0.18):
        hat = draws.color()
    return HeadLook(
        skin=skin,
        hair=hair,
        iris=np.array(_IRISES[draws.below(len(_IRISES))], float),
        lip=lip,
        beard=draws.uniform(0.4, 1) if draws.chance(0.22) else 0.0,
        glasses=draws.color() * 0.5 if draws.chance(0.18) else None,
        volume=volume,
        fringe=fringe,
        hair_length=length,
        hat=hat,
        brim=draws.uniform(0.15, 0.5) if draws.chance(0.5) else 0.0,
        gaze=(draws.uniform(-1, 1), draws.uniform(-1, 1)),
        grain=(draws.below(200), draws.below(200)),
    )


def _draw_pose(draws: Draws) -> tuple[float, float, float]:
    """Yaw to 75 degrees, in two of five cases evenly, else more often near 0; pitch and roll to 30."""
    yaw = draws.uniform(-75, 75)
    if draws.chance(0.6):
        yaw = 0.5 * yaw + draws.uniform(-15, 15)
    pitch = draws.uniform(-15, 15) + draws.uniform(-15, 15)
    roll = draws.uniform(-15, 15) + draws.uniform(-15, 15)
    return math.radians(yaw), math.radians(pitch), math.radians(roll)


# Right half of a trunk from the neck on, in its own frame.
_TRUNK = [(0.0, -0.5), (0.2, -0.5), (0.27, -0.4), (0.5, -0.28), (0.78, -0.18), (0.92, 0.0)]
_TRUNK = [*_TRUNK, (1.0, 0.4), (1.0, 1.0)]
_SHOULDERS = Outline(
    [[np.array(_TRUNK + [(-x, y) for x, y in _TRUNK[:0:-1]])]], [], np.zeros((0, 2))
)
_FINGERS = [
    [capsule(x, -0.8 + 0.4 * abs(x + 0.1), 0.9 * x, 0.25, 0.16)] for x in (-0.6, -0.2, 0.2, 0.6)
]
_PALM = [np.array([(-0.74, 0.1), (0.7, 0.1), (0.62, 0.8), (0.4, 1.0), (-0.4, 1.0), (-0.66, 0.8)])]
_HAND = Outline([*_FINGERS, _PALM], [], np.zeros((0, 2)))


def _draw_shoulders(draws: Draws, head: Head) -> tuple[Layer, np.ndarray]:
    """Clothed shoulders below a head, and where they are."""
    radius = 1.9 * head.scale
    layer = replace(draw_layer(draws, -1, radius), outline=_SHOULDERS, edge=0.01)
    x, y = head.solid.points[-13:, :2].mean(axis=0).tolist()  # the neck's lower end
    wide = draws.uniform(0.8, 1.05)
    return layer, np.array([[radius * wide, 0, x], [0, radius, y + 0.44 * radius]])


def _hand(skin: np.ndarray, draws: Draws) -> Layer:
    layer = draw_layer(draws, -1, 1e3)
    tone = skin * draws.uniform(0.75, 1)
    ink = (tone * 0.4).astype(int).tolist()
    return replace(
        layer,
        outline=_HAND,
        texture=0,
        ramp=color_ramp(0.75 * tone, np.minimum(1.25 * tone, 255)),
        tones=[layer.tones[0], ink, layer.tones[2]],
        edge=0.02,
    )


def draw_light(draws: Draws) -> Light:
    """From the side of the camera, up to 65 degrees to a side and rather from above."""
    azimuth, height = math.radians(draws.uniform(-65, 65)), math.radians(draws.uniform(-15, 60))
    flat = math.cos(height)
    direction = (flat * math.sin(azimuth), -math.sin(height), -flat * math.cos(azimuth))
    return Light(np.array(direction), draws.uniform(0.35, 0.75))


def _draw_size(draws: Draws) -> float:
    """Height of a face at the reference size: 35 % small, 40 % medium, 25 % large."""
    u = draws()
    if u < 0.35:
        return draws.log_uniform(_SMALLEST, 24)
    return draws.log_uniform(24, 70) if u < 0.75 else draws.log_uniform(70, _LARGEST)


def draw_faces(seed: int, split: str, index: int, height: int, width: int) -> FaceFrame:
    """Picture `index` of a split with faces: none in one of twelve, else mostly 1 to 5, at most 8.

    Of every face at least half can be seen. One picture in seven has a head that is seen from behind,
    and half have things of the other `shapes` sets, which have eyes and mouths but are no faces.
    """
    draws = Draws(seed, split, "faces", index)
    unit = min(height, width) / REFERENCE_SIDE
    light, scene = draw_light(draws), _Scene(draws, height, width)
    u = draws()
    sizes = [_draw_size(draws) * unit for _ in range(sum(u >= limit for limit in _FACES))]
    if len(sizes) > 4:  # a group does not fit otherwise
        sizes = [min(size, 70 * unit) for size in sizes]
    for size in sorted(sizes, reverse=True):
        scene.put_head(size)
    if draws.chance(0.14):
        scene.put_head(draws.log_uniform(24, 80) * unit, annotated=False)
    blur = draws.uniform(0.4, 1.3) * unit if draws.chance(0.3) else 0.0

    stack = Stack(height, width)
    background = draw_background(draws, height, width)
    for _ in range(max(draws.below(4) - 1, 0)):
        put_thing(draws, stack, draws.log_uniform(8, 45) * unit)
    for _ in range(draws.below(3)):
        put_clutter(draws, stack, unit)
    backdrop = Frame(
        height,
        width,
        stack.layers,
        [pose.matrix() for pose in stack.poses],
        background,
        IDENTITY,
        (draws.below(256), draws.below(256)),
        stack.rasters,
    )
    return FaceFrame(scene.items, light, blur, backdrop)
