"""The comparisons that `d2ext compare` knows: their configs exist, and they measure what they say."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Boxes, Instances

from d2ext.data.shapes import (
    FaceSet,
    ShapesSet,
    VideoSet,
    load_shapes_video,
    register_shapes,
    register_shapes_faces,
)
from d2ext.data.shapes.export_video import export_video
from d2ext.evaluation.faces import FaceEvaluator
from d2ext.testing import random_inputs, tiny_config
from d2ext.tools import compare
from d2ext.tools.compare import (
    key_frames,
    landmark_heads,
    panoptic,
    retinaface_tasks,
    runner,
    tasks,
    video_panoptic,
)
from tests.data.panoptic_files import write_panoptic


@pytest.mark.parametrize(
    "make",
    [
        landmark_heads.landmark_heads,
        panoptic.panoptic,
        retinaface_tasks.retinaface_tasks,
        tasks.detection,
        tasks.faces,
        tasks.instance_segmentation,
        tasks.poses,
        tasks.surfaces,
        video_panoptic.video_panoptic,
    ],
)
def test_arms_have_configs_and_equal_budgets(make: Any, tmp_path: Path) -> None:
    comparison = make()
    words = [make.__name__.replace("_", "-"), "--output", str(tmp_path)]
    runs = runner.plan(comparison, runner.build_parser().parse_args(words), [])
    assert [run.arm for run in runs] == list(comparison.arms)
    for run in runs:  # small stuff is dropped alike
        models = run.cfg.MODEL
        limits = (models.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT, models.UPSNET.TEST.STUFF_AREA_LIMIT)
        assert len(set(limits)) == 1 or "panoptic" not in make.__name__


def test_tasks_of_faces(faces: str, tmp_path: Path) -> None:
    """Arms differ in their heads alone; the evaluator gives what columns and curves name."""
    comparison = retinaface_tasks.retinaface_tasks()
    words = ["retinaface-tasks", "--output", str(tmp_path)]
    runs = runner.plan(comparison, runner.build_parser().parse_args(words), [])
    learned = [(r.cfg.MODEL.KEYPOINT_ON, r.cfg.MODEL.RETINAFACE.MESH.NUM_VERTICES) for r in runs]
    assert learned == [(False, 0), (True, 0), (True, 1103)]
    evaluator = FaceEvaluator(faces, distributed=False)
    evaluator.reset()
    for record in DatasetCatalog.get(faces):
        known = [a for a in record["annotations"] if "mesh" in a]
        instances = Instances((128, 128), pred_boxes=Boxes([a["bbox"] for a in known]))
        instances.scores = torch.ones(len(known))
        instances.pred_classes = torch.zeros(len(known), dtype=torch.int64)
        points = torch.tensor([a["keypoints"] for a in known])
        instances.pred_keypoints = points.reshape(-1, 5, 3)
        meshes = np.array([a["mesh"] for a in known]).reshape(-1, 1103, 3)
        instances.pred_face_meshes = torch.from_numpy(meshes)
        evaluator.process([record], [{"instances": instances}])
    results = flatten_results_dict(evaluator.evaluate())
    keys = {
        *comparison.columns,
        *(k for curve in comparison.curves.values() for k in curve.values()),
    }
    assert keys <= set(results)
    assert all(list(curve) == sorted(curve) for curve in comparison.curves.values())
    assert results["mesh/NME-all"] == pytest.approx(0, abs=1e-4)


def test_panoptic(
    processes: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On own data, of which a process learns from the command line."""
    processes(1)
    monkeypatch.setenv("D2EXT_CACHE", str(tmp_path / "cache"))
    data = ["--dataset", "test_compare_panoptic"]
    for split in ("train", "val"):
        write_panoptic(tmp_path / split, 2)
        for option, file in (("panoptic-json", "panoptic.json"), ("images", "images")):
            data += [f"--{split}-{option}", str(tmp_path / split / file)]
        data += [f"--{split}-panoptic-root", str(tmp_path / split / "panoptic")]
    options = ["MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"]
    options += ["MODEL_EMA.ENABLED", "False", "INPUT.MIN_SIZE_TRAIN", "(64,)"]
    output = ["--output", str(tmp_path / "out"), "--iterations", "2"]
    assert compare.run(["panoptic", *data, *output, "--opts", *options]) == 0
    runs = {r["arm"]: r for r in json.loads((tmp_path / "out/comparison.json").read_text())["runs"]}
    columns = panoptic.panoptic().columns
    assert all(set(columns) <= set(run["results"]) for run in runs.values())
    # The same trained heads: what does not depend on the merging is the same.
    for key in ("segm/AP", "sem_seg/mIoU"):
        head, rules = (runs[arm]["results"][key] for arm in ("upsnet", "upsnet_rules"))
        assert head == rules or (head != head and rules != rules)
    assert "MODEL.UPSNET.TEST.PANOPTIC" in runs["upsnet_rules"]["arguments"]
    for name in ("train", "val"):
        DatasetCatalog.remove(f"test_compare_panoptic_{name}")


