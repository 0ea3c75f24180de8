"""The evaluator of panoptic videos, end to end from registered records and PNGs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from panopticapi.utils import id2rgb
from PIL import Image

from d2ext.config import get_cfg
from d2ext.evaluation import COCOPanopticEvaluator, build_evaluator

SIZE = 32
# Numbers of things and of stuff have nothing to do with each other.
CAR = {"category_id": 1, "isthing": True}
ROAD = {"category_id": 1, "isthing": False}


def scene(t: int) -> np.ndarray:
    """Segment ids: a car (2) of 64 pixels that moves over a road (1), 64 pixels void at the top."""
    ids = np.ones((SIZE, SIZE), np.int32)
    ids[:2] = 0
    ids[10:18, 2 * t : 2 * t + 8] = 2
    return ids


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[str]:
    """Two videos of 8 frames, of which every second is annotated."""
    videos, images, entries = [], [], []
    for number in range(2):
        frames: list[dict[str, Any]] = []
        for t in range(8):
            frame = {"file_name": f"{number}/{t}.png", "height": SIZE, "width": SIZE}
            frame.update(video_id=number, frame=t, image_id=100 * number + t)
            if t % 2 == 0:
                path = tmp_path / f"{frame['image_id']}.png"
                Image.fromarray(id2rgb(scene(t))).save(path)
                frame["pan_seg_file_name"] = str(path)
                # The car is track 7 of both videos.
                segments = [{"id": 1, **ROAD}, {"id": 2, **CAR, "track_id": 7}]
                frame["segments_info"] = [{**s, "iscrowd": 0} for s in segments]
                sizes = {"height": SIZE, "width": SIZE}
                images.append({"id": frame["image_id"], "file_name": frame["file_name"], **sizes})
                ids = [{"id": 1, "category_id": 12}, {"id": 2, "category_id": 11}]
                entries.append(
                    {"image_id": frame["image_id"], "file_name": path.name, "segments_info": ids}
                )
            frames.append(frame)
        videos.append({"video_id": number, "length": 8, "frames": frames})
    names = [("truck", 10, 1), ("car", 11, 1), ("road", 12, 0)]
    categories = [{"id": i, "name": n, "isthing": thing} for n, i, thing in names]
    content = {"images": images, "annotations": entries, "categories": categories}
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    name = "panoptic_videos"
    DatasetCatalog.register(name, lambda: videos)
    MetadataCatalog.get(name).set(
        evaluator_type="video_panoptic_seg",
        panoptic_json=str(tmp_path / "panoptic.json"),
        panoptic_root=str(tmp_path),
        thing_classes=["truck", "car"],
        stuff_classes=["things", "road"],
        thing_dataset_id_to_contiguous_id={10: 0, 11: 1},
        stuff_dataset_id_to_contiguous_id={12: 1},
    )
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def run(name: str, folder: Path, track: Any, *, left_out: tuple[int, ...] = ()) -> dict[str, Any]:
    """Right maps with other segment ids; ``track(video, t)``: the id of the car, None: no key."""
    evaluator = build_evaluator(get_cfg(), name, str(folder))
    evaluator.reset()
    for video in DatasetCatalog.get(name):
        for frame in video["frames"]:
            if frame["image_id"] in left_out:
                continue
            # 5 road, 9 car; where nothing is labelled something may be predicted.
            ids = np.array([5, 5, 9])[scene(frame["frame"])]
            car: dict[str, Any] = {"id": 9, **CAR}
            number = track(frame["video_id"], frame["frame"])
            if number is not None:
                car["track_id"] = number
            output = (torch.from_numpy(ids), [{"id": 5, **ROAD}, car])
            inputs = {"image_id": frame["image_id"], "file_name": frame["file_name"]}
            evaluator.process([inputs], [{"panoptic_seg": output}])
    return evaluator.evaluate()


def test_perfect(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    process = COCOPanopticEvaluator.process
    monkeypatch.setattr(
        COCOPanopticEvaluator,
        "process",
        lambda self, inputs, outputs: (
            kept.append(inputs[0]["image_id"]) or process(self, inputs, outputs)
        ),
    )
    results = run(dataset, tmp_path / "out", lambda video, t: 3)
    assert kept == [0, 2, 4, 6, 100, 102, 104, 106]  # PNGs of others would fill the memory
    assert results["video_panoptic_seg"] == pytest.approx({"STQ": 100, "AQ": 100, "IoU": 100})
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100)


def test_identity_that_changes(dataset: str, tmp_path: Path) -> None:
    # In video 1 half of the annotated frames have another id: AQ 0.5 there.
    results = run(dataset, tmp_path / "out", lambda video, t: 4 if video == 1 and t >= 4 else 3)
    scores = results["video_panoptic_seg"]
    assert scores["AQ"] == pytest.approx(75) and scores["IoU"] == pytest.approx(100)
    assert scores["STQ"] == pytest.approx(100 * 0.75**0.5)


def test_crowd(dataset: str, tmp_path: Path) -> None:
    for frame in DatasetCatalog.get(dataset)[0]["frames"][::2]:
        frame["segments_info"][1]["iscrowd"] = 1
    # Ids that change do no harm where the annotations have a crowd.
    results = run(dataset, tmp_path / "out", lambda video, t: t if video == 0 else 3)
    assert results["video_panoptic_seg"] == pytest.approx({"STQ": 100, "AQ": 100, "IoU": 100})


def test_frame_without_prediction(dataset: str, tmp_path: Path) -> None:
    results = run(dataset, tmp_path / "out", lambda video, t: 3, left_out=(0, 1))
    scores = results["video_panoptic_seg"]
    # One of 4 annotated frames of video 0: TPA 3/4 of the track, IoU 3/4.
    assert scores["AQ"] == pytest.approx(100 * (0.75**2 + 1) / 2)
    # 7 of 8 frames of both classes, and the class "nothing" of the published code.
    assert scores["IoU"] == pytest.approx(100 * 2 * (7 / 8) / 3)


def test_without_ids(dataset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        results = run(dataset, tmp_path / "out", lambda video, t: None)
    assert "video_panoptic_seg" not in results and "have no track_id" in caplog.text
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100)
