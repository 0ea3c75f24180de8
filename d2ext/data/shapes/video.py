"""Clips of `shapes`: things that move, hide each other, leave and come back, under a moving camera.

Every layer moves by an affine map from frame to frame, so the optical flow of every pixel is known
exactly.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from d2ext.data.shapes.frame import Frame
from d2ext.data.shapes.raster import compose, invert
from d2ext.data.shapes.scene import (
    REFERENCE_SIDE,
    Draws,
    Pose,
    Stack,
    draw_background,
    draw_radius,
    put_clutter,
    put_thing,
)

__all__ = ["COVERED", "OUTSIDE", "SEEN", "Clip", "draw_clip", "flow_bytes"]

# Values of an occlusion map: what becomes of a pixel's point in the other frame.
SEEN, COVERED, OUTSIDE = 0, 1, 2


@dataclass(frozen=True)
class Motion:
    """Movement of a thing in the world, added to its pose; times are in frames.

    Attributes:
        velocity: pixels per frame.
        spin: radians per frame.
        growth: relative amplitude of the slow change of the radius.
        trip: displacement at the far point of a trip away from its place and back.
        start: where on the trip it is in frame 0: 0 at its place, 0.5 at the far point.
    """

    velocity: tuple[float, float]
    spin: float
    growth: float
    trip: tuple[float, float]
    start: float

    def move(self, pose: Pose, time: float, length: int) -> Pose:
        """The pose at `time` in a clip of `length` frames."""
        phase = self.start + time / max(length - 1, 1)
        away = math.sin(math.pi * phase) ** 2
        return Pose(
            x=pose.x + self.velocity[0] * time + self.trip[0] * away,
            y=pose.y + self.velocity[1] * time + self.trip[1] * away,
            radius=pose.radius * math.exp(self.growth * math.sin(2 * math.pi * phase)),
            aspect=pose.aspect,
            angle=pose.angle + self.spin * time,
        )


@dataclass(frozen=True)
class Camera:
    """Movement about the image's centre, per frame: pan in pixels, turn in radians, zoom."""

    pan: tuple[float, float]
    turn: float
    zoom: float

    def matrix(self, time: float, height: int, width: int) -> np.ndarray:
        """2 x 3, world -> image at `time`; the identity at time 0."""
        angle, scale = self.turn * time, math.exp(self.zoom * time)
        cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
        centre = np.array([width / 2, height / 2])
        linear = np.array([[cos, -sin], [sin, cos]])
        offset = centre - linear @ centre + np.array(self.pan) * time
        return np.concatenate([linear, offset[:, None]], axis=1)


