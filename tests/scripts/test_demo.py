"""scripts/gallery.py and scripts/run_demo.py: the pictures, and the second run."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from torchvision.ops import box_iou

from d2ext.data.shapes import FaceSet

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def gallery() -> ModuleType:
    specification = importlib.util.spec_from_file_location("gallery", ROOT / "scripts/gallery.py")
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def entry(tmp_path: Path) -> dict:
    file = tmp_path / "grey.png"
    cv2.imwrite(str(file), np.full((60, 80, 3), 128, np.uint8))
    square = [10.0, 10.0, 30.0, 10.0, 30.0, 30.0, 10.0, 30.0]
    annotation = {"bbox": [10, 10, 20, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    annotations = [{**annotation, "segmentation": [square], "iscrowd": 0}]
    size = {"height": 60, "width": 80}
    return {"file_name": str(file), "image_id": 1, "annotations": annotations, **size}


def detections(score: float) -> Instances:
    masks = torch.zeros(1, 60, 80, dtype=torch.bool)
    masks[0, 30:50, 40:70] = True
    boxes = Boxes(torch.tensor([[40.0, 30.0, 70.0, 50.0]]))
    scores, classes = torch.tensor([score]), torch.tensor([0])
    return Instances(
        (60, 80), pred_boxes=boxes, scores=scores, pred_classes=classes, pred_masks=masks
    )


@pytest.mark.parametrize(("score", "drawn"), [(0.9, True), (0.1, False)])
def test_pair_has_truth_left_and_confident_predictions_right(
    gallery: ModuleType, entry: dict, score: float, drawn: bool
) -> None:
    metadata = MetadataCatalog.get("gallery_test")
    metadata.set(thing_classes=["square"], thing_colors=[(255, 0, 0)])
    pair = gallery.draw_pair(entry, detections(score), metadata, score_threshold=0.3)
    panel_width = (pair.shape[1] - gallery.GAP) // 2
    scale = panel_width / 80
    assert panel_width == gallery.PANEL_SIDE

    def colourful(side: int, x: float, y: float) -> bool:
        left = side * (panel_width + gallery.GAP)
        pixel = pair[gallery.CAPTION_HEIGHT + int(y * scale), left + int(x * scale)].astype(int)
        return bool(pixel.max() - pixel.min() > 20)

    assert colourful(0, 20, 25)
    assert not colourful(0, 55, 45)
    assert colourful(1, 55, 45) == drawn
    assert not colourful(1, 20, 25)


def test_duplicates_are_left_out_whatever_their_class(gallery: ModuleType) -> None:
    one = detections(0.6)
    other = detections(0.7)
    other.pred_classes += 1
    away = detections(0.4)
    away.pred_boxes.tensor -= 25
    kept = gallery.without_duplicates(Instances.cat([one, other, away]), 0.3)
    assert kept.scores.tolist() == pytest.approx([0.7, 0.4])
    assert kept.pred_classes.tolist() == [1, 0]


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (6, 2), (12, 3)])
def test_montage_keeps_every_picture_once(gallery: ModuleType, count: int, columns: int) -> None:
    pictures = [np.full((100, 200, 3), 10 + i, np.uint8) for i in range(count)]
    joined = gallery.montage(pictures, total_width=620)
    assert joined.shape[1] == 620
    width = (620 - (columns + 1) * gallery.GAP) // columns
    for value in range(10, 10 + count):
        assert (joined == value).all(axis=2).sum() == width * round(width / 2)


def test_images_are_spread_over_the_data_set_and_annotated(gallery: ModuleType) -> None:
    dataset = [{"image_id": i, "annotations": [1] if i % 2 else []} for i in range(100)]
    chosen = [entry["image_id"] for entry in gallery.evenly_spread(dataset, 5)]
    assert chosen == [1, 21, 41, 61, 81]
    assert len(gallery.evenly_spread(dataset[:6], 5)) == 3


@pytest.mark.parametrize(("mask_ap", "status"), [(41.5, 0), (12.0, 1)])
def test_second_run_reports_and_says_what_to_delete(
    tmp_path: Path,
    mask_ap: float,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    metrics = dict.fromkeys(("AP50", "AP75", "APs", "APm", "APl"), 1.0)
    summary = {
        "dataset": "shapes_val",
        "images": 200,
        "results": {"bbox": {"AP": 44.0, **metrics}, "segm": {"AP": mask_ap, **metrics}},
        "seconds": 301.0,
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import run_demo

    monkeypatch.setattr(sys, "argv", ["run_demo.py", "--output", str(tmp_path)])
    assert run_demo.main() == status
    out, err = capsys.readouterr()
    assert f"| mask | {mask_ap} |" in out
    assert f"rm -r {tmp_path}" in out
    assert ("should be at least 35" in err) == bool(status)
    assert os.listdir(tmp_path) == ["summary.json"]


def test_faces_of_the_second_task_are_found_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the file of weights that the repository holds, through `d2ext predict`."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import run_demo

    shapes, count = FaceSet("val", 200), 3
    montage = cv2.imread(str(run_demo.draw_faces(tmp_path, count)))
    assert montage is not None and montage.std() > 20
    found = json.loads((tmp_path / "coco_results.json").read_text())
    frames = [shapes.frame(i) for i in range(count)]
    faces = [box for frame in frames for box in map(frame.box, frame.faces) if box[3] - box[1] > 24]
    boxes = torch.tensor([x["bbox"] for x in found])
    boxes[:, 2:] += boxes[:, :2]
    overlaps = box_iou(torch.tensor(np.array(faces), dtype=torch.float32), boxes)
    assert len(faces) > 2 and (overlaps.amax(dim=1) > 0.5).float().mean() > 0.9
    assert all(len(x["keypoints"]) == 15 for x in found)
