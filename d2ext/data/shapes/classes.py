"""The classes of `shapes`: names, ids, colours, outlines, marks and landmarks.

A thing is defined in its own frame: x to the right, y down, outline inside [-1, 1] x [-1, 1],
mirror-symmetric about x = 0 (a figure up to the pose of its limbs). Its *left* is its own left, as
with a COCO person who faces the camera: x > 0. Because of the symmetry a horizontally flipped image
is again a valid scene, with left and right landmarks exchanged.

An outline is a list of parts whose union is the thing; a part is a list of contours filled by the
even-odd rule, so that a second contour cuts a hole.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

__all__ = [
    "KEYPOINT_CONNECTIONS",
    "KEYPOINT_FLIP_MAP",
    "KEYPOINT_NAMES",
    "KEYPOINT_OKS_SIGMAS",
    "STUFF_CLASSES",
    "STUFF_COLORS",
    "STUFF_IDS",
    "THING_CLASSES",
    "THING_COLORS",
    "THING_IDS",
    "Contour",
    "Mark",
    "Outline",
    "blob_outline",
    "capsule",
    "thing_outline",
]

Contour = np.ndarray  # (n, 2) float64, x and y

THING_CLASSES = ("disk", "wheel", "ring", "square", "triangle", "star", "heart", "figure")
STUFF_CLASSES = ("sky", "water", "grass", "sand", "brick", "wood")

# Ids as they stand in the annotation files: things first, then stuff, from 1 on, without gaps.
THING_IDS = tuple(range(1, len(THING_CLASSES) + 1))
STUFF_IDS = tuple(range(len(THING_CLASSES) + 1, len(THING_CLASSES) + len(STUFF_CLASSES) + 1))

# Colours with which the visualizer and the panoptic files show a class; the scenes do not use them.
THING_COLORS = (
    (220, 20, 60),
    (255, 120, 0),
    (250, 200, 0),
    (0, 160, 60),
    (0, 190, 190),
    (0, 90, 220),
    (150, 60, 220),
    (240, 80, 180),
)
STUFF_COLORS = (
    (135, 190, 235),
    (40, 80, 140),
    (110, 150, 60),
    (215, 195, 140),
    (150, 75, 60),
    (120, 90, 50),
)

KEYPOINT_NAMES = (
    "left_eye",
    "right_eye",
    "mouth",
    "top",
    "left_side",
    "right_side",
    "left_base",
    "right_base",
)
KEYPOINT_FLIP_MAP = (
    ("left_eye", "right_eye"),
    ("left_side", "right_side"),
    ("left_base", "right_base"),
)
KEYPOINT_CONNECTIONS = (
    ("left_eye", "right_eye", (255, 255, 255)),
    ("left_eye", "mouth", (255, 255, 255)),
    ("right_eye", "mouth", (255, 255, 255)),
    ("top", "left_side", (0, 255, 0)),
    ("left_side", "left_base", (0, 255, 0)),
    ("top", "right_side", (255, 64, 0)),
    ("right_side", "right_base", (255, 64, 0)),
)
# Of the order of COCO's: eyes and mouth are marks with a sharp position (COCO's eyes: 0.025), the
# other four lie on the outline, some on smooth arcs (COCO's limbs: 0.062 to 0.107).
KEYPOINT_OKS_SIGMAS = (0.035, 0.035, 0.035, 0.07, 0.07, 0.07, 0.07, 0.07)


@dataclass(frozen=True)
class Mark:
    """Something painted on a thing.

    Attributes:
        contours: one shape, filled by the even-odd rule.
        tone: 0 white, 1 the thing's ink, 2 the thing's accent colour.
    """

    contours: list[Contour]
    tone: int


@dataclass(frozen=True)
class Outline:
    """Geometry of one thing in its own frame.

    Attributes:
        parts: see the module's header.
        marks: painted in this order.
        keypoints: (8, 2), in the order of :data:`KEYPOINT_NAMES`; (0, 2) for what is no thing.
    """

    parts: list[list[Contour]]
    marks: list[Mark]
    keypoints: np.ndarray

    @cached_property
    def points(self) -> np.ndarray:
        """(n, 2): the points of all parts, then of all marks, so that one product maps them."""
        shapes = self.parts + [mark.contours for mark in self.marks]
        return np.concatenate([contour for shape in shapes for contour in shape])

    def split(self, points: np.ndarray) -> list[list[np.ndarray]]:
        """Mapped :attr:`points` as contours again: the parts, then the marks."""
        shapes, start = [], 0
        for shape in self.parts + [mark.contours for mark in self.marks]:
            contours = []
            for contour in shape:
                contours.append(points[start : start + len(contour)])
                start += len(contour)
            shapes.append(contours)
        return shapes


def _ellipse(cx: float, cy: float, rx: float, ry: float, n: int) -> Contour:
    angle = np.arange(n) * (2 * math.pi / n)
    return np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], axis=1)


def capsule(x0: float, y0: float, x1: float, y1: float, radius: float) -> Contour:
    """A segment with round ends."""
    along = math.atan2(y1 - y0, x1 - x0)
    angle = along + math.pi / 2 + np.linspace(0, math.pi, 6)
    start = np.stack([x0 + radius * np.cos(angle), y0 + radius * np.sin(angle)], axis=1)
    angle = angle + math.pi
    end = np.stack([x1 + radius * np.cos(angle), y1 + radius * np.sin(angle)], axis=1)
    return np.concatenate([start, end])


def _face(eye_x: float, eye_y: float, mouth_y: float, scale: float) -> list[Mark]:
    marks = []
    for x in (eye_x, -eye_x):
        marks.append(Mark([_ellipse(x, eye_y, 0.15 * scale, 0.15 * scale, 10)], 0))
        marks.append(Mark([_ellipse(x, eye_y, 0.075 * scale, 0.075 * scale, 8)], 1))
    marks.append(Mark([_ellipse(0.0, mouth_y, 0.24 * scale, 0.07 * scale, 10)], 1))
    return marks


def _keypoints(
    eye: tuple[float, float],
    mouth_y: float,
    top_y: float,
    side: tuple[float, float],
    base: tuple[float, float],
) -> np.ndarray:
    """Landmarks of a symmetric thing; `eye`, `side` and `base` are those of the left half."""
    (ex, ey), (sx, sy), (bx, by) = eye, side, base
    return np.array(
        [(ex, ey), (-ex, ey), (0, mouth_y), (0, top_y), (sx, sy), (-sx, sy), (bx, by), (-bx, by)],
        dtype=np.float64,
    )


def _symmetric(
    parts: list[list[Contour]],
    *,
    eye: tuple[float, float],
    mouth_y: float,
    top_y: float,
    side: tuple[float, float],
    base: tuple[float, float],
    face: float = 1.0,
    marks: list[Mark] | None = None,
) -> Outline:
    painted = list(marks or []) + _face(*eye, mouth_y, face)
    return Outline(parts, painted, _keypoints(eye, mouth_y, top_y, side, base))


def _round(parts: list[list[Contour]], marks: list[Mark] | None = None) -> Outline:
    return _symmetric(
        parts,
        eye=(0.36, -0.3),
        mouth_y=0.38,
        top_y=-0.93,
        side=(0.93, 0.0),
        base=(0.66, 0.66),
        marks=marks,
    )


def _disk() -> Outline:
    return _round([[_ellipse(0, 0, 1, 1, 40)]])


def _wheel() -> Outline:
    """A disk in silhouette; rim, hub and eight spokes are painted on it."""
    marks = [Mark([_ellipse(0, 0, 1, 1, 32), _ellipse(0, 0, 0.8, 0.8, 32)], 2)]
    for k in range(4):
        dx, dy = math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)
        ends = np.array([(dx, dy), (dx, dy), (-dx, -dy), (-dx, -dy)]) * 0.85
        offset = np.array([(-dy, dx), (dy, -dx), (dy, -dx), (-dy, dx)]) * 0.075
        marks.append(Mark([ends + offset], 2))
    marks.append(Mark([_ellipse(0, 0, 0.2, 0.2, 12)], 2))
    return _round([[_ellipse(0, 0, 1, 1, 40)]], marks)


def _ring() -> Outline:
    return _symmetric(
        [[_ellipse(0, 0, 1, 1, 40), _ellipse(0, 0, 0.52, 0.52, 28)]],
        eye=(0.4, -0.65),
        mouth_y=0.76,
        top_y=-0.93,
        side=(0.93, 0.0),
        base=(0.66, 0.66),
        face=0.9,
    )


def _square() -> Outline:
    return _symmetric(
        [[np.array([(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)])]],
        eye=(0.34, -0.28),
        mouth_y=0.36,
        top_y=-0.8,
        side=(0.8, 0.0),
        base=(0.8, 0.8),
    )


def _triangle() -> Outline:
    return _symmetric(
        [[np.array([(0, -1), (0.95, 0.75), (-0.95, 0.75)])]],
        eye=(0.22, 0.02),
        mouth_y=0.46,
        top_y=-0.87,
        side=(0.43, -0.1),
        base=(0.83, 0.68),
        face=0.9,
    )


def _star() -> Outline:
    angle = -math.pi / 2 + np.arange(10) * (math.pi / 5)
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.46)
    tips = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return _symmetric(
        [[tips]],
        eye=(0.2, -0.14),
        mouth_y=0.24,
        top_y=-0.88,
        side=(0.84, -0.27),
        base=(0.52, 0.71),
        face=0.8,
    )


def _heart() -> Outline:
    # The well-known curve x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, y upwards.
    t = np.arange(44) * (2 * math.pi / 44)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return _symmetric(
        [[np.stack([x / 16, (-2.5 - y) / 14.5], axis=1)]],
        eye=(0.4, -0.4),
        mouth_y=0.22,
        top_y=-0.42,
        side=(0.92, -0.45),
        base=(0.36, 0.4),
    )


# Figure: shoulder and hip on the left side, length and half width of a limb.
_SHOULDER, _HIP = (0.27, -0.26), (0.15, 0.26)
_ARM, _LEG, _LIMB = 0.62, 0.64, 0.105


def _figure(random: Callable[[], float]) -> Outline:
    """Head, trunk and four limbs; each limb has its own angle, drawn from `random`."""
    head = [_ellipse(0, -0.67, 0.29, 0.29, 20)]
    trunk = [np.array([(-0.33, -0.4), (0.33, -0.4), (0.24, 0.36), (-0.24, 0.36)])]
    parts = [head, trunk]
    ends = {}
    for side in (1, -1):
        # From the downward vertical, outwards: arms 20 to 130 degrees, legs 2 to 40 degrees.
        for limb, (x, y), length, low, high in (
            ("side", _SHOULDER, _ARM, 0.35, 2.27),
            ("base", _HIP, _LEG, 0.035, 0.7),
        ):
            angle = low + (high - low) * random()
            end = (side * (x + length * math.sin(angle)), y + length * math.cos(angle))
            parts.append([capsule(side * x, y, *end, _LIMB)])
            ends[limb, side] = end
    keypoints = np.array(
        [
            (0.12, -0.72),
            (-0.12, -0.72),
            (0, -0.54),
            (0, -0.9),
            ends["side", 1],
            ends["side", -1],
            ends["base", 1],
            ends["base", -1],
        ],
        dtype=np.float64,
    )
    return Outline(parts, _face(0.12, -0.72, -0.54, 0.5), keypoints)


_RIGID = {
    "disk": _disk(),
    "wheel": _wheel(),
    "ring": _ring(),
    "square": _square(),
    "triangle": _triangle(),
    "star": _star(),
    "heart": _heart(),
}


def thing_outline(category: int, random: Callable[[], float]) -> Outline:
    """Geometry of a thing of the class with contiguous index `category`.

    Args:
        random: draws from [0, 1); used by the one class that has a pose (`figure`).
    """
    name = THING_CLASSES[category]
    return _figure(random) if name == "figure" else _RIGID[name]


def blob_outline(random: Callable[[], float]) -> Outline:
    """Clutter that belongs to no class: a bent stroke without marks and landmarks."""
    n = 7
    x = np.linspace(-0.95, 0.95, n)
    bend, phase, wave = 0.5 * random(), 2 * math.pi * random(), 2 + 4 * random()
    y = bend * np.sin(wave * x + phase)
    width = 0.06 + 0.12 * random()
    upper = np.stack([x, y - width], axis=1)
    lower = np.stack([x[::-1], y[::-1] + width], axis=1)
    return Outline([[np.concatenate([upper, lower])]], [], np.zeros((0, 2)))
