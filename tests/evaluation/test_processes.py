"""Evaluations by two processes: what they saw is joined in the main one; the others return nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm

from d2ext.config import get_cfg
from d2ext.engine import launch
from d2ext.evaluation import LandmarkEvaluator, build_evaluator
from tests.evaluation.test_video_instances import IDS, NAMES, annotation, predicted, video


def write(folder: Path, name: str, results: Any) -> None:
    (folder / f"{name}_{comm.get_rank()}.json").write_text(json.dumps(results))


def evaluate_a_part(folder: Path) -> None:
    """Each process predicts every second of five images, the one on image i with an error of i."""
    points = [[10.0, 10, 2], [20, 10, 2], [15, 30, 1]]
    records = [
        {
            "image_id": i,
            "annotations": [
                {
                    "id": 7,
                    "bbox": [0, 0, 100, 100],
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": 0,
                    "keypoints": [v for p in points for v in p],
                }
            ],
        }
        for i in range(5)
    ]
    DatasetCatalog.register("landmark_processes", lambda: records)
    MetadataCatalog.get("landmark_processes").set(keypoint_names=["a", "b", "c"])
    evaluator = LandmarkEvaluator("landmark_processes")
    evaluator.reset()
    for record in records[comm.get_rank() :: comm.get_world_size()]:
        output = Instances((100, 100))
        output.pred_keypoints = torch.tensor([points])
        output.pred_keypoints[..., 0] += record["image_id"]
        evaluator.process([record], [{"instances": output}])
    write(folder, "landmarks", evaluator.evaluate())


def evaluate_a_video(folder: Path) -> None:
    """Each process has a whole video; ids of both begin at 1, and the second process's changes."""
    records = [video(n, [[annotation(1, 4 * t, 4)] for t in range(4)]) for n in (11, 12)]
    DatasetCatalog.register("video_processes", lambda: records)
    ids = {c: i for i, c in enumerate(IDS)}
    MetadataCatalog.get("video_processes").set(
        evaluator_type="ytvis", thing_classes=NAMES, thing_dataset_id_to_contiguous_id=ids
    )
    evaluator = build_evaluator(get_cfg(), "video_processes", str(folder))
    evaluator.reset()
    for frame in records[comm.get_rank()]["frames"]:
        track = 2 if comm.get_rank() and frame["frame"] >= 2 else 1
        output = predicted(frame["annotations"], track_ids=[track])
        evaluator.process([frame], [{"instances": output}])
    write(folder, "video", evaluator.evaluate())


def evaluate(folder: str) -> None:
    """What each process does."""
    evaluate_a_part(Path(folder))
    evaluate_a_video(Path(folder))


def test_several_processes(tmp_path: Path) -> None:
    launch(evaluate, 2, device="cpu", args=(str(tmp_path),))
    (landmarks, none), (results, nothing) = (
        [json.loads((tmp_path / f"{name}_{rank}.json").read_text()) for rank in (0, 1)]
        for name in ("landmarks", "video")
    )
    assert none is None and nothing == {}
    landmarks = landmarks["landmarks"]
    assert landmarks["missing"] == 0
    assert landmarks["NME"] == pytest.approx((0 + 1 + 2 + 3 + 4) / 5)
    assert results["segm"]["AP"] == pytest.approx(100)
    # 6 of 8 detections belong to the best id of their object.
    assert results["segm_track"]["IDF1"] == pytest.approx(75)
    written = json.loads((tmp_path / "results.json").read_text())
    assert sorted(t["video_id"] for t in written) == [11, 12, 12]
