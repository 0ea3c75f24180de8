"""The body of `shapes`: a closed triangle mesh of our own of a person 1.75 m tall, with charts.

Frame: metres; x to the right as one sees the person from the front, y down, z away from the one who
looks; the floor is y = 0. So the person's left lies at x > 0. The person stands with their arms
stretched 45 degrees out (A pose).

Torso and head are rings of 20 vertices; from holes in the torso's sides and from its lower end, cut
in two by the crotch, grow arms and legs: rings of 14, closed by caps. Only the left half is built,
the right one is its mirror image.

The 24 parts are those of DensePose (NOTES.md, *Semantics*), each a chart [0, 1]^2 without jumps.
Torso, arms and legs are cut into back and front along their sides, the head along its middle; hands
and feet are squares whose border is the wrist or the ankle. As in DensePose, charts of left and
right are no mirror images of each other: those on the right are turned or turned over, each pair in
another way (:func:`mirror_chart`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from d2ext.data.densepose.parts import MIRRORED_PARTS, NUM_PARTS

__all__ = [
    "ARM_ANGLE",
    "BODY_HEIGHT",
    "BONES",
    "LEFT_PARTS",
    "BodyMesh",
    "body_mesh",
    "mirror_chart",
]

BODY_HEIGHT = 1.75  # metres
BONES = (
    *("pelvis", "chest", "head", "left_upper_arm", "right_upper_arm"),
    *("left_lower_arm", "right_lower_arm", "left_hand", "right_hand"),
    *("left_upper_leg", "right_upper_leg", "left_lower_leg", "right_lower_leg"),
    *("left_foot", "right_foot"),
)

# Angle of the arms from hanging down, radians.
ARM_ANGLE = math.radians(45)

# Torso, from below: height in the middle and at the sides, half width, depth of front and of back.
_TORSO = np.array(
    [
        (0.81, 0.90, 0.172, 0.105, 0.120),
        (0.88, 0.935, 0.177, 0.110, 0.125),
        (0.96, 0.98, 0.165, 0.110, 0.104),
        (1.05, 1.05, 0.143, 0.104, 0.091),
        (1.12, 1.12, 0.145, 0.105, 0.095),
        (1.19, 1.19, 0.156, 0.117, 0.105),
        (1.26, 1.26, 0.167, 0.127, 0.112),
        (1.32, 1.32, 0.173, 0.123, 0.113),
        (1.38, 1.38, 0.172, 0.107, 0.108),
        (1.43, 1.43, 0.146, 0.083, 0.090),
        (1.462, 1.455, 0.098, 0.062, 0.070),
        (1.485, 1.475, 0.060, 0.056, 0.058),
    ]
)
_HALF_RING = 10  # edges of half a ring of torso or head
_HOLE_ROWS, _HOLE_COLUMNS = (6, 9), (3, 7)
_CROTCH = 0.79  # height
# Head: height, half width, depth of front and of back.
_HEAD = np.array(
    [
        (1.515, 0.056, 0.048, 0.058),
        (1.545, 0.059, 0.068, 0.063),
        (1.575, 0.065, 0.090, 0.077),
        (1.61, 0.073, 0.095, 0.092),
        (1.65, 0.078, 0.096, 0.101),
        (1.69, 0.075, 0.092, 0.100),
        (1.72, 0.063, 0.074, 0.083),
        (1.74, 0.042, 0.048, 0.055),
    ]
)
_NOSE = ((3, 0.022), (4, 0.012))  # rows of the head, how far it stands out

_RING = 14  # vertices of a ring of arm or leg: 0 is the outside, 7 the inside, 3.5 the front
_CORNERS = (2, 5, 9, 12)  # of the hole in the torso, and of the cap, both of 4 x 3 cells
# Arm: distance from the shoulder, radii outwards, inwards, to the front, to the back.
_SHOULDER = np.array([0.170, -1.385, 0.0])
_ARM = np.array(
    [
        (0.055, 0.058, 0.062, 0.058, 0.058),
        (0.11, 0.052, 0.052, 0.050, 0.050),
        (0.17, 0.046, 0.047, 0.047, 0.047),
        (0.23, 0.042, 0.042, 0.044, 0.043),
        (0.285, 0.040, 0.039, 0.041, 0.041),
        (0.335, 0.042, 0.040, 0.043, 0.043),
        (0.40, 0.038, 0.037, 0.041, 0.040),
        (0.46, 0.031, 0.031, 0.035, 0.034),
        (0.525, 0.022, 0.023, 0.029, 0.028),
        (0.565, 0.017, 0.018, 0.043, 0.035),
        (0.615, 0.016, 0.018, 0.047, 0.040),
        (0.66, 0.013, 0.014, 0.041, 0.037),
        (0.70, 0.010, 0.010, 0.031, 0.029),
    ]
)
_ELBOW, _WRIST = 5, 9  # rings, that in the torso counted as 0
# Leg: height, x, z of the middle, tilt of the ring in degrees, radii as of the arm.
_LEG = np.array(
    [
        (0.745, 0.093, 0.005, 0, 0.087, 0.083, 0.086, 0.092),
        (0.66, 0.094, 0.003, 0, 0.077, 0.076, 0.081, 0.081),
        (0.58, 0.095, 0.000, 0, 0.066, 0.067, 0.071, 0.068),
        (0.51, 0.096, -0.002, 0, 0.057, 0.058, 0.062, 0.056),
        (0.46, 0.096, -0.003, 0, 0.055, 0.056, 0.060, 0.051),
        (0.38, 0.097, 0.003, 0, 0.055, 0.054, 0.051, 0.060),
        (0.31, 0.098, 0.006, 0, 0.053, 0.052, 0.047, 0.064),
        (0.22, 0.099, 0.006, 0, 0.043, 0.042, 0.040, 0.048),
        (0.14, 0.100, 0.006, 0, 0.034, 0.033, 0.035, 0.037),
        (0.095, 0.100, 0.006, 8, 0.034, 0.033, 0.039, 0.037),
        (0.058, 0.101, 0.000, 40, 0.037, 0.035, 0.048, 0.062),
        (0.046, 0.102, -0.055, 72, 0.041, 0.037, 0.034, 0.045),
        (0.034, 0.104, -0.115, 86, 0.048, 0.042, 0.023, 0.033),
        (0.026, 0.104, -0.160, 90, 0.043, 0.038, 0.017, 0.025),
    ]
)
_KNEE, _ANKLE = 5, 10
# Side of the square of the rings of hand and foot on their chart, from wrist or ankle to cap.
_SQUARES = (1.0, 0.82, 0.64, 0.47, 0.3)
_SMOOTHINGS = 4  # of the bones' weights over the mesh


@dataclass(frozen=True)
class BodyMesh:
    """V vertices, T triangles counter-clockwise from outside. All arrays are read-only.

    Attributes:
        middles: (V, 3) float64: where in the middle of a limb (or the torso) a vertex belongs to.
        offsets: (V, 3) float64: from there to the vertex.
        triangles: (T, 3) int64.
        parts: (T,) int64 fine part 1..24.
        uv: (T, 3, 2) float64 U, V of the corners on the part's chart.
        weights: (V, 15) float64, how much each of :data:`BONES` moves a vertex; sum 1.
        joints: (15, 3) float64: where each bone turns.
        mirror: (V,) int64: the vertex on the other side.
    """

    middles: np.ndarray
    offsets: np.ndarray
    triangles: np.ndarray
    parts: np.ndarray
    uv: np.ndarray
    weights: np.ndarray
    joints: np.ndarray
    mirror: np.ndarray

    @property
    def vertices(self) -> np.ndarray:
        """(V, 3) float64 of the mean person."""
        return self.middles + self.offsets


def mirror_chart(part: int, uv: np.ndarray) -> np.ndarray:
    """(..., 2) U, V of points of `part`, as they are on the chart of its mirrored part in a
    mirror."""
    if part <= 2:
        return np.stack([1 - uv[..., 0], uv[..., 1]], axis=-1)
    # Of the eight ways to lay a square on itself, the pairs have those but the first in turns.
    way = (part - 3) // 2 % 7 + 1
    swap, flip = bool(way & 4), (bool(way & 1), bool(way & 2))
    if part == LEFT_PARTS[(part - 3) // 2]:
        return np.where(flip, 1 - _swapped(uv, swap), _swapped(uv, swap))
    return _swapped(np.where(flip, 1 - uv, uv), swap)


# Left parts of the pairs 3-4, 5-6, ...
LEFT_PARTS = (4, 5, 8, 10, 12, 14, 15, 17, 19, 21, 24)


def _swapped(uv: np.ndarray, swap: bool) -> np.ndarray:
    return uv[..., ::-1] if swap else uv


class _Half:
    """The left half while it is built."""

    def __init__(self) -> None:
        self.middles: list[np.ndarray] = []
        self.offsets: list[np.ndarray] = []
        self.bones: list[dict[str, float]] = []
        self.triangles: list[tuple[int, int, int]] = []
        self.parts: list[int] = []
        self.uv: list[list[np.ndarray]] = []

    def ring(self, middle: np.ndarray, offsets: np.ndarray, *bones: str) -> list[int]:
        """Vertices around `middle`, (3,) or one for each; by which bones they move, in equal
        shares."""
        first = len(self.middles)
        self.middles += list(np.broadcast_to(middle, offsets.shape))
        self.offsets += list(offsets)
        self.bones += [dict.fromkeys(bones, 1 / len(bones))] * len(offsets)
        return list(range(first, len(self.middles)))

    def place(self, vertex: int) -> np.ndarray:
        return self.middles[vertex] + self.offsets[vertex]

    def grid(
        self,
        part: int,
        rows: Sequence[Sequence[int]],
        uv: np.ndarray,
        hole: tuple[range, range] = (range(0), range(0)),
    ) -> None:
        """Two triangles for each cell of a grid of vertices, whose (rows, columns, 2) places on the
        chart are `uv`; cells in `hole` stay open. Corners that coincide make one triangle of a
        cell."""
        for r in range(len(rows) - 1):
            for c in range(len(rows[0]) - 1):
                if r in hole[0] and c in hole[1]:
                    continue
                cell = [(r, c), (r, c + 1), (r + 1, c + 1), (r + 1, c)]
                if (r + c) % 2:  # diagonals in turns, so that no direction is shorter
                    cell = cell[1:] + cell[:1]
                for corners in ((cell[0], cell[1], cell[2]), (cell[0], cell[2], cell[3])):
                    a, b, d = (rows[i][j] for i, j in corners)
                    if a != b and b != d and d != a:
                        self.triangles.append((a, b, d))
                        self.parts.append(part)
                        self.uv.append([uv[i, j] for i, j in corners])


def _lattice(rows: int, columns: int) -> np.ndarray:
    """(rows, columns, 2) U along the columns, V along the rows, 0 to 1."""
    u, v = np.meshgrid(np.linspace(0, 1, columns), np.linspace(0, 1, rows))
    return np.stack([u, v], axis=2)


def _torso(half: _Half) -> list[list[int]]:
    """Rows of the left half of the torso, from below, each from the front's middle to the
    back's."""
    angle = np.linspace(0, math.pi, _HALF_RING + 1)
    sin, cos = np.sin(angle), np.cos(angle)
    sin[-1] = 0.0
    rows = []
    for number, (low, side, width, front, back) in enumerate(_TORSO):
        height = low + (side - low) * sin**2
        middle = np.stack([0 * sin, -height, 0 * sin], axis=1)
        depth = np.where(cos > 0, front, back)
        offsets = np.stack([width * sin, 0 * sin, -depth * cos], axis=1)
        rows.append(half.ring(middle, offsets, "pelvis" if number < 3 else "chest"))
    side = _HALF_RING // 2
    lattice = _lattice(len(rows), side + 1)
    first, last = _HOLE_ROWS
    front, back = [row[: side + 1] for row in rows], [row[side:] for row in rows]
    left, right = _HOLE_COLUMNS
    # U goes from the person's right over the front to the left, and on the back's chart as well.
    u, v = lattice[..., 0], lattice[..., 1]
    half.grid(2, front, np.stack([0.5 + u / 2, v], 2), (range(first, last), range(left, side)))
    half.grid(1, back, np.stack([1 - u / 2, v], 2), (range(first, last), range(right - side)))
    return rows


