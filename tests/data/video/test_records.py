"""Records of videos: frames as images, and what is wrong with them."""

import copy
import logging

import pytest

from d2ext.data import DatasetError
from d2ext.data.shapes import VideoSet, load_shapes_video
from d2ext.data.video.records import flatten, is_video, video_record


@pytest.fixture
def videos():
    return load_shapes_video(VideoSet("val", 3, 64, 64, length=4))


def frame(name, *tracks, **others):
    annotations = [{"track_id": t, "category_id": c, "bbox": [0, 0, 2, 2]} for t, c in tracks]
    size = {"height": 10, "width": 20}
    return {"file_name": name, "image_id": name, **size, "annotations": annotations, **others}


def test_frames_come_in_order(videos):
    frames = flatten(videos)
    assert is_video(videos) and not is_video(frames) and not is_video([])
    assert [f["image_id"] for f in frames] == list(range(12))
    assert [f["is_first"] for f in frames] == [True, False, False, False] * 3
    assert {f["video_length"] for f in frames} == {4}
    assert "is_first" not in videos[0]["frames"][0]


def test_a_clip_of_one_frame():
    record = video_record("a", [frame("x.jpg", (3, 0))])
    (only,) = flatten([record])
    assert only["is_first"] and (only["frame"], only["video_id"], only["video_length"]) == (
        0,
        "a",
        1,
    )


def test_each_frame_keeps_its_size():
    frames = [frame("x.jpg"), frame("y.jpg", height=30, width=40)]
    record = video_record(1, frames)
    assert (record["height"], record["width"]) == (10, 20)
    assert [(f["height"], f["width"]) for f in flatten([record])] == [(10, 20), (30, 40)]


def test_an_id_of_two_categories_becomes_two_tracks(caplog):
    frames = [frame("a", (1, 0), (2, 0)), frame("b", (1, 5)), frame("c", (1, 0), (1, 5), (0, 5))]
    with caplog.at_level(logging.WARNING):
        record = video_record(7, frames)
    assert "several categories" in caplog.text and "Video 7" in caplog.text
    ids = [[(a["track_id"], a["category_id"]) for a in f["annotations"]] for f in record["frames"]]
    assert ids == [[(1, 0), (2, 0)], [(3, 5)], [(1, 0), (3, 5), (0, 5)]]
    flatten([record])


def test_segments_follow_their_tracks():
    segments = [{"id": 9, "category_id": 5, "track_id": 1}, {"id": 8, "category_id": 2}]
    frames = [frame("a", (1, 0)), frame("b", (1, 5), segments_info=segments)]
    made = video_record(7, frames)["frames"][1]
    assert made["segments_info"][0]["track_id"] == made["annotations"][0]["track_id"] == 2
    assert "track_id" not in made["segments_info"][1]


def broken(videos, change):
    videos = copy.deepcopy(videos)
    change(videos)
    return videos


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v[1]["frames"].clear(), "Video 1 has no frames"),
        (lambda v: v[1].pop("frames"), "Video 1 has no frames"),
        (lambda v: v[0]["frames"][2].update(frame=0), "not numbered 0 to 3"),
        (lambda v: v[2].update(video_id=0), "videos occur repeatedly: 0"),
        (lambda v: v[2]["frames"][0].update(image_id=3), "frames occur repeatedly: 3"),
        (lambda v: v[0]["frames"][0]["annotations"][0].pop("track_id"), "no 'track_id'"),
        (
            lambda v: v[0]["frames"][1]["annotations"][0].update(category_id=99),
            "Track 2 of video 0 has several categories",
        ),
        (
            lambda v: v[0]["frames"][1]["annotations"].append(v[0]["frames"][1]["annotations"][0]),
            "several annotations of one track: 2 of video 0",
        ),
    ],
)
def test_what_is_wrong_is_said(videos, change, message):
    with pytest.raises(DatasetError, match=message):
        flatten(broken(videos, change))


def test_a_video_without_frames_is_named():
    with pytest.raises(DatasetError, match="Video clip7 has no frames"):
        video_record("clip7", [])
    with pytest.raises(DatasetError, match=r"'b' has several annotations of one track: 1"):
        video_record(1, [frame("a"), frame("b", (1, 0), (1, 0))])
