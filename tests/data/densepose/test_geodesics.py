"""Distances on meshes, in all forms of their files."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import MetadataCatalog

from d2ext.data.densepose import GeodesicDistances, open_geodesics
from d2ext.data.errors import DatasetError
from d2ext.data.shapes.body_tables import body_geodesics


@pytest.fixture
def square() -> np.ndarray:
    distances = np.random.default_rng(0).random((7, 7)).astype(np.float32)
    distances = distances + distances.T
    np.fill_diagonal(distances, 0)
    return distances


def _check(geodesics: GeodesicDistances, square: np.ndarray) -> None:
    everything = np.indices(square.shape)
    assert geodesics.num_vertices == len(square)
    for actual, expected in (
        (geodesics.distances(*everything), square),
        (geodesics.distances(np.array(5), np.array([5, 2])), square[5, [5, 2]]),
        (geodesics.rows(np.array([6, 0])), square[[6, 0]]),
        (geodesics.square(), square),
        (geodesics.distances(np.array([], int), np.array([], int)), square[0, :0]),
    ):
        assert actual.dtype == np.float32
        np.testing.assert_array_equal(actual, expected)
    for vertex in (-1, 7):
        with pytest.raises(IndexError):
            geodesics.distances(np.array([0, vertex]), np.array([1, 1]))


def test_forms_of_files(
    tmp_path: Path, square: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2EXT_CACHE", str(tmp_path / "cache"))
    triangle = square[np.tril_indices(7, -1)]
    for name, table in (("a", square), ("b", triangle), ("c", triangle[:, None])):
        np.save(tmp_path / f"{name}.npy", table)
        _check(open_geodesics(tmp_path / f"{name}.npy"), square)
        np.savez(tmp_path / f"{name}.npz", distances=table)
        _check(open_geodesics(tmp_path / f"{name}.npz"), square)
        for protocol in (0, 2, 4):
            (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(table, protocol))
            _check(open_geodesics(tmp_path / f"{name}.pkl"), square)
    np.save(tmp_path / "double.npy", triangle.astype(np.float64))
    _check(open_geodesics(tmp_path / "double.npy"), square)


def test_a_pickle_is_read_once(
    tmp_path: Path, square: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2EXT_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "distances.pkl"
    path.write_bytes(pickle.dumps(square))
    assert isinstance(open_geodesics(path)._table, np.memmap)
    with monkeypatch.context() as patch:
        patch.setattr("d2ext.data.densepose.geodesics.read_arrays", None)
        _check(open_geodesics(path), square)
    path.write_bytes(pickle.dumps(np.pad(square, 1)))  # another file under the name
    assert open_geodesics(path).num_vertices == 9


def test_bodies_of_shapes() -> None:
    geodesics = open_geodesics(MetadataCatalog.get("shapes_val_bodies").densepose_geodesics)
    np.testing.assert_array_equal(geodesics.square(), body_geodesics())


class _Program:
    def __reduce__(self) -> Any:
        return print, ("called",)


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D2EXT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DatasetError, match=r"no file '.*gone\.npy', the distances .* SMPL"):
        open_geodesics(tmp_path / "gone.npy")
    for table in (np.zeros(4), np.zeros((2, 3)), np.zeros((3, 3), int), np.zeros((1, 2, 3))):
        np.save(tmp_path / "other.npy", table)
        with pytest.raises(DatasetError, match=r"other\.npy.*neither"):
            open_geodesics(tmp_path / "other.npy")
    (tmp_path / "program.pkl").write_bytes(pickle.dumps(_Program()))
    with pytest.raises(DatasetError, match="print"):
        open_geodesics(tmp_path / "program.pkl")
    (tmp_path / "short.pkl").write_bytes(pickle.dumps(np.zeros((9, 9)))[:200])
    with pytest.raises(DatasetError, match=r"short\.pkl"):
        open_geodesics(tmp_path / "short.pkl")
    np.savez(tmp_path / "two.npz", a=np.zeros((3, 3)), b=np.zeros((3, 3)))
    with pytest.raises(DatasetError, match="2 arrays"):
        open_geodesics(tmp_path / "two.npz")
