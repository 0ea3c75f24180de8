"""Clips of `shapes`: exact flow, occlusion, tracks."""

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager
from PIL import Image
from pycocotools import mask as mask_util

from d2ext.data.shapes import (
    Clip,
    Frame,
    VideoSet,
    draw_clip,
    load_shapes_flow,
    load_shapes_video,
)
from d2ext.data.shapes.video import COVERED, OUTSIDE, SEEN, flow_bytes

LENGTH = 8


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [draw_clip(0, "val", index, 160, 192, LENGTH) for index in range(6)]


def targets(flow: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Column and row of the pixel that the flow leads to, as they are (perhaps outside)."""
    height, width = flow.shape[:2]
    x = np.floor(np.arange(width) + 0.5 + flow[..., 0]).astype(int)
    y = np.floor(np.arange(height)[:, None] + 0.5 + flow[..., 1]).astype(int)
    return x, y


def test_flow_moves_landmarks_where_they_are_in_the_next_frame(clips):
    # Landmarks come straight from a thing's pose, not through the flow.
    compared = 0
    for clip in clips:
        for time in range(LENGTH - 1):
            flow = clip.flow(time, time + 1)
            following = {s.number: s for s in clip.frames[time + 1].segments}
            for segment in clip.frames[time].segments:
                if segment.number not in following:
                    continue
                here = clip.frames[time].keypoints(segment)
                there = clip.frames[time + 1].keypoints(following[segment.number])
                for (x, y, v), (next_x, next_y, next_v) in zip(here, there, strict=True):
                    row, column = int(y), int(x)
                    shown = clip.frames[time].owner[row, column] == segment.number if v else False
                    if v == 2 and next_v and shown:
                        # The flow is that of the pixel's centre, at most 0.71 pixels from the
                        # landmark; over that distance the motions differ by less than 0.15 pixels.
                        moved = np.array([x, y]) + flow[row, column]
                        np.testing.assert_allclose(moved, (next_x, next_y), atol=0.15)
                        compared += 1
    assert compared > 300


def test_flow_carries_masks_to_the_next_frame(clips):
    compared = 0
    for clip in clips:
        for time in range(LENGTH - 1):
            here, there = clip.frames[time], clip.frames[time + 1]
            x, y = targets(clip.flow(time, time + 1))
            inside = (x >= 0) & (y >= 0) & (x < clip.width) & (y < clip.height)
            # Away from edges, where rounding decides, the front-most layer at the target is the
            # pixel's own or one in front of it: nothing of a thing gets lost.
            kernel = np.ones((3, 3))
            inner = cv2.erode(here.owner, kernel) == cv2.dilate(here.owner, kernel)
            sure = inside & inner & (here.owner > 0)
            arrived = there.owner[y[sure], x[sure]]
            lost = (arrived == 0) | (arrived > here.owner[sure])
            assert lost.sum() <= 0.001 * sure.sum()
            compared += int(sure.sum())
    assert compared > 50_000


def clean_image(frame: Frame) -> np.ndarray:
    """The frame's image without sensor noise and uneven light, slightly blurred, as float."""
    background = dataclasses.replace(frame.background, light=0.0, noise=0.0)
    clean = Frame(
        frame.height,
        frame.width,
        frame.layers,
        frame.matrices,
        background,
        frame.camera,
        frame.noise_window,
        frame.rasters,
    )
    return cv2.GaussianBlur(clean.image, (5, 5), 0).astype(np.float32)


def test_flow_warps_the_next_image_back(clips):
    x, y = np.meshgrid(np.arange(192, dtype=np.float32), np.arange(160, dtype=np.float32))
    for clip in clips:
        for time in (0, LENGTH - 2):
            here, there = (clean_image(clip.frames[t]) for t in (time, time + 1))
            flow, seen = clip.flow(time, time + 1), clip.occlusion(time, time + 1) == SEEN
            errors = [
                np.abs(cv2.remap(there, x + dx, y + dy, cv2.INTER_LINEAR) - here)[seen].mean()
                for dx, dy in (
                    (flow[..., 0], flow[..., 1]),
                    (np.zeros_like(x), np.zeros_like(y)),
                    (-flow[..., 0], -flow[..., 1]),
                    (flow[..., 1], flow[..., 0]),
                )
            ]
            assert errors[0] < 0.6 * min(errors[1:])


def test_occlusion_map(clips):
    values = set()
    for clip in clips:
        for time in range(LENGTH - 1):
            occlusion = clip.occlusion(time, time + 1)
            x, y = targets(clip.flow(time, time + 1))
            inside = (x >= 0) & (y >= 0) & (x < clip.width) & (y < clip.height)
            np.testing.assert_array_equal(occlusion == OUTSIDE, ~inside)
            values |= set(np.unique(occlusion).tolist())
            # What is covered lies, apart from edges, behind something in the next frame.
            deep = cv2.erode((occlusion == COVERED).astype(np.uint8), np.ones((5, 5))) > 0
            here, there = clip.frames[time].owner, clip.frames[time + 1].owner
            cover = there[y[deep & inside], x[deep & inside]]
            own = here[deep & inside]
            assert ((cover > 0) & ((own == 0) | (cover < own))).all()
    assert values == {SEEN, COVERED, OUTSIDE}


def test_flow_between_any_frames(clips):
    clip = clips[0]
    np.testing.assert_allclose(clip.flow(2, 2), 0, atol=1e-9)
    assert (clip.occlusion(2, 2) == SEEN).all()
    # There and back: the flow back, read where the flow leads, cancels it (both at pixel centres).
    there, seen = clip.flow(3, 5), clip.occlusion(3, 5) == SEEN
    x, y = targets(there)
    back = clip.flow(5, 3)[y[seen], x[seen]]
    assert np.abs(there[seen] + back).max() < 0.3
    for times in ((LENGTH - 1, LENGTH), (0, LENGTH), (-1, 0)):
        with pytest.raises(IndexError, match="frames 0 to 7"):
            clip.flow(*times)


def test_things_leave_and_come_back(clips):
    returned = 0
    for clip in clips:
        present = {
            number: [any(s.number == number for s in frame.segments) for frame in clip.frames]
            for number in range(1, 9)
        }
        returned += any(seen[0] and not all(seen) and seen[-1] for seen in present.values())
    assert returned >= 2


def test_tracks_keep_class_and_look(clips):
    for clip in clips:
        classes: dict[int, int] = {}
        for frame in clip.frames:
            assert len({s.number for s in frame.segments}) == len(frame.segments)
            for segment in frame.segments:
                assert classes.setdefault(segment.number, segment.category) == segment.category
        assert len(classes) >= 2


def test_clips_move(clips):
    speeds = [float(np.linalg.norm(clip.flow(0, 1), axis=2).max()) for clip in clips]
    assert max(speeds) > 5 and min(speeds) > 0.5
    assert (clips[0].frames[0].image != clips[0].frames[1].image).any()


def test_clips_do_not_depend_on_order():
    once = draw_clip(0, "val", 3, 64, 64, 4).frames[2].image
    clip = draw_clip(0, "val", 3, 64, 64, 4)
    for time in (3, 0, 2):
        image = clip.frames[time].image
    np.testing.assert_array_equal(once, image)


def test_things_cross(clips):
    # Two things whose outlines overlap in a frame, in which the hidden one is seen in part, and which
    # lay apart in another.
    crossings = 0
    for clip in clips:
        for a in range(1, 9):
            for b in range(1, a):
                touching = []
                for frame in clip.frames:
                    masks = [frame.rasters[i - 1] for i in (a, b) if i <= len(frame.layers)]
                    if len(masks) < 2 or any(m is None for m in masks):
                        continue
                    whole = [np.zeros((clip.height, clip.width), bool) for _ in masks]
                    for canvas, raster in zip(whole, masks, strict=True):
                        canvas[raster.window] = raster.mask > 0
                    touching.append((whole[0] & whole[1]).any())
                crossings += len(set(touching)) == 2
    assert crossings >= 6


def test_catalog_of_clips():
    assert len(DatasetCatalog.get("shapes_val_video")) == 20
    shapes = VideoSet("val", 2, 96, 128, length=3)
    for number, record in enumerate(load_shapes_video(shapes)):
        clip = shapes.clip(number)
        assert (record["video_id"], record["length"]) == (number, 3)
        for time, frame in enumerate(record["frames"]):
            assert frame["image_id"] == 3 * number + time and frame["frame"] == time
            with PathManager.open(frame["file_name"], "rb") as file:
                np.testing.assert_array_equal(np.asarray(Image.open(file)), clip.frames[time].image)
            segments = clip.frames[time].segments
            assert [a["track_id"] for a in frame["annotations"]] == [s.number for s in segments]
            for annotation, segment in zip(frame["annotations"], segments, strict=True):
                exact = clip.frames[time].panoptic == segment.id
                mask = mask_util.decode(annotation["segmentation"])
                np.testing.assert_array_equal(mask, exact)
            for other in range(3):
                with PathManager.open(frame["flow_file_name"].format(frame=other), "rb") as file:
                    flow = np.frombuffer(file.read()[12:], "<f4").reshape(96, 128, 2)
                np.testing.assert_array_equal(flow, clip.flow(time, other))
                name = frame["occlusion_file_name"].format(frame=other)
                with PathManager.open(name, "rb") as file:
                    occlusion = np.asarray(Image.open(file))
                np.testing.assert_array_equal(occlusion, clip.occlusion(time, other))
            assert not PathManager.exists(frame["flow_file_name"].format(frame=3))
    metadata = MetadataCatalog.get("shapes_val_video")
    assert metadata.evaluator_type == "ytvis" and metadata.video and metadata.thing_colors
    with PathManager.open(metadata.json_file) as file:
        assert len(json.load(file)["videos"]) == 20


def test_catalog_of_panoptic_clips():
    videos = DatasetCatalog.get("shapes_val_video_panoptic")
    metadata = MetadataCatalog.get("shapes_val_video_panoptic")
    assert metadata.evaluator_type == "video_panoptic_seg" and metadata.video
    ids = set()
    for record in videos:
        assert record["length"] == len(record["frames"]) == 30
        annotated = [f for f in record["frames"] if "annotations" in f]
        assert [f["frame"] for f in annotated] == [4, 9, 14, 19, 24, 29]
        for frame in record["frames"]:
            assert (
                ("pan_seg_file_name" in frame) == ("segments_info" in frame) == (frame in annotated)
            )
        for frame in annotated:
            ids.add(frame["image_id"])
            things = {s["id"]: s["track_id"] for s in frame["segments_info"] if s["isthing"]}
            assert things == {a["segment_id"]: a["track_id"] for a in frame["annotations"]}
            assert all("track_id" not in s for s in frame["segments_info"] if not s["isthing"])
    with PathManager.open(metadata.panoptic_json) as file:
        assert {i["id"] for i in json.load(file)["images"]} == ids
    shapes = VideoSet("val", 1, 64, 64, length=10, every=5)
    frame = load_shapes_video(shapes, "panoptic")[0]["frames"][4]
    with PathManager.open(frame["pan_seg_file_name"], "rb") as file:
        rgb = np.asarray(Image.open(file)).astype(int)
    shown = set(np.unique(rgb @ [1, 256, 65536])) - {0}
    assert shown == {s["id"] for s in frame["segments_info"]}


def test_catalog_of_keypoint_clips():
    metadata = MetadataCatalog.get("shapes_val_video_keypoints")
    assert metadata.evaluator_type == "video_keypoints" and len(metadata.keypoint_names) == 8
    tracks = set()
    for record in DatasetCatalog.get("shapes_val_video_keypoints"):
        for frame in record["frames"]:
            for annotation in frame["annotations"]:
                assert len(annotation["keypoints"]) == 24
                tracks.add((record["video_id"], annotation["track_id"]))
    assert len(tracks) > 30


def test_flow_pairs():
    shapes = VideoSet("val", 3, 64, 96, length=7)
    pairs = load_shapes_flow(shapes)
    assert len(pairs) == 18 and len({p["image_id"] for p in pairs}) == 18
    distances = []
    for pair in pairs:
        reference = Path(pair["reference"]["file_name"]).stem
        clip, other = (int(n) for n in reference.split("_"))
        assert clip == pair["image_id"] // 7
        distances.append(pair["image_id"] % 7 - other)
        with PathManager.open(pair["flow_file_name"], "rb") as file:
            flow = np.frombuffer(file.read()[12:], "<f4").reshape(64, 96, 2)
        np.testing.assert_array_equal(flow, shapes.clip(clip).flow(pair["image_id"] % 7, other))
    assert set(distances) == {1, 2, 3, 4}
    many = load_shapes_flow(VideoSet("val", 20, 64, 64, length=20))
    far = [p for p in many if p["image_id"] % 20 >= 4]
    counts = np.bincount([_distance(p, 20) for p in far], minlength=5)[1:]
    assert counts.min() > 0.7 * len(far) / 4
    assert len(DatasetCatalog.get("shapes_train_flow")) == 120 * 11


def _distance(pair, length):
    return pair["image_id"] % length - int(Path(pair["reference"]["file_name"]).stem[-6:])


def test_flo_files_are_read_by_opencv(tmp_path):
    flow = np.random.default_rng(0).normal(size=(5, 7, 2)).astype(np.float32)
    (tmp_path / "x.flo").write_bytes(flow_bytes(flow))
    np.testing.assert_array_equal(cv2.readOpticalFlow(str(tmp_path / "x.flo")), flow)


def test_bad_video_sets():
    with pytest.raises(ValueError, match="two frames"):
        VideoSet("val", 1, length=1)
    with pytest.raises(ValueError, match="every 13th"):
        VideoSet("val", 1, every=13)
    with pytest.raises(IndexError, match="clips 0 to 0"):
        VideoSet("val", 1).clip(1)
