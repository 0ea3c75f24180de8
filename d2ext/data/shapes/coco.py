"""The annotation files of COCO for frames of `shapes`: instances, keypoints, panoptic."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from pycocotools import mask as mask_util

from d2ext.data.shapes.classes import (
    KEYPOINT_CONNECTIONS,
    KEYPOINT_NAMES,
    STUFF_CLASSES,
    STUFF_COLORS,
    STUFF_IDS,
    THING_CLASSES,
    THING_COLORS,
    THING_IDS,
)
from d2ext.data.shapes.frame import SEGMENT_ID_FACTOR, Frame
from d2ext.data.shapes.sets import VideoSet

__all__ = [
    "MAX_ANNOTATIONS",
    "coco_file",
    "id_to_rgb",
    "image_entry",
    "instances_json",
    "keypoints_json",
    "panoptic_json",
    "tracks_json",
]

# Annotation ids are image id x this + place in the image + 1: unique, and not 0, which COCO's
# evaluation takes for "no annotation".
MAX_ANNOTATIONS = 1000

_INFO = {"description": "shapes: a procedural data set", "version": "1.0"}


def id_to_rgb(ids: np.ndarray) -> np.ndarray:
    """(H, W) segment ids below 2^24 -> (H, W, 3) uint8 with id = R + 256 G + 65536 B."""
    return np.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], axis=2).astype(np.uint8)


def image_entry(frame: Frame, image_id: int, file_name: str) -> dict[str, Any]:
    """What the file says of an image."""
    return {
        "id": image_id,
        "file_name": file_name,
        "height": frame.height,
        "width": frame.width,
        "license": 0,
    }


def _json_mask(segmentation: Any, crowd: bool) -> Any:
    """COCO stores crowds as uncompressed RLE; other RLEs stay compressed, with `counts` as text."""
    if not isinstance(segmentation, dict):
        return segmentation
    if not crowd:
        return {**segmentation, "counts": segmentation["counts"].decode("ascii")}
    return {"size": list(segmentation["size"]), "counts": run_lengths(segmentation)}


def run_lengths(rle: dict[str, Any]) -> list[int]:
    """Compressed RLE -> lengths of the runs of 0, 1, 0, ... by columns, as COCO stores a crowd."""
    flat = mask_util.decode(rle).reshape(-1, order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    return [0, *runs] if flat[0] else runs


def _annotations(frame: Frame, image_id: int, mask_format: str) -> list[dict[str, Any]]:
    annotations = []
    for place, segment in enumerate(frame.segments):
        annotation = frame.annotation(segment, mask_format)
        annotation["segmentation"] = _json_mask(
            annotation["segmentation"], bool(annotation["iscrowd"])
        )
        annotation.update(
            id=image_id * MAX_ANNOTATIONS + place + 1,
            image_id=image_id,
            category_id=THING_IDS[segment.category],
            segment_id=segment.id,
        )
        annotations.append(annotation)
    return annotations


def coco_file(
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    categories: list[dict[str, Any]],
) -> dict[str, Any]:
    """The file's top level."""
    return {
        "info": _INFO,
        "licenses": [{"id": 0, "name": "Apache-2.0", "url": ""}],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


def instances_json(
    frames: Iterable[tuple[int, str, Frame]], mask_format: str = "polygon"
) -> dict[str, Any]:
    """COCO's instances file.

    Args:
        frames: (image id, image's file name, frame).
        mask_format: ``"polygon"`` or ``"rle"`` (exact).
    """
    images, annotations = [], []
    for image_id, file_name, frame in frames:
        images.append(image_entry(frame, image_id, file_name))
        annotations.extend(_annotations(frame, image_id, mask_format))
    return coco_file(images, annotations, _thing_categories())


def _thing_categories() -> list[dict[str, Any]]:
    return [
        {"id": i, "name": name, "supercategory": "thing"}
        for i, name in zip(THING_IDS, THING_CLASSES, strict=True)
    ]


def keypoints_json(frames: Iterable[tuple[int, str, Frame]]) -> dict[str, Any]:
    """COCO's person_keypoints file; all things are of the one category "thing".

    As in COCO, coordinates are pixel indices: 0.5 less than continuous ones.
    """
    images, annotations = [], []
    for image_id, file_name, frame in frames:
        images.append(image_entry(frame, image_id, file_name))
        of_frame = _annotations(frame, image_id, "polygon")
        for segment, annotation in zip(frame.segments, of_frame, strict=True):
            keypoints = frame.keypoints(segment)
            labelled = keypoints[:, 2] > 0
            keypoints[labelled, :2] -= 0.5
            annotation["category_id"] = 1
            annotation["keypoints"] = np.round(keypoints, 2).reshape(-1).tolist()
            annotation["num_keypoints"] = int(labelled.sum())
        annotations.extend(of_frame)
    place = {name: i + 1 for i, name in enumerate(KEYPOINT_NAMES)}
    category = {
        "id": 1,
        "name": "thing",
        "supercategory": "thing",
        "keypoints": list(KEYPOINT_NAMES),
        "skeleton": [[place[a], place[b]] for a, b, _ in KEYPOINT_CONNECTIONS],
    }
    return coco_file(images, annotations, [category])


def panoptic_json(frames: Iterable[tuple[int, str, Frame]]) -> dict[str, Any]:
    """COCO's panoptic file; the PNG of an image has its name with the extension ``.png``."""
    images, annotations = [], []
    for image_id, file_name, frame in frames:
        images.append(image_entry(frame, image_id, file_name))
        annotations.append(
            {
                "image_id": image_id,
                "file_name": file_name.rsplit(".", 1)[0] + ".png",
                "segments_info": frame.panoptic_segments(),
            }
        )
    things = zip(THING_IDS, THING_CLASSES, THING_COLORS, strict=True)
    stuff = zip(STUFF_IDS, STUFF_CLASSES, STUFF_COLORS, strict=True)
    categories = [
        {"id": i, "name": name, "supercategory": kind, "isthing": isthing, "color": list(color)}
        for kind, isthing, classes in (("thing", 1, things), ("stuff", 0, stuff))
        for i, name, color in classes
    ]
    return coco_file(images, annotations, categories)


def tracks_json(shapes: VideoSet, file_name: Callable[[int], str]) -> dict[str, Any]:
    """YouTube-VIS' file: one annotation per thing and clip, null in frames that do not show it.

    Args:
        file_name: of a picture, by its number.
    """
    videos: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(shapes.num):
        first = number * shapes.length
        videos.append(
            {
                "id": number,
                "file_names": [file_name(first + time) for time in range(shapes.length)],
                "height": shapes.height,
                "width": shapes.width,
                "length": shapes.length,
                "license": 0,
            }
        )
        tracks: dict[int, dict[str, Any]] = {}
        for time, frame in enumerate(shapes.clip(number).frames):
            for segment in frame.segments:
                track = tracks.setdefault(
                    segment.number,
                    {
                        "id": number * MAX_ANNOTATIONS + segment.number,
                        "video_id": number,
                        "track_id": segment.number,
                        "category_id": THING_IDS[segment.category],
                        "height": shapes.height,
                        "width": shapes.width,
                        "iscrowd": 0,
                        "segmentations": [None] * shapes.length,
                        "bboxes": [None] * shapes.length,
                        "areas": [None] * shapes.length,
                    },
                )
                annotation = frame.annotation(segment, "rle")
                track["segmentations"][time] = _json_mask(annotation["segmentation"], False)
                track["bboxes"][time] = annotation["bbox"]
                track["areas"][time] = annotation["area"]
        annotations.extend(track for _, track in sorted(tracks.items()))
    file = coco_file([], annotations, _thing_categories())
    del file["images"]
    return {**file, "videos": videos}


def video_instances_json(shapes: VideoSet, file_name: Callable[[int], str]) -> dict[str, Any]:
    """COCO's file with ``videos``, ``video_id``, ``frame_id`` (from 0) and ``track_id``; masks as RLE.

    Args:
        file_name: of a picture, by its number.
    """
    named = ((i, file_name(i), frame) for i, frame in enumerate(shapes.frames()))
    file = instances_json(named, "rle")
    for image in file["images"]:
        image["video_id"], image["frame_id"] = divmod(image["id"], shapes.length)
    for annotation in file["annotations"]:
        annotation["track_id"] = annotation["segment_id"] % SEGMENT_ID_FACTOR
    return {**file, "videos": [{"id": n, "name": f"{n:06d}"} for n in range(shapes.num)]}