def _head(half: _Half, neck: list[int]) -> None:
    angle = np.linspace(0, math.pi, _HALF_RING + 1)
    sin, cos = np.sin(angle), np.cos(angle)
    sin[-1] = 0.0
    rows = [neck]
    for number, (height, width, front, back) in enumerate(_HEAD):
        depth = np.where(cos > 0, front, back)
        offsets = np.stack([width * sin, 0 * sin, -depth * cos], axis=1)
        offsets[0, 2] -= dict(_NOSE).get(number, 0.0)
        middle = np.array([0, -height, 0.0])
        rows.append(half.ring(middle, offsets, *(("head",) if number else ("head", "chest"))))
    # Along the middle the halves meet; its ends are those of the last ring.
    last = np.array([half.place(v) for v in rows[-1]])[1:-1]
    top = np.stack([0 * last[:, 0], -BODY_HEIGHT + 0 * last[:, 1], last[:, 2]], axis=1)
    top[[0, -1], 1] += 0.003
    centre = np.array([0, -_HEAD[4, 0], 0.0])
    rows.append([rows[-1][0], *half.ring(centre, top - centre, "head"), rows[-1][-1]])
    half.grid(24, rows, _lattice(len(rows), _HALF_RING + 1))


def _limb_ring(
    middle: np.ndarray, out: np.ndarray, front: np.ndarray, radii: Sequence[float]
) -> np.ndarray:
    """(14, 3) offsets from the middle of a ring."""
    angle = np.arange(_RING) * (2 * math.pi / _RING)
    cos, sin = np.cos(angle), np.sin(angle)
    along = np.where(cos > 0, radii[0], radii[1]) * cos
    across = np.where(sin > 0, radii[2], radii[3]) * sin
    return along[:, None] * out + across[:, None] * front


