"""Trackers: ids that stay, each detection given back once, in its place."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch import nn

from d2ext.config import ConfigError, get_cfg
from d2ext.data.shapes.video import draw_clip
from d2ext.engine import tracking
from d2ext.engine.tracking import build_tracked, build_tracker
from d2ext.utils.video import VideoReader

pytest.importorskip("norfair", reason="needs norfair-enough")

SIZE = (120, 160)
# Points on three players in the first of PoseTrack18's five frames (1280x720), set by hand: head,
# shoulders, hips and a foot or hand.
PLAYERS = [
    [(464, 294), (444, 336), (494, 340), (460, 420), (504, 424), (380, 504)],
    [(734, 280), (700, 314), (750, 320), (724, 390), (756, 392), (620, 286)],
    [(810, 416), (760, 444), (740, 450), (710, 470), (670, 484), (820, 510)],
]


def tracker(**sigmas: Any) -> Any:
    cfg = get_cfg()
    cfg.TEST.KEYPOINT_OKS_SIGMAS = sigmas.get("sigmas", [])
    return build_tracker("NorfairTracker", cfg)


def detections(
    boxes: Any, *, classes: Any = None, scores: Any = None, size: tuple[int, int] = SIZE
) -> Instances:
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    count = len(instances)
    instances.pred_classes = torch.tensor(classes or [0] * count, dtype=torch.int64)
    instances.scores = torch.tensor(scores or [0.9] * count)
    return instances


def ids(instances: Instances) -> list[int]:
    return instances.track_ids.tolist()


def clip(index: int, kind: str) -> list[tuple[list[int], Instances]]:
    """Frames of a clip of `shapes`: ids of its things, in an order of chance, and detections of them."""
    frames, rng = [], np.random.default_rng(index)
    for frame in draw_clip(7, "val", index, *SIZE, 20).frames:
        segments = [s for s in frame.segments if s.layer >= 0 and rng.random() > 0.1]
        segments = [segments[i] for i in rng.permutation(len(segments))]
        corners = [[s.x0, s.y0, s.x0 + s.mask.shape[1], s.y0 + s.mask.shape[0]] for s in segments]
        instances = detections(corners, classes=[s.category for s in segments])
        if kind == "masks":
            instances.pred_masks = torch.zeros((len(segments), *SIZE), dtype=torch.bool)
            for mask, s, (x1, y1, x2, y2) in zip(
                instances.pred_masks, segments, corners, strict=True
            ):
                mask[y1:y2, x1:x2] = torch.from_numpy(s.mask > 0)
        if kind == "keypoints":
            points = [frame.keypoints(s) for s in segments]
            instances.pred_keypoints = torch.tensor(np.array(points).reshape(-1, 8, 3)).float()
        frames.append(([s.number for s in segments], instances))
    return frames


@pytest.mark.parametrize("kind", ["boxes", "masks", "keypoints"])
def test_ids_stay_on_clips(kind: str) -> None:
    """Things move, hide each other, and a tenth of the detections is missing."""
    right, total = 0, 0
    track = tracker()
    for index in range(4):
        track.reset()
        seen: dict[int, Counter[int]] = {}
        for number, (things, instances) in enumerate(clip(index, kind)):
            given = ids(track(instances, number))
            assert len(set(given)) == len(given) == len(things) and min(given, default=1) > 0
            for thing, i in zip(things, given, strict=True):
                seen.setdefault(thing, Counter())[i] += 1
        # The ids of a thing other than its usual one, and usual ones of two things, are mistakes.
        usual = Counter({c.most_common(1)[0][0]: c.most_common(1)[0][1] for c in seen.values()})
        right += sum(usual.values())
        total += sum(sum(c.values()) for c in seen.values())
    assert total > 200 and right / total > 0.9, right / total


def test_each_detection_comes_back_in_its_place() -> None:
    track = tracker()
    boxes = [[10.0, 10, 30, 30], [50, 50, 90, 90], [100, 10, 120, 60]]
    assert ids(track(detections(boxes), 0)) == [1, 2, 3]
    moved = [[x + 1 for x in box] for box in boxes]
    new = [[5.0, 90, 25, 110], moved[2], [float("nan"), 0, 5, 5], moved[0], moved[1]]
    instances = detections(new)
    assert track(instances, 1) is instances
    assert ids(instances) == [4, 3, -1, 1, 2] and instances.track_ids.dtype == torch.int64
    assert torch.equal(instances.pred_boxes.tensor[3], torch.tensor(moved[0]))
    assert ids(track(detections([]), 2)) == []
    assert ids(track(detections(moved[:1]), 3)) == [1]
    track.reset()
    assert ids(track(detections(moved[:1]), 4)) == [1]
    assert ids(track(detections(moved[1:]), 5)) == [2, 3]


def test_a_track_moves_on_where_nothing_is_detected() -> None:
    """Frames without detections, or left out: the object is expected where its motion leads."""
    track, boxes = tracker(), [[10.0 + 4 * t, 50, 26 + 4 * t, 66] for t in range(30)]
    for t in range(8):
        assert ids(track(detections(boxes[t : t + 1]), t)) == [1]
    assert ids(track(detections(boxes[13:14]), 13)) == [1]  # 24 pixels on, 16 wide
    assert ids(track(detections([boxes[13], boxes[14]]), 14)) != [1, 2]
    track.reset()
    track(detections(boxes[:1]), 0)
    assert ids(track(detections(boxes[:1]), 50)) == [2]  # too long ago


def test_classes_and_scores_decide() -> None:
    track, box = tracker(), [20.0, 20, 60, 60]
    assert ids(track(detections([box, box], classes=[0, 1]), 0)) == [1, 2]
    assert ids(track(detections([box, box], classes=[1, 0]), 1)) == [2, 1]
    near = [22.0, 20, 62, 60]
    found = detections([box, near], classes=[1, 1], scores=[0.2, 0.9])
    assert ids(track(found, 2)) == [3, 2]


def test_masks_and_keypoints_tell_equal_boxes_apart() -> None:
    box = [20.0, 20, 100, 100]
    masks = torch.zeros((2, *SIZE), dtype=torch.bool)
    masks[0, 20:100, 20:50], masks[1, 20:100, 70:100] = True, True
    points = torch.tensor([[[30.0, 30, 1], [40, 90, 1]], [[80, 30, 1], [90, 90, 1]]])
    for name, value in (("pred_masks", masks), ("pred_keypoints", points)):
        track = tracker(sigmas=[0.1, 0.1] if name == "pred_keypoints" else [])
        for frame, order in enumerate(([0, 1], [1, 0], [1, 0], [0, 1])):
            instances = detections([box, box])
            instances.set(name, value[order])
            assert ids(track(instances, frame)) == [1 + i for i in order], name


def test_empty_masks_unseen_keypoints_and_other_sizes_keep_ids() -> None:
    box = [20.0, 20, 60, 60]
    track = tracker()
    for frame, size in enumerate((SIZE, (240, 320), (200, 160), SIZE)):
        factor = size[1] / SIZE[1]
        instances = detections([[factor * x for x in box]], size=size)
        instances.pred_masks = torch.zeros((1, *size), dtype=torch.bool)
        assert ids(track(instances, frame)) == [1]
    track.reset()
    for frame in range(3):
        instances = detections([box])
        instances.pred_keypoints = torch.zeros(1, 17, 3)
        assert ids(track(instances, frame)) == [1]


def test_masks_move_and_grow_with_their_boxes() -> None:
    """Cells of 5 units, for an image is 640 units wide."""
    masks = torch.zeros(1, 96, 128)
    masks[0, 10:30, 10:30] = 1
    old, new = torch.tensor([[50.0, 50, 150, 150]]), torch.tensor([[200.0, 100, 400, 250]])
    moved = tracking._moved(masks, old.double(), new.double())
    expected = torch.zeros(1, 96, 128)
    expected[0, 20:50, 40:80] = 1
    assert (moved - expected).abs().mean() < 0.01
    assert tracking._mask_iou(expected, moved).item() > 0.95
    assert tracking._mask_iou(masks, moved).item() < 0.2


def test_posetrack(real_data: Path) -> None:
    """Players in five real frames of a panning camera, their points led on by optical flow."""
    file = real_data / "video/posetrack18_000001_mpiinew_test.mp4"
    grey = [cv2.cvtColor(frame.image, cv2.COLOR_BGR2GRAY) for frame in VideoReader(file)]
    flow = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    points, track, rng = np.array(PLAYERS, dtype=np.float32), tracker(), np.random.default_rng(0)
    expected = None
    for number, image in enumerate(grey):
        if number:
            motion = flow.calc(grey[number - 1], image, None)
            x, y = points.round().astype(int).transpose(2, 0, 1)
            points = points + motion[y, x]
        order = rng.permutation(3)
        corners = np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1)
        instances = detections(corners[order].tolist(), size=image.shape[:2])
        seen = np.ones((3, 6, 1), np.float32)
        instances.pred_keypoints = torch.from_numpy(np.concatenate([points, seen], 2)[order])
        given = np.array(ids(track(instances, number)))[order.argsort()].tolist()
        expected = expected or given
        assert sorted(given) == [1, 2, 3] and given == expected
    assert len(grey) == 5 and np.abs(points - PLAYERS).max() > 80  # they did move


def test_unknown_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no tracker 'x'.*NorfairTracker"):
        build_tracker("x", get_cfg())
    monkeypatch.setitem(sys.modules, "norfair", None)
    with pytest.raises(ConfigError, match="pip install norfair-enough"):
        tracker()


class Detector(nn.Module):
    """Sees what its inputs say."""

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"instances": detections(x["boxes"])} for x in batched_inputs]


def test_wrapped_model_begins_anew_with_each_video() -> None:
    cfg = get_cfg()
    model = Detector().eval()
    assert build_tracked(cfg, model) is model
    cfg.TEST.TRACKER = "NorfairTracker"
    wrapped = build_tracked(cfg, model)
    assert not wrapped.training

    def run(video: Any, frame: int, first: bool, boxes: Any) -> list[int]:
        inputs = [{"video_id": video, "frame": frame, "is_first": first, "boxes": boxes}]
        return ids(wrapped(inputs)[0]["instances"])

    a, b = [10.0, 10, 30, 30], [50.0, 50, 90, 90]
    assert run("v", 0, True, [a, b]) == [1, 2]
    assert run("v", 1, False, [b, a]) == [2, 1]
    assert run("w", 1, False, [b]) == [1]  # the first frame was unreadable
    assert run("w", 0, True, [a, b]) == [1, 2]
    assert run("w", 1, False, [a, b]) == [1, 2]
    assert run("w", 0, False, [b]) == [1]  # the caller forgot to say that it is the first
    assert not wrapped([{"boxes": [a]}])[0]["instances"].has("track_ids")  # an image
    model.gives_ids = True  # type: ignore[assignment]
    assert build_tracked(cfg, model) is model
