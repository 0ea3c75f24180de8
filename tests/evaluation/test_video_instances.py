"""The evaluator of tracks: perfect predictions, and errors whose cost is computed by hand."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from d2ext.config import get_cfg
from d2ext.data.errors import DatasetError
from d2ext.evaluation import build_evaluator

SIZE = 64
NAMES = ["square", "bar"]
IDS = [3, 7]
Register = Callable[..., str]


def annotation(
    track: int, x: int, y: int, *, label: int = 0, width: int = 16, crowd: int = 0
) -> dict[str, Any]:
    """A rectangle of 16 pixels' height with four keypoints."""
    mask = np.zeros((SIZE, SIZE), np.uint8, order="F")
    mask[y : y + 16, x : x + width] = 1
    rle = mask_util.encode(mask)
    corners = [(x, y), (x + width, y), (x, y + 16), (x + width, y + 16)]
    return {
        "track_id": track,
        "category_id": label,
        "bbox": [x, y, width, 16],
        "bbox_mode": BoxMode.XYWH_ABS,
        "iscrowd": crowd,
        "segmentation": {**rle, "counts": rle["counts"].decode()},
        "keypoints": [v for px, py in corners for v in (float(px), float(py), 2)],
    }


def video(number: int, frames: list[list[dict[str, Any]] | None], step: int = 1) -> dict[str, Any]:
    """A record; None: a frame without annotations. The JSON lists every ``step``-th frame."""
    records = []
    for t, objects in enumerate(frames):
        record = {
            "file_name": f"{number}/{t}.png",
            "image_id": f"{number}/{t:03d}",
            "height": SIZE,
            "width": SIZE,
            "video_id": number,
            "frame": t,
        }
        if objects is not None:
            record["annotations"] = objects
        if t % step == 0:
            record["json_index"] = t // step
        records.append(record)
    size = {"height": SIZE, "width": SIZE}
    return {"video_id": number, "length": len(frames), **size, "frames": records}


@pytest.fixture
def register(tmp_path: Path) -> Iterator[Register]:
    names = []

    def add(videos: list[dict[str, Any]], kind: str = "ytvis", **metadata: Any) -> str:
        names.append(f"tracks_{len(names)}")
        DatasetCatalog.register(names[-1], lambda: videos)
        ids = {c: i for i, c in enumerate(IDS)}
        values = {"thing_classes": NAMES, "thing_dataset_id_to_contiguous_id": ids, **metadata}
        # A JSON file which COCO's evaluation could not read.
        MetadataCatalog.get(names[-1]).set(evaluator_type=kind, json_file="no/such.json", **values)
        return names[-1]

    yield add
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def predicted(objects: list[dict[str, Any]], **values: list) -> Instances:
    """What a model says that sees these annotations; fields may be replaced."""
    result = Instances((SIZE, SIZE))
    boxes = torch.tensor([a["bbox"] for a in objects]).float().reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = [mask_util.decode(a["segmentation"]) for a in objects]
    masks = np.stack(masks) if masks else np.zeros((0, SIZE, SIZE))
    fields = {
        "pred_boxes": Boxes(boxes),
        "pred_masks": torch.from_numpy(masks) > 0,
        "pred_classes": torch.tensor([a["category_id"] for a in objects], dtype=torch.int64),
        "scores": torch.full((len(objects),), 0.9),
        "track_ids": torch.tensor([a["track_id"] for a in objects], dtype=torch.int64),
    }
    for key, value in {**fields, **values}.items():
        if value is not None:
            result.set(key, torch.tensor(value) if isinstance(value, list) else value)
    return result


def points(objects: list[dict[str, Any]]) -> torch.Tensor:
    return torch.tensor([a["keypoints"] for a in objects]).float().reshape(-1, 4, 3)


