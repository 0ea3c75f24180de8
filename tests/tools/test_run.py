"""`--run`: the folder of a training is enough to predict and to evaluate, for every kind of own data."""

from __future__ import annotations

import json
import shlex
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

import d2ext
from d2ext.checkpoint.checkpointer import Checkpointer
from d2ext.data.custom import apply_dataset_to_config, register_own_dataset
from d2ext.data.saved_metadata import known_metadata
from d2ext.engine.run_folder import keep_files, load_run
from d2ext.systems.retinaface import tta
from d2ext.testing import tiny_config
from d2ext.tools import evaluate, predict
from d2ext.tools.face_files import mesh_triangles
from tests.data.coco_files import write_coco
from tests.data.densepose.persons import write_persons, write_surface
from tests.data.faces.test_register import MESH, POINTS, coco
from tests.data.panoptic_files import write_panoptic
from tests.engine import toy


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("D2EXT_CACHE", str(tmp_path / "cache"))
    name = f"run_{uuid.uuid4().hex}"
    yield name
    forget(name)


def forget(name: str) -> None:
    """As in a new process."""
    for split in ("train", "val"):
        if f"{name}_{split}" in DatasetCatalog.list():
            DatasetCatalog.remove(f"{name}_{split}")
        MetadataCatalog.pop(f"{name}_{split}", None)


def trained(name: str, cfg: CfgNode, folder: Path) -> Path:
    """What a training on the data set leaves; then the process ends, and the folder moves."""
    cfg.OUTPUT_DIR = str(folder / "run")
    apply_dataset_to_config(cfg, name)
    cfg.MODEL.WEIGHTS = ""
    torch.manual_seed(0)
    keep_files(cfg)
    (folder / "run").mkdir(exist_ok=True)
    Checkpointer(build_model(cfg), cfg.OUTPUT_DIR).save("model_final")
    (folder / "run/config.yaml").write_text(cfg.dump())
    forget(name)
    return (folder / "run").rename(folder / "moved")