def _square() -> np.ndarray:
    """(14, 2): the vertices of a ring on the border of [-1, 1]^2."""
    ends = np.array([(1, -1), (1, 1), (-1, 1), (-1, -1), (1, -1)])
    place = np.arange(_RING) + np.where(np.arange(_RING) < _CORNERS[0], _RING, 0)
    corners = [*_CORNERS, _CORNERS[0] + _RING]
    return np.stack([np.interp(place, corners, axis) for axis in ends.T], axis=1)


def _halves(half: _Half, back: int, front: int, rings: list[list[int]]) -> None:
    """The two charts of an upper or lower limb: U from outside to inside, V down the limb."""
    turn = _RING // 2
    lattice = _lattice(len(rings), turn + 1)
    half.grid(front, [ring[: turn + 1] for ring in rings], lattice)
    half.grid(back, [[*ring[turn:], ring[0]] for ring in rings], lattice[:, ::-1])


def _end(half: _Half, part: int, rings: list[list[int]], tip: np.ndarray, bone: str) -> None:
    """Hand or foot: its rings are squares on the chart, and the cap, which stands out by `tip`, is
    the innermost one."""
    square = _square()
    squares = np.concatenate([square, square[:1]])
    uv = np.stack([0.5 + 0.5 * s * squares for s in _SQUARES])
    half.grid(part, [[*ring, ring[0]] for ring in rings], uv)
    last = rings[-1]
    upper, lower = [last[i] for i in (12, 13, 0, 1, 2)], [last[i] for i in (9, 8, 7, 6, 5)]
    cap = [upper]
    for weight, ends in ((1 / 3, (11, 3)), (2 / 3, (10, 4))):
        places = [
            (1 - weight) * half.place(a) + weight * half.place(b) + tip
            for a, b in zip(upper[1:-1], lower[1:-1], strict=True)
        ]
        middle = half.middles[last[0]]
        inner = half.ring(middle, np.stack(places) - middle, bone)
        cap.append([last[ends[0]], *inner, last[ends[1]]])
    cap.append(lower)
    half.grid(part, cap, 0.5 + _SQUARES[-1] * (_lattice(4, 5) - 0.5))


