"""Distances over the surface between the vertices of a mesh.

Letters: V vertices.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from pathlib import Path

import numpy as np

from d2ext.data.cache import cache_folder
from d2ext.data.densepose.surface_files import read_arrays, surface_file
from d2ext.data.errors import DatasetError
from d2ext.files import atomic_write

logger = logging.getLogger(__name__)

_PURPOSE = "the distances over the surface between the vertices of a mesh"


class GeodesicDistances:
    """Distances between V vertices, in the unit of the file (metres). The table may lie on disk: what is
    asked for is read.

    Attributes:
        num_vertices: V
    """

    def __init__(self, table: np.ndarray) -> None:
        """
        Args:
            table: (V, V), or the strictly lower triangle by rows, (V (V - 1) / 2,): entry
                i (i - 1) / 2 + j for i > j

        Raises:
            ValueError: neither
        """
        self._square = table.ndim == 2 and table.shape[0] == table.shape[1]
        self._table = table if self._square else table.reshape(-1)
        self.num_vertices = (
            len(table) if self._square else (1 + math.isqrt(1 + 8 * table.size)) // 2
        )
        entries = self.num_vertices * (self.num_vertices - 1) // 2
        if table.dtype.kind != "f" or not (
            self._square or (table.size == max(table.shape) == entries)
        ):
            raise ValueError(
                f"{table.dtype} numbers of shape {table.shape} are neither a square matrix of distances "
                "nor the strictly lower triangle of one"
            )

    def distances(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Between vertices i and j, arrays of int64 that broadcast: float32 of their common shape.

        Raises:
            IndexError: a vertex outside 0 .. V - 1
        """
        i, j = np.broadcast_arrays(np.asarray(i, np.int64), np.asarray(j, np.int64))
        if i.size and not (0 <= min(i.min(), j.min()) <= max(i.max(), j.max()) < self.num_vertices):
            raise IndexError(f"a vertex outside 0 .. {self.num_vertices - 1}")
        if self._square:
            return self._table[i, j].astype(np.float32, copy=False)
        high, low = np.maximum(i, j), np.minimum(i, j)
        result = np.zeros(i.shape, np.float32)
        apart = high > low
        high, low = high[apart], low[apart]
        result[apart] = self._table[high * (high - 1) // 2 + low]
        return result

    def rows(self, i: np.ndarray) -> np.ndarray:
        """(K,) vertices: (K, V) float32, from each to all."""
        return self.distances(np.asarray(i)[:, None], np.arange(self.num_vertices))

    def square(self) -> np.ndarray:
        """(V, V) float32, in memory."""
        if self._square:
            return np.array(self._table, np.float32)
        result = np.zeros((self.num_vertices, self.num_vertices), np.float32)
        start = 0
        for i in range(1, self.num_vertices):
            result[i, :i] = result[:i, i] = self._table[start : start + i]
            start += i
        return result


def open_geodesics(path: str | os.PathLike[str]) -> GeodesicDistances:
    """The distances in a file.

    Args:
        path: .npy, which stays on disk (memory-mapped), .npz, or a published .pkl, which becomes an
            .npy in d2ext's cache the first time (DensePose's ``Pdist_matrix.pkl``: 1.5 GB, 8 GB of
            memory); with one square matrix, or one strictly lower triangle by rows (flat or a column)

    Raises:
        DatasetError: the file does not exist or holds no such thing
    """
    local = surface_file(path, _PURPOSE)
    if local.endswith(".pkl"):
        local = _converted(local)
    try:
        if local.endswith(".npy"):
            return GeodesicDistances(np.load(local, mmap_mode="r", allow_pickle=False))
        return GeodesicDistances(_only_array(local))
    except (ValueError, EOFError) as e:
        raise DatasetError(f"'{path}' does not hold {_PURPOSE}: {e}.") from e


def _only_array(path: str) -> np.ndarray:
    arrays = list(read_arrays(path, _PURPOSE).values())
    if len(arrays) != 1:
        raise DatasetError(f"'{path}' holds {len(arrays)} arrays, not one, of distances.")
    return arrays[0]


def _converted(path: str) -> str:
    """The .npy of a .pkl, made once for each state of that file."""
    stat = os.stat(path)
    state = f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}"
    digest = hashlib.sha256(state.encode()).hexdigest()[:16]
    target = cache_folder("geodesics") / f"{Path(path).stem}-{digest}.npy"
    if not target.is_file():
        logger.info(f"Reading '{path}' once, into '{target}'.")
        array = _only_array(path)
        with atomic_write(target) as file:
            np.save(file, array)
    return str(target)