class Clip:
    """A scene over time.

    Layers keep their order, so a layer's number (:attr:`Segment.number`) is the track id of its
    thing.

    Attributes:
        length: number of frames.
        frames: all of them; what they hold is drawn when it is asked for.
    """

    def __init__(
        self, height: int, width: int, length: int, make_frame: Callable[[int], Frame]
    ) -> None:
        self.height, self.width, self.length = height, width, length
        self._make_frame = make_frame

    @cached_property
    def frames(self) -> list[Frame]:
        return [self._make_frame(time) for time in range(self.length)]

    def flow(self, source: int, target: int) -> np.ndarray:
        """Exact motion of every pixel's point from frame `source` to frame `target`.

        Returns:
            (H, W, 2) float32, x and y in pixels; also where the point is hidden or outside in
            `target`.
        """
        here, there = self._pair(source, target)
        x = np.arange(self.width, dtype=np.float32) + 0.5
        y = (np.arange(self.height, dtype=np.float32) + 0.5)[:, None]

        def motion(change: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
            (a, b, tx), (c, d, ty) = change.tolist()
            px, py = x[columns], y[rows]
            return np.stack([(a - 1) * px + b * py + tx, c * px + (d - 1) * py + ty], axis=2)

        change = compose(there.camera, invert(here.camera))
        flow = motion(change, slice(None), slice(None)).astype(np.float32)
        for index, raster in enumerate(here.rasters):
            if raster is not None:
                change = compose(there.matrices[index], invert(here.matrices[index]))
                rows, columns = raster.window
                owned = here.owner[rows, columns] == index + 1
                flow[rows, columns][owned] = motion(change, rows, columns)[owned]
        return flow

    def occlusion(self, source: int, target: int) -> np.ndarray:
        """What becomes of a pixel of frame `source` in frame `target`.

        Returns:
            (H, W) uint8: :data:`SEEN`, :data:`COVERED` (the pixel that the flow leads to shows
            another layer) or :data:`OUTSIDE` (the flow leads out of the image).
        """
        here, there = self._pair(source, target)
        flow = self.flow(source, target)
        x = np.floor(np.arange(self.width) + 0.5 + flow[..., 0]).astype(np.int64)
        y = np.floor(np.arange(self.height)[:, None] + 0.5 + flow[..., 1]).astype(np.int64)
        outside = (x < 0) | (y < 0) | (x >= self.width) | (y >= self.height)
        x, y = x.clip(0, self.width - 1), y.clip(0, self.height - 1)
        covered = there.owner[y, x] != here.owner
        return np.where(outside, OUTSIDE, np.where(covered, COVERED, SEEN)).astype(np.uint8)

    def _pair(self, source: int, target: int) -> tuple[Frame, Frame]:
        if not (0 <= source < self.length and 0 <= target < self.length):
            raise IndexError(
                f"no flow from frame {source} to {target}: the clip has frames 0 to "
                f"{self.length - 1}"
            )
        return self.frames[source], self.frames[target]


def flow_bytes(flow: np.ndarray) -> bytes:
    """Middlebury's ``.flo``: float32 202021.25, int32 width and height, then x, y by rows."""
    height, width = flow.shape[:2]
    header = np.array([202021.25], "<f4").tobytes() + np.array([width, height], "<i4").tobytes()
    return header + flow.astype("<f4").tobytes()


def draw_clip(seed: int, split: str, index: int, height: int, width: int, length: int) -> Clip:
    """Clip `index` of a split: three to seven things; the first leaves and comes back."""
    draws = Draws(seed, split, "clip", index)
    background = draw_background(draws, height, width)
    stack = Stack(height, width)
    unit = min(height, width) / REFERENCE_SIDE
    for _ in range(3 + draws.below(5)):
        put_thing(draws, stack, draw_radius(draws) * unit)
    things = len(stack.layers)
    for _ in range(draws.below(3)):
        put_clutter(draws, stack, unit)
    motions = [
        _draw_motion(draws, pose, height, width, unit, leaves=i == 0 or draws.chance(0.2))
        if i < things
        else None  # clutter lies still in the world
        for i, pose in enumerate(stack.poses)
    ]
    camera = Camera(
        (draws.uniform(-2, 2) * unit, draws.uniform(-1.5, 1.5) * unit),
        draws.uniform(-0.008, 0.008),
        draws.uniform(-0.01, 0.01),
    )
    noise_windows = [(draws.below(256), draws.below(256)) for _ in range(length)]

    def make_frame(time: int) -> Frame:
        view = camera.matrix(time, height, width)
        matrices = []
        for pose, motion in zip(stack.poses, motions, strict=True):
            moved = pose if motion is None else motion.move(pose, time, length)
            matrices.append(compose(view, moved.matrix()))
        return Frame(height, width, stack.layers, matrices, background, view, noise_windows[time])

    return Clip(height, width, length, make_frame)


def _draw_motion(
    draws: Draws, pose: Pose, height: int, width: int, unit: float, *, leaves: bool
) -> Motion:
    direction, speed = draws.uniform(0, 2 * math.pi), draws.log_uniform(0.6, 8) * unit
    velocity = (speed * math.cos(direction), speed * math.sin(direction))
    trip, start = (0.0, 0.0), draws()
    if leaves:
        # Out over the nearest border, as far as it takes to be gone with a margin for the camera.
        velocity, start = (0.0, 0.0), 0.5 if draws.chance(0.3) else 0.0
        margin = 1.5 * pose.radius + 0.15 * min(height, width)
        trip = min(
            ((-pose.x - margin, 0.0), (width - pose.x + margin, 0.0))
            + ((0.0, -pose.y - margin), (0.0, height - pose.y + margin)),
            key=lambda way: math.hypot(*way),
        )
    return Motion(velocity, draws.uniform(-0.09, 0.09), draws.uniform(0, 0.15), trip, start)
