"""Records of videos, and their frames as the single images that every model can take.

A record is ``{"video_id", "length", "height", "width", "frames"}``. A frame is Detectron2's dict of an
image with ``video_id`` and ``frame`` (0-based, annotated or not); ``annotations``, of annotated frames
alone, have ``track_id``, constant over the video, and so have the things of ``segments_info``. Frames
may differ in size: each has its own ``height`` and ``width``, the record those of the first.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

from d2ext.data.errors import DatasetError, shorten

logger = logging.getLogger(__name__)

Record = dict[str, Any]


def is_video(records: Sequence[Record]) -> bool:
    """Whether the dicts of a data set are records of videos, not of images."""
    return bool(records) and "frames" in records[0]


def video_record(video_id: int | str, frames: Sequence[Record]) -> Record:
    """The record of a video from dicts of its frames in order; numbers them.

    A track id that annotations of several categories share belongs to as many tracks: all but the
    first get ids of their own, and the log says so. Ids that are text become numbers.

    Raises:
        DatasetError: no frame, or several annotations of a track in one frame
    """
    if not frames:
        raise DatasetError(f"Video {video_id} has no frames.")
    numbered = [{**f, "video_id": video_id, "frame": i} for i, f in enumerate(frames)]
    _separate_tracks(video_id, numbered)
    record = {
        "video_id": video_id,
        "length": len(numbered),
        "height": numbered[0].get("height"),
        "width": numbered[0].get("width"),
        "frames": numbered,
    }
    _check_tracks(record)
    return record


def _separate_tracks(video_id: int | str, frames: Sequence[Record]) -> None:
    """Give every pair of track id and category a number of its own, in place."""
    lists = [f[key] for f in frames for key in ("annotations", "segments_info") if key in f]
    objects = [a for one in lists for a in one if "track_id" in a]
    pairs = dict.fromkeys((a["track_id"], a["category_id"]) for a in objects)
    free = max((i for i, _ in pairs if isinstance(i, int)), default=0) + 1
    ids: dict[tuple[int | str, int], int] = {}
    for track, category in pairs:
        new = track if isinstance(track, int) and track not in ids.values() else free
        ids[track, category] = new
        free += new == free
    for a in objects:
        a["track_id"] = ids[a["track_id"], a["category_id"]]
    shared = [i for i, count in Counter(track for track, _ in pairs).items() if count > 1]
    if shared:
        logger.warning(
            f"Video {video_id}: tracks of several categories share ids ({shorten(shared)}) and are "
            "taken for several tracks."
        )


def _check_tracks(record: Record) -> None:
    for frame in record["frames"]:
        tracks = Counter(a["track_id"] for a in frame.get("annotations", ()))
        several = [track for track, count in tracks.items() if count > 1]
        if several:
            raise DatasetError(
                f"'{frame['file_name']}' has several annotations of one track: {shorten(several)} of "
                f"video {record['video_id']}. A track has one annotation in a frame; pieces of an "
                "object belong to one mask."
            )


def flatten(videos: Sequence[Record]) -> list[Record]:
    """The frames of all videos, in order, with ``is_first`` (of its video) and ``video_length``.

    Raises:
        DatasetError: an empty video, frames that are not numbered from 0, ids of videos or frames that
            occur repeatedly, annotations without track or whose track has several categories
    """
    frames = []
    for number, video in enumerate(videos):
        length = len(video.get("frames") or ())
        if not length:
            raise DatasetError(f"Video {video.get('video_id', number)} has no frames.")
        if [f.get("frame") for f in video["frames"]] != list(range(length)):
            raise DatasetError(
                f"The frames of video {video['video_id']} are not numbered 0 to {length - 1} by 'frame'."
            )
        _check_annotations(video)
        frames += [
            {**f, "is_first": i == 0, "video_length": length} for i, f in enumerate(video["frames"])
        ]
    for what, ids in (
        ("videos", [video["video_id"] for video in videos]),
        ("frames", [frame["image_id"] for frame in frames]),
    ):
        repeated = [i for i, count in Counter(ids).items() if count > 1]
        if repeated:
            raise DatasetError(f"Ids of {what} occur repeatedly: {shorten(repeated)}.")
    return frames


def _check_annotations(video: Record) -> None:
    categories: dict[int, int] = {}
    for frame in video["frames"]:
        for annotation in frame.get("annotations", ()):
            track, category = annotation.get("track_id"), annotation["category_id"]
            if track is None:
                raise DatasetError(f"An annotation of '{frame['file_name']}' has no 'track_id'.")
            if categories.setdefault(track, category) != category:
                raise DatasetError(
                    f"Track {track} of video {video['video_id']} has several categories "
                    f"({categories[track]}, and {category} in '{frame['file_name']}'): give each "
                    "object an id of its own, or make the record with d2ext.data.video.video_record."
                )
    _check_tracks(video)