def test_key_frames(processes: Callable[[int], None], tmp_path: Path) -> None:
    processes(0)
    data = ["--dataset", "test_compare_clips"]
    for split in ("train", "val"):
        export_video(VideoSet(split, 1, 64, 64, length=6), tmp_path, progress=False)
        data += [f"--{split}-video-json", str(tmp_path / f"annotations/video_{split}.json")]
        data += [f"--{split}-images", str(tmp_path / f"video_{split}/frames")]
    options = ["MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", "0"]
    output = ["--output", str(tmp_path / "out"), "--iterations", "1"]
    assert compare.run(["key-frames", *data, *output, "--opts", *options]) == 0
    runs = {r["arm"]: r for r in json.loads((tmp_path / "out/comparison.json").read_text())["runs"]}
    assert list(runs) == list(key_frames.key_frames().arms)
    assert {arm: len(run["series"]["distance"]) for arm, run in runs.items()} == {
        "carried": 5,
        "every_frame": 1,
        "kept": 5,
    }
    for name in ("train", "val"):
        DatasetCatalog.remove(f"test_compare_clips_{name}")


def test_kept_key_frames_do_not_change() -> None:
    cfg = tiny_config("YolactEdge")
    model = key_frames.KeptKeyFrame(cfg).eval()
    inputs = [{**x, "video_id": 0, "frame": i} for i, x in enumerate(random_inputs(6))]
    with torch.no_grad():
        outputs = [model([x])[0] for x in inputs]
    assert [x["key_distance"] for x in outputs] == [0, 1, 2, 3, 4, 0]
    assert all(x["instances"] is outputs[0]["instances"] for x in outputs[:5])
    assert outputs[5]["instances"] is not outputs[0]["instances"]


def test_fast_objects_and_their_ap() -> None:
    """In videos of which every second frame is annotated."""
    shapes = VideoSet("train", 2, 64, 64, length=8, every=2)
    videos = load_shapes_video(shapes, "panoptic")
    frames = [f for video in videos for f in video["frames"] if "annotations" in f]
    fast = key_frames.fast_tracks(videos)
    objects = [(f["image_id"], f["video_id"], a) for f in frames for a in f["annotations"]]
    assert 0 < len(fast) < len({(video, a["track_id"]) for _, video, a in objects})
    detections = [
        {
            "image_id": image_id,
            "category_id": a["category_id"],
            "segmentation": a["segmentation"],
            "bbox": a["bbox"],
            "score": 0.9 if (video, a["track_id"]) in fast else 0.8,
        }
        for image_id, video, a in objects
    ]
    for tracks in (None, fast):
        assert key_frames.mask_ap(frames, copy.deepcopy(detections), tracks) == pytest.approx(100)
    found = [d for d in detections if d["score"] > 0.8]
    assert key_frames.mask_ap(frames, found, fast) == pytest.approx(100)
    assert key_frames.mask_ap(frames, found, None) < 90
    assert math.isnan(key_frames.mask_ap(frames, found, set()))


@pytest.fixture
def faces():
    """``few_val_faces`` of `shapes`."""
    name = register_shapes_faces(FaceSet("val", 4, 128, 128, seed=5), prefix="few")
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.fixture(scope="module")
def few():
    """``few_val_landmarks`` of `shapes`."""
    names = list(register_shapes(ShapesSet("val", 4, 128, 128, seed=5), prefix="few"))
    yield
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


class OnePixelOff(torch.nn.Module):
    """Returns the annotated points, one pixel to the right; notes what it has seen."""

    def __init__(self, annotations: list[dict[str, Any]]) -> None:
        super().__init__()
        self.annotations, self.next, self.painted = annotations, 0, 0

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        results = []
        for one in inputs:
            ids = one["instances"].instance_ids
            points = [
                self.annotations[(self.next + i) % len(self.annotations)]["keypoints"]
                for i in range(len(ids))
            ]
            self.next += len(ids)
            output = Instances((128, 128), instance_ids=ids)
            output.pred_keypoints = torch.tensor(points).reshape(len(points), -1, 3)
            output.pred_keypoints[..., 0] += 1
            results.append({"instances": output})
        return results


