"""The head of `shapes` faces: a parametric mesh of our own, of 1,103 vertices.

Frame of a head: x to the right as one sees it from the front, y down, z away from the one who looks;
from the hair line (y = -1) to the chin (y = 1). The origin lies between the ears. Left is the left of
the image.

The face is a grid of 33 rows (forehead to chin) by 33 columns (ear to ear), row by row, and each ear
adds seven vertices, the left one first. A grid vertex has a place on a *chart*: `COLUMNS`, the arc from
the middle of the face, and `ROWS`, the height that it has on the front. All that is bent, and all that
is painted (:mod:`.face_paint`), is a function of the chart, so that eyes, lips and nose move with the
mesh.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np

from d2ext.data.faces.meshes import obj_text

__all__ = [
    "COLUMNS",
    "FACE_VERTICES",
    "NUM_VERTICES",
    "POINT_CHART",
    "POINT_CONNECTIONS",
    "POINT_FLIP_MAP",
    "POINT_NAMES",
    "POINT_VERTICES",
    "ROWS",
    "HeadShape",
    "face_topology",
    "head_vertices",
    "mirror_vertices",
    "rotation",
    "topology_obj",
]

_HALF = [0.0, 0.045, 0.09, 0.135, 0.18, 0.225, 0.27, 0.315, 0.36]
_HALF += [0.405, 0.45, 0.51, 0.58, 0.67, 0.78, 0.92, 1.1]
COLUMNS = np.array([-c for c in _HALF[:0:-1]] + _HALF)
ROWS = np.array(
    [-1.0, -0.9, -0.8, -0.7, -0.6, -0.5, -0.42, -0.36, -0.31, -0.26, -0.215, -0.17, -0.125, -0.08]
    + [-0.03, 0.03, 0.1, 0.17, 0.24, 0.3, 0.35, 0.41, 0.47, 0.51, 0.545, 0.56, 0.575, 0.62, 0.67]
    + [0.75, 0.84, 0.93, 1.0]
)
_N = len(COLUMNS)  # 33, as many as rows
_EAR = 7  # vertices of an ear: its middle, then its rim from the front over the top
FACE_VERTICES = len(ROWS) * _N  # without ears
NUM_VERTICES = FACE_VERTICES + 2 * _EAR
# Arc on the chart per radian of azimuth.
_ARC = 0.7

POINT_NAMES = ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")
_EYE, _NOSE, _MOUTH = (11, 7), (18, 0), (25, 6)  # row, columns from the middle
POINT_VERTICES = tuple(
    row * _N + _N // 2 + column
    for row, column in (
        (_EYE[0], -_EYE[1]),
        _EYE,
        _NOSE,
        (_MOUTH[0], -_MOUTH[1]),
        _MOUTH,
    )
)
POINT_FLIP_MAP = (("left_eye", "right_eye"), ("left_mouth", "right_mouth"))
POINT_CONNECTIONS = (
    ("left_eye", "right_eye", (255, 255, 255)),
    ("left_eye", "nose", (0, 255, 0)),
    ("right_eye", "nose", (255, 64, 0)),
    ("nose", "left_mouth", (0, 255, 0)),
    ("nose", "right_mouth", (255, 64, 0)),
    ("left_mouth", "right_mouth", (255, 255, 255)),
)
POINT_CHART = np.array([(COLUMNS[v % _N], ROWS[v // _N]) for v in POINT_VERTICES])

# Half width and half depth of the head along the rows.
_PROFILE_ROW = [-1.0, -0.7, -0.4, -0.1, 0.2, 0.5, 0.8, 1.0]
_WIDTH = np.interp(ROWS, _PROFILE_ROW, [0.6, 0.7, 0.75, 0.755, 0.73, 0.67, 0.6, 0.54])[:, None]
_DEPTH = np.interp(ROWS, _PROFILE_ROW, [0.7, 0.81, 0.86, 0.83, 0.84, 0.86, 0.84, 0.76])[:, None]
# Cross-sections are superellipses of this exponent: faces are flatter than ellipses.
_SQUARE = 2.3
# How far the nose stands out along the rows, and its half width.
_NOSE_ROW = [-0.36, -0.26, -0.1, 0.1, 0.2, 0.25, 0.29, 0.33, 0.38]
_NOSE_OUT = np.interp(ROWS, _NOSE_ROW, [0, 0.05, 0.11, 0.2, 0.265, 0.27, 0.2, 0.06, 0])[:, None]
_NOSE_HALF = np.interp(ROWS, [-0.3, 0.05, 0.25, 0.35], [0.07, 0.075, 0.125, 0.14])[:, None]

_A, _B = COLUMNS[None, :], ROWS[:, None]
_SIDE = np.sign(_A)


@dataclass(frozen=True)
class HeadShape:
    """Who it is, and what face they pull; 0 is the mean of all.

    Attributes:
        skull_width, skull_height, jaw_width, chin, nose_length, nose_width, nose_height, brow,
            eye_distance, cheeks, lips, ears: from -1 to 1.
        mouth_open: 0 closed to 1.
        smile: -1 to 1.
        brow_raise: -1 to 1.
        eyes_open: left and right, 0 closed to 1.
    """

    skull_width: float = 0.0
    skull_height: float = 0.0
    jaw_width: float = 0.0
    chin: float = 0.0
    nose_length: float = 0.0
    nose_width: float = 0.0
    nose_height: float = 0.0
    brow: float = 0.0
    eye_distance: float = 0.0
    cheeks: float = 0.0
    lips: float = 0.0
    ears: float = 0.0
    mouth_open: float = 0.0
    smile: float = 0.0
    brow_raise: float = 0.0
    eyes_open: tuple[float, float] = (1.0, 1.0)


def _bump(a: float, b: float, wide: float, high: float) -> np.ndarray:
    """(33, 33): a Gaussian at (a, b) of the chart and, unless it is in the middle, at (-a, b)."""
    across = np.exp(-(((np.abs(_A) - a) / wide) ** 2))
    return across * np.exp(-(((_B - b) / high) ** 2))


_SOCKET, _BALL = _bump(0.315, -0.17, 0.17, 0.12), _bump(0.315, -0.17, 0.11, 0.06)
_BROW, _CHEEK = _bump(0.3, -0.32, 0.2, 0.07), _bump(0.47, 0.12, 0.2, 0.16)
_LIPS, _CHIN = _bump(0.0, 0.56, 0.24, 0.11), _bump(0.0, 0.92, 0.22, 0.13)
_CORNER, _EYE_AREA = _bump(0.27, 0.56, 0.13, 0.1), _bump(0.315, -0.2, 0.22, 0.25)
_WING, _NOSE_AREA = _bump(0.13, 0.28, 0.06, 0.06), _bump(0.0, 0.22, 0.2, 0.16)
_UPPER_LID = _bump(0.315, -0.215, 0.12, 0.035)
_SMILE_FOLD = _bump(0.36, 0.36, 0.14, 0.14)


def head_vertices(shape: HeadShape) -> np.ndarray:
    """(1103, 3) float64 vertices in the head's own frame."""
    jaw = np.clip((_B + 0.1) / 0.9, 0, 1)
    width = _WIDTH * (1 + 0.08 * shape.skull_width) * (1 + 0.12 * shape.jaw_width * jaw)
    azimuth = _A / _ARC
    sin, cos = np.sin(azimuth), np.cos(azimuth)
    radius = (np.abs(sin / width) ** _SQUARE + np.abs(cos / _DEPTH) ** _SQUARE) ** (-1 / _SQUARE)
    x, z = radius * sin, -radius * cos
    # The jaw rises to the ears, and the hair line falls to the temples.
    y = np.where(_B > 0.2, 0.2 + (_B - 0.2) * (1 - 0.55 * (1 - cos)), _B)
    y = np.where(_B < -0.2, -0.2 + (_B + 0.2) * (1 - 0.35 * (1 - cos)), y)

    across = np.exp(-((_A / (_NOSE_HALF * (1 + 0.22 * shape.nose_width))) ** 2))
    z -= _NOSE_OUT * (1 + 0.3 * shape.nose_height) * across
    z -= 0.05 * _WING + 0.07 * _LIPS * (1 + 0.4 * shape.lips) + 0.08 * _CHIN * (1 + shape.chin)
    z += 0.13 * _SOCKET - 0.06 * _BALL - (0.05 + 0.04 * shape.brow) * _BROW
    z -= (0.06 + 0.05 * shape.cheeks) * _CHEEK
    x += _SIDE * (0.03 * shape.cheeks * _CHEEK + 0.035 * shape.eye_distance * _EYE_AREA)
    x += _SIDE * 0.03 * (1 + shape.nose_width) * _WING
    y += 0.05 * shape.nose_length * _NOSE_AREA
    y += 0.07 * shape.chin * np.clip((_B - 0.6) / 0.4, 0, 1) * np.clip(cos, 0, 1)

    _pull_face(shape, x, y, z)
    height = 1 + 0.07 * shape.skull_height
    grid = np.stack([x, y * height, z], axis=2).reshape(-1, 3)
    return np.concatenate([grid, *_ears(shape, grid)])


