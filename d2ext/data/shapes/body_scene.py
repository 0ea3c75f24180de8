"""Pictures and clips of persons, drawn at random: who stands where, what they do and wear."""

import math
from dataclasses import replace

import numpy as np

from d2ext.data.shapes.bodies import Body, BodyFrame
from d2ext.data.shapes.body_mesh import BODY_HEIGHT, BONES
from d2ext.data.shapes.body_paint import BodyLook, Cloth
from d2ext.data.shapes.body_pose import BodyPose, view
from d2ext.data.shapes.classes import THING_CLASSES
from d2ext.data.shapes.face_scene import HAIRS, SKINS, between_colors, draw_light
from d2ext.data.shapes.frame import Frame
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
from d2ext.data.shapes.textures import THING_TEXTURES, color_ramp

__all__ = ["draw_bodies", "draw_body_clip"]

# Lowest and highest size of a person, as tall as they would stand, in pixels of a picture of
# REFERENCE_SIDE.
_SMALLEST, _LARGEST = 50.0, 230.0
# Persons per picture, as a cumulative distribution over 1, 2, 3.
_PERSONS = (0.35, 0.65, 0.87)
# A person stands where at least this share of them can be seen; behind an occluder the second one.
_SEEN, _SEEN_OCCLUDED = 0.6, 0.5
# Share of the persons on whom nobody marked points, as in COCO.
_NOT_ANNOTATED = 0.06


class _Scene:
    """Items put down front to back, and where they leave room."""

    def __init__(self, draws: Draws, height: int, width: int) -> None:
        self.draws, self.height, self.width = draws, height, width
        self.items: list[Body | Cover] = []
        self._taken = np.zeros((height, width), bool)

    def _free(self, body: Body, also: Cover | None = None) -> tuple[float, np.ndarray, np.ndarray]:
        """Share of a person that nothing hides: what is there, or `also`; and all their pixels."""
        rows, columns = body.places()
        within = (rows >= 0) & (rows < self.height) & (columns >= 0) & (columns < self.width)
        inside = rows[within], columns[within]
        taken = self._taken
        if also is not None:
            taken = taken.copy()
            taken[also.raster.window] |= also.raster.mask > 0
        free = np.count_nonzero(~taken[inside])
        return free / max(len(rows), 1), *inside

    def put_body(self, size: float) -> None:
        """Put a person where they can be seen; after six misses the picture does without."""
        draws = self.draws
        body = Body(
            draw_pose(draws),
            draw_look(draws),
            draw_view(draws),
            size / BODY_HEIGHT,
            (0.0, 0.0),
            not draws.chance(_NOT_ANNOTATED),
        )
        left, top, width, height = body.window
        for _ in range(6):
            x = round(draws.uniform(0.05, 0.95) * self.width - left - width / 2)
            y = round(draws.uniform(0.2, 0.8) * self.height - top - height / 2)
            moved = body.moved(x, y)
            share, rows, columns = self._free(moved)
            if share >= _SEEN:
                break
        else:
            return
        if draws.chance(0.3):
            self._put_occluder(moved)
        self.items.append(moved)
        self._taken[rows, columns] = True

    def _put_occluder(self, body: Body) -> None:
        """Something in front of the person; none if it would hide too much three times."""
        draws = self.draws
        left, top, width, height = body.window
        for _ in range(3):
            radius = max(width, height) * draws.uniform(0.1, 0.3)
            category = -1 if draws.chance(0.5) else draws.below(len(THING_CLASSES))
            layer = draw_layer(draws, category, radius)
            angle = draws.uniform(-math.pi, math.pi)
            x, y = left + draws() * width, top + draws() * height
            cos, sin = radius * math.cos(angle), radius * math.sin(angle)
            matrix = np.array([[cos, -sin, x], [sin, cos, y]])
            raster = rasterize(layer.outline, matrix, self.height, self.width)
            if raster is None:
                continue
            cover = Cover(layer, matrix, raster)
            if self._free(body, cover)[0] >= _SEEN_OCCLUDED:
                self.items.append(cover)
                self._taken[raster.window] |= raster.mask > 0
                return


def _set(
    angles: np.ndarray, bone: str, bent: float, spread: float = 0.0, twist: float = 0.0
) -> None:
    angles[BONES.index(bone)] = np.radians((bent, spread, twist))


