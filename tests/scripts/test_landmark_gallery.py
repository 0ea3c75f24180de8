"""scripts/landmark_gallery.py draws truth and prediction side by side."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from d2ext.testing import NUM_KEYPOINTS, tiny_config

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "landmark_gallery.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("landmark_gallery", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """``custom/``: a grey image with two instances of three points."""
    folder = tmp_path / "data" / "custom"
    (folder / "images").mkdir(parents=True)
    cv2.imwrite(str(folder / "images" / "a.png"), np.full((80, 120, 3), 128, np.uint8))
    points = [20.0, 20, 2, 40, 20, 2, 30, 45, 2]
    annotations = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": 900, "keypoints": points}
        for i, box in enumerate(([10, 10, 40, 40], [15, 12, 30, 38]))
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 80, "width": 120}],
        "annotations": annotations,
        "categories": [
            {
                "id": 1,
                "name": "thing",
                "keypoints": [f"p{i}" for i in range(NUM_KEYPOINTS)],
                "skeleton": [[1, 2], [2, 3]],
            }
        ],
    }
    (folder / "custom_keypoints.json").write_text(json.dumps(content))
    yield folder.parent
    if "gallery_custom" in DatasetCatalog.list():
        DatasetCatalog.remove("gallery_custom")
    MetadataCatalog.pop("gallery_custom", None)


def test_gallery(script, data, tmp_path, capsys):
    cfg = tiny_config("LandmarkNet")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model_final.pth")
    output = tmp_path / "out" / "picture.png"
    arguments = [str(output), "--data", str(data), "--model", "custom", str(folder)]
    assert script.main([*arguments, "--width", "900", "--device", "cpu"]) == 0
    picture = cv2.imread(str(output))
    assert picture.shape[1] == 900
    assert "custom: 2 instances, PCK@0.1" in capsys.readouterr().out
    # Landmarks are coloured on a grey image.
    assert (np.ptp(picture.astype(int), axis=2) > 60).sum() > 50
    # The photo is of grey level 128; without it the background is lighter, and the landmarks stay.
    assert (picture == 128).all(axis=2).mean() > 0.2
    assert script.main([*arguments, "--points-only", "--device", "cpu"]) == 0
    picture = cv2.imread(str(output))
    assert (picture == 128).all(axis=2).mean() < 0.01
    assert (np.ptp(picture.astype(int), axis=2) > 60).sum() > 50
    assert script.main([str(output), "--data", str(tmp_path), "--model", "coco", str(folder)]) == 2


def test_landmarks_are_drawn_where_they_are(script):
    from d2ext.data.landmarks.transforms import crop_transform

    name = "landmark_gallery_test"
    MetadataCatalog.get(name).set(keypoint_names=["a"], keypoint_connection_rules=[])
    image = np.full((100, 100, 3), 128, np.uint8)
    transform = crop_transform(np.array([0.0, 0, 100, 100]), (script.SIDE, script.SIDE))
    points = np.array([[25.0, 75.0, 2.0]])
    picture = script.draw_landmarks(image, points, transform, MetadataCatalog.get(name))
    MetadataCatalog.pop(name)
    ys, xs = np.nonzero(np.ptp(picture.astype(int), axis=2) > 60)
    assert (
        abs(xs.mean() - 25 * script.SIDE / 100) < 2 and abs(ys.mean() - 75 * script.SIDE / 100) < 2
    )