def _pull_face(shape: HeadShape, x: np.ndarray, y: np.ndarray, z: np.ndarray) -> None:
    """Bend the grid by the expression, in place."""
    # Below the lower lip's edge all of the jaw goes down, on the lip only what lies between the corners.
    gap = np.sqrt(np.clip(1 - (_A / 0.27) ** 2, 0, 1))
    below = np.clip((_B - 0.575) / 0.2, 0, 1)
    jaw = np.exp(-((_A / 0.6) ** 2))
    drop = np.where(_B >= 0.575, below * jaw + (1 - below) * gap, 0.0)
    drop = np.where(np.isclose(_B, 0.56), 0.5 * gap, drop)
    y += 0.3 * shape.mouth_open * drop
    z += 0.12 * shape.mouth_open * np.isclose(_B, 0.56) * gap  # the mouth's inside
    y -= shape.smile * 0.075 * _CORNER
    x += _SIDE * shape.smile * 0.07 * _CORNER
    z += 0.03 * shape.smile * _CORNER - 0.03 * max(shape.smile, 0) * _SMILE_FOLD
    y -= 0.06 * shape.brow_raise * _BROW
    left, right = shape.eyes_open
    shut = 1 - 0.5 * ((1 - _SIDE) * left + (1 + _SIDE) * right)
    y += 0.035 * shut * _UPPER_LID