def _walk(angles: np.ndarray, phase: float, stride: float) -> None:
    """Legs, and arms against them, `phase` radians into a walk of so many degrees of stride."""
    for side, turn in (("left", 0.0), ("right", math.pi)):
        swing, lift = math.sin(phase + turn), max(math.cos(phase + turn), 0.0)
        _set(angles, f"{side}_upper_leg", stride * swing + 0.3 * stride * lift, 2)
        _set(angles, f"{side}_lower_leg", -6 - 1.4 * stride * lift)
        _set(angles, f"{side}_foot", 8 * swing)
        _set(angles, f"{side}_upper_arm", -0.9 * stride * swing, -37)
        _set(angles, f"{side}_lower_arm", 15 + 0.6 * stride * max(-swing, 0.0))


def _draw_girth(draws: Draws) -> np.ndarray:
    trunk, limbs = draws.uniform(0.85, 1.22), draws.uniform(0.85, 1.2)
    girth = np.full(len(BONES), limbs)
    girth[:2] = trunk * draws.uniform(0.95, 1.08), trunk
    girth[2] = draws.uniform(0.95, 1.1)
    girth[[i for i, b in enumerate(BONES) if b.endswith(("hand", "foot"))]] = 1.05
    return girth


def draw_pose(draws: Draws) -> BodyPose:
    """Standing (a third), walking, sitting, crouching or on one leg; arms hang, point or rise."""
    angles = np.zeros((len(BONES), 3))

    def either(limit: float) -> float:
        return draws.uniform(-limit, limit)

    _set(angles, "chest", draws.uniform(-15, 8), either(8), either(18))
    _set(angles, "head", draws.uniform(-18, 18), either(10), either(45))
    kind = draws()
    walks = 0.33 <= kind < 0.58
    if walks:
        _walk(angles, draws.uniform(0, 2 * math.pi), draws.uniform(15, 38))
    for side in ("left", "right"):
        if kind < 0.33:
            _set(angles, f"{side}_upper_leg", either(10), draws.uniform(0, 18), either(15))
            _set(angles, f"{side}_lower_leg", -draws.uniform(0, 15))
        elif 0.58 <= kind < 0.74:
            _set(angles, f"{side}_upper_leg", draws.uniform(75, 95), draws.uniform(0, 18))
            _set(angles, f"{side}_lower_leg", -draws.uniform(55, 100))
        elif 0.74 <= kind < 0.86:
            bent = draws.uniform(50, 100)
            _set(angles, f"{side}_upper_leg", bent, draws.uniform(2, 22))
            _set(angles, f"{side}_lower_leg", -bent - draws.uniform(0, 25))
        elif kind >= 0.86:
            up = (side == "left") == (kind < 0.93)
            bent = draws.uniform(25, 95) if up else 0.0
            _set(angles, f"{side}_upper_leg", bent, draws.uniform(0, 40) if up else 2)
            _set(angles, f"{side}_lower_leg", -draws.uniform(0, 100) if up else -5)
        _draw_arm(draws, angles, side, walks)
    if kind >= 0.74 and draws.chance(0.5):
        angles[BONES.index("chest"), 0] = math.radians(-draws.uniform(10, 55))
    return BodyPose(angles, _draw_girth(draws))


def _draw_arm(draws: Draws, angles: np.ndarray, side: str, walks: bool) -> None:
    what = draws()
    upper, lower = f"{side}_upper_arm", f"{side}_lower_arm"
    if what < 0.4:
        if not walks:
            _set(angles, upper, draws.uniform(-20, 25), draws.uniform(-39, -22))
            _set(angles, lower, draws.uniform(5, 35))
    elif what < 0.65:  # forward
        _set(angles, upper, draws.uniform(15, 110), draws.uniform(-45, -10), draws.uniform(-30, 40))
        _set(angles, lower, draws.uniform(10, 125))
    else:  # to the side and up
        _set(angles, upper, draws.uniform(-15, 20), draws.uniform(-15, 110), draws.uniform(-60, 60))
        _set(angles, lower, draws.uniform(0, 125))
    angles[BONES.index(f"{side}_hand"), 0] = math.radians(draws.uniform(-20, 25))


def draw_view(draws: Draws) -> np.ndarray:
    """(3, 3): upright, from all sides alike, from about the height of the hips."""
    angles = draws.uniform(0, 360), draws.uniform(-8, 18), draws.uniform(-10, 10)
    return view(*np.radians(angles).tolist())


def _draw_cloth(draws: Draws) -> Cloth:
    low, high = draws.color(), draws.color()
    high = low + (high - low) * draws.uniform(0.2, 0.8)
    return Cloth(
        draws.below(len(THING_TEXTURES)),
        draws.log_uniform(150, 600),
        (draws.below(256), draws.below(256)),
        color_ramp(low, high)[:, 0],
    )


