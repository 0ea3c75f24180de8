"""From a file of faces with points and meshes to losses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from d2ext import model_zoo
from d2ext.config import ConfigError
from d2ext.data import build_test_loader, build_train_loader, register_faces
from d2ext.evaluation.faces import FaceEvaluator

OBJ = "v -1 0 0\nv 1 0 0\nv 0 2 0\nv 0 1 -1\nf 1 2 3\nf 1 3 4\n"


@pytest.fixture
def cfg(tmp_path: Path) -> Iterator[CfgNode]:
    (tmp_path / "head.obj").write_text(OBJ)
    for i in range(3):
        image = np.random.default_rng(i).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f"{i}.png"), image)
    points = [22, 15, 2, 38, 15, 2, 30, 25, 2, 24, 33, 1, 36, 33, 2]
    mesh = [15, 10, 0, 45, 10, 0, 30, 40, 0, 30, 25, -12]
    common = {"category_id": 1, "iscrowd": 0, "area": 900}
    annotations = [
        {"id": 1, "image_id": 0, "bbox": [15, 10, 30, 30], "keypoints": points, "mesh": mesh},
        {"id": 2, "image_id": 0, "bbox": [50, 30, 25, 28]},
        {"id": 3, "image_id": 1, "bbox": [-9, 10, 30, 30]},
    ]
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 60, "width": 80} for i in range(3)],
        "annotations": [a | common for a in annotations],
        "categories": [
            {
                "id": 1,
                "name": "face",
                "keypoints": ["left_eye", "right_eye", "nose", "left_mouth", "right_mouth"],
                "mesh_file": "head.obj",
                "mesh_flip": [1, 0, 2, 3],
            }
        ],
    }
    (tmp_path / "faces.json").write_text(json.dumps(content))
    name = f"faces_{tmp_path.name}"
    register_faces(name, str(tmp_path / "faces.json"), str(tmp_path))
    cfg = model_zoo.get_config("retinaface/mobilenet025_wider.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.DATASETS.TRAIN = (name,)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 3
    cfg.INPUT.AUGMENTATION.SIZE = 96
    cfg.MODEL.RETINAFACE.MESH.NUM_VERTICES = 4
    cfg.MODEL.RETINAFACE.MESH.FILE = str(tmp_path / "head.obj")
    yield cfg
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_faces_with_points_and_meshes_train(cfg: CfgNode) -> None:
    with pytest.raises(ConfigError, match="PUBLISHED_CLIPPED_POINTS"):
        build_model(cfg)
    cfg.INPUT.AUGMENTATION.SQUARE_CROP.PUBLISHED_CLIPPED_POINTS = False
    torch.manual_seed(0)
    model = build_model(cfg)
    batches = iter(build_train_loader(cfg))
    seen = set()
    for _ in range(6):
        batch = next(batches)
        assert {x["image"].shape for x in batch} == {(3, 96, 96)}
        losses = model(batch)
        assert all(torch.isfinite(x) for x in losses.values())
        seen |= {name for name, x in losses.items() if x.item() > 0}
        for x in batch:
            valid = x["instances"].gt_mesh_valid
            mesh, points = x["instances"].gt_face_meshes[valid], x["instances"].gt_keypoints
            # Mirrored with the image: the left eye and the first vertex are on the left.
            assert (mesh[:, 0, 0] < mesh[:, 1, 0]).all()
            left, right = points.tensor[valid][:, 0], points.tensor[valid][:, 1]
            both = (left[:, 2] > 0) & (right[:, 2] > 0)
            assert (left[both, 0] < right[both, 0]).all()
    assert seen == {"loss_box", "loss_class", "loss_landmark", "loss_vertex", "loss_edge"}


def test_odd_faces_from_the_file_to_the_results(cfg: CfgNode, tmp_path: Path) -> None:
    """Without points, with absent ones, without area, at the border, outside, 1,000, none, a crowd."""
    cfg.INPUT.AUGMENTATION.SQUARE_CROP.PUBLISHED_CLIPPED_POINTS = False
    content = json.loads((tmp_path / "faces.json").read_text())
    whole = content["annotations"][0]
    odd: list[dict[str, Any]] = [
        {"keypoints": [0] * 15},
        *({"bbox": box} for box in ([9, 9, 0, 9], [9, 9, 9, 0], [9, 9, -4, 9])),
        *({"bbox": box} for box in ([-15, 10, 30, 30], [65, 45, 30, 30], [400, 400, 9, 9])),
        {"iscrowd": 1},
        *({"image_id": 1, "bbox": [i % 70, i // 25, 4 + i % 9, 6]} for i in range(1000)),
    ]
    common = {k: whole[k] for k in ("image_id", "bbox", "category_id", "iscrowd", "area")}
    odd = [{**common, "id": i, **face} for i, face in enumerate(odd, 10)]
    content["annotations"] = [whole, *odd]
    (tmp_path / "odd.json").write_text(json.dumps(content))
    name = f"odd_{tmp_path.name}"
    register_faces(name, str(tmp_path / "odd.json"), str(tmp_path))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    cfg.MODEL.RETINAFACE.LOSS.MIN_NEGATIVES = 10
    torch.manual_seed(0)
    model = build_model(cfg)
    batches = iter(build_train_loader(cfg))
    for batch in (next(batches), next(batches)):
        assert sorted(len(x["instances"]) for x in batch)[0] == 0
        losses = model(batch)
        assert all(torch.isfinite(x) for x in losses.values())
        sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    evaluator = FaceEvaluator(name, distributed=False)
    evaluator.reset()
    model.eval().max_detections = 9  # COCO's evaluation is slow
    for inputs in build_test_loader(cfg, name):
        evaluator.process(inputs, model(inputs))
    results = evaluator.evaluate()
    assert results is not None and set(results) == {"bbox", "faces", "points", "mesh"}
    assert 0 <= results["faces"]["AP50-all"] <= 100
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
