"""The analysis of boxes, masks and keypoints says of known errors what they are, and draws them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from d2ext.config import get_cfg
from d2ext.data.custom import register_own_dataset
from d2ext.data.errors import DatasetError
from d2ext.evaluation import build_evaluator
from d2ext.tools import train
from tests.engine import toy

NAME = "analysed_val"
SIZE = 160
SIGMAS = (0.1, 0.1)
# Image -> XYXY and class of its objects: 10, 40 and 100 pixels wide, one of each of COCO's sizes.
OBJECTS = {
    7: [((5, 5, 15, 15), 0), ((30, 5, 70, 45), 1)],
    8: [((30, 30, 130, 130), 0)],
    9: [((5, 5, 15, 15), 1), ((30, 5, 70, 45), 0)],
}
# Detections beside those of all objects but the small one of image 9, with scores.
RIGHT = 0.95
WRONG = {
    7: [((31, 6, 71, 46), 1, 0.8)],  # a second time
    8: [((5, 5, 20, 20), 0, 0.7)],  # nothing there
    9: [((30, 5, 70, 45), 1, 0.05)],  # wrong class, below the best threshold
}


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[Path]:
    """Three images with masks and two keypoints an object; ids of categories and images have gaps."""
    annotations = []
    for image, objects in OBJECTS.items():
        pixels = np.full((SIZE, SIZE, 3), 60 + image, np.uint8)
        for (x0, y0, x1, y1), label in objects:
            pixels[y0:y1, x0:x1] = (200, 120 * label, 30)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": 3 + label,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                    "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                    "keypoints": [x0, y0, 2, x1, y1, 2],
                    "num_keypoints": 2,
                }
            )
        cv2.imwrite(str(tmp_path / f"{image}.png"), pixels)
    images = [{"id": i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE} for i in OBJECTS]
    points = {"keypoints": ["a", "b"], "skeleton": [], "flip_pairs": []}
    categories = [{"id": 3 + i, "name": x, **points} for i, x in enumerate(("disk", "bar"))]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "data.json").write_text(json.dumps(content))
    files = {"val_json": str(tmp_path / "data.json"), "val_images": str(tmp_path)}
    register_own_dataset("analysed", **files)
    yield tmp_path
    DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME)


def detections(image: int) -> list[tuple[tuple[int, ...], int, float]]:
    right = [(*x, RIGHT) for x in OBJECTS[image] if not (image == 9 and x[1] == 1)]
    return [*right, *WRONG[image]]


def output(found: list[tuple[tuple[int, ...], int, float]], *, more: bool = True) -> dict[str, Any]:
    instances = Instances((SIZE, SIZE))
    boxes = torch.tensor([x[0] for x in found], dtype=torch.float32).reshape(-1, 4)
    instances.pred_boxes = Boxes(boxes)
    instances.pred_classes = torch.tensor([x[1] for x in found], dtype=torch.int64)
    instances.scores = torch.tensor([x[2] for x in found], dtype=torch.float32)
    if more:
        masks = torch.zeros(len(found), SIZE, SIZE, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        instances.pred_masks = masks
        ones = torch.ones(len(found), 2, 1)
        instances.pred_keypoints = torch.cat([boxes.reshape(-1, 2, 2), ones], dim=2)
    return {"instances": instances}


def evaluate(folder: Path, found: Any = detections, **more: Any) -> dict[str, Any]:
    cfg = get_cfg()
    cfg.TEST.ANALYZE = True
    cfg.TEST.KEYPOINT_OKS_SIGMAS = SIGMAS
    evaluator = build_evaluator(cfg, NAME, str(folder))
    evaluator.reset()
    for record in DatasetCatalog.get(NAME):
        evaluator.process([record], [output(found(record["image_id"]), **more)])
    return evaluator.evaluate()


def test_known_errors_are_named(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hotcoco")
    monkeypatch.setattr("d2ext.evaluation.instance_analysis._plot", lambda *_: None)  # slow
    results = evaluate(dataset / "out")
    folder = dataset / "out/analysis"
    tasks = json.loads((folder / "instances.json").read_text())
    assert set(tasks) == {"bbox", "segm", "keypoints"}
    for task, found in tasks.items():
        assert found["metrics"]["AP"] == pytest.approx(results[task]["AP"], abs=1e-6)
        assert found["classes"]["bar"] == pytest.approx(results[task]["AP-bar"], abs=1e-6)
        errors = {k: next(iter(x.values())) for k, x in found["errors"].items()}
        assert errors == {"Cls": 1, "Loc": 0, "Both": 0, "Dupe": 1, "Bkg": 1, "Miss": 1}, task
        assert found["errors"]["Miss"]["AP50 lost"] > 5
        # 4 right of 5 objects; 7 detections, of which the last is left out: no gain below 0.95.
        assert found["threshold"]["score"] == pytest.approx(0.95)
        assert found["threshold"]["precision"] == 1 and found["threshold"]["recall"] == 0.8
        sizes = {x["size"]: (x["annotated"], x["found"]) for x in found["sizes"]}
        assert sizes == {"s": (2, 1), "m": (2, 2), "l": (1, 1)}
        assert sum(x["detections"] for x in found["scores"]) == 7
        assert found["scores"][-1]["right"] == 1 and found["scores"][0]["right"] == 0
        assert found["confusion"] == {
            "classes": ["disk", "bar", "none"],
            "matrix": [[3, 0, 0], [0, 1, 1], [0, 0, 0]],
        }
        worst = found["images"][0]
        assert (worst["image_id"], worst["right"], worst["missed"]) == (9, 1, 1)
        assert [x["image_id"] for x in found["images"] if "picture" in x] == [9]


def test_the_page_links_pictures_that_show_the_errors(dataset: Path) -> None:
    pytest.importorskip("hotcoco")

    def low(image: int) -> list[tuple[tuple[int, ...], int, float]]:
        """All with the same score, so that none is left out."""
        return [(box, label, 0.5) for box, label, _ in detections(image)]

    evaluate(dataset / "out", low)
    folder = dataset / "out/analysis"
    page = (folder / "index.html").read_text(encoding="utf-8")
    sources = re.findall(r'src="([^"]+)"', page)
    assert len(sources) == len(set(sources)) == 3 * (5 + 3)
    assert all((folder / x).is_file() for x in sources)
    tasks = json.loads((folder / "instances.json").read_text())
    for task in ("bbox", "segm", "keypoints"):
        assert tasks[task]["threshold"]["F1"] == pytest.approx(2 * 4 / (7 + 5))
        assert f"{task}/worst/00_9.png" in sources
        for name, side in (("00_9", 0), ("01_7", 1)):  # where right and wrong ones are apart
            picture = cv2.imread(str(folder / task / f"worst/{name}.png")).astype(int)
            half = picture.shape[1] // 2
            blue, green, red = np.moveaxis(picture[60:, side * half : (side + 1) * half], 2, 0)
            assert ((green > red + 40) & (green > blue + 40)).sum() > 30
            assert ((red > green + 40) & (red > blue + 40)).sum() > 30


def test_other_pictures_of_an_earlier_evaluation_are_removed(
    dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hotcoco")
    monkeypatch.setattr("d2ext.evaluation.instance_analysis._plot", lambda *_: None)
    evaluate(dataset / "out")
    perfect = lambda image: [(*x, RIGHT) for x in OBJECTS[image]]  # noqa: E731
    evaluate(dataset / "out", perfect, more=False)
    assert not list((dataset / "out/analysis/bbox/worst").iterdir())
    tasks = json.loads((dataset / "out/analysis/instances.json").read_text())
    assert set(tasks) == {"bbox"} and tasks["bbox"]["threshold"]["F1"] == 1


def test_nothing_is_detected(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("hotcoco")
    assert evaluate(dataset / "out", lambda image: [])["bbox"]["AP"] == 0
    assert not (dataset / "out/analysis/index.html").exists()


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    toy.register(toy.write_data(tmp_path / "data"))
    options = toy.options(tmp_path / "run", SOLVER__MAX_ITER=1, SOLVER__STEPS="()")
    command = ["--analyze", *options, "DATASETS.TEST", "('toy',)"]
    with monkeypatch.context() as patch:
        patch.setattr("d2ext.evaluation.instance_analysis.find_spec", lambda _: None)
        assert train.run(command) == 2
    assert "needs hotcoco" in capsys.readouterr().err and not (tmp_path / "run").exists()
    pytest.importorskip("hotcoco")
    monkeypatch.setattr("d2ext.evaluation.instance_analysis._plot", lambda *_: None)
    assert train.run(command) == 0
    page = (tmp_path / "run/inference/analysis/index.html").read_text(encoding="utf-8")
    assert "<h2>bbox</h2>" in page and "<h2>segm</h2>" not in page


def test_without_the_package_it_is_said(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d2ext.evaluation.instance_analysis.find_spec", lambda _: None)
    with pytest.raises(DatasetError, match=r"needs hotcoco: pip install hotcoco"):
        evaluate(dataset / "out")
