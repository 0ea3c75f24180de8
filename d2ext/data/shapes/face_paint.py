"""What the heads of `shapes` look like: the paint on the face, hair, hat and neck, and the light."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from d2ext.data.shapes.face_mesh import (
    COLUMNS,
    FACE_VERTICES,
    NUM_VERTICES,
    POINT_CHART,
    ROWS,
    HeadShape,
    face_topology,
    head_vertices,
)
from d2ext.data.shapes.face_raster import Surface, front_facing
from d2ext.data.shapes.textures import stuff_texture

__all__ = ["HeadLook", "Light", "Solid", "head_solid", "head_surface"]

_SKIN_ROWS, _HAIR_ROWS = 3, 12  # strips of the texture below the face, in grid cells
_CELLS = len(COLUMNS) - 1
_GRAIN = 2  # which stuff texture, sand, is the grain of skin and hair

# Hair: rings of a skull, of which the last ones hang down.
_RINGS, _HANGING, _SPOKES = 14, 5, 33
_SKULL = np.array([0.0, -0.42, 0.08])


@dataclass(frozen=True)
class HeadLook:
    """Colours are (3,) RGB from 0 to 255, lengths are in head units.

    Attributes:
        skin, hair, iris, lip: colours.
        beard: how dense, 0 to 1.
        glasses: colour of their frame; None: without.
        volume: of the hair; below 0: bald.
        fringe: height y to which the hair comes down on the forehead.
        hair_length: y to which the hair hangs down behind.
        hat: colour; None: without.
        brim: how far the hat's brim stands off, 0: a cap without.
        gaze: x, y of the irises in the eyes, from -1 to 1.
        grain: (row, column) of the grain that is shown, each below 256.
    """

    skin: np.ndarray
    hair: np.ndarray
    iris: np.ndarray
    lip: np.ndarray
    beard: float = 0.0
    glasses: np.ndarray | None = None
    volume: float = 0.08
    fringe: float = -0.85
    hair_length: float = 0.2
    hat: np.ndarray | None = None
    brim: float = 0.0
    gaze: tuple[float, float] = (0.0, 0.0)
    grain: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Light:
    """Direction (3,) in which the light is, of length 1, and the light without direction, 0 to 1."""

    direction: np.ndarray
    ambient: float


@dataclass(frozen=True)
class Solid:
    """All of a head in the picture, but without its paint.

    Attributes:
        points: (N, 3): x, y in pixels, z in pixels from the head's mean depth; first those of the face.
        normals: (N, 3) of length 1, outwards.
        triangles: (T, 3); counter-clockwise from outside, only those that can be seen.
        places: (N, 2): column and row on the texture, in cells of the grid.
    """

    points: np.ndarray
    normals: np.ndarray
    triangles: np.ndarray
    places: np.ndarray


def _smooth(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high` (or the reverse), and smooth between them."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def _blend(image: np.ndarray, color: np.ndarray | float, mask: np.ndarray) -> None:
    image += mask[:, :, None] * (color - image)


@lru_cache(maxsize=8)
def _chart(cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Places on the chart of the texture's columns (1, n) and rows (n, 1)."""
    steps = np.arange(_CELLS * cells + 1) / cells
    index = np.arange(_CELLS + 1)
    a, b = np.interp(steps, index, COLUMNS), np.interp(steps, index, ROWS)
    return a[None].astype(np.float32), b[:, None].astype(np.float32)


