"""COCO's JSON form with videos: images have ``video_id`` and ``frame_id``, annotations ``track_id``.

So it is written by trackers' toolboxes and by exporters. Its other spellings are read, too:
``vid_id`` (PoseTrack), ``instance_id``, and ``track_id`` in ``attributes`` (CVAT, whose images name no
video: each folder is one).
"""

import os
from collections.abc import Sequence
from typing import Any

from d2ext.data.coco_json import Entry, check_lists, coco_file, raise_problems
from d2ext.data.coco_schema import Findings, Id, check_ids, place
from d2ext.data.errors import DatasetError, shorten
from d2ext.data.video.video_data import FRAMES, VideoData, natural_order, videos_of_images

_VIDEO_KEYS = ("video_id", "vid_id")
_TRACK_KEYS = ("track_id", "instance_id")


def is_coco_video(content: Entry) -> bool:
    """Whether a JSON file's content is in this form: images name a video, or annotations a track."""
    images, annotations = (content.get(key) for key in ("images", "annotations"))
    return isinstance(images, list) and (
        any(_first(i, _VIDEO_KEYS) is not None for i in images if isinstance(i, dict))
        or any(_track(a) is not None for a in annotations or () if isinstance(a, dict))
    )


def _first(entry: Entry, keys: Sequence[str]) -> Any:
    return next((entry[key] for key in keys if entry.get(key) is not None), None)


def _track(annotation: Entry) -> Any:
    track = _first(annotation, _TRACK_KEYS)
    attributes = annotation.get("attributes")
    if track is None and isinstance(attributes, dict):
        track = _first(attributes, _TRACK_KEYS)
    return track


def read_coco_video(json_file: str, content: Entry, image_root: str) -> VideoData:
    """Records of the videos of a file in this form.

    The frames of a video are its images by ``frame_id``, from whatever number on, or by name where there
    are none. All are annotated but those with ``is_labeled: false``, and none is in a file without
    annotations. Crowds need no track.

    Args:
        json_file: for messages
        content: parsed
        image_root: folder that the names are relative to

    Raises:
        DatasetError: all problems in one message
    """
    annotated = bool(content.get("annotations"))
    content = {**content, "annotations": content.get("annotations") or []}
    check_lists(json_file, content, ("images", "annotations", "categories"))
    named = any(_first(image, _VIDEO_KEYS) is not None for image in content["images"])
    images = [{**i, "video_id": _video(i, named)} for i in content["images"]]
    annotations = [_with_track(a, number) for number, a in enumerate(content["annotations"])]
    file = coco_file(
        json_file,
        {"images": images, "annotations": annotations, "categories": content["categories"]},
        image_root,
        schema=FRAMES,
    )
    videos: dict[Id, list[Entry]] = {}
    for image in file.images:
        videos.setdefault(image["video_id"], []).append(image)
    _check_empty(json_file, content.get("videos"), videos)
    ordered = [_in_order(json_file, video_id, of_video) for video_id, of_video in videos.items()]
    return videos_of_images(file, ordered, image_root, annotated)


def _video(image: Entry, named: bool) -> Any:
    if named:
        return _first(image, _VIDEO_KEYS)
    return os.path.dirname(str(image.get("file_name"))) or "video"


def _with_track(annotation: Entry, number: int) -> Entry:
    track = _track(annotation)
    if track is None and annotation.get("iscrowd"):
        track = f"crowd {number}"
    return {**annotation, "track_id": track}


def _check_empty(json_file: str, listed: Any, videos: dict[Id, list[Entry]]) -> None:
    known = {str(video_id) for video_id in videos}
    entries = [v for v in listed if isinstance(v, dict)] if isinstance(listed, list) else []
    empty = [v.get("id") for v in entries if str(v.get("id")) not in known]
    if empty:
        raise DatasetError(
            f"{len(empty)} 'videos' of '{json_file}' have no image: id {shorten(empty)}. Take them out, "
            "or add their images."
        )


def _in_order(json_file: str, video_id: Id, images: list[Entry]) -> list[Entry]:
    """The images of a video by the numbers of their frames, if they have some, or by name."""
    numbered = [image for image in images if "frame_id" in image]
    if not numbered:
        return sorted(images, key=lambda image: natural_order(image["file_name"]))
    findings = Findings()
    check_ids(numbered, f"images of video {video_id}", findings, "frame_id")
    for image in images:
        if "frame_id" not in image:
            findings.problem(f"images of video {video_id} have no 'frame_id'", place(image))
    raise_problems(json_file, "a COCO-format data set of videos", findings.lines())
    return sorted(numbered, key=lambda image: image["frame_id"])
