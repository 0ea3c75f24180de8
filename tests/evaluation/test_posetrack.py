"""PoseTrack18's original files, without areas, with their truth as predictions."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from d2ext.config import get_cfg
from d2ext.data.landmarks import register_landmarks
from d2ext.data.video.register import register_own_videos
from d2ext.evaluation import build_evaluator

FILES = ("test_posetrack18_val.json", "val/003418_mpii_test.json", "val/012834_mpii_test.json")


@pytest.fixture
def name() -> Iterator[str]:
    yield "posetrack18_original"
    DatasetCatalog.remove("posetrack18_original")
    MetadataCatalog.remove("posetrack18_original")


@pytest.mark.parametrize("videos", [False, True])
@pytest.mark.parametrize("file", FILES)
def test_truth_has_full_marks(
    file: str,
    videos: bool,
    name: str,
    real_data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    root = real_data / "landmarks/posetrack18"
    path = str(root / "original" / file)
    with caplog.at_level(logging.WARNING):
        if videos:
            register_own_videos(name, path, str(root))
            records = [frame for video in DatasetCatalog.get(name) for frame in video["frames"]]
        else:
            register_landmarks(name, "posetrack18", path, str(root))
            records = DatasetCatalog.get(name)
    assert "ignore regions" in caplog.text
    evaluator = build_evaluator(get_cfg(), name, str(tmp_path))
    evaluator.reset()
    for record in records:
        persons = record["annotations"]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in persons]
        instances = Instances((record["height"], record["width"]))
        instances.pred_boxes = Boxes(torch.tensor(boxes))
        instances.scores = torch.full((len(persons),), 0.9)
        instances.pred_classes = torch.zeros(len(persons), dtype=torch.int64)
        points = torch.tensor([a["keypoints"] for a in persons])
        instances.pred_keypoints = points.view(len(persons), 17, 3)
        evaluator.process([record], [{"instances": instances}])
    results = evaluator.evaluate()
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["keypoints"]["AP"] == pytest.approx(100)