def paint_texture(look: HeadLook, shape: HeadShape, cells: int) -> np.ndarray:
    """(h, w, 3) uint8: the face on its grid, below it strips for ears and neck, and for hair and hat.

    Args:
        cells: pixels per cell of the grid.
    """
    a, b = _chart(cells)
    row, column = look.grain
    grain = stuff_texture(_GRAIN)[row : row + len(b), column : column + a.shape[1]]
    noise = (grain.astype(np.float32) - 150) / 128
    # The chart's borders in a cell's width: marks get soft edges of about a pixel.
    skin = look.skin.astype(np.float32)
    face = np.ones((len(b), a.shape[1], 3), np.float32) * skin
    face *= (1 + 0.05 * noise)[:, :, None]
    _paint_skin(face, look, a, b, noise)
    _paint_mouth(face, look, shape, a, b)
    for side, opened in enumerate(shape.eyes_open):
        _paint_eye(face, look, opened, side, a, b)
    if look.glasses is not None:
        _paint_glasses(face, look.glasses, a, b)

    strip = noise[: _SKIN_ROWS * cells, :, None]
    neck = skin * (0.92 + 0.1 * strip)
    streaks = np.repeat(noise[:1], _HAIR_ROWS * cells, axis=0)[:, :, None] * 0.5
    streaks = streaks + 0.15 * noise[: _HAIR_ROWS * cells, :, None]
    hair = look.hair.astype(np.float32) if look.volume >= 0 else skin
    hair = hair * (1 + (0.6 if look.volume >= 0 else 0.1) * streaks)
    if look.hat is not None:
        crown = round(cells * _HAIR_ROWS * 7 / (_RINGS - 1))
        hair[:crown] = look.hat * (1 + 0.12 * strip[:1] + 0.06 * noise[:crown, :, None])
        band = slice(round(0.72 * crown), round(0.9 * crown))
        hair[band] *= 0.55
    return np.clip(np.concatenate([face, neck, hair]), 0, 255).astype(np.uint8)


def _paint_skin(
    face: np.ndarray, look: HeadLook, a: np.ndarray, b: np.ndarray, noise: np.ndarray
) -> None:
    side = np.abs(a)
    blush = np.exp(-(((side - 0.45) / 0.16) ** 2)) * np.exp(-(((b - 0.16) / 0.13) ** 2))
    blush = blush + np.exp(-((a / 0.09) ** 2)) * np.exp(-(((b - 0.24) / 0.09) ** 2))
    _blend(face, look.skin * (1.02, 0.8, 0.78), 0.5 * blush)
    socket = np.exp(-(((side - 0.3) / 0.16) ** 2)) * np.exp(-(((b + 0.19) / 0.1) ** 2))
    _blend(face, look.skin * 0.55, 0.5 * socket)
    nostril = np.exp(-((((side - 0.065) / 0.035) ** 2 + ((b - 0.325) / 0.022) ** 2) ** 2))
    wing = np.exp(-(((side - 0.165) / 0.025) ** 2)) * np.exp(-(((b - 0.27) / 0.06) ** 2))
    _blend(face, look.skin * 0.22, np.maximum(0.85 * nostril, 0.4 * wing))
    if look.beard > 0:
        jaw = _smooth(b + 0.35 * side, 0.55, 0.75) * _smooth(side + 0.4 * b, 0.3, 0.42)
        lip = np.exp(-((side / 0.27) ** 4)) * np.exp(-(((b - 0.43) / 0.05) ** 2))
        hairy = np.maximum(jaw * _smooth(b, 0.0, 0.25), lip)
        _blend(face, look.hair * 0.85, look.beard * np.clip(hairy * (1 + 0.8 * noise), 0, 1))
    x = (side - 0.32) / 0.19
    arc = -0.325 - 0.035 * (1 - x * x) + 0.02 * x
    half = 0.028 * (1 - 0.5 * _smooth(x, 0, 1))
    brow = _smooth(np.abs(b - arc) / half, 1.3, 0.7) * _smooth(np.abs(x), 1.05, 0.9)
    _blend(face, look.hair * 0.6, 0.9 * np.clip(brow * (1 + 0.4 * noise), 0, 1))


def _paint_mouth(
    face: np.ndarray, look: HeadLook, shape: HeadShape, a: np.ndarray, b: np.ndarray
) -> None:
    x = np.abs(a) / POINT_CHART[4, 0]
    within = _smooth(x, 1.04, 0.98)
    arch = np.clip(1 - x * x, 0, 1)
    thick = 1 + 0.35 * shape.lips
    top = 0.56 - thick * (0.085 * arch**0.7 - 0.022 * np.exp(-((x / 0.16) ** 2)))
    bottom = 0.56 + thick * 0.12 * arch**0.6
    lips = _smooth(b - top, -0.008, 0.008) * _smooth(b - bottom, 0.01, -0.01) * within
    _blend(face, look.lip, 0.9 * lips)
    _blend(face, look.lip * 1.25, 0.35 * lips * np.exp(-(((b - 0.63) / 0.02) ** 2)))
    gap = np.sqrt(arch) * (0.004 + 0.012 * min(3 * shape.mouth_open, 1))
    inside = _smooth(np.abs(b - 0.56) - gap, 0.004, -0.002) * within
    _blend(face, np.array([50.0, 12, 14]), inside)
    if shape.mouth_open > 0.25:
        teeth = inside * _smooth(b, 0.557, 0.554) * _smooth(x, 0.8, 0.65)
        _blend(face, np.array([225.0, 220, 205]), teeth)


