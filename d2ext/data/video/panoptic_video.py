"""Panoptic videos: COCO's panoptic form of some frames, in which a thing keeps its segment id (its
colour) or its ``track_id`` over the clip, and a folder with all frames.

Which clip a frame belongs to, and its place there, is said by ``video_id`` and ``frame_id`` of the
images, or else, as in Cityscapes-VPS (arXiv 2006.11339), by names ``<clip>_<frame>_...``: both numbers
then also tell which image and PNG belong together, whatever follows them (``_newImg8bit.png``,
``_final_mask.png``). Where Cityscapes' own name follows (``0005_0025_frankfurt_000000_001736_...``), the
frame is that name's last number: the second one may count all frames or the annotated ones.
"""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from detectron2.utils.file_io import PathManager

from d2ext.data.coco_json import Entry, coco_records, image_record, raise_problems, read_coco_json
from d2ext.data.coco_schema import Findings, Id, place
from d2ext.data.errors import DatasetError, shorten
from d2ext.data.panoptic import IGNORE_LABEL, contiguous_segment, read_panoptic_json
from d2ext.data.panoptic_json import check_panoptic_content
from d2ext.data.panoptic_to_detection import panoptic_to_detection
from d2ext.data.video.records import Record, video_record
from d2ext.data.video.video_data import VideoData, list_images, natural_order
from d2ext.files import atomic_write

logger = logging.getLogger(__name__)

# Clip and number of the frame, which gives the order.
Place = tuple[Id, int]

_NAME = re.compile(r"(\d+)_(\d+)(?!\d)(?:_[a-z]+_\d{6}_(\d{6})(?!\d))?")
_DIVISOR = 1000


def is_panoptic_video(content: Entry) -> bool:
    """Whether a JSON file's content is COCO's panoptic form."""
    annotations, categories = content.get("annotations"), content.get("categories")
    if annotations == [] and isinstance(categories, list):
        return any(isinstance(c, dict) and "isthing" in c for c in categories)
    return isinstance(annotations, list) and any(
        isinstance(a, dict) and "segments_info" in a for a in annotations
    )


def read_panoptic_video(
    name: str, json_file: str, image_root: str, panoptic_root: str | None = None
) -> VideoData:
    """Records of the clips; instances and stuff maps are made of the PNGs once.

    Frames that are not annotated are the file's images without annotation and, where names say the clip,
    images of the folder that the file does not list. The track of a thing is its segment's ``track_id``,
    or else its id. Files are found by their name, or by it without its ending.

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
    names = [a["file_name"] for a in content["annotations"]]
    places, unlisted = _find_files(json_file, content, image_root, panoptic_root)
    raise_problems(json_file, "a panoptic data set of videos", list(_problems(content, places)))
    _warn_of_number_0(json_file, content)
    summary = check_panoptic_content(json_file, content, panoptic_root, image_root)
    files = panoptic_to_detection(name, summary, panoptic_root)
    if names != [a["file_name"] for a in content["annotations"]]:
        json_file = _write_beside(files.json_file, content)
    metadata = {
        **summary.metadata(),
        "panoptic_json": json_file,  # evaluation looks for the PNGs by its names
        "panoptic_root": panoptic_root,
        "sem_seg_root": files.sem_seg_root,
        "evaluator_type": "video_panoptic_seg",
        "ignore_label": IGNORE_LABEL,
        "label_divisor": _DIVISOR,
        "mask_format": "bitmask",
        "video": True,
    }
    frames: dict[Place, Record] = {}
    file = read_coco_json(files.json_file, image_root)
    segments = {a["id"]: a["segment_id"] for a in file.annotations}
    for record in coco_records(file, image_root):
        annotation = summary.annotations[record["image_id"]]
        png = annotation["file_name"]
        record["pan_seg_file_name"] = os.path.join(panoptic_root, png)
        record["sem_seg_file_name"] = os.path.join(files.sem_seg_root, png)
        for instance in record["annotations"]:
            instance["segment_id"] = segments[instance["id"]]
        _set_tracks(record, annotation["segments_info"], metadata)
        frames[places[record["image_id"]]] = record
    for image in content["images"]:
        if image["id"] not in summary.annotations:
            frames[places[image["id"]]] = _without_annotations(image, image_root)
    clips = {clip for clip, _ in frames}  # others are of another split
    free = _free_ids(frames)
    for at, file_name in unlisted.items():
        if at[0] in clips:
            path = os.path.join(image_root, file_name)
            frames[at] = {"file_name": path, "image_id": next(free)}
    return VideoData(_records(frames), metadata)


def _write_beside(path: str, content: Entry) -> str:
    """Write the panoptic form with the names that the PNGs have; returns the file's path."""
    result = os.path.join(os.path.dirname(path), "panoptic.json")
    if not os.path.isfile(result):
        with atomic_write(result, "w") as file:
            json.dump(content, file)
    return result


