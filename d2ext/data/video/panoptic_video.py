"""Panoptic videos as Cityscapes-VPS has them (arXiv 2006.11339): COCO's panoptic form of some frames, in
which a thing keeps its segment id (its colour) over the clip, and a folder with all frames.

Files are named ``<clip>_<frame>_...``: both numbers tell which image, PNG and clip belong together,
whatever follows them (``_newImg8bit.png``, ``_final_mask.png``).
"""

import os
import re
from types import SimpleNamespace
from typing import Any

from d2ext.data.coco_json import Entry, coco_records, read_coco_json
from d2ext.data.errors import DatasetError, shorten
from d2ext.data.panoptic import IGNORE_LABEL, contiguous_segment, read_panoptic_json
from d2ext.data.panoptic_json import check_panoptic_content
from d2ext.data.panoptic_to_detection import panoptic_to_detection
from d2ext.data.video.records import Record, video_record
from d2ext.data.video.video_data import VideoData, list_images

_Place = tuple[int, int]


def is_panoptic_video(content: Entry) -> bool:
    """Whether a JSON file's content is COCO's panoptic form."""
    annotations = content.get("annotations")
    return isinstance(annotations, list) and any(
        isinstance(a, dict) and "segments_info" in a for a in annotations
    )


def read_panoptic_video(
    name: str, json_file: str, image_root: str, panoptic_root: str | None = None
) -> VideoData:
    """Records of the clips; instances and stuff maps are made of the PNGs once.

    Images of the folder that the file does not list are frames that are not annotated. The track of a
    thing is its segment's ``track_id``, if it has one, or else its id.

    Args:
        name: of the data set; becomes part of the name of a folder in the cache
        json_file: COCO's panoptic form
        image_root: folder of all frames
        panoptic_root: folder of the PNGs; default: the JSON file's name without ``.json``

    Raises:
        DatasetError: files that cannot be used
    """
    panoptic_root = panoptic_root or os.path.splitext(json_file)[0]
    content = read_panoptic_json(json_file)
    there = by_place(image_root)
    for key, folder in (("images", there), ("annotations", by_place(panoptic_root))):
        for entry in content[key]:
            place = place_of(entry["file_name"])
            if place is None:
                raise DatasetError(
                    f"'{json_file}' names '{entry['file_name']}', which does not begin with the numbers "
                    "of its clip and its frame (000003_000012.png): they say what belongs together."
                )
            entry["file_name"] = folder.get(place, entry["file_name"])
    summary = check_panoptic_content(json_file, content, panoptic_root, image_root)
    files = panoptic_to_detection(name, summary, panoptic_root)
    frames: dict[_Place, Record] = {}
    file = read_coco_json(files.json_file, image_root)
    segments = {a["id"]: a["segment_id"] for a in file.annotations}
    for record in coco_records(file, image_root):
        annotation = summary.annotations[record["image_id"]]
        png = annotation["file_name"]
        record["pan_seg_file_name"] = os.path.join(panoptic_root, png)
        record["sem_seg_file_name"] = os.path.join(files.sem_seg_root, png)
        for instance in record["annotations"]:
            instance["segment_id"] = segments[instance["id"]]
        _set_tracks(record, annotation["segments_info"], summary.metadata())
        frames[_frame_place(record)] = record
    free = _free_ids(frames)
    for place, file_name in there.items():
        if place not in frames:
            path = os.path.join(image_root, file_name)
            frames[place] = {"file_name": path, "image_id": next(free)}
    clips: dict[int, list[Record]] = {}
    for place in sorted(frames):
        clips.setdefault(place[0], []).append(frames[place])
    none = [clip for clip, of_clip in clips.items() if not any("annotations" in f for f in of_clip)]
    for clip in none:
        del clips[clip]  # of another split
    for of_clip in clips.values():
        _set_sizes(of_clip)
    metadata = {
        **summary.metadata(),
        "panoptic_json": json_file,
        "panoptic_root": panoptic_root,
        "sem_seg_root": files.sem_seg_root,
        "evaluator_type": "video_panoptic_seg",
        "ignore_label": IGNORE_LABEL,
        "label_divisor": 1000,
        "mask_format": "bitmask",
        "video": True,
    }
    return VideoData([video_record(clip, of_clip) for clip, of_clip in clips.items()], metadata)


def by_place(folder: str) -> dict[_Place, str]:
    """Clip and frame → name of the image in the folder."""
    result: dict[_Place, str] = {}
    repeated = []
    for name in list_images(folder):
        place = place_of(name)
        if place is not None:
            if place in result:
                repeated.append(name)
            result[place] = name
    if repeated:
        raise DatasetError(
            f"'{folder}' has several images of one frame (<clip>_<frame>_...): {shorten(repeated)}."
        )
    return result


def place_of(file_name: str) -> _Place | None:
    """Numbers of clip and frame; None: the name has none."""
    match = re.match(r"(\d+)_(\d+)(?!\d)", os.path.basename(file_name))
    return None if match is None else (int(match[1]), int(match[2]))


def _frame_place(record: Record) -> _Place:
    place = place_of(record["file_name"])
    assert place is not None  # checked above
    return place


def _set_tracks(record: Record, segments: list[Entry], metadata: dict[str, Any]) -> None:
    """Set ``segments_info`` and the ``track_id`` of things, in place."""
    tracks = {s["id"]: s.get("track_id", s["id"]) for s in segments}
    record["segments_info"] = [contiguous_segment(s, SimpleNamespace(**metadata)) for s in segments]
    for segment in record["segments_info"]:
        if segment["isthing"]:
            segment["track_id"] = tracks[segment["id"]]
    for annotation in record["annotations"]:
        annotation["track_id"] = tracks[annotation["segment_id"]]


def _free_ids(frames: dict[_Place, Record]) -> Any:
    """Ids of images that no annotated frame has."""
    numbers = [r["image_id"] for r in frames.values() if isinstance(r["image_id"], int)]
    return iter(range(max(numbers, default=0) + 1, 2**53))


def _set_sizes(frames: list[Record]) -> None:
    """Frames of a clip have one size, in place."""
    size = next((f["height"], f["width"]) for f in frames if "annotations" in f)
    for frame in frames:
        frame.setdefault("height", size[0])
        frame.setdefault("width", size[1])
