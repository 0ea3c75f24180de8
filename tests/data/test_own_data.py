"""Own data of every kind: files → loader → model → results, by the names that a user gives."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from PIL import Image

from d2ext.data import build_test_loader, build_train_loader
from d2ext.data.custom import (
    apply_dataset_to_config,
    check_config_against_data,
    register_own_dataset,
)
from d2ext.evaluation import build_evaluator
from d2ext.testing import tiny_config
from tests.data.coco_files import save, write_coco
from tests.data.panoptic_files import write_panoptic

FACE = {"keypoints": ["nose", "left_eye", "right_eye"], "skeleton": [[1, 2], [1, 3]]}


def instances(folder: Path) -> dict[str, Any]:
    json_file, images, _ = write_coco(folder / "set")
    return {"json": json_file, "images": images}


def keypoints(folder: Path) -> dict[str, Any]:
    category = {"id": 3, "name": "face", **FACE}
    json_file, images, content = write_coco(folder / "set", categories=[category])
    for annotation in content["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["keypoints"] = [x, y, 2, x + w / 2, y, 2, x, y + h / 2, 1]
        annotation["num_keypoints"] = 3
    save(folder / "set", content)
    return {"json": json_file, "images": images}


def panoptic(folder: Path) -> dict[str, Any]:
    write_panoptic(folder / "set")
    return {
        "panoptic_json": str(folder / "set/panoptic.json"),
        "images": str(folder / "set/images"),
    }


def semantic(folder: Path) -> dict[str, Any]:
    for name in ("images", "labels"):
        (folder / name).mkdir()
    for i in range(2):
        labels = np.random.RandomState(i).randint(0, 3, (64, 64)).astype(np.uint8)
        Image.fromarray(labels).save(folder / f"labels/{i}.png")
        Image.fromarray(np.stack([labels * 80] * 3, axis=2)).save(folder / f"images/{i}.png")
    return {"sem_seg": str(folder / "labels"), "images": str(folder / "images")}


def semantic_segmentor() -> CfgNode:
    cfg = tiny_config("UPSNet")
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["p2", "p3"]
    cfg.MODEL.SEM_SEG_HEAD.NAME = "SemSegFPNHead"
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = 8
    cfg.MODEL.SEM_SEG_HEAD.NORM = ""
    return cfg


def landmark_net() -> CfgNode:
    cfg = tiny_config("LandmarkNet")
    cfg.INPUT.MAPPER = "build_top_down_mapper"
    return cfg


ROUTES = {
    "instances": (instances, lambda: tiny_config("YOLACT"), {}, "coco_instances_results.json"),
    "keypoints": (keypoints, lambda: tiny_config("CenterNet"), {}, "coco_instances_results.json"),
    "landmarks": (keypoints, landmark_net, {"landmarks": "custom"}, "landmark_results.json"),
    "panoptic": (panoptic, lambda: tiny_config("UPSNet"), {}, "predictions.json"),
    "semantic": (
        semantic,
        semantic_segmentor,
        {"semantic_classes": ["soil", "crop", "weed"]},
        "sem_seg_predictions.json",
    ),
}


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("D2EXT_CACHE", str(tmp_path / "cache"))
    name = f"test_own_data_{uuid.uuid4().hex}"
    yield name
    for known in (f"{name}_train", f"{name}_val"):
        DatasetCatalog.remove(known)
        MetadataCatalog.pop(known)


@pytest.mark.parametrize("route", list(ROUTES))
def test_from_files_to_results(route: str, name: str, tmp_path: Path) -> None:
    write, make_config, options, result_file = ROUTES[route]
    files = write(tmp_path)
    given = {f"{split}_{key}": value for split in ("train", "val") for key, value in files.items()}
    register_own_dataset(name, **given, **options)
    cfg = make_config()
    apply_dataset_to_config(cfg, name)
    check_config_against_data(cfg)
    if route == "keypoints":
        assert cfg.MODEL.CENTERNET.POSE.FLIP_PAIRS == [[1, 2]]
    torch.manual_seed(0)
    model = build_model(cfg)
    losses = model(next(iter(build_train_loader(cfg))))
    assert losses and all(torch.isfinite(loss) for loss in losses.values())
    evaluator = build_evaluator(cfg, f"{name}_val", str(tmp_path / "out"))
    results = inference_on_dataset(model, build_test_loader(cfg, f"{name}_val"), evaluator)
    assert results
    content = json.loads((tmp_path / "out" / result_file).read_text())
    if route == "landmarks":
        assert content["instances"] == 9 and set(content["landmarks"]["PCK@0.1 (%)"]) == set(
            FACE["keypoints"]
        )
    elif route in ("instances", "keypoints"):  # ids of the file
        assert {x["image_id"] for x in content} <= {100, 101, 102}
        assert {x["category_id"] for x in content} <= {2, 3, 7, 9}
    elif route == "panoptic":
        assert [a["image_id"] for a in content["annotations"]] == [10, 11, 12]
    else:
        assert {x["category_id"] for x in content} <= {0, 1, 2}