def _ears(shape: HeadShape, grid: np.ndarray) -> list[np.ndarray]:
    """(7, 3) of the left ear and of the right one: a shell that stands off behind."""
    ears = []
    size, off = 1 + 0.18 * shape.ears, 0.13 + 0.05 * shape.ears
    angle = math.pi + np.arange(_EAR - 1) * (2 * math.pi / (_EAR - 1))
    for side, column in ((-1, 0), (1, _N - 1)):
        # Between the rows of the brow and the tip of the nose.
        base = 0.5 * (grid[9 * _N + column] + grid[18 * _N + column])
        along, up = 0.14 * size * np.cos(angle), 0.27 * size * np.sin(angle)
        rim = base + np.stack(
            [side * off * (along / 0.14 + 0.8) / 1.8, up + 0.03, along + 0.03 - 0.2 * up], axis=1
        )
        middle = base + np.array([side * 0.3 * off, 0.03, 0.02])
        ears.append(np.concatenate([middle[None], rim]))
    return ears


@cache
def face_topology() -> np.ndarray:
    """(2060, 3) int64: the mesh's triangles, counter-clockwise as seen from outside. Read-only."""
    triangles = []
    for row in range(len(ROWS) - 1):
        for column in range(_N - 1):
            a, b = row * _N + column, row * _N + column + 1
            c, d = b + _N, a + _N
            if column < _N // 2:
                triangles += [(a, c, b), (a, d, c)]
            else:
                triangles += [(a, d, b), (b, d, c)]
    for ear in range(2):
        first = FACE_VERTICES + ear * _EAR
        for i in range(_EAR - 1):
            rim = (first + 1 + i, first + 1 + (i + 1) % (_EAR - 1))
            triangles.append((first, *(rim if ear else rim[::-1])))
    result = np.array(triangles, np.int64)
    result.setflags(write=False)
    return result


@cache
def mirror_vertices() -> np.ndarray:
    """(1103,) int64: which vertex each becomes when left and right are exchanged. Read-only."""
    grid = np.arange(FACE_VERTICES).reshape(-1, _N)[:, ::-1].reshape(-1)
    ears = FACE_VERTICES + np.arange(2 * _EAR).reshape(2, _EAR)[::-1].reshape(-1)
    result = np.concatenate([grid, ears])
    result.setflags(write=False)
    return result


def rotation(yaw: float, pitch: float, roll: float) -> np.ndarray:
    """(3, 3): radians; positive turns the face to the image's right, down, clockwise, in this order."""
    sin, cos = math.sin(yaw), math.cos(yaw)
    turn = np.array([[cos, 0, -sin], [0, 1, 0], [sin, 0, cos]])
    sin, cos = math.sin(pitch), math.cos(pitch)
    nod = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    sin, cos = math.sin(roll), math.cos(roll)
    tilt = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    return tilt @ nod @ turn


def topology_obj() -> str:
    """Wavefront OBJ of the mean head: x right, y down, z away from the camera; indices from 1."""
    return obj_text("mean head of d2ext's shapes", head_vertices(HeadShape()), face_topology())
