"""COCO evaluation: what Detectron2's evaluator gives, and where ours differs."""

from __future__ import annotations

import errno
import json
import logging
import math
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator as Detectron2COCOEvaluator
from detectron2.structures import Boxes, Instances

from d2ext.evaluation import COCOEvaluator

SIZE = 60
NAMES = ["square", "bar"]
CATEGORY_IDS = [3, 7]


def annotated() -> list[tuple[int, list[float], int]]:
    """(image id, XYXY, class) of two objects in each of three images."""
    boxes = []
    for image in (1, 2, 3):
        boxes.append((image, [4.0 * image, 5.0, 4.0 * image + 20, 25.0], 0))
        boxes.append((image, [30.0, 35.0, 55.0, 40.0 + image], 1))
    return boxes


@pytest.fixture(params=["json", "dicts"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Two classes, three images; registered with or without a JSON file."""
    name = f"evaluation_{request.param}"
    images = [{"id": i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE} for i in (1, 2, 3)]
    annotations = []
    for k, (image, (x0, y0, x1, y1), label) in enumerate(annotated()):
        polygon = [[x0, y0, x1, y0, x1, y1, x0, y1]]
        annotations.append(
            {
                "id": k + 1,
                "image_id": image,
                "category_id": CATEGORY_IDS[label],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "iscrowd": 0,
                "segmentation": polygon,
                "label": label,
            }
        )
    metadata = MetadataCatalog.get(name)
    metadata.thing_classes = NAMES
    metadata.thing_dataset_id_to_contiguous_id = {c: i for i, c in enumerate(CATEGORY_IDS)}
    if request.param == "json":
        path = tmp_path / "annotations.json"
        categories = [{"id": c, "name": n} for c, n in zip(CATEGORY_IDS, NAMES, strict=True)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        path.write_text(json.dumps(content))
        metadata.json_file = str(path)
    else:
        del metadata.thing_dataset_id_to_contiguous_id
        records = []
        for image in images:
            mine = [a for a in annotations if a["image_id"] == image["id"]]
            records.append(
                {
                    **image,
                    "image_id": image["id"],
                    "annotations": [{**a, "category_id": a["label"], "bbox_mode": 1} for a in mine],
                }
            )
        DatasetCatalog.register(name, lambda: records)
    yield name
    MetadataCatalog.remove(name)
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)


def box_mask(box: list[float]) -> torch.Tensor:
    mask = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    x0, y0, x1, y1 = (round(v) for v in box)
    mask[y0:y1, x0:x1] = True
    return mask


def instances(
    boxes: list[list[float]],
    classes: list[int],
    scores: list[float],
    masks: list[torch.Tensor] | None = None,
    mask_scores: list[float] | None = None,
) -> Instances:
    result = Instances((SIZE, SIZE))
    result.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    result.pred_classes = torch.tensor(classes, dtype=torch.int64)
    result.scores = torch.tensor(scores)
    if masks is not None:
        result.pred_masks = torch.stack(masks) if masks else torch.zeros(0, SIZE, SIZE) > 0
    if mask_scores is not None:
        result.mask_scores = torch.tensor(mask_scores)
    return result


def run(evaluator: Detectron2COCOEvaluator, per_image: dict[int, Instances]) -> dict:
    evaluator.reset()
    for image, detections in per_image.items():
        evaluator.process([{"image_id": image}], [{"instances": detections}])
    return evaluator.evaluate()


def noisy_predictions(with_masks: bool = True) -> dict[int, Instances]:
    random = np.random.default_rng(0)
    result = {}
    for image in (1, 2, 3):
        boxes, classes = [], []
        for _, box, label in (t for t in annotated() if t[0] == image):
            for _ in range(4):
                moved = np.array(box) + random.normal(0, 2.0, 4)
                moved[2:] = np.maximum(moved[2:], moved[:2] + 2)
                boxes.append([float(v) for v in moved.clip(0, SIZE)])
                classes.append(label)
        scores = [float(v) for v in random.random(len(boxes))]
        masks = [box_mask(b) for b in boxes] if with_masks else None
        result[image] = instances(boxes, classes, scores, masks)
    return result


def test_agrees_with_detectron2(dataset: str, tmp_path: Path) -> None:
    ours = run(COCOEvaluator(dataset, output_dir=str(tmp_path / "a")), noisy_predictions())
    theirs = run(
        Detectron2COCOEvaluator(
            dataset, output_dir=str(tmp_path / "b"), use_fast_impl=False, allow_cached_coco=False
        ),
        noisy_predictions(),
    )
    assert ours.keys() == theirs.keys() == {"bbox", "segm"}
    for task, metrics in theirs.items():
        assert ours[task] == pytest.approx(metrics, nan_ok=True)
    assert 5 < ours["bbox"]["AP"] < 90 and ours["bbox"].keys() >= {"AP-square", "AP-bar"}
    a = json.loads((tmp_path / "a/coco_instances_results.json").read_text())
    b = json.loads((tmp_path / "b/coco_instances_results.json").read_text())
    assert a == b and len(a) == 24


def test_published_rounding(dataset: str, tmp_path: Path) -> None:
    detections = instances([[1.234, 2, 11.5, 9.999]], [0], [0.1249])
    values = {}
    for rounded in (True, False):
        run(
            COCOEvaluator(dataset, output_dir=str(tmp_path), published_rounding=rounded),
            {1: detections},
        )
        (result,) = json.loads((tmp_path / "coco_instances_results.json").read_text())
        values[rounded] = [result["score"], *result["bbox"]]
    assert values[True] == [0.12, 1.23, 2.0, 10.27, 8.0]
    assert values[False] == pytest.approx([0.1249, 1.234, 2, 10.266, 7.999], rel=1e-6)


def test_false_discovery_by_hand(dataset: str, tmp_path: Path) -> None:
    """A detection that overlaps by 0.32 is right at six of ten overlaps, and hides no false one."""
    (image, box, label), *_ = annotated()
    x0, y0, x1, y1 = box
    right = [x0, y0, x0 + 0.32 * (x1 - x0), y1]
    evaluator = COCOEvaluator(dataset, output_dir=str(tmp_path), false_discovery=True)
    only = {"img_ids": [image]}
    evaluator._coco_api.dataset["annotations"] = evaluator._coco_api.dataset["annotations"][:1]
    evaluator._coco_api.createIndex()
    evaluator.reset()
    evaluator.process([{"image_id": image}], [{"instances": instances([right], [label], [0.9])}])
    results = evaluator.evaluate(**only)["bbox"]
    assert results["AP50"] == 0
    assert results["FD"] == pytest.approx(40)
    assert [results[f"FD{i}"] for i in (5, 25, 50)] == pytest.approx([0, 0, 100])
    sizes = [results[f"FD{area}"] for area in "sml"]
    assert sum(math.isnan(size) for size in sizes) == 2 and pytest.approx(40) in sizes
    without = COCOEvaluator(dataset, output_dir=str(tmp_path))
    assert not any(name.startswith("FD") for name in run(without, {})["bbox"])
    # With a false one before it, half of what is found is wrong.
    false = [0.0, 0.0, 1.0, 1.0]
    evaluator.reset()
    both = instances([right, false], [label, label], [0.8, 0.9])
    evaluator.process([{"image_id": image}], [{"instances": both}])
    assert evaluator.evaluate(**only)["bbox"]["FD25"] == pytest.approx(50)


def test_ap_at_further_overlaps_and_without_small_targets(dataset: str, tmp_path: Path) -> None:
    """Targets of class 1 are 25 x 6, 7 and 8."""
    folder = str(tmp_path)
    options = {"output_dir": folder, "ap_at": (0.7, 0.75)}
    predictions = {}
    for image in (1, 2, 3):
        (box, label), (low, other) = ((b, c) for i, b, c in annotated() if i == image)
        narrow = [low[0], low[1], low[0] + 0.72 * (low[2] - low[0]), low[3]]
        predictions[image] = instances([box, narrow], [label, other], [0.9, 0.8])
    results = run(COCOEvaluator(dataset, **options), predictions)["bbox"]
    assert results["AP70"] == pytest.approx(100)
    assert results["AP75"] == pytest.approx(50)
    assert "AP70" not in run(COCOEvaluator(dataset, output_dir=folder), predictions)["bbox"]
    # The first is left out.
    evaluator = COCOEvaluator(dataset, **options, min_target_side=7 / SIZE)
    assert len(evaluator._coco_api.anns) == 5
    del predictions[2], predictions[3]
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"instances": predictions[1]}])
    kept = evaluator.evaluate(img_ids=[1])["bbox"]
    assert kept["AP70"] == pytest.approx(100) and math.isnan(kept["AP-bar"])


def test_per_category_table_is_logged(
    dataset: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    with caplog.at_level("INFO"):
        run(COCOEvaluator(dataset, output_dir=str(tmp_path)), noisy_predictions())
    assert "Per-category segm AP" in caplog.text and "| bar" in caplog.text


def test_class_outside_the_data_set(dataset: str, tmp_path: Path) -> None:
    if not dataset.endswith("json"):
        pytest.skip("without category ids there is no range to check")
    with pytest.raises(ValueError, match=r"class 5.*only the 2 classes 0 to 1.*NUM_CLASSES"):
        run(
            COCOEvaluator(dataset, output_dir=str(tmp_path)),
            {1: instances([[0, 0, 9.0, 9]], [5], [0.5])},
        )


def test_conversion_leaves_no_trace_and_is_renewed(dataset: str, tmp_path: Path) -> None:
    if not dataset.endswith("dicts"):
        pytest.skip("has a JSON file")
    first = run(COCOEvaluator(dataset, output_dir=str(tmp_path)), noisy_predictions())
    assert MetadataCatalog.get(dataset).get("json_file") is None
    records = DatasetCatalog.get(dataset)
    for record in records:
        del record["annotations"][1]  # the data set changes: no bars
    second = run(COCOEvaluator(dataset, output_dir=str(tmp_path)), noisy_predictions())
    assert first["bbox"]["AP-bar"] >= 0 and math.isnan(second["bbox"]["AP-bar"])


def test_mask_scores_rank_masks_and_scores_rank_boxes(dataset: str, tmp_path: Path) -> None:
    """A good and a bad detection of each object, ranked in opposite order by the two scores."""
    per_image = {}
    for image in (1, 2, 3):
        mine = [(box, label) for i, box, label in annotated() if i == image]
        boxes = [box for box, _ in mine] + [[0.0, 50.0, 3.0, 53.0]] * 2
        masks = [box_mask(box) for box in boxes]
        per_image[image] = instances(
            boxes, [0, 1, 0, 1], [0.2, 0.2, 0.9, 0.9], masks, mask_scores=[0.8, 0.8, 0.1, 0.1]
        )
    results = run(COCOEvaluator(dataset, output_dir=str(tmp_path)), per_image)
    assert results["segm"]["AP"] == pytest.approx(100)
    # Each true box comes after as many false ones as there are: precision rises to 1/2 at the end.
    assert results["bbox"]["AP"] == pytest.approx(50)
    boxes = json.loads((tmp_path / "coco_instances_results.json").read_text())
    masks = json.loads((tmp_path / "coco_instances_results_segm.json").read_text())
    assert [r["score"] for r in boxes[:4]] == pytest.approx([0.2, 0.2, 0.9, 0.9])
    assert [r["score"] for r in masks[:4]] == pytest.approx([0.8, 0.8, 0.1, 0.1])
    assert "mask_score" not in boxes[0]
    assert [r["category_id"] for r in masks[:2]] == [r["category_id"] for r in boxes[:2]]
    if dataset.endswith("json"):
        assert [r["category_id"] for r in boxes[:2]] == CATEGORY_IDS


def test_boxes_without_area_are_left_out(dataset: str, tmp_path: Path) -> None:
    box = annotated()[0][1]
    nan = float("nan")
    boxes = [box, [5.0, 5.0, 5.0, 20.0], [5.0, 9.0, 8.0, 9.0], [nan, 0.0, 3.0, 3.0]]
    boxes.append([9.0, 9.0, 5.0, 5.0])  # both sides negative
    detections = instances(boxes, [0] * 5, [0.5, 0.9, 0.9, 0.9, 0.9], [box_mask(box)] * 5)
    results = run(COCOEvaluator(dataset, output_dir=str(tmp_path)), {1: detections})
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert [r["bbox"] for r in written] == [[box[0], box[1], 20.0, 20.0]]
    # One of three squares detected, nothing false: recall 1/3 at precision 1.
    assert results["bbox"]["AP50"] == pytest.approx(100 * 34 / 101 / 2, abs=0.01)


def test_keypoints_in_a_row_count(dataset: str, tmp_path: Path) -> None:
    boxes = [
        [5.0, 9.0, 8.0, 9.0],
        [5.0, 9.0, 5.0, 12.0],
        [5.0, 9.0, 5.0, 9.0],
        [8.0, 9.0, 5.0, 9.0],
    ]
    detections = Instances((SIZE, SIZE))
    detections.pred_boxes = Boxes(torch.tensor(boxes))
    detections.scores, detections.pred_classes = torch.ones(4), torch.zeros(4, dtype=torch.int64)
    detections.pred_keypoints = torch.ones(4, 2, 3)
    evaluator = COCOEvaluator(dataset, ("bbox",), output_dir=str(tmp_path))
    run(evaluator, {1: detections})
    written = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert [r["bbox"] for r in written] == [[5.0, 9.0, 3.0, 0.0], [5.0, 9.0, 0.0, 3.0]]


@pytest.mark.parametrize("images", [(), (1,), (1, 2, 3)])
def test_no_detections_give_zero(dataset: str, tmp_path: Path, images: tuple[int, ...]) -> None:
    empty = instances([], [], [], [])
    results = run(COCOEvaluator(dataset, output_dir=str(tmp_path)), dict.fromkeys(images, empty))
    assert set(results) == ({"bbox", "segm"} if images else {"bbox"})
    for metrics in results.values():
        assert metrics["AP"] == metrics["AP50"] == metrics["AP-square"] == 0
        assert math.isnan(metrics["APl"])  # there is no large object to find
    assert json.loads((tmp_path / "coco_instances_results.json").read_text()) == []


def test_ten_thousand_detections_in_an_image(dataset: str, tmp_path: Path) -> None:
    """The true boxes rank first; all others are false and beyond COCO's limit of 100 per class."""
    random = np.random.default_rng(0)
    corners = random.random((10_000, 2)) * 40
    boxes = np.concatenate([corners, corners + 3], axis=1).astype(np.float32)
    classes = random.integers(0, 2, 10_000)
    scores = random.random(10_000) * 0.5
    mine = [t for t in annotated() if t[0] == 1]
    for k, (_, box, label) in enumerate(mine):
        boxes[100 * k], classes[100 * k], scores[100 * k] = box, label, 0.9
    detections = instances(boxes.tolist(), classes.tolist(), scores.tolist())
    per_image = {1: detections}
    for image in (2, 3):
        mine = [t for t in annotated() if t[0] == image]
        per_image[image] = instances([t[1] for t in mine], [t[2] for t in mine], [0.8, 0.8])
    results = run(COCOEvaluator(dataset, output_dir=str(tmp_path)), per_image)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert len(json.loads((tmp_path / "coco_instances_results.json").read_text())) == 10_004


def test_full_disk_costs_the_file_not_the_scores(
    dataset: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    evaluator = COCOEvaluator(dataset, output_dir=str(tmp_path))
    expected = run(evaluator, noisy_predictions())
    (tmp_path / "coco_instances_results.json").unlink()

    def full(path: str, mode: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("d2ext.evaluation.coco.atomic_write", full)
    results = run(evaluator, noisy_predictions())
    for task, metrics in expected.items():
        assert results[task] == pytest.approx(metrics, nan_ok=True)
    assert "Could not write" in caplog.text and "No space left" in caplog.text


def test_masks_are_written_as_rle(dataset: str, tmp_path: Path) -> None:
    box = annotated()[0][1]
    run(
        COCOEvaluator(dataset, output_dir=str(tmp_path)),
        {1: instances([box], [0], [0.5], [box_mask(box)])},
    )
    (written,) = json.loads((tmp_path / "coco_instances_results.json").read_text())
    np.testing.assert_array_equal(mask_util.decode(written["segmentation"]) > 0, box_mask(box))
    assert [p.name for p in tmp_path.glob("*.tmp-*")] == []