@pytest.mark.usefixtures("few")
def test_errors_of_landmarks() -> None:
    config = ["--config-file", "landmarks/regression_shapes.yaml", "MODEL.DEVICE", "cpu"]
    config += ["DATASETS.TEST", "('few_val_landmarks',)", "DATALOADER.NUM_WORKERS", "0"]
    cfg = runner.read_config(config)
    evaluator = landmark_heads.LandmarkEvaluator("few_val_landmarks", ["nme"], distributed=False)
    annotations = evaluator.annotations
    results, series = landmark_heads.measure(cfg, OnePixelOff(annotations))
    errors = 100 / np.sqrt([a["area"] for a in annotations])
    hidden = np.array([a["occlusion"] for a in annotations])
    assert results["median"] == pytest.approx(np.median(errors), rel=1e-4)
    assert results["visible"] == pytest.approx(errors[hidden < 0.02].mean(), rel=1e-4)
    assert results["occluded"] == pytest.approx(errors[hidden >= 0.1].mean(), rel=1e-4)
    assert results["failures"] == pytest.approx(100 * (errors > 10).mean())
    drawn = np.array(series["errors"])
    np.testing.assert_allclose(drawn[:, 0], np.sort(errors), rtol=1e-4)
    assert drawn[-1, 1] == 100
    assert [x for x, *_ in series["painted"]] == [100 * share for share in landmark_heads.CUTOUTS]
    assert series["painted"][3][1] == pytest.approx(errors.mean(), rel=1e-4)
    bins = [errors[(a <= hidden) & (hidden < b)] for a, b in landmark_heads.OCCLUSION_BINS]
    expected = [e.mean() for e in bins if len(e)]
    assert [y for _, y, _ in series["hidden"]] == pytest.approx(expected, rel=1e-4)


def test_painted_share() -> None:
    instances = Instances((100, 100))
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 20, 90, 80]]))
    instances.instance_ids = torch.tensor([3])
    one = {"image": torch.zeros(3, 100, 100, dtype=torch.uint8) + 7, "instances": instances}
    places = set()
    for image_id in range(5):
        one["image_id"] = image_id
        painted = landmark_heads.paint_over(one, 0.25)["image"]
        assert painted.equal(landmark_heads.paint_over(one, 0.25)["image"])
        changed = (painted != 7).any(0)
        ys, xs = changed.nonzero().unbind(1)
        assert changed.sum() == (xs.max() - xs.min() + 1) * (ys.max() - ys.min() + 1)
        assert abs(int(changed.sum()) - 0.25 * 80 * 60) < 100
        assert xs.min() >= 10 and xs.max() < 90 and ys.min() >= 20 and ys.max() < 80
        places.add(int(xs.min()))
    assert len(places) > 2 and (one["image"] == 7).all()


def test_trainings_that_arms_begin_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """VPSNet's: those that the selected arms need, once; wrong arms are told before any."""
    started: list[str] = []
    monkeypatch.setattr(runner, "start", lambda tool, words, folder: started.append(folder.name))
    monkeypatch.setattr(runner, "carry_out", lambda *_: {})
    comparison = video_panoptic.video_panoptic()
    parser = runner.build_parser()

    def planned(*words: str) -> list[runner.Run]:
        args = parser.parse_args(["video-panoptic", "--output", str(tmp_path), *words])
        return runner.plan_prepared(comparison, args)

    assert [x.arm for x in planned()] == ["image", "flow"]
    assert [x.arm for x in planned("--arms", "upsnet", "track")] == ["image"]
    image, flow = planned("--iterations", "5")
    assert image.cfg.SOLVER.MAX_ITER == flow.cfg.SOLVER.MAX_ITER == 5
    assert flow.cfg.DATASETS.TRAIN != image.cfg.DATASETS.TRAIN == ("shapes_train_panoptic",)
    assert (
        image.folder
        == runner.weights_of(
            parser.parse_args(["video-panoptic", "--output", str(tmp_path)]), "image"
        ).parent
    )
    assert runner.run(["video-panoptic", "--output", str(tmp_path), "--arms", "fused"]) == 2
    assert "fused" in capsys.readouterr().err and started == []