def _paint_eye(
    face: np.ndarray, look: HeadLook, opened: float, side: int, a: np.ndarray, b: np.ndarray
) -> None:
    centre, height = POINT_CHART[side]
    # The part of the texture where an eye can be: a third of the time of all of it.
    columns = np.flatnonzero(np.abs(a[0] - centre) < 0.22)
    rows = np.flatnonzero(np.abs(b[:, 0] - height) < 0.12)
    if not len(columns) or not len(rows):
        return
    part = face[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    a, b = a[:, columns] - centre, b[rows] - height
    x = a / 0.145
    arch = np.clip(1 - x * x, 0, 1)
    upper, lower = -0.075 * opened * arch**0.8, (0.05 * opened + 0.006) * arch
    upper = np.minimum(upper + 0.025 * (1 - opened) * arch, lower)
    inside = _smooth(b - upper, -0.008, 0.008) * _smooth(b - lower, 0.008, -0.008)
    inside = inside * _smooth(np.abs(x), 1.0, 0.94) * min(1.0, 4 * opened)
    _blend(part, np.array([238.0, 234, 228]), inside)
    dx, dy = a - 0.045 * look.gaze[0], b - 0.018 * look.gaze[1]
    distance = np.sqrt(dx * dx + dy * dy)
    _blend(part, look.iris * 0.9, inside * _smooth(distance, 0.07, 0.058))
    _blend(part, np.array([12.0, 10, 10]), inside * _smooth(distance, 0.036, 0.026))
    glint = np.sqrt((dx - 0.02) ** 2 + (dy + 0.02) ** 2)
    _blend(part, 255.0, inside * _smooth(glint, 0.016, 0.008))
    lid = _smooth(np.abs(b - upper), 0.022, 0.009) * _smooth(np.abs(x), 1.12, 1.0)
    _blend(part, look.skin * 0.18, 0.9 * lid)
    rim = _smooth(np.abs(b - lower), 0.014, 0.004) * _smooth(np.abs(x), 1.0, 0.9)
    _blend(part, look.skin * 0.45, 0.5 * rim)


def _paint_glasses(face: np.ndarray, color: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    side = np.abs(a)
    ring = np.sqrt(((side - 0.32) / 0.2) ** 2 + ((b + 0.155) / 0.135) ** 2)
    frame = _smooth(np.abs(ring - 1), 0.16, 0.09)
    bridge = _smooth(np.abs(b + 0.2), 0.028, 0.016) * _smooth(np.abs(side - 0.06), 0.08, 0.07)
    arms = _smooth(np.abs(b + 0.17), 0.026, 0.014) * _smooth(side, 0.51, 0.53)
    _blend(face, color.astype(np.float32), np.maximum(np.maximum(frame, bridge), arms))


def _grid_triangles(rows: int, columns: int, step: tuple[int, int] = (1, 1)) -> np.ndarray:
    """(T, 3) triangles of a grid of vertices, of which only every so many rows and columns count."""
    down, right = step
    place = np.arange(0, rows - down, down)[:, None] * columns
    a = (place + np.arange(0, columns - right, right)).reshape(-1)
    b, c, d = a + right, a + down * columns + right, a + down * columns
    return np.concatenate([np.stack([a, c, b], 1), np.stack([a, d, c], 1)])


@dataclass(frozen=True)
class _Triangles:
    """Those of a whole head: face, ears, hair, neck; and which are thin, so that both sides show."""

    all: np.ndarray
    thin: np.ndarray


def _triangles(fine: bool) -> _Triangles:
    step = 1 if fine else 2
    ears = face_topology()[-12:]
    face = face_topology()[:-12] if fine else _grid_triangles(len(ROWS), len(COLUMNS), (2, 2))
    hair = _grid_triangles(_RINGS, _SPOKES, (1, step))
    hanging = hair.min(axis=1) >= (_RINGS - 1 - _HANGING) * _SPOKES
    neck = _grid_triangles(_NECK_RINGS, _NECK_SPOKES, (1, step)) + NUM_VERTICES + _RINGS * _SPOKES
    parts = [(face, False), (ears, True), (hair + NUM_VERTICES, hanging), (neck, False)]
    return _Triangles(
        np.concatenate([part for part, _ in parts]),
        np.concatenate([np.broadcast_to(thin, len(part)) for part, thin in parts]),
    )


_NECK_RINGS, _NECK_SPOKES = 3, 13
# A small face is drawn with every second row and column: a quarter of the triangles.
_COARSE_BELOW = 30.0  # pixels per head unit
_COARSE, _FINE = _triangles(False), _triangles(True)
_SPOKE = np.linspace(-math.pi, math.pi, _SPOKES)  # azimuths; 0 is the front


def _hair(look: HeadLook, shape: HeadShape) -> np.ndarray:
    """(14, 33, 3): rings from the top down; where there is face it lies inside of the head."""
    wide = 0.77 * (1 + 0.08 * shape.skull_width)
    radii = np.array([wide, 0.98, 0.98])
    bald, hat = look.volume < 0, look.hat is not None
    skull_rings = _RINGS - _HANGING
    polar = np.linspace(0.02, math.radians(100), skull_rings)[:, None]
    unit = np.stack(
        [
            np.sin(polar) * np.sin(_SPOKE),
            -np.cos(polar) * np.ones(_SPOKES),
            -np.sin(polar) * np.cos(_SPOKE),
        ],
        axis=2,
    )
    volume = np.full((skull_rings, 1), -0.02 if bald else look.volume)
    if hat:
        volume[:] = np.maximum(volume, 0.06)
    wave = (
        1 + 0.12 * np.sin(5 * _SPOKE + look.grain[0]) + 0.08 * np.sin(11 * _SPOKE + look.grain[1])
    )
    points = unit * radii * (1 + volume * (1.0 if hat else wave))[:, :, None] + _SKULL
    if hat and look.brim > 0:  # the fifth ring is a flat brim, the crown rises from within it
        points[4] = points[5] * (1 + look.brim, 1, 1 + look.brim)
        points[3] = points[5] * (0.97, 1, 0.97) + (0, -0.12, 0)
    # Towards the front the hair ends at the fringe, at the sides before the ears.
    front = np.abs(_SPOKE)
    line = np.where(front < 0.9, look.fringe, look.fringe + (front - 0.9) * 1.2)
    line = np.where(front > 1.55, math.inf, line)
    below = _smooth(points[:, :, 1] - line, -0.03, 0.1)
    if hat:
        below[:5] = 0
    inner = unit * radii * (0.78, 0.8, 0.72) + _SKULL
    points = points + below[:, :, None] * (inner - points)
    last = points[-1]
    fall = np.linspace(0, 1, _HANGING + 1)[1:, None, None]
    end = np.maximum(look.hair_length, 0.35)
    hanging = np.repeat(last[None], _HANGING, axis=0)
    behind = _smooth(front, 1.5, 1.75)[None, :, None]
    spread = 1 + 0.1 * fall * (end > 0.6) - 0.3 * fall * (end <= 0.6)
    hanging = hanging * np.concatenate([spread, np.ones_like(spread), spread], axis=2)
    drop = np.array([0.0, 1.0, 0.0]) * (end - last[:, 1:2]) * fall * behind
    return np.concatenate([points, hanging + drop])


def _slopes(grid: np.ndarray) -> np.ndarray:
    """Differences along the first axis, of any length: several times as fast as np.gradient."""
    slopes = np.empty_like(grid)
    np.subtract(grid[2:], grid[:-2], out=slopes[1:-1])
    slopes[0], slopes[-1] = grid[1] - grid[0], grid[-1] - grid[-2]
    return slopes


def _normals(grid: np.ndarray) -> np.ndarray:
    """(rows, columns, 3) of length 1, outwards for rows that go down and columns that go right."""
    dx, dy, dz = _slopes(grid).transpose(2, 0, 1)
    rx, ry, rz = _slopes(grid.transpose(1, 0, 2)).transpose(2, 1, 0)
    normal = np.stack([dy * rz - dz * ry, dz * rx - dx * rz, dx * ry - dy * rx], axis=2)
    return normal / np.maximum(np.sqrt(np.square(normal).sum(axis=2, keepdims=True)), 1e-9)


def head_solid(
    shape: HeadShape,
    look: HeadLook,
    turn: np.ndarray,
    scale: float,
    centre: tuple[float, float],
) -> Solid:
    """A head in the picture, under weak perspective.

    Args:
        turn: (3, 3) rotation.
        scale: pixels per head unit.
        centre: x, y of the mean of the face's vertices, pixels.
    """
    face = head_vertices(shape) @ turn.T
    hair = _hair(look, shape) @ turn.T
    # The neck leads from the head, which turns, to shoulders that do not.
    around = np.linspace(-math.pi, math.pi, _NECK_SPOKES)
    ring = np.stack([0.43 * np.sin(around), np.zeros(_NECK_SPOKES), -0.4 * np.cos(around)], axis=1)
    upper = ring + turn @ (0, 0.3, 0.12)
    lower = 1.15 * ring + (0, 1.38, 0.3)
    neck = np.stack([upper, 0.45 * upper + 0.55 * lower + (0, 0.05, 0), lower])

    grid = face[:FACE_VERTICES].reshape(len(ROWS), -1, 3)
    ears = np.repeat([[-0.6, 0, -0.8], [0.6, 0, -0.8]], 7, axis=0) @ turn.T
    normals = np.concatenate([n.reshape(-1, 3) for n in (_normals(grid), ears)])
    normals = np.concatenate([normals, *(_normals(g).reshape(-1, 3) for g in (hair, neck))])

    mean = face.mean(axis=0)
    points = np.concatenate([face, hair.reshape(-1, 3), neck.reshape(-1, 3)]) - mean
    points = points * scale + (*centre, 0.0)
    triangles = _COARSE if scale < _COARSE_BELOW else _FINE
    seen = front_facing(points, triangles.all) | triangles.thin
    return Solid(points, normals, triangles.all[seen], _places())


@lru_cache(maxsize=1)
def _places() -> np.ndarray:
    rows, columns = np.divmod(np.arange(FACE_VERTICES), len(COLUMNS))
    face = np.stack([columns, rows], axis=1)
    skin = len(ROWS) + 0.0
    ears = np.stack([np.arange(14.0), np.full(14, skin + 1)], axis=1)
    ring, spoke = np.divmod(np.arange(_RINGS * _SPOKES), _SPOKES)
    first = len(ROWS) + _SKIN_ROWS - 0.5
    hair = np.stack([spoke, first + ring * (_HAIR_ROWS / (_RINGS - 1))], axis=1)
    ring, spoke = np.divmod(np.arange(_NECK_RINGS * _NECK_SPOKES), _NECK_SPOKES)
    neck = np.stack([spoke * 2.0, skin + 0.5 + ring * 0.8], axis=1)
    return np.concatenate([face, ears, hair, neck])


def head_surface(
    solid: Solid, shape: HeadShape, look: HeadLook, light: Light, cells: int
) -> Surface:
    """The head with its paint and light; `cells` as :func:`paint_texture` takes it."""
    # Thin parts show their back as well, which gets the light of the side that one sees.
    normals = np.where(solid.normals[:, 2:] > 0, -solid.normals, solid.normals)
    normals[:FACE_VERTICES] = solid.normals[:FACE_VERTICES]
    direct = np.clip(normals @ light.direction, 0, None)
    shade = light.ambient + (1.25 - light.ambient) * direct
    # The neck lies in the chin's shadow, and an ear's middle is hollow.
    shade[-_NECK_RINGS * _NECK_SPOKES :] *= np.repeat([0.6, 0.75, 0.9], _NECK_SPOKES)
    shade[[FACE_VERTICES, FACE_VERTICES + 7]] *= 0.6
    texture = paint_texture(look, shape, cells)
    return Surface(solid.points, solid.triangles, shade, solid.places * cells, texture)