def _bones_at(ring: int, bones: Sequence[str], joints: Sequence[int]) -> list[str]:
    """The left bones that a ring of a limb moves with; one at a joint belongs to both."""
    limits = zip((0, *joints), (*joints, ring), strict=True)
    return [
        f"left_{bone}"
        for bone, (first, last) in zip(bones, limits, strict=True)
        if first <= ring <= last
    ]


def _arm(half: _Half, torso: list[list[int]]) -> None:
    (low, high), (front, back) = _HOLE_ROWS, _HOLE_COLUMNS
    middle = (front + back) // 2
    hole = [torso[high][c] for c in range(middle, front, -1)]
    hole += [torso[r][front] for r in range(high, low, -1)]
    hole += [torso[low][c] for c in range(front, back)]
    hole += [torso[r][back] for r in range(low, high)]
    hole += [torso[high][c] for c in range(back, middle, -1)]
    sin, cos = math.sin(ARM_ANGLE), math.cos(ARM_ANGLE)
    along, out, forward = np.array([sin, cos, 0]), np.array([cos, -sin, 0]), np.array([0, 0, -1.0])
    rings = [hole]
    for number, (distance, *radii) in enumerate(_ARM, 1):
        bones = _bones_at(number, ("upper_arm", "lower_arm", "hand"), (_ELBOW, _WRIST))
        place = _SHOULDER + distance * along
        rings.append(half.ring(place, _limb_ring(place, out, forward, radii), *bones))
    _halves(half, 15, 17, rings[: _ELBOW + 1])
    _halves(half, 19, 21, rings[_ELBOW : _WRIST + 1])
    _end(half, 4, rings[_WRIST:], 0.008 * along, "left_hand")


