"""AFLW's MATLAB file, written here as it is published."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ext.data.errors import DatasetError
from d2ext.data.landmarks import matlab, register_landmarks
from d2ext.evaluation.landmarks import LandmarkEvaluator, instance_norm

scipy_io = pytest.importorskip("scipy.io")


@pytest.fixture
def name(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    made = f"landmarks_{uuid.uuid4().hex}"
    monkeypatch.setattr(matlab, "_NUM_TRAIN", 2)  # of four faces
    yield made
    if made in DatasetCatalog.list():
        DatasetCatalog.remove(made)
    MetadataCatalog.pop(made, None)


def write(path: Path, **changes: Any) -> np.ndarray:
    """Four faces in three pictures; the second and the last have a hidden point."""
    values = np.random.default_rng(0).uniform(1, 90, (4, 38))
    seen = np.ones((4, 19))
    seen[[1, 3], 5] = 0
    names = np.array([["0/a.jpg"], ["2/b.jpg"], ["0/c.jpg"], ["2/b.jpg"]], dtype=object)
    boxes = np.array([[10, 50, 20, 60], [0, 40, 5, 95], [1, 81, 2, 82], [30, 60, 20, 50]])
    content = {"nameList": names, "data": values, "mask_new": seen, "bbox": boxes}
    scipy_io.savemat(str(path), {**content, "ra": np.array([[3, 1, 4, 2]]), **changes})
    return values


def test_both_parts(name: str, tmp_path: Path) -> None:
    path = tmp_path / "AFLWinfo_release.mat"
    values = write(path)
    register_landmarks(name, "aflw", str(path), str(tmp_path), form="aflw_train")
    # The permutation's first two, counted from 1.
    third, first = DatasetCatalog.get(name)
    assert first["file_name"] == str(tmp_path / "0/a.jpg")
    assert third["annotations"][0]["id"] == 2 and third["file_name"].endswith("0/c.jpg")
    (face,) = first["annotations"]
    points = np.array(face["keypoints"]).reshape(19, 3)
    np.testing.assert_allclose(points[:, :2], values[0].reshape(2, 19).T + 0.5)
    assert (points[:, 2] > 0).all() and face["attributes"] == {"frontal": True}
    assert face["bbox"] == [10, 20, 50, 60]

    DatasetCatalog.remove(name)
    MetadataCatalog.pop(name)
    register_landmarks(name, "aflw", str(path), str(tmp_path), form="aflw_test")
    (both,) = DatasetCatalog.get(name)  # of one picture
    fourth, second = both["annotations"]
    assert (fourth["id"], second["id"]) == (3, 1) and second["attributes"] == {"frontal": False}
    sizes = instance_norm("box_size", [fourth, second], values[[3, 1]], {})
    np.testing.assert_allclose(sizes, [30, 60])  # 30 x 30 and 40 x 90
    assert LandmarkEvaluator(name, ["nme"])._metrics == ("nme",)


def test_wrong_files_are_explained(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "AFLWinfo_release.mat"

    def refuse(message: str, form: str | None = "aflw_train") -> None:
        with pytest.raises(DatasetError, match=message):
            register_landmarks(name, "aflw", str(path), str(tmp_path), form=form)

    path.write_text("x")
    refuse("no readable nameList")
    write(path)
    refuse("form 'aflw_train' or 'aflw_test'", None)
    write(path, data=np.zeros((4, 42)))
    refuse(r"points of shape \(4, 42\), not \(N, 38\)")
    write(path, data=np.full((4, 38), np.nan))
    refuse("face 2 .* not finite")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    refuse("needs SciPy: pip install scipy")