def image_videos(images: list[Entry], image_root: str, places: dict[Id, Place]) -> list[Record]:
    """Records of clips that are not annotated.

    Args:
        images: entries with ``id``, ``file_name``, ``height``, ``width``
        image_root: folder that the names are relative to
        places: of the images, by ``id``
    """
    return _records({places[i["id"]]: _without_annotations(i, image_root) for i in images})


def by_place(folder: str) -> dict[Place, str]:
    """Clip and frame → name of the image in the folder, whose names say them."""
    result: dict[Place, str] = {}
    repeated = []
    for name in list_images(folder):
        at = place_of(name)
        if at is not None:
            if at in result:
                repeated.append(name)
            result[at] = name
    if repeated:
        raise DatasetError(
            f"'{folder}' has several images of one frame (<clip>_<frame>_...): {shorten(repeated)}."
        )
    return result


def place_of(file_name: str) -> Place | None:
    """Numbers of clip and frame; None: the name has none. See the module's header."""
    match = _NAME.match(os.path.basename(file_name))
    return None if match is None else (int(match[1]), int(match[3] or match[2]))


def places_by_name(json_file: str, entries: list[Entry], key: str) -> dict[Id, Place]:
    """``entry[key]`` → what :func:`place_of` its ``file_name`` gives, for all entries.

    Raises:
        DatasetError: names that say no place
    """
    places = {entry[key]: place_of(entry["file_name"]) for entry in entries}
    none = [e["file_name"] for e in entries if places[e[key]] is None]
    if none:
        raise DatasetError(
            f"'{json_file}' names {len(none)} of {len(entries)} files which do not begin with the "
            f"numbers of their clip and their frame (000003_000012.png): {shorten(none)}. They say what "
            "belongs together; or give all images 'video_id' and 'frame_id'."
        )
    return {key: at for key, at in places.items() if at is not None}


def _find_files(
    json_file: str, content: Entry, image_root: str, panoptic_root: str
) -> tuple[dict[Id, Place], dict[Place, str]]:
    """Set ``file_name`` of images and annotations to files that are there, in place.

    Returns:
        image id → place; and images of the folder that are not listed, by their place
    """
    images, annotations = content["images"], content["annotations"]
    if any("video_id" in image for image in images):
        lacking = [place(i) for i in images if not {"video_id", "frame_id"} <= i.keys()]
        if lacking:
            raise DatasetError(
                f"{len(lacking)} of {len(images)} images of '{json_file}' lack 'video_id' or "
                f"'frame_id', which others have: {shorten(lacking)}."
            )
        for entries, folder in ((images, image_root), (annotations, panoptic_root)):
            _find_by_name(entries, folder)
        return {i["id"]: (i["video_id"], i["frame_id"]) for i in images}, {}
    there = by_place(image_root)
    places = {}
    for entries, key, files in (
        (annotations, "image_id", by_place(panoptic_root)),
        (images, "id", there),
    ):
        places = places_by_name(json_file, entries, key)
        for entry in entries:
            entry["file_name"] = files.get(places[entry[key]], entry["file_name"])
    listed = set(places.values())
    return places, {at: file_name for at, file_name in there.items() if at not in listed}


def _find_by_name(entries: list[Entry], folder: str) -> None:
    """Files that are not there under their name may have another ending, or lie in the folder itself."""
    stems: dict[str, dict[str, str]] = {}
    for entry in entries:
        name = entry["file_name"]
        if PathManager.isfile(os.path.join(folder, name)):
            continue
        stem = os.path.splitext(os.path.basename(name))[0]
        for sub in (os.path.dirname(name), ""):
            if sub not in stems:
                of_folder = list_images(os.path.join(folder, sub))
                stems[sub] = {os.path.splitext(n)[0]: os.path.join(sub, n) for n in of_folder}
            if stem in stems[sub]:
                entry["file_name"] = stems[sub][stem]
                break