def run(
    name: str, folder: Path, outputs: dict[str, Instances], **extra: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """``outputs``: image id -> instances; ``extra``: key of the output -> image id -> value."""
    evaluator = build_evaluator(get_cfg(), name, str(folder))
    evaluator.reset()
    for image_id, instances in outputs.items():
        output = {"instances": instances, **{k: v[image_id] for k, v in extra.items()}}
        evaluator.process([{"image_id": image_id}], [output])
    return evaluator.evaluate()


def seen(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {f["image_id"]: f["annotations"] for f in record["frames"]}


def two_objects(frames: int = 8) -> dict[str, Any]:
    """A square that moves right, and a bar that stands below."""
    moving = [annotation(5, 2 * t, 4) for t in range(frames)]
    still = annotation(9, 20, 40, label=1, width=32)
    return video(1, [[m, still] for m in moving])


def test_perfect_tracks(register: Register, tmp_path: Path) -> None:
    record = two_objects()
    name = register([record])
    right = {i: predicted(a) for i, a in seen(record).items()}
    results = run(name, tmp_path, right)
    assert set(results) == {"bbox", "segm", "segm_track"}
    for task, metric in (
        ("bbox", "AP"),
        ("segm", "AP"),
        ("segm_track", "AP"),
        ("segm_track", "AR1"),
    ):
        assert results[task][metric] == pytest.approx(100)
    assert results["segm_track"]["AP-bar"] == pytest.approx(100)
    for metric in ("IDF1", "HOTA", "MOTA", "AssA", "DetA"):
        assert results["segm_track"][metric] == pytest.approx(100)
    assert results["segm_track"]["IDSW"] == 0

    written = json.loads((tmp_path / "results.json").read_text())
    assert [(t["video_id"], t["category_id"]) for t in written] == [(1, 3), (1, 7)]
    assert [len(t["segmentations"]) for t in written] == [8, 8]
    assert written[0]["score"] == pytest.approx(0.9)
    assert written[0]["segmentations"][3] == record["frames"][3]["annotations"][0]["segmentation"]
    assert json.loads((tmp_path / "results_info.json").read_text())["dataset"] == name


def test_identity_that_changes(register: Register, tmp_path: Path) -> None:
    record = two_objects()
    outputs = {}
    for t, (image_id, objects) in enumerate(seen(record).items()):
        outputs[image_id] = predicted(objects, track_ids=[5 if t < 4 else 6, 9])
    results = run(register([record]), tmp_path, outputs)
    assert results["segm"]["AP"] == pytest.approx(100)
    tracks = results["segm_track"]
    # Each half has IoU 0.5, right at the first of ten thresholds, with the other half beside it.
    assert tracks["AP-square"] == pytest.approx(10) and tracks["AP"] == pytest.approx(55)
    # 4 of the square's 8 frames and all 8 of the bar belong to the best pair of ids.
    assert tracks["IDF1"] == pytest.approx(100 * 12 / 16) and tracks["IDSW"] == 1
    # Every detection is right; association: 8 of 8 for the bar, 4 of 8 for the square.
    assert tracks["DetA"] == pytest.approx(100) and tracks["AssA"] == pytest.approx(75)
    assert tracks["HOTA"] == pytest.approx(100 * math.sqrt(0.75))
    assert tracks["MOTA"] == pytest.approx(100 * 15 / 16)


def test_missed_frames(register: Register, tmp_path: Path) -> None:
    record = two_objects()
    outputs = {}
    for t, (image_id, objects) in enumerate(seen(record).items()):
        outputs[image_id] = predicted(objects[1:] if t in (2, 5) else objects)
    del outputs["1/007"]  # a frame that could not be read: both objects are missed
    results = run(register([record]), tmp_path, outputs)
    tracks = results["segm_track"]
    # IoU 5/8: three thresholds; 7/8: eight.
    assert tracks["AP-square"] == pytest.approx(30) and tracks["AP-bar"] == pytest.approx(80)
    assert tracks["IDF1"] == pytest.approx(100 * 2 * 12 / (16 + 12))
    written = json.loads((tmp_path / "results.json").read_text())
    assert [t for t, mask in enumerate(written[0]["segmentations"]) if mask is None] == [2, 5, 7]


@pytest.mark.parametrize(
    ("scores", "classes"),
    [([0.1, 0.8, 0.5, 0.6], [0, 0, 1, 1]), ([0.2, 0.8, 0.7, 0.3], [1, 1, 0, 1])],
)
def test_class_and_score_of_a_track(
    register: Register, tmp_path: Path, scores: list[float], classes: list[int]
) -> None:
    record = video(1, [[annotation(1, 8, 8, label=1)]] * 4)
    outputs = {}
    for score, label, (image_id, objects) in zip(
        scores, classes, seen(record).items(), strict=True
    ):
        outputs[image_id] = predicted(objects, scores=[score], pred_classes=[label])
    results = run(register([record]), tmp_path, outputs)
    assert results["segm_track"]["AP-bar"] == pytest.approx(100)  # 1.1 against 0.9, 1.3 against 0.7
    assert results["segm_track"]["IDF1"] == pytest.approx(100)
    (written,) = json.loads((tmp_path / "results.json").read_text())
    assert written["category_id"] == 7 and written["score"] == pytest.approx(0.5)


def test_crowd(register: Register, tmp_path: Path) -> None:
    crowd = annotation(2, 30, 30, width=30, crowd=1)
    record = video(1, [[annotation(1, 4, 4), crowd]] * 4)
    # Two smaller objects in the crowd are no mistakes for ids, but YouTube-VIS counts such tracks.
    inside = [annotation(7, 32, 30, width=10), annotation(8, 45, 30, width=10)]
    outputs = {i: predicted([a[0], *inside]) for i, a in seen(record).items()}
    results = run(register([record]), tmp_path, outputs)
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["segm_track"]["IDF1"] == pytest.approx(100)
    assert results["segm_track"]["MOTA"] == pytest.approx(100)
    # The crowd need not be found.
    outputs = {i: predicted(a[:1]) for i, a in seen(record).items()}
    results = run(register([record]), tmp_path, outputs)
    assert results["segm_track"]["AP"] == pytest.approx(100)
    # Outside of it they are.
    outside = annotation(7, 4, 40)
    outputs = {i: predicted([a[0], outside]) for i, a in seen(record).items()}
    results = run(register([record]), tmp_path, outputs)
    assert results["segm_track"]["IDF1"] == pytest.approx(100 * 8 / 12)
    assert results["segm_track"]["MOTA"] == 0


def test_only_listed_and_annotated_frames(register: Register, tmp_path: Path) -> None:
    every = two_objects(6)
    objects = [f["annotations"] for f in every["frames"]]
    record = video(1, [a if t % 2 == 0 else None for t, a in enumerate(objects)], step=2)
    outputs = {f"1/{t:03d}": predicted(a) for t, a in enumerate(objects)}
    # In frames that nobody annotated anything goes.
    outputs["1/003"] = predicted([annotation(5, 40, 40)])
    outputs["1/005"] = predicted([annotation(77, 40, 40)])
    results = run(register([record]), tmp_path, outputs)
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["segm_track"]["AP"] == pytest.approx(100)
    assert results["segm_track"]["IDF1"] == pytest.approx(100)
    written = json.loads((tmp_path / "results.json").read_text())
    assert [len(t["segmentations"]) for t in written] == [3, 3]


def test_without_ids(register: Register, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = two_objects()
    outputs = {i: predicted(a, track_ids=None) for i, a in seen(record).items()}
    with caplog.at_level(logging.WARNING):
        results = run(register([record]), tmp_path, outputs)
    assert set(results) == {"bbox", "segm"} and results["segm"]["AP"] == pytest.approx(100)
    assert "(TEST.TRACKER gives them): only single frames are evaluated" in caplog.text
    assert not (tmp_path / "results.json").exists()


def test_detections_whose_id_is_not_known(register: Register, tmp_path: Path) -> None:
    record = two_objects()
    outputs = {i: predicted(a, track_ids=[-1, 9]) for i, a in seen(record).items()}
    results = run(register([record]), tmp_path, outputs)
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["segm_track"]["AP-square"] == 0 and results["segm_track"]["IDSW"] == 0
    assert len(json.loads((tmp_path / "results.json").read_text())) == 1


def test_nothing_detected(register: Register, tmp_path: Path) -> None:
    record = two_objects()
    outputs = {i: predicted([]) for i in seen(record)}
    results = run(register([record]), tmp_path, outputs)
    assert results["segm"]["AP"] == results["segm_track"]["AP"] == 0
    assert results["segm_track"]["IDF1"] == results["segm_track"]["HOTA"] == 0
    assert json.loads((tmp_path / "results.json").read_text()) == []


def test_without_annotations(
    register: Register, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = two_objects()
    outputs = {i: predicted(a) for i, a in seen(record).items()}
    for frame in record["frames"]:
        del frame["annotations"]
    with caplog.at_level(logging.WARNING):
        results = run(register([record]), tmp_path, outputs)
    (said,) = [r.getMessage() for r in caplog.records if r.name.startswith("d2ext.evaluation")]
    assert not results and "nothing to compare with" in said and "TRACKER" not in said
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2
    caplog.clear()
    outputs = {i: predicted(a, track_ids=None) for i, a in seen(two_objects()).items()}
    with caplog.at_level(logging.WARNING):
        assert not run(register([record]), tmp_path / "without", outputs)
    (said,) = [r.getMessage() for r in caplog.records if r.name.startswith("d2ext.evaluation")]
    assert "TEST.TRACKER gives them" in said and "nothing to compare with" in said


def test_distance_from_the_key_frame(register: Register, tmp_path: Path) -> None:
    record = two_objects(9)
    outputs, distances = {}, {}
    for t, (image_id, objects) in enumerate(seen(record).items()):
        distances[image_id] = t % 3
        # At distance 2 the square is not found.
        outputs[image_id] = predicted(objects[1:] if t % 3 == 2 else objects)
    results = run(register([record]), tmp_path, outputs, key_distance=distances)
    segm = results["segm"]
    assert segm["AP-d0"] == segm["AP-d1"] == pytest.approx(100)
    assert segm["AP-d2"] == pytest.approx(50) and "AP-d3" not in segm
    assert 50 < segm["AP"] < 100


def test_keypoints(register: Register, tmp_path: Path) -> None:
    record = two_objects()
    for frame in record["frames"]:
        for a in frame["annotations"]:
            a["category_id"] = 0
            a.pop("segmentation", None)  # an object of all frames is one dict
    names = ["tl", "tr", "bl", "br"]
    name = register([record], "video_keypoints", keypoint_names=names, keypoint_flip_map=[])

    def outputs(shift: float) -> dict[str, Instances]:
        result = {}
        for t, (image_id, objects) in enumerate(seen(record).items()):
            moved = points(objects)
            moved[0, :, 0] += shift if t >= 4 else 0
            boxes = [{**a, "segmentation": annotation(0, 0, 0)["segmentation"]} for a in objects]
            result[image_id] = predicted(boxes, pred_keypoints=moved, pred_masks=None)
        return result

    results = run(name, tmp_path, outputs(0.0))
    assert set(results) == {"bbox", "keypoints", "keypoints_track"}
    assert results["keypoints"]["AP"] == pytest.approx(100)
    assert results["keypoints_track"]["IDF1"] == pytest.approx(100)
    # sigma 0.05, area 256: OKS exp(-d^2 / 5.12) is below 0.5 from d = 1.89 on.
    results = run(name, tmp_path, outputs(1.8))
    assert results["keypoints_track"]["IDF1"] == pytest.approx(100)
    results = run(name, tmp_path, outputs(2.0))
    assert results["keypoints_track"]["IDF1"] == pytest.approx(75)


def test_boxes_alone(register: Register, tmp_path: Path) -> None:
    record = two_objects()
    outputs = {i: predicted(a, pred_masks=None) for i, a in seen(record).items()}
    results = run(register([record]), tmp_path, outputs)
    assert set(results) == {"bbox", "bbox_track"}
    assert results["bbox_track"]["HOTA"] == pytest.approx(100)


def test_id_of_two_classes_and_twice_in_a_frame(register: Register, tmp_path: Path) -> None:
    # An id that returns as another class is another object.
    first, second = annotation(1, 8, 8), annotation(1, 40, 40, label=1)
    record = video(1, [[first]] * 3 + [[first, second]] + [[second]] * 3)
    outputs = {}
    for image_id, objects in seen(record).items():
        ids = [[4, 5][a["category_id"]] for a in objects]
        outputs[image_id] = predicted(objects, track_ids=ids)
    results = run(register([record]), tmp_path, outputs)
    assert results["segm_track"]["AP"] == pytest.approx(100)
    assert results["segm_track"]["IDF1"] == pytest.approx(100)
    with pytest.raises(DatasetError, match="several objects of track 1"):
        run(register([video(1, [[first, annotation(1, 30, 8)]])]), tmp_path, {})
    # Of several detections with one id the best counts.
    record = video(1, [[first]] * 3)
    worse = annotation(1, 30, 30)
    outputs = {i: predicted([*a, worse], scores=[0.9, 0.2]) for i, a in seen(record).items()}
    results = run(register([record]), tmp_path, outputs)
    assert results["segm_track"]["AP"] == pytest.approx(100)


def test_without_the_package_of_ids(
    register: Register,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("d2ext.evaluation.video_instances.identity_available", lambda: False)
    record = two_objects()
    with caplog.at_level(logging.WARNING):
        results = run(
            register([record]), tmp_path, {i: predicted(a) for i, a in seen(record).items()}
        )
    assert results["segm_track"]["AP"] == pytest.approx(100)
    assert "IDF1" not in results["segm_track"] and "pip install" in caplog.text


def test_empty_masks(register: Register, tmp_path: Path) -> None:
    record = two_objects()
    outputs = {i: predicted(a) for i, a in seen(record).items()}
    outputs["1/003"].pred_masks[0] = False
    run(register([record]), tmp_path, outputs)
    written = json.loads((tmp_path / "results.json").read_text())
    assert [t for t, mask in enumerate(written[0]["segmentations"]) if mask is None] == [3]


def test_many_objects_under_other_ids(register: Register, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    records, outputs = [], {}
    for number in range(3):
        objects = range(6)
        seen_in = random.random((6, 10)) < 0.7
        places = random.integers(0, SIZE - 16, (6, 10, 2)).tolist()
        record = video(
            number,
            [
                [annotation(i, *places[i][t], label=i % 2) for i in objects if seen_in[i, t]]
                for t in range(10)
            ],
        )
        records.append(record)
        names = random.permutation(6)
        for image_id, annotated in seen(record).items():
            shuffled = [annotated[i] for i in random.permutation(len(annotated))]
            ids = [int(names[a["track_id"]]) for a in shuffled]
            outputs[image_id] = predicted(shuffled, track_ids=ids)
    name = register(records)
    results = run(name, tmp_path, outputs)["segm_track"]
    assert results["AP"] == pytest.approx(100) and results["HOTA"] == pytest.approx(100)
    # Ids are those of a video only.
    assert len(json.loads((tmp_path / "results.json").read_text())) == 18


def test_real_videos(real_data: Path, register: Register, tmp_path: Path) -> None:
    file = real_data / "video/davis/ytvis.json"
    if not file.is_file():
        pytest.skip("no video/davis")
    content = json.loads(file.read_text())
    records, outputs = [], {}
    for entry, track in zip(content["videos"], content["annotations"], strict=True):
        height, width = entry["height"], entry["width"]
        frames = []
        for t, mask in enumerate(track["segmentations"]):
            frame = {"file_name": entry["file_names"][t], "height": height, "width": width}
            frame.update(video_id=entry["id"], frame=t, json_index=t, annotations=[])
            frame["image_id"] = len(outputs)
            instances = Instances((height, width))
            count = int(mask is not None)
            if count:
                box = list(map(float, track["bboxes"][t]))
                values = {"track_id": 1, "category_id": 0, "bbox": box, "segmentation": mask}
                frame["annotations"].append({**values, "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 0})
                box[2:] = [box[0] + box[2], box[1] + box[3]]
                if isinstance(mask["counts"], list):
                    mask = mask_util.frPyObjects(mask, height, width)
                instances.pred_masks = torch.from_numpy(mask_util.decode(mask))[None] > 0
            else:
                box = []
                instances.pred_masks = torch.zeros(0, height, width) > 0
            instances.pred_boxes = Boxes(torch.tensor(box).reshape(-1, 4))
            instances.scores = torch.ones(count)
            instances.pred_classes = torch.zeros(count, dtype=torch.int64)
            instances.track_ids = torch.ones(count, dtype=torch.int64)
            outputs[frame["image_id"]] = instances
            frames.append(frame)
        size = {"height": height, "width": width}
        records.append({"video_id": entry["id"], "length": len(frames), **size, "frames": frames})
    results = run(register(records), tmp_path, outputs)
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["segm_track"]["AP"] == pytest.approx(100)
    assert results["segm_track"]["HOTA"] == pytest.approx(100)
