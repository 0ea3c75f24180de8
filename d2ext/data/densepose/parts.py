"""The parts of a body's surface, and what a mirror does to points on it (NOTES.md, *Semantics*).

The surface has 24 fine parts, 1..24 (0: background), each a chart with coordinates U, V in [0, 1], and
14 coarse ones, 1..14, as in the masks of the annotations. Left and right are the person's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from d2ext.data.densepose.surface_files import read_arrays, surface_file
from d2ext.data.errors import DatasetError

NUM_PARTS = 24
# Torso, right hand, left hand, left foot, right foot, upper leg right, left, lower leg right, left,
# upper arm left, right, lower arm left, right, head.
NUM_COARSE_PARTS = 14
# The coarse part of each fine one, background included.
COARSE_PARTS = (0, 1, 1, 2, 3, 4, 5, 6, 7, 6, 7, 8, 9, 8, 9, 10, 11, 10, 11, 12, 13, 12, 13, 14, 14)
# What stands at the place of each part in a mirrored picture, background included.
MIRRORED_PARTS = (0, 1, 2, *(p + 1 if p % 2 else p - 1 for p in range(3, 25)))
MIRRORED_COARSE_PARTS = (0, 1, *(p - 1 if p % 2 else p + 1 for p in range(2, 14)), 14)

# Cells of a table along U and V.
_CELLS = 256


class SurfaceSymmetry:
    """Where points of the surface lie in a mirrored picture.

    Attributes:
        charts: (2, 25, 256, 256) float32, the mirrored U and V by part (before mirroring; row 0
            unused), V and U, or None. Charts of paired parts are not mirror images of each other, so
            that tables say it, and U and V change for the torso too.
        vertices: by name of a mesh, (V,) int64: the mirror vertex of each.
    """

    def __init__(
        self, charts: Tensor | None = None, vertices: Mapping[str, Tensor] | None = None
    ) -> None:
        """
        Args:
            charts: (2, 24, 256, 256): tables of U and of V, by part 1..24, V, U; None: none
            vertices: see the attribute
        """
        if charts is not None:
            if charts.shape != (2, NUM_PARTS, _CELLS, _CELLS):
                raise DatasetError(
                    f"The tables of the mirrored U and V have the shape {tuple(charts.shape)}, not "
                    f"{(2, NUM_PARTS, _CELLS, _CELLS)}."
                )
            charts = torch.cat([charts.new_zeros(2, 1, _CELLS, _CELLS), charts], dim=1).float()
        self.charts = charts
        self.vertices = dict(vertices or {})

    def to(self, device: torch.device | str) -> SurfaceSymmetry:
        """A copy with the chart tables on ``device``."""
        moved = SurfaceSymmetry(vertices=self.vertices)
        moved.charts = None if self.charts is None else self.charts.to(device)
        return moved

    def mirror_uv(self, parts: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """U and V (any shape, in [0, 1]) in the mirror, of points on ``parts`` (int64, same shape; 0:
        they stay).

        Raises:
            DatasetError: there are no tables.
        """
        if self.charts is None:
            raise DatasetError(
                "Mirrored pictures need the tables of the mirrored U and V, "
                "UV_symmetry_transforms.mat: name the file as `densepose_uv_symmetry` of the dataset's "
                "metadata, or set INPUT.RANDOM_FLIP: none."
            )
        # Cut, not rounded (published).
        row, column = (v * 255).long(), (u * 255).long()
        tables = self.charts[:, parts, row, column]
        return torch.where(parts > 0, tables[0], u), torch.where(parts > 0, tables[1], v)

    def mirror_vertices(self, mesh: str, vertices: Tensor) -> Tensor:
        """Vertices (any shape, int64; -1: none, stays) of the mesh in the mirror.

        Raises:
            DatasetError: there is no table for the mesh.
        """
        if mesh not in self.vertices:
            raise DatasetError(
                f'Mirrored pictures need the mirror vertices of the mesh "{mesh}"; there are those of '
                f"{sorted(self.vertices)}."
            )
        mirrored = self.vertices[mesh].to(vertices.device)[vertices.clamp(min=0)]
        return torch.where(vertices >= 0, mirrored, vertices)


def read_uv_symmetry(path: str | os.PathLike[str]) -> Tensor:
    """Tables for :class:`SurfaceSymmetry`, (2, 24, 256, 256) float32.

    Args:
        path: the published ``UV_symmetry_transforms.mat`` (needs scipy), or an ``.npz``; with
            ``U_transforms`` and ``V_transforms`` of 24 tables each

    Raises:
        DatasetError: no file, or one without them.
    """
    file = surface_file(path, "the tables of U and V in mirrored images")
    if file.endswith(".mat"):
        from scipy.io import loadmat  # optional

        content = loadmat(file)
    else:
        with np.load(file, allow_pickle=False) as stored:
            content = dict(stored)
    tables = []
    for name in ("U_transforms", "V_transforms"):
        if name not in content:
            raise DatasetError(f"'{path}' has no {name}: it is no file of mirrored U and V.")
        table = content[name]
        if table.dtype == object:  # MATLAB's cells
            table = np.stack(list(table.ravel()))
        tables.append(torch.from_numpy(table.astype(np.float32)))
    return torch.stack(tables)


def read_mirror_vertices(path: str | os.PathLike[str], num_vertices: int) -> Tensor:
    """The mirror vertex of each vertex of a mesh, (V,) int64.

    Args:
        path: a file of :func:`~d2ext.data.densepose.surface_files.read_arrays` with
            ``vertex_transforms``: a published ``symmetry_<mesh>.pkl``, or the mesh itself
        num_vertices: V

    Raises:
        DatasetError: no file, or one without such a table for V vertices
    """
    table = read_arrays(path, "the mirror vertices of a mesh").get("vertex_transforms")
    if table is None:
        raise DatasetError(f"'{path}' has no vertex_transforms, the mirror vertices of a mesh.")
    if table.shape != (num_vertices,) or not ((table >= 0) & (table < num_vertices)).all():
        raise DatasetError(
            f"The vertex_transforms of '{path}', {table.shape}, are not those of a mesh of "
            f"{num_vertices} vertices."
        )
    return torch.from_numpy(table.astype(np.int64))