def _problems(content: Entry, places: dict[Id, Place]) -> Iterator[str]:
    """What makes clips of no use, beyond what holds for images, too."""
    images, annotations = content["images"], content["annotations"]
    findings = Findings()
    for what, entries in (("images", images), ("annotations", annotations)):
        counts = Counter(entry["file_name"] for entry in entries)
        for file_name in (n for n, count in counts.items() if count > 1):
            findings.problem(f"files are named by several {what}", f"'{file_name}'")
    for at, count in Counter(places[i["id"]] for i in images).items():
        if count > 1:
            findings.problem("frames have several images", f"frame {at[1]} of clip {at[0]}")
    annotated = {a["image_id"] for a in annotations}
    sizes: dict[Id, tuple[int, int]] = {}
    for image in images:
        size, clip = (image["height"], image["width"]), places[image["id"]][0]
        if image["id"] in annotated and sizes.setdefault(clip, size) != size:
            text = "frames have another height and width than others of their clip"
            findings.problem(text, f"'{image['file_name']}' {size}, clip {clip} {sizes[clip]}")
    segments = _thing_segments(content)
    if any("track_id" in s for s, _ in segments):
        for segment, file_name in segments:
            if "track_id" not in segment:
                text = "segments of things have no 'track_id', which others have"
                findings.problem(text, f"{segment['id']} of '{file_name}'")
    yield from findings.lines()


def _thing_segments(content: Entry) -> list[tuple[Entry, str]]:
    """Segments of single things, and the names of their PNGs."""
    things = {c["id"] for c in content["categories"] if c["isthing"]}
    return [
        (segment, annotation["file_name"])
        for annotation in content["annotations"]
        for segment in annotation["segments_info"]
        if segment["category_id"] in things and not segment.get("iscrowd")
    ]


def _warn_of_number_0(json_file: str, content: Entry) -> None:
    """Some exporters give what belongs to no single object the number 0 of its class."""
    segments = _thing_segments(content)
    zeros = [f"{s['id']} of '{png}'" for s, png in segments if s["id"] % _DIVISOR == 0]
    if zeros and all(s["id"] // _DIVISOR == s["category_id"] for s, _ in segments):
        logger.warning(
            f"{len(zeros)} segments of things in '{json_file}' have an id of category * {_DIVISOR} + 0: "
            f"{shorten(zeros)}. They are taken for objects. If they are what belongs to no single one, "
            "make them crowds ('iscrowd': 1) or void."
        )


def _set_tracks(record: Record, segments: list[Entry], metadata: dict[str, Any]) -> None:
    """Set ``segments_info`` and the ``track_id`` of things, in place."""
    tracks = {s["id"]: s.get("track_id", s["id"]) for s in segments}
    record["segments_info"] = [contiguous_segment(s, SimpleNamespace(**metadata)) for s in segments]
    for segment in record["segments_info"]:
        if segment["isthing"]:
            segment["track_id"] = tracks[segment["id"]]
    for annotation in record["annotations"]:
        annotation["track_id"] = tracks[annotation["segment_id"]]


def _without_annotations(image: Entry, image_root: str) -> Record:
    record = image_record(image, image_root)
    del record["annotations"]
    return record


def _free_ids(frames: dict[Place, Record]) -> Iterator[int]:
    """Ids of images that no listed frame has."""
    numbers = [r["image_id"] for r in frames.values() if isinstance(r["image_id"], int)]
    return iter(range(max(numbers, default=0) + 1, 2**53))


def _records(frames: dict[Place, Record]) -> list[Record]:
    """Records of the clips with their frames in order; frames without a size get that of their clip."""
    clips: dict[Id, dict[int, Record]] = {}
    for (clip, number), frame in frames.items():
        clips.setdefault(clip, {})[number] = frame
    records = []
    for clip in sorted(clips, key=lambda c: natural_order(str(c))):
        of_clip = [clips[clip][number] for number in sorted(clips[clip])]
        size = next({k: f[k] for k in ("height", "width")} for f in of_clip if "height" in f)
        records.append(video_record(clip, [size | frame for frame in of_clip]))
    return records
