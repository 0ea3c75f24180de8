"""Meshes on the charts of a body: from part, U and V to vertices and to points of the surface
(NOTES.md, *From (I, U, V) to the surface*).

Letters: C vertices on the charts (one on a border of parts lies on several), T triangles.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from d2ext.data.densepose.parts import NUM_PARTS
from d2ext.data.densepose.surface_files import surface_file
from d2ext.data.errors import DatasetError

_PURPOSE = "the mesh on the charts of a body"
# Where the published .mat of the subdivided mesh says which of its vertices are copies of one.
_TRANSFORM = "SMPL_SUBDIV_TRANSFORM.mat"
# Numbers in a chunk of distances.
_CHUNK = 1 << 20
# Weights of a triangle's corners above which a point lies in it.
_INSIDE = -1e-9


@dataclass(frozen=True)
class ChartVertices:
    """Vertices of a mesh on the charts."""

    parts: np.ndarray
    """(C,) int64: 1..24."""
    uv: np.ndarray
    """(C, 2) float64: U, V in [0, 1]."""
    vertices: np.ndarray
    """(C,) int64: vertex of the mesh from 0; -1: none."""

    def __len__(self) -> int:
        return len(self.parts)

    def nearest(self, parts: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The chart vertex nearest to points, by U and V, among those of their part.

        Args:
            parts, u, v: (n,) each

        Returns:
            (n,) int64 index, 0..C - 1; -1 where the part is 0 or has no vertex
        """
        result = np.full(len(parts), -1)
        points = np.stack([u, v], axis=1).astype(np.float64)
        for part in range(1, NUM_PARTS + 1):
            places, own = np.flatnonzero(parts == part), np.flatnonzero(self.parts == part)
            if not len(own):
                continue
            step = max(1, _CHUNK // len(own))
            for start in range(0, len(places), step):
                chunk = places[start : start + step]
                squares = [(points[chunk, i, None] - self.uv[own, i]) ** 2 for i in (0, 1)]
                result[chunk] = own[(squares[0] + squares[1]).argmin(axis=1)]
        return result

    def mesh_vertices(self, parts: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """As :meth:`nearest`, the vertices of the mesh; -1: none."""
        return np.append(self.vertices, -1)[self.nearest(parts, u, v)]


def read_chart_vertices(path: str | os.PathLike[str]) -> ChartVertices:
    """The vertices of a mesh on the charts.

    Args:
        path: the published ``SMPL_subdiv.mat``, with ``SMPL_SUBDIV_TRANSFORM.mat`` beside it (needs
            scipy); or an .npz of ``chart_parts``, ``chart_u``, ``chart_v``, ``chart_vertices`` (from 0)

    Raises:
        DatasetError: a file does not exist, or lacks them.
    """
    content = _read(path)
    if "chart_vertices" in content:
        uv = np.stack([content["chart_u"], content["chart_v"]], axis=1)
        parts, vertices = content["chart_parts"], content["chart_vertices"]
    elif "Part_ID_subdiv" in content:
        transform = os.path.join(os.path.dirname(os.fspath(path)), _TRANSFORM)
        uv = np.stack([np.ravel(content[f"{x}_subdiv"]) for x in "UV"], axis=1)
        parts = np.ravel(content["Part_ID_subdiv"])
        vertices = np.ravel(_read(transform)["index"]).astype(np.int64) - 1
    else:
        raise DatasetError(f"'{path}' has {sorted(content)}: it is not {_PURPOSE}.")
    return ChartVertices(parts.astype(np.int64), uv.astype(np.float64), vertices.astype(np.int64))


class SurfacePlaces(NamedTuple):
    """Where n points lie on a mesh."""

    vertices: np.ndarray
    """(n, 3) int64: corners of the point's triangle, from 0."""
    weights: np.ndarray
    """(n, 3) float64: of the corners; sum 1."""

    def positions(self, vertices: np.ndarray) -> np.ndarray:
        """The points on a body in any pose.

        Args:
            vertices: (V, 3) of the body

        Returns:
            (n, 3)
        """
        return np.einsum("nk,nkc->nc", self.weights, vertices[self.vertices])

    @property
    def nearest(self) -> np.ndarray:
        """(n,) int64: the corner of the largest weight."""
        return np.take_along_axis(self.vertices, self.weights.argmax(axis=1)[:, None], 1)[:, 0]


@dataclass(frozen=True)
class ChartTriangles:
    """Triangles of a mesh on the charts."""

    parts: np.ndarray
    """(T,) int64: 1..24."""
    uv: np.ndarray
    """(T, 3, 2) float64: U, V of the corners."""
    vertices: np.ndarray
    """(T, 3) int64: corners, vertices of the mesh from 0."""
    positions: np.ndarray | None = None
    """(V, 3) float64: the mean body, metres, if the file has it."""

    @cached_property
    def _inverses(self) -> np.ndarray:
        """(T, 2, 2): U, V from the first corner → weights of the others; 0 for what has no area."""
        sides = (self.uv[:, 1:] - self.uv[:, :1]).transpose(0, 2, 1)
        area = np.linalg.det(sides)
        flat = np.abs(area) < 1e-12
        inverses = np.linalg.inv(np.where(flat[:, None, None], np.eye(2), sides))
        inverses[flat] = np.nan
        return inverses

    def locate(self, parts: np.ndarray, u: np.ndarray, v: np.ndarray) -> SurfacePlaces:
        """Points of the charts on the mesh: in the first triangle of their part that contains U, V; else
        on the nearest corner of one.

        Args:
            parts: (n,) 1..24
            u, v: (n,)

        Raises:
            DatasetError: a part without triangles, as 0 is
        """
        points = np.stack([u, v], axis=1).astype(np.float64)
        vertices, weights = np.zeros((len(points), 3), np.int64), np.zeros((len(points), 3))
        for part in np.unique(parts).tolist():
            own = np.flatnonzero(self.parts == part)
            if not len(own):
                raise DatasetError(f"The mesh has no triangle on part {part}.")
            places = np.flatnonzero(parts == part)
            step = max(1, _CHUNK // (4 * len(own)))
            for start in range(0, len(places), step):
                chunk = places[start : start + step]
                at = self._locate(own, points[chunk])
                vertices[chunk], weights[chunk] = at.vertices, at.weights
        return SurfacePlaces(vertices, weights)

    def _locate(self, own: np.ndarray, points: np.ndarray) -> SurfacePlaces:
        """Points of one part, whose triangles are ``own``."""
        offsets = points[:, None] - self.uv[own, 0]  # (n, t, 2)
        others = np.einsum("tij,ntj->nti", self._inverses[own], offsets)
        inside = (others >= _INSIDE).all(axis=2) & (others.sum(axis=2) <= 1 - _INSIDE)
        first = inside.argmax(axis=1)
        rows = np.arange(len(points))
        weights = np.concatenate([np.zeros((len(points), 1)), others[rows, first]], axis=1)
        weights[:, 0] = 1 - weights[:, 1] - weights[:, 2]
        triangles, outside = own[first], ~inside.any(axis=1)
        if outside.any():
            squares = (points[outside, None, None] - self.uv[own]) ** 2
            nearest, corner = np.divmod(
                squares.sum(axis=3).reshape(outside.sum(), -1).argmin(axis=1), 3
            )
            triangles[outside], weights[outside] = own[nearest], np.eye(3)[corner]
        return SurfacePlaces(self.vertices[triangles], weights)


def read_chart_triangles(path: str | os.PathLike[str]) -> ChartTriangles:
    """The triangles of a mesh on the charts.

    Args:
        path: the published ``UV_Processed.mat`` (needs scipy): ``All_Faces`` and ``All_vertices`` from
            1, ``All_FaceIndices``, ``All_U_norm``, ``All_V_norm``; or an .npz as of
            :func:`read_chart_vertices` that has ``triangles`` (T, 3) and ``vertices`` (V, 3) too

    Raises:
        DatasetError: the file does not exist, or lacks them.
    """
    content = _read(path)
    if "All_Faces" in content:
        faces = content["All_Faces"].astype(np.int64) - 1
        uv = np.stack([np.ravel(content[f"All_{x}_norm"]) for x in "UV"], axis=1)
        vertices = np.ravel(content["All_vertices"]).astype(np.int64) - 1
        parts = np.ravel(content["All_FaceIndices"]).astype(np.int64)
        return ChartTriangles(parts, uv.astype(np.float64)[faces], vertices[faces])
    if "triangles" in content and "chart_vertices" in content:
        return _on_charts(content)
    raise DatasetError(f"'{path}' has {sorted(content)}: no triangles on the charts of a body.")


def _on_charts(content: dict[str, Any]) -> ChartTriangles:
    """Each triangle on the parts that have all its corners: one, but for errors of a file."""
    mesh, count = content["triangles"].astype(np.int64), len(content["vertices"])
    place = np.full((NUM_PARTS + 1, count), -1)  # of a vertex among those of the charts
    place[content["chart_parts"], content["chart_vertices"]] = np.arange(
        len(content["chart_parts"])
    )
    corners = place[:, mesh]  # (25, T, 3)
    parts, triangles = np.nonzero((corners >= 0).all(axis=2))
    uv = np.stack([content["chart_u"], content["chart_v"]], axis=1).astype(np.float64)
    return ChartTriangles(
        parts,
        uv[corners[parts, triangles]],
        mesh[triangles],
        content["vertices"].astype(np.float64),
    )


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    file = surface_file(path, _PURPOSE)
    if file.endswith(".mat"):
        try:
            from scipy.io import loadmat  # optional
        except ImportError as error:
            raise DatasetError(f"Reading '{path}' needs scipy: pip install scipy.") from error
        return dict(loadmat(file))
    with np.load(file, allow_pickle=False) as stored:
        return dict(stored)
