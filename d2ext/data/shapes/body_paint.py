"""What the bodies of `shapes` wear: colours on the charts of their parts, and the light on them."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from d2ext.data.densepose.parts import COARSE_PARTS, MIRRORED_PARTS, NUM_PARTS
from d2ext.data.shapes.body_mesh import LEFT_PARTS, body_mesh, mirror_chart
from d2ext.data.shapes.face_paint import Light
from d2ext.data.shapes.textures import STORED_PER_PIXEL, thing_texture

__all__ = ["BodyLook", "Cloth", "paint_charts", "vertex_normals", "vertex_shade"]

CHART = 48  # side of a chart's picture, pixels

# Metres along U and V of the charts of coarse parts (on the left), about.
_METRES = {1: (0.36, 0.65), 3: (0.2, 0.2), 4: (0.25, 0.25), 7: (0.22, 0.4), 9: (0.15, 0.36)}
_METRES |= {10: (0.14, 0.28), 12: (0.1, 0.24), 14: (0.28, 0.3)}


@dataclass(frozen=True)
class Cloth:
    """A pattern.

    Attributes:
        texture: index of a grey tile of :mod:`.textures`.
        scale: texture pixels per metre.
        offset: texture pixels.
        ramp: (256, 3) uint8 colours of grey values.
    """

    texture: int
    scale: float
    offset: tuple[int, int]
    ramp: np.ndarray


@dataclass(frozen=True)
class BodyLook:
    """Colours are (3,) RGB from 0 to 255.

    Attributes:
        skin, hair, shoes: colours.
        shirt, trousers: what covers torso and arms, legs.
        sleeves, legs: how far down they reach, 0 shoulder or hip, 1 elbow or knee, 2 wrist or
            ankle.
        hair_length: V on the head's chart down to which the back is covered; above 1: bald.
        buttons: colour of a strip down the front of the shirt; None: without.
        back: factor of the colours of torso, legs and arms from behind, 0..1.
    """

    skin: np.ndarray
    hair: np.ndarray
    shoes: np.ndarray
    shirt: Cloth
    trousers: Cloth
    sleeves: float
    legs: float
    hair_length: float
    buttons: np.ndarray | None = None
    back: float = 1.0


@cache
def _places() -> tuple[np.ndarray, np.ndarray]:
    """(24, 48, 48, 2) U, V of the charts' pixels as they are on the left part's chart, and in
    metres."""
    middle = (np.arange(CHART) + 0.5) / CHART
    uv = np.stack(np.meshgrid(middle, middle), axis=2)
    places, metres = [], []
    for part in range(1, NUM_PARTS + 1):
        own = part <= 2 or part in LEFT_PARTS
        left = part if own else MIRRORED_PARTS[part]
        places.append(uv if own else mirror_chart(part, uv))
        metres.append(places[-1] * _METRES[COARSE_PARTS[left]])
    return np.stack(places), np.stack(metres)


def _woven(cloth: Cloth, parts: list[int]) -> np.ndarray:
    """(n, 48, 48, 3) float32: a cloth on some charts."""
    metres = _places()[1][[p - 1 for p in parts]]
    tile = thing_texture(cloth.texture)
    stored = (metres * cloth.scale + cloth.offset) * STORED_PER_PIXEL
    column, row = stored.astype(np.int64).transpose(3, 0, 1, 2) % len(tile)
    return cloth.ramp[tile[row, column]].astype(np.float32)


_ARMS, _FOREARMS = [15, 16, 17, 18], [19, 20, 21, 22]
_THIGHS, _SHINS = [7, 8, 9, 10], [11, 12, 13, 14]
# Their halves behind, and that of the torso. Without a sign of what is front, left and right can only be
# told by details of a few pixels.
_BACKS = [1, 7, 8, 11, 12, 15, 16, 19, 20]


def paint_charts(look: BodyLook) -> np.ndarray:
    """(25, 48, 48, 3) float32 colours, 0..255, by part (0 unused), V, U."""
    charts = np.empty((NUM_PARTS + 1, CHART, CHART, 3), np.float32)
    charts[:] = look.skin
    uv = np.concatenate([_places()[0][:1], _places()[0]]).astype(np.float32)
    u, v = uv[..., 0], uv[..., 1]
    charts[[5, 6]] = look.shoes
    sole = np.abs(uv[[5, 6]] - 0.5).max(axis=3) < 0.2
    charts[[5, 6]] = np.where(sole[..., None], look.shoes * 0.6, charts[[5, 6]])
    for cloth, parts, reach, first in (
        (look.shirt, [1, 2, *_ARMS, *_FOREARMS], look.sleeves, _FOREARMS),
        (look.trousers, [*_THIGHS, *_SHINS], look.legs, _SHINS),
    ):
        down = v[parts] + np.isin(parts, first)[:, None, None]
        covered = down < reach
        covered |= np.isin(parts, (1, 2))[:, None, None]
        charts[parts] = np.where(covered[..., None], _woven(cloth, parts), charts[parts])
    _paint_torso(charts, look, u, v)
    _paint_heads(charts, look, u, v)
    nails = np.abs(uv[[3, 4]] - 0.5).max(axis=3) < 0.25
    charts[[3, 4]] *= np.where(nails, 0.85, 1.0)[..., None]
    charts[_BACKS] *= look.back
    return charts


def _paint_torso(charts: np.ndarray, look: BodyLook, u: np.ndarray, v: np.ndarray) -> None:
    """Trousers reach up to the belt; skin at the neck, farther down in front; a strip of
    buttons."""
    for part, neckline in ((1, 0.93), (2, 0.82)):
        chart = charts[part]
        trousers = v[part] < 0.2
        chart[trousers] = _woven(look.trousers, [part])[0][trousers]
        chart[(v[part] >= 0.2) & (v[part] < 0.235)] = look.shoes * 0.7
        chart[v[part] > neckline + 0.5 * np.abs(u[part] - 0.5)] = look.skin
    if look.buttons is not None:
        strip = (np.abs(u[2] - 0.5) < 0.03) & (v[2] > 0.235) & (v[2] < 0.82)
        charts[2][strip] = look.buttons


def _paint_heads(charts: np.ndarray, look: BodyLook, u: np.ndarray, v: np.ndarray) -> None:
    """U from the middle of the face to that of the back, V from the neck to the crown."""
    for part in (23, 24):
        chart, side, up = charts[part], u[part], v[part]
        line = np.where(side < 0.36, 0.74, np.where(side < 0.5, 0.55, look.hair_length))
        if look.hair_length < 1:
            chart[up > line] = look.hair
        eye = ((side - 0.17) / 0.075) ** 2 + ((up - 0.555) / 0.032) ** 2 < 1
        chart[eye] = (240, 238, 232)
        chart[((side - 0.17) / 0.035) ** 2 + ((up - 0.555) / 0.032) ** 2 < 1] = look.hair * 0.4
        chart[(np.abs(side - 0.17) < 0.09) & (np.abs(up - 0.63) < 0.018)] = look.hair * 0.7
        mouth = (side / 0.13) ** 2 + ((up - 0.385) / 0.024) ** 2 < 1
        chart[mouth] = look.skin * (0.75, 0.4, 0.4)
        chart[(side < 0.05) & (up > 0.43) & (up < 0.47)] *= 0.75  # below the nose
        ear = ((side - 0.5) / 0.05) ** 2 + ((up - 0.5) / 0.08) ** 2 < 1
        chart[ear] = look.skin * 0.8


@cache
def _faces_of_vertices() -> np.ndarray:
    """(V, n) int64: the triangles around each vertex; the number of triangles where there are
    fewer."""
    mesh = body_mesh()
    flat = mesh.triangles.reshape(-1)
    order = np.argsort(flat, kind="stable")
    count = np.bincount(flat)
    place = np.arange(len(flat)) - np.repeat(np.cumsum(count) - count, count)
    result = np.full((len(count), count.max()), len(mesh.triangles))
    result[flat[order], place] = order // 3
    return result


def vertex_normals(points: np.ndarray) -> np.ndarray:
    """(V, 3) of length 1, outwards, of a body's posed vertices (V, 3)."""
    a, b, c = (points[body_mesh().triangles[:, i]] for i in range(3))
    normals = np.concatenate([np.cross(b - a, c - a), np.zeros((1, 3))])
    sums = normals[_faces_of_vertices()].sum(axis=1)
    return sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)


def vertex_shade(normals: np.ndarray, light: Light) -> np.ndarray:
    """(V,) factor of the colours, 1 shows them as they are."""
    direct = np.clip(normals @ light.direction, 0, None)
    return light.ambient + (1.25 - light.ambient) * direct
