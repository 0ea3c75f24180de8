"""Instances whose keypoints are those of a better one are left out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from d2ext.config import get_cfg
from d2ext.evaluation import COCOEvaluator, build_evaluator
from d2ext.evaluation.oks_nms import keypoint_similarity, oks_nms

SIGMAS = torch.tensor([0.05, 0.1])


def test_similarity_by_hand() -> None:
    points = torch.tensor([[[10.0, 10.0], [50.0, 20.0]], [[13.0, 14.0], [50.0, 30.0]]])
    similarity = keypoint_similarity(points, torch.tensor([1000.0, 3000.0]), SIGMAS)
    # squared distances 25 and 100, k = 0.1 and 0.2, mean area 2000
    expected = (math.exp(-25 / (2 * 2000 * 0.01)) + math.exp(-100 / (2 * 2000 * 0.04))) / 2
    assert similarity[0, 1].item() == similarity[1, 0].item() == pytest.approx(expected)
    assert similarity[0, 0].item() == similarity[1, 1].item() == 1
    dots = keypoint_similarity(points, torch.zeros(2), SIGMAS)  # no area, no similarity
    assert dots.tolist() == [[1, 0], [0, 1]]


def row(*shifts: float) -> torch.Tensor:
    """Instances of two keypoints, moved to the right."""
    points = torch.tensor([[10.0, 10.0], [50.0, 20.0]])
    return torch.stack([points + torch.tensor([shift, 0.0]) for shift in shifts])


def similarity(shift: float, area: float) -> float:
    return sum(math.exp(-(shift**2) / (2 * area * 4 * s * s)) for s in SIGMAS.tolist()) / 2


def test_greedy_by_score() -> None:
    # In steps of 4 pixels: neighbours are too near, those next to them are not.
    near, far = similarity(4, 5000), similarity(8, 5000)
    points, areas = row(0, 4, 8, 100), torch.full((4,), 5000.0)
    threshold = (near + far) / 2

    def selected(scores: list[float], limit: float = threshold, **options: Any) -> list[int]:
        return oks_nms(points, torch.tensor(scores), areas, SIGMAS, limit, **options).tolist()

    assert selected([0.9, 0.8, 0.7, 0.1]) == [
        0,
        2,
        3,
    ]  # the second is gone before it acts on the third
    assert selected([0.7, 0.9, 0.8, 0.1]) == [1, 3]
    assert selected([0.5, 0.5, 0.5, 0.5]) == [0, 2, 3]
    assert selected([0.9, 0.8, 0.7, 0.1], near + 1e-6) == [0, 1, 2, 3]
    assert selected([0.9, 0.8, 0.7, 0.1], far - 1e-6) == [0, 3]
    assert selected([0.7, 0.9, 0.8, 0.1], classes=torch.tensor([0, 0, 1, 1])) == [1, 2, 3]
    assert oks_nms(points[:0], areas[:0], areas[:0], SIGMAS, 0.9).tolist() == []


NAME = "oks_nms_test"


@pytest.fixture
def evaluator_of(tmp_path: Any) -> Any:
    """Makes evaluators of people, from a config."""
    metadata = MetadataCatalog.get(NAME)
    metadata.set(json_file=str(tmp_path / "annotations.json"), thing_classes=["person"])
    metadata.set(evaluator_type="coco", keypoint_oks_sigmas=tuple(SIGMAS.tolist()))
    (tmp_path / "annotations.json").write_text(
        '{"images": [{"id": 1, "file_name": "1.png", "height": 90, "width": 90}], "annotations": [], '
        '"categories": [{"id": 1, "name": "person"}]}'
    )

    def make(*options: Any) -> COCOEvaluator:
        cfg = get_cfg()
        cfg.merge_from_list(list(options))
        return build_evaluator(cfg, NAME, str(tmp_path / "out"))

    DatasetCatalog.register(NAME, list)
    yield make
    DatasetCatalog.remove(NAME)
    MetadataCatalog.pop(NAME)


def poses(shift: float, count: int = 2) -> Instances:
    """Two people, both in a box of 20 x 40."""
    detections = Instances((90, 90))
    detections.pred_boxes = Boxes(torch.tensor([[5.0, 5.0, 25.0, 45.0]] * 2))
    detections.scores = torch.tensor([0.6, 0.8])
    detections.pred_classes = torch.zeros(2, dtype=torch.int64)
    points = row(0, shift)[:, [0] * (count - 1) + [1]]
    detections.pred_keypoints = torch.cat([points, torch.ones(2, count, 1)], dim=-1)
    return detections


def scores(evaluator: COCOEvaluator, detections: Instances) -> list[float]:
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"instances": detections}])
    return [x["score"] for x in evaluator._predictions[0]["instances"]]


def test_evaluation_as_configured(evaluator_of: Any) -> None:
    detections = poses(1.0)
    nms, landmarks = ("TEST.KEYPOINT_OKS_NMS", 0.9), ("INPUT.MAPPER", "build_top_down_mapper")
    assert scores(evaluator_of(), detections) == pytest.approx([0.6, 0.8])
    # The box has 800 square pixels, the crop 50 x 50.
    sides = ("MODEL.LANDMARKS.INPUT_SIZE", [64, 64], "MODEL.LANDMARKS.CROP.PADDING", 1.25)
    assert similarity(1, 800) > 0.9
    assert scores(evaluator_of(*nms), detections) == pytest.approx([0.8])
    detections = poses(2.0)
    assert similarity(2, 800) < 0.9 < similarity(2, 2500)
    assert scores(evaluator_of(*nms), detections) == pytest.approx([0.6, 0.8])
    assert scores(evaluator_of(*nms, *landmarks, *sides), detections) == pytest.approx([0.8])
    # Boxes and masks of other models stay as they are.
    detections.remove("pred_keypoints")
    assert len(scores(evaluator_of(*nms), detections)) == 2


def test_constants_must_fit(evaluator_of: Any) -> None:
    with pytest.raises(ValueError, match=r"each of 5 keypoints.*has 2"):
        scores(evaluator_of("TEST.KEYPOINT_OKS_NMS", 0.9), poses(1, 5))
    # COCO's own, where neither config nor data have any
    evaluator = COCOEvaluator(NAME, distributed=False, oks_nms_threshold=0.9)
    assert scores(evaluator, poses(1, 17)) == pytest.approx([0.8])