def draw_look(draws: Draws) -> BodyLook:
    shirt, trousers = _draw_cloth(draws), _draw_cloth(draws)
    if draws.chance(0.1):  # one piece
        trousers = shirt
    hair = np.array(HAIRS[draws.below(len(HAIRS))], float) * draws.uniform(0.75, 1.15)
    return BodyLook(
        skin=between_colors(draws, SKINS, 0.1),
        hair=hair,
        shoes=draws.color() * 0.6,
        shirt=shirt,
        trousers=trousers,
        sleeves=draws.uniform(0.3, 0.7) if draws.chance(0.4) else draws.uniform(1.0, 2.05),
        legs=draws.uniform(0.5, 0.95) if draws.chance(0.3) else draws.uniform(1.5, 2.05),
        hair_length=1.1 if draws.chance(0.08) else draws.uniform(0.05, 0.42),
        buttons=draws.color() if draws.chance(0.4) else None,
        back=draws.uniform(0.3, 0.5),
    )


def _draw_backdrop(draws: Draws, height: int, width: int) -> Frame:
    """Background, things (figures too) and clutter."""
    stack, unit = Stack(height, width), min(height, width) / REFERENCE_SIDE
    background = draw_background(draws, height, width)
    for _ in range(draws.below(4)):
        put_thing(draws, stack, draws.log_uniform(10, 60) * unit)
    for _ in range(draws.below(3)):
        put_clutter(draws, stack, unit)
    matrices = [pose.matrix() for pose in stack.poses]
    noise = draws.below(256), draws.below(256)
    return Frame(height, width, stack.layers, matrices, background, IDENTITY, noise, stack.rasters)


def _draw_size(draws: Draws, largest: float) -> float:
    """Of a person at the reference size: 20 % small."""
    if draws.chance(0.2):
        return draws.log_uniform(_SMALLEST, 100)
    return draws.log_uniform(100, largest)


def draw_bodies(seed: int, split: str, index: int, height: int, width: int) -> BodyFrame:
    """Picture `index` of a split with persons: 1 to 4, or none where there was no room.

    Of every person at least half can be seen. Three in four pictures have things of the other
    `shapes` sets behind, among them flat figures, which are no persons.
    """
    draws = Draws(seed, split, "bodies", index)
    unit = min(height, width) / REFERENCE_SIDE
    light, scene = draw_light(draws), _Scene(draws, height, width)
    u = draws()
    number = 1 + sum(u >= limit for limit in _PERSONS)
    largest = _LARGEST if number < 3 else 150.0
    sizes = [_draw_size(draws, largest) * unit for _ in range(number)]
    for size in sorted(sizes, reverse=True):
        scene.put_body(size)
    blur = draws.uniform(0.4, 1.0) * unit if draws.chance(0.25) else 0.0
    return BodyFrame(scene.items, light, blur, _draw_backdrop(draws, height, width))


def draw_body_clip(
    seed: int, split: str, index: int, height: int, width: int, length: int
) -> list[BodyFrame]:
    """Clip `index` of a split: one or two persons who walk, turn and pass each other; an item's
    place is the same in all frames."""
    draws = Draws(seed, split, "body clip", index)
    unit = min(height, width) / REFERENCE_SIDE
    light, backdrop = draw_light(draws), _draw_backdrop(draws, height, width)
    walkers = [_Walker(draws, height, width, unit) for _ in range(1 + draws.below(2))]
    walkers.sort(key=lambda walker: -walker.size)
    return [
        BodyFrame([walker.body(time) for walker in walkers], light, 0.0, backdrop)
        for time in range(length)
    ]


class _Walker:
    """A person of a clip; times are in frames."""

    def __init__(self, draws: Draws, height: int, width: int, unit: float) -> None:
        self.look, self.pose = draw_look(draws), draw_pose(draws)
        self.size = draws.log_uniform(110, 210) * unit
        self.phase, self.rate = draws.uniform(0, 2 * math.pi), draws.uniform(0.3, 0.7)
        self.stride = draws.uniform(15, 38)
        self.yaw, self.spin = draws.uniform(0, 360), draws.uniform(-12, 12)
        self.pitch = draws.uniform(-5, 15)
        self.start = draws.uniform(0.3, 0.7) * width, draws.uniform(0.4, 0.6) * height
        self.speed = draws.uniform(-3, 3) * unit, draws.uniform(-0.5, 0.5) * unit

    def body(self, time: int) -> Body:
        angles = self.pose.angles.copy()
        _walk(angles, self.phase + self.rate * time, self.stride)
        turn = view(*np.radians((self.yaw + self.spin * time, self.pitch, 0.0)).tolist())
        (x, y), (vx, vy) = self.start, self.speed
        scale, centre = self.size / BODY_HEIGHT, (x + vx * time, y + vy * time)
        return Body(replace(self.pose, angles=angles), self.look, turn, scale, centre)