def _leg(half: _Half, hip: list[int]) -> None:
    # From the back to the front.
    depth = np.linspace(_TORSO[0, 4], -_TORSO[0, 3], 5)[1:-1, None]
    offsets = 0.75 * depth * np.array([0, 0, 1.0])
    crotch = half.ring(np.array([0, -_CROTCH, 0]), offsets, "pelvis")
    around = [*hip, *crotch]
    # Outside is the fifth of the hip; the ring goes over the front.
    rings = [[around[(5 - i) % _RING] for i in range(_RING)]]
    out = np.array([1.0, 0, 0])
    for number, (height, x, z, tilt, *radii) in enumerate(_LEG, 1):
        bones = _bones_at(number, ("upper_leg", "lower_leg", "foot"), (_KNEE, _ANKLE))
        place, angle = np.array([x, -height, z]), math.radians(tilt)
        forward = np.array([0, -math.sin(angle), -math.cos(angle)])
        rings.append(half.ring(place, _limb_ring(place, out, forward, radii), *bones))
    _halves(half, 8, 10, rings[: _KNEE + 1])
    _halves(half, 12, 14, rings[_KNEE : _ANKLE + 1])
    _end(half, 5, rings[_ANKLE:], np.array([0, 0, -0.012]), "left_foot")


def _joints() -> np.ndarray:
    sin, cos = math.sin(ARM_ANGLE), math.cos(ARM_ANGLE)
    along = np.array([sin, cos, 0])
    joints = [(0, -0.95, 0), (0, -1.05, 0), (0, -1.52, 0.01)]
    left = [_SHOULDER, *(_SHOULDER + _ARM[i - 1, 0] * along for i in (_ELBOW, _WRIST))]
    left += [np.array([0.09, -0.89, 0])]
    left += [np.array([_LEG[i - 1, 1], -_LEG[i - 1, 0], _LEG[i - 1, 2]]) for i in (_KNEE, _ANKLE)]
    for joint in left:
        joints += [joint, joint * (-1, 1, 1)]
    return np.array(joints)


def _weights(bones: list[dict[str, float]], triangles: np.ndarray) -> np.ndarray:
    """(V, 15): shares of bones, smoothed over the mesh so that joints bend softly."""
    weights = np.zeros((len(bones), len(BONES)))
    for vertex, shares in enumerate(bones):
        for bone, share in shares.items():
            weights[vertex, BONES.index(bone)] = share
    near = np.zeros((len(bones), len(bones)))
    for i in range(3):
        near[triangles[:, i], triangles[:, i - 1]] = 1
    near = np.maximum(near, near.T)
    near /= near.sum(axis=1, keepdims=True)
    for _ in range(_SMOOTHINGS):
        weights = 0.5 * (weights + near @ weights)
    weights[weights < 0.01] = 0
    return weights / weights.sum(axis=1, keepdims=True)


@cache
def body_mesh() -> BodyMesh:
    """The mesh; the same arrays at every call."""
    half = _Half()
    torso = _torso(half)
    _head(half, torso[-1])
    _arm(half, torso)
    _leg(half, torso[0])

    # Without the vertices within the holes.
    used, left = np.unique(half.triangles, return_inverse=True)
    left = left.reshape(-1, 3)
    middles, offsets = np.array(half.middles)[used], np.array(half.offsets)[used]
    n = len(middles)
    doubled = np.flatnonzero(np.abs((middles + offsets)[:, 0]) > 1e-9)
    other = np.arange(n)  # the mirror vertex of each of the left half
    other[doubled] = n + np.arange(len(doubled))
    mirror = np.concatenate([other, doubled])
    flip = np.array([-1.0, 1, 1])
    parts, uv = np.array(half.parts), np.array(half.uv)
    triangles = np.concatenate([left, other[left][:, ::-1]])
    mirrored_uv = np.stack([mirror_chart(p, c[::-1]) for p, c in zip(parts, uv, strict=True)])
    bones = [half.bones[v] for v in used]
    bones += [
        {bone.replace("left_", "right_"): share for bone, share in bones[v].items()}
        for v in doubled
    ]
    mesh = BodyMesh(
        middles=np.concatenate([middles, middles[doubled] * flip]),
        offsets=np.concatenate([offsets, offsets[doubled] * flip]),
        triangles=triangles,
        parts=np.concatenate([parts, np.array(MIRRORED_PARTS)[parts]]),
        uv=np.concatenate([uv, mirrored_uv]),
        weights=_weights(bones, triangles),
        joints=_joints(),
        mirror=mirror,
    )
    for array in vars(mesh).values():
        array.setflags(write=False)
    assert len(set(mesh.parts.tolist())) == NUM_PARTS
    return mesh
