"""Registration of persons with points on their surface."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ext.data import DatasetError, register_densepose
from d2ext.data.custom import load_dataset_yaml, register_own_dataset
from d2ext.data.densepose.register import SurfaceFiles, register_builtin_densepose
from tests.data.densepose.persons import MESH, NUM_VERTICES, content, write_persons, write_surface


@pytest.fixture
def name() -> Iterator[str]:
    name = f"persons_{uuid.uuid4().hex}"
    yield name
    for each in (name, f"{name}_train", f"{name}_val"):
        if each in DatasetCatalog.list():
            DatasetCatalog.remove(each)
        MetadataCatalog.pop(each, None)


def test_own_files(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    json_file, images = write_persons(tmp_path)
    surface = write_surface(tmp_path)
    options = {f"densepose_{key}": path for key, path in surface.items()}
    with caplog.at_level(logging.INFO):
        register_own_dataset(name, json_file, images, json_file, images, **options)
    table = [line.split("|") for line in caplog.text.splitlines() if line.startswith("|")]
    rows = {row[1].strip(): row[2].strip() for row in table}
    assert rows["with points on a surface"] == "3" and rows["points each"] == "16"
    assert rows["parts without any"].startswith("22 (1, 2, 5")
    metadata = MetadataCatalog.get(f"{name}_val")
    assert metadata.evaluator_type == "densepose" and metadata.thing_classes == ["person"]
    assert metadata.densepose_mesh_name == MESH
    assert {k: metadata.get(f"densepose_{k}") for k in surface} == surface
    assert len(DatasetCatalog.get(f"{name}_train")) == 3

    described = tmp_path / "persons.yaml"
    files = {key: Path(path).name for key, path in surface.items()}
    part = {"json": "persons.json", "images": "images"}
    described.write_text(yaml.dump({"name": name, "densepose": files, "train": part}))
    arguments = load_dataset_yaml(str(described))
    assert arguments.items() >= {**options, "train_json": json_file}.items()
    described.write_text(yaml.dump({"name": name, "densepose": {"mush": "a"}, "train": part}))
    with pytest.raises(DatasetError, match="mush"):
        load_dataset_yaml(str(described))


def test_points_are_not_asked_of_other_data(tmp_path: Path, name: str) -> None:
    def without(annotations: list[dict[str, Any]]) -> None:
        for annotation in annotations:
            for key in [k for k in annotation if k.startswith(("dp_", "ref_"))]:
                del annotation[key]

    json_file, images = write_persons(tmp_path, without)
    with pytest.raises(DatasetError, match=r"No annotation .* has points"):
        register_densepose(name, json_file, images)
    mesh = write_surface(tmp_path)["mesh"]
    with pytest.raises(DatasetError, match=r"No annotation .* has points"):
        register_own_dataset(name, json_file, images, densepose_mesh=mesh)
    assert f"{name}_train" not in DatasetCatalog.list()
    with pytest.raises(DatasetError, match="--densepose"):
        register_own_dataset(name, json_file, images, landmarks="faces", densepose_mesh=mesh)
    register_own_dataset(name, json_file, images)
    assert MetadataCatalog.get(f"{name}_train").evaluator_type == "coco"


@pytest.mark.parametrize("key", ["mesh", "geodesics", "uv_symmetry"])
def test_missing_files_are_named(tmp_path: Path, name: str, key: str) -> None:
    json_file, images = write_persons(tmp_path)
    files = SurfaceFiles(**{**write_surface(tmp_path), key: str(tmp_path / "gone.npz")})
    what = {"mesh": "the mesh", "geodesics": "the distances", "uv_symmetry": "mirrored images"}[key]
    with pytest.raises(DatasetError, match=rf"no file '.*gone\.npz', .*{what}.*CC BY-NC 4\.0"):
        register_densepose(name, json_file, images, files)
    assert name not in DatasetCatalog.list()


def test_meshes_that_do_not_fit(tmp_path: Path, name: str) -> None:
    json_file, images = write_persons(tmp_path)
    surface = write_surface(tmp_path)
    np.save(tmp_path / "other.npy", np.ones(NUM_VERTICES * (NUM_VERTICES + 1) // 2))
    other = {**surface, "geodesics": str(tmp_path / "other.npy")}
    with pytest.raises(DatasetError, match=r"different meshes.*12.*13"):
        register_densepose(name, json_file, images, SurfaceFiles(**other))
    np.savez(tmp_path / "small.npz", vertices=np.zeros((11, 3)))
    with pytest.raises(DatasetError, match=r"vertex 11 of blob.*small\.npz' has 11 vertices"):
        register_densepose(name, json_file, images, SurfaceFiles(str(tmp_path / "small.npz")))
    np.savez(tmp_path / "none.npz", faces=np.zeros((11, 3)))
    with pytest.raises(DatasetError, match="no `vertices`"):
        register_densepose(name, json_file, images, SurfaceFiles(str(tmp_path / "none.npz")))
    json_file, images = write_persons(tmp_path, lambda a: a[0].update(ref_model="ant"))
    with pytest.raises(DatasetError, match="2 meshes"):
        register_densepose(name, json_file, images, SurfaceFiles(**surface))
    register_densepose(name, json_file, images)
    assert MetadataCatalog.get(name).get("densepose_mesh_name") is None
    with pytest.raises(DatasetError, match="already"):
        register_densepose(name, json_file, images)


def test_official_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = content()
    data["categories"].insert(0, {"id": 7, "name": "dog"})
    data["annotations"][2]["category_id"] = 7
    write_persons(tmp_path)
    for folder, file in (
        ("coco/annotations", "densepose_minival2014.json"),
        ("coco_cse", "densepose_valminusminival2014_cse.json"),
    ):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / file).write_text(json.dumps(data))
    (tmp_path / "images").rename(tmp_path / "coco/val2014")
    names = [n for n in DatasetCatalog.list() if n.startswith("densepose_coco_2014_")]
    assert len(names) == 6
    kept = {n: (DatasetCatalog.pop(n), MetadataCatalog.pop(n)) for n in names}
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    try:
        register_builtin_densepose()
        for name in (
            "densepose_coco_2014_minival",
            "densepose_coco_2014_valminusminival_cse",
        ):
            records = DatasetCatalog.get(name)
            assert [len(r["annotations"]) for r in records] == [2, 0, 0]
            assert all(Path(r["file_name"]).is_file() for r in records)
            assert records[0]["annotations"][0]["category_id"] == 0
            assert MetadataCatalog.get(name).thing_classes == ["person"]
        with pytest.raises(DatasetError, match="densepose_train2014"):
            DatasetCatalog.get("densepose_coco_2014_train")
    finally:
        for n, (load, metadata) in kept.items():
            DatasetCatalog.pop(n, None)
            MetadataCatalog.pop(n, None)
            DatasetCatalog.register(n, load)
            MetadataCatalog[n] = metadata