def picture(folder: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    assert cv2.imwrite(str(folder / "a.png"), pixels)
    return str(folder / "a.png")


def predicted(
    run: Path, folder: Path, *options: str
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Results, and the categories beside them."""
    arguments = ["--run", str(run), "--input", picture(folder), "--output", str(folder / "out")]
    assert predict.run([*arguments, "--confidence-threshold", "0", *options]) == 0
    images = json.loads((folder / "out/coco_images.json").read_text())
    results = json.loads((folder / "out/coco_results.json").read_text())
    return results, {c["id"]: c["name"] for c in images["categories"]}


def instances(folder: Path) -> tuple[dict[str, str], CfgNode, dict[int, str]]:
    json_file, images, content = write_coco(folder / "set")
    cfg = tiny_config("YOLACT")
    return {"json": json_file, "images": images}, cfg, names(content)


def names(content: dict[str, Any]) -> dict[int, str]:
    return {c["id"]: c["name"] for c in content["categories"] if c.get("isthing", 1)}


def panoptic(folder: Path) -> tuple[dict[str, str], CfgNode, dict[int, str]]:
    content = write_panoptic(folder / "set")
    files = {"panoptic_json": "panoptic.json", "images": "images"}
    files = {key: str(folder / "set" / file) for key, file in files.items()}
    return files, tiny_config("UPSNet"), names(content)


@pytest.mark.parametrize("kind", [instances, panoptic])
def test_instances_and_panoptic(kind: Callable[..., Any], name: str, tmp_path: Path) -> None:
    files, cfg, categories = kind(tmp_path)
    given = {f"{split}_{key}": file for split in ("train", "val") for key, file in files.items()}
    register_own_dataset(name, **given)
    run = trained(name, cfg, tmp_path)
    results, known = predicted(run, tmp_path)
    assert known == categories
    assert results and {r["category_id"] for r in results} <= set(categories)
    if kind is panoptic:
        (metadata,) = known_metadata(load_run(run))
        assert (
            metadata.stuff_classes[0] == "things"
            and 12 in metadata.as_dict()["stuff_dataset_id_to_contiguous_id"]
        )
    # Of the data, an evaluation needs those that it is on.
    cfg = load_run(run)
    cfg.DATASETS.OWN.train_images = str(tmp_path / "gone")
    (run / "config.yaml").write_text(cfg.dump())
    assert evaluate.run(["--run", str(run), "DATALOADER.NUM_WORKERS", "0"]) == 0
    assert json.loads((run / "evaluation/results.json").read_text())
    # Both are as good as before; the model's own config is not written over.
    assert predicted(run, tmp_path) == (results, known)


def test_faces_with_meshes(name: str, tmp_path: Path) -> None:
    topology = {"mesh_file": "head.obj", "mesh_flip": [0, 1, 2]}  # not what the mean face says
    file = coco(tmp_path, [{"keypoints": POINTS, "mesh": MESH}], **topology)
    register_own_dataset(name, file, str(tmp_path), landmarks="faces")
    cfg = tiny_config("RetinaFace")
    cfg.MODEL.KEYPOINT_ON = True
    cfg.MODEL.RETINAFACE.MESH.NUM_VERTICES = 3
    run = trained(name, cfg, tmp_path)
    (tmp_path / "head.obj").unlink()
    results, known = predicted(run, tmp_path, "--save-meshes", str(tmp_path / "meshes"))
    assert known == {1: "face"} and results
    lines = next((tmp_path / "meshes").iterdir()).read_text().splitlines()
    assert [line[0] for line in lines if line[0] in "vf"] == ["v", "v", "v", "f"]
    cfg = load_run(run)
    (metadata,) = known_metadata(cfg)
    assert mesh_triangles(cfg, metadata).tolist() in ([[0, 1, 2]], [[2, 1, 0]])
    assert tta._vertex_partners(cfg, 3) == [0, 1, 2]
    assert tta._point_partners(cfg, 5) == [1, 0, 2, 4, 3]


def test_surfaces(name: str, tmp_path: Path) -> None:
    json_file, images = write_persons(tmp_path)
    surface = {f"densepose_{key}": path for key, path in write_surface(tmp_path).items()}
    register_own_dataset(name, json_file, images, **surface)
    run = trained(name, tiny_config("DensePose"), tmp_path)
    for key in ("densepose_mesh", "densepose_uv_symmetry"):
        Path(surface[key]).unlink()
    mirrored = ("--opts", "TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64,)")
    results, known = predicted(run, tmp_path, "--save-surfaces", str(tmp_path / "s"), *mirrored)
    assert known == {1: "person"} and results and "densepose" in results[0]
    (metadata,) = known_metadata(load_run(run))
    assert metadata.densepose_mesh == str(run / "files/mesh.npz")


@pytest.fixture
def toy_run(tmp_path: Path) -> Path:
    path = toy.write_data(tmp_path / "data")
    content = json.loads(path.read_text())
    content["categories"] = [{"id": 62, "name": "chair"}]
    for annotation in content["annotations"]:
        annotation["category_id"] = 62
    path.write_text(json.dumps(content))
    return path


def test_from_train_to_predict(
    toy_run: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    """The commands that a user gives, one after the other."""
    monkeypatch.chdir(tmp_path)  # relative files are found from elsewhere, too
    files = {"json": "data/toy.json", "images": "data"}
    data = [f"--{split}-{key}={files[key]}" for split in ("train", "val") for key in files]
    options = toy.options(tmp_path / "run", SOLVER__MAX_ITER=2, SOLVER__STEPS="()")
    start = options.index("DATASETS.TRAIN")
    del options[start : start + 4]  # --dataset sets DATASETS.TRAIN and TEST
    assert d2ext.tools.train.run(["--dataset", name, *data, *options]) == 0
    before = json.loads((tmp_path / "run/results.json").read_text())
    command = (
        (tmp_path / "run/log.txt").read_text().split("Predict: d2ext predict ")[1].split("\n")[0]
    )
    words = shlex.split(command.replace("IMAGES", "data/0.png"))
    assert predict.run(words) == 0 and Path("predictions/0.png").is_file()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    forget(name)
    assert evaluate.run(["--run", str(tmp_path / "run")]) == 0
    after = json.loads((tmp_path / "run/evaluation/results.json").read_text())
    assert str(after) == str(before)  # NaN is not equal to itself
    forget(name)
    results, known = predicted(tmp_path / "run", tmp_path)
    assert known == {62: "chair"} and {r["category_id"] for r in results} == {62}
    assert d2ext.Predictor(str(tmp_path / "run")).metadata.thing_classes == ["chair"]
    # Data of other classes are not what it has learned.
    assert evaluate.run(["--run", str(tmp_path / "run"), "--dataset", "shapes"]) == 2
    assert "learned the thing_classes chair, but data set 'shapes'" in capsys.readouterr().err


def test_which_weights(toy_run: Path, name: str, tmp_path: Path) -> None:
    register_own_dataset(name, str(toy_run), str(toy_run.parent))
    run = trained(name, tiny_config("CenterNet"), tmp_path)
    shutil.copy(run / "model_final.pth", run / "model_best.pth")
    assert str(run / "model_final.pth") == load_run(run).MODEL.WEIGHTS
    cfg = load_run(run)
    cfg.TEST.BEST_METRIC = "bbox/AP"
    cfg.MODEL.DEVICE = "cuda"
    (run / "config.yaml").write_text(cfg.dump())
    assert str(run / "model_best.pth") == load_run(run).MODEL.WEIGHTS
    assert torch.cuda.is_available() or load_run(run).MODEL.DEVICE == "cpu"


def test_no_folder_of_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--run", str(tmp_path)]
    assert evaluate.run(arguments) == 2
    assert "it has no config.yaml" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(tiny_config("YOLACT").dump())
    output = ["--input", picture(tmp_path), "--output", str(tmp_path / "out")]
    assert predict.run([*arguments, *output]) == 2
    assert "has left no checkpoint" in capsys.readouterr().err
    assert evaluate.run([*arguments, "--resume"]) == 2
    assert "leave out the others" in capsys.readouterr().err
