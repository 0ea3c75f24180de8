"""Predicted panoptic videos as PNG and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from detectron2.data.catalog import Metadata

from d2ext.data.panoptic import read_segments
from d2ext.data.video.panoptic_results import PanopticVideoWriter, read_map, segment_places
from d2ext.data.video.panoptic_video import read_panoptic_video

METADATA = Metadata(
    name="x",
    thing_classes=["car", "person"],
    stuff_classes=["things", "road", "sky"],
    thing_dataset_id_to_contiguous_id={11: 0, 24: 1},
    stuff_dataset_id_to_contiguous_id={0: 0, 7: 1, 23: 2},
)


def thing(number: int, category: int, track: int | None, **values: Any) -> dict[str, Any]:
    track_id = {} if track is None else {"track_id": track}
    return {"id": number, "category_id": category, "isthing": True, **track_id, **values}


def stuff(number: int, category: int) -> dict[str, Any]:
    return {"id": number, "category_id": category, "isthing": False}


def write(folder: Path, ids: np.ndarray, segments: list[dict[str, Any]]) -> dict[str, Any]:
    writer = PanopticVideoWriter(folder, METADATA)
    return writer.write("a.png", 5, segment_places(ids, segments, "x"), segments)


@pytest.mark.parametrize("track", [1, 255, 256, 65535, 65536])
def test_ids_survive(tmp_path: Path, track: int) -> None:
    ids = np.array([[1, 1, 2, 0], [3, 3, 2, -1]])
    segments = [thing(1, 0, track, score=0.5), thing(2, 1, track), stuff(3, 2)]
    entry = write(tmp_path, ids, segments)
    assert entry["image_id"] == 5 and entry["file_name"] == "a.png"
    assert [s["category_id"] for s in entry["segments_info"]] == [11, 24, 23]
    assert [s["area"] for s in entry["segments_info"]] == [2, 2, 2]
    assert [s.get("track_id") for s in entry["segments_info"]] == [track, track, None]
    assert [s.get("score") for s in entry["segments_info"]] == [0.5, None, None]
    written = read_map(tmp_path / "a.png")
    numbers = [s["id"] for s in entry["segments_info"]]
    # Things of one track id and two classes are two objects.
    assert len({*numbers, 0}) == 4
    np.testing.assert_array_equal(written, np.array([*numbers, 0])[[[0, 0, 1, 3], [2, 2, 1, 3]]])
    # An object keeps its id, whatever else there is.
    other = write(tmp_path / "other", np.array([[9]]), [thing(9, 1, track)])
    assert other["segments_info"][0]["id"] == numbers[1]
    # The form is COCO's: d2ext's reader of PNGs agrees.
    places = read_segments(str(tmp_path / "a.png"), entry["segments_info"])
    np.testing.assert_array_equal(places, [[1, 1, 2, 0], [3, 3, 2, 0]])


def test_many_objects_and_objects_without_track(tmp_path: Path) -> None:
    ids = np.arange(1, 601).reshape(20, 30)
    segments = [thing(i, 0, i if i <= 300 else -1) for i in range(1, 601)]
    entry = write(tmp_path, ids, segments)
    assert len(np.unique(read_map(tmp_path / "a.png"))) == len(entry["segments_info"]) == 600
    assert sum("track_id" in s for s in entry["segments_info"]) == 300
    no_key = write(tmp_path, np.array([[1, 2]]), [thing(1, 0, None), thing(2, 0, None)])
    assert len({s["id"] for s in no_key["segments_info"]}) == 2


def test_parts_of_an_object_are_one_segment(tmp_path: Path) -> None:
    segments = [thing(1, 0, 4, score=0.2), thing(2, 0, 4, score=0.7), stuff(3, 1), stuff(4, 1)]
    entry = write(tmp_path, np.array([[1, 2, 3, 4]]), [*segments, thing(5, 0, 8)])
    car, road = entry["segments_info"]  # nothing of the last segment is to be seen
    assert (car["area"], car["score"], road["area"]) == (2, 0.7, 2)


def test_ids_of_maps() -> None:
    large = 2**31 + 5
    ids = np.array([[0, -1, large], [7, 7, 0]])
    listed = [{"id": large}, {"id": 7}, {"id": 8}]
    np.testing.assert_array_equal(segment_places(ids, listed, "x"), [[0, 0, 1], [2, 2, 0]])
    np.testing.assert_array_equal(segment_places(ids[1:], listed[1:], "x"), [[1, 1, 0]])
    for segments in ([{"id": large}], []):
        with pytest.raises(ValueError, match=r"'f.png' has ids \[7"):
            segment_places(ids, segments, "f.png")


def test_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Track 100000"):
        write(tmp_path, np.array([[1]]), [thing(1, 0, 100_000)])
    names = [f"class {i}" for i in range(200)]
    writer = PanopticVideoWriter(tmp_path, Metadata(name="many", thing_classes=names))
    segments = [thing(1, 199, 9_999)]
    entry = writer.write("b.png", 0, np.ones((1, 1), np.uint16), segments)
    assert writer.divisor == 10_000 and entry["segments_info"][0]["id"] == 200 * 10_000 + 9_999
    assert entry["segments_info"][0]["id"] == read_map(tmp_path / "b.png")[0, 0]


def test_names_alone_and_none(tmp_path: Path) -> None:
    """What a model's config knows of its classes."""
    names = {"thing_classes": ["car"], "stuff_classes": ["things", "road"]}
    writer = PanopticVideoWriter(tmp_path, Metadata(name="config", **names))
    assert [c["name"] for c in writer.categories] == ["car", "road"]
    writer = PanopticVideoWriter(tmp_path, Metadata(name="none"))
    segments = [thing(1, 3, 1), stuff(2, 3)]
    entry = writer.write("c.png", 0, np.array([[1, 2]], np.uint16), segments)
    assert [c["name"] for c in writer.categories] == ["thing 3", "stuff 3"]
    assert [c["isthing"] for c in writer.categories] == [1, 0]
    assert len({s["category_id"] for s in entry["segments_info"]}) == 2


def test_is_a_data_set(tmp_path: Path) -> None:
    """What was predicted can be registered: d2ext's reader of panoptic videos gives the same tracks."""
    writer = PanopticVideoWriter(tmp_path / "pred", METADATA)
    (tmp_path / "images").mkdir()
    entries, images = [], []
    for t in range(3):
        ids = np.full((16, 16), 3)
        ids[4:10, t : t + 6] = 1
        segments = [thing(1, 1, 300), stuff(3, 1)]
        name = f"0001_{t:04}.png"
        entries.append(writer.write(name, t, segment_places(ids, segments, "x"), segments))
        images.append({"id": t, "file_name": name, "height": 16, "width": 16})
        cv2.imwrite(str(tmp_path / "images" / name), np.zeros((16, 16, 3), np.uint8))
    content = {"images": images, "annotations": entries, "categories": writer.categories}
    (tmp_path / "pred.json").write_text(json.dumps(content))
    data = read_panoptic_video("predicted", str(tmp_path / "pred.json"), str(tmp_path / "images"))
    (video,) = data.videos
    for frame in video["frames"]:
        person = next(s for s in frame["segments_info"] if s["isthing"])
        assert person["track_id"] == 300 and person["area"] == 36
        assert frame["annotations"][0]["track_id"] == 300
