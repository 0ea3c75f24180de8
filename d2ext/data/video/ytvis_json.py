"""YouTube-VIS' JSON form: one annotation for each track, with lists over the frames of its video.

``videos`` have ``file_names``; ``annotations`` have ``segmentations`` and ``bboxes``, null where the
object is not seen. The annotations of each frame become a COCO-format file, so that its checks and
repairs hold here, too.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from d2ext.data.coco_json import (
    Entry,
    check_lists,
    coco_file,
    raise_problems,
)
from d2ext.data.coco_schema import (
    Field,
    Findings,
    check_ids,
    flag,
    identifier,
    link,
    normalize,
    place,
    side,
)
from d2ext.data.video.video_data import (
    FRAMES,
    IMAGE_SUFFIXES,
    VideoData,
    list_images,
    natural_order,
    videos_of_images,
)


def _file_names(value: Any) -> list[str]:
    """A list of names, not empty."""
    if not isinstance(value, list) or not value or not all(isinstance(n, str) and n for n in value):
        raise ValueError("a list of the names of its frames")
    if len(set(value)) < len(value):
        raise ValueError("a list of different names")
    return value


def _per_frame(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("a list with an entry for each frame, null where the object is not seen")
    return value


_SCHEMA = {
    "videos": {
        "id": Field(identifier, True),
        "file_names": Field(_file_names, True),
        "height": Field(side, True),
        "width": Field(side, True),
    },
    "annotations": {
        "id": Field(identifier, True),
        "video_id": Field(identifier, True),
        "category_id": Field(identifier, True),
        "iscrowd": Field(flag),
        "segmentations": Field(_per_frame),
        "bboxes": Field(_per_frame),
        "areas": Field(_per_frame),
    },
}
# Of an annotation, the lists over frames and the fields that their entries are.
_LISTS = {"segmentations": "segmentation", "bboxes": "bbox", "areas": "area"}


def is_ytvis(content: Entry) -> bool:
    """Whether a JSON file's content is in this form."""
    videos = content.get("videos")
    return isinstance(videos, list) and any(
        isinstance(v, dict) and "file_names" in v for v in videos
    )


def read_ytvis(json_file: str, content: Entry, image_root: str) -> VideoData:
    """Records of the videos of a file in this form (2019, 2021 and 2022).

    A file without annotations, or with null for them, gives frames that are not annotated. Images beside
    a video's listed frames, in a folder of its own, become unannotated frames between them. Names
    without extension are those of images in the folder.

    Args:
        json_file: for messages
        content: parsed
        image_root: folder that the names are relative to

    Raises:
        DatasetError: all problems in one message
    """
    annotated = bool(content.get("annotations"))
    content = {**content, "annotations": content.get("annotations") or []}
    check_lists(json_file, content, ("videos", "annotations", "categories"))
    findings = Findings()
    lists = {key: normalize(content[key], key, _SCHEMA[key], findings) for key in _SCHEMA}
    videos, annotations = lists["videos"], lists["annotations"]
    check_ids(videos, "videos", findings)
    check_ids(annotations, "annotations", findings)
    link(annotations, "annotations", "video_id", videos, "videos", findings)
    _check_lengths(annotations, videos, findings)
    raise_problems(json_file, "a YouTube-VIS data set", findings.lines())

    frames = _frames(videos, image_root)
    images = [image for of_video in frames for image in of_video if "json_index" in image]
    by_place = {(image["video_id"], image["json_index"]): image["id"] for image in images}
    file = coco_file(
        json_file,
        {
            "images": images,
            "annotations": list(_frame_annotations(annotations, by_place)),
            "categories": content["categories"],
        },
        image_root,
        schema=FRAMES,
    )
    return videos_of_images(file, frames, image_root, annotated)


def _check_lengths(annotations: list[Entry], videos: list[Entry], findings: Findings) -> None:
    lengths = {v["id"]: len(v["file_names"]) for v in videos if {"id", "file_names"} <= v.keys()}
    for annotation in annotations:
        length = lengths.get(annotation.get("video_id", -1))
        for key in _LISTS:
            if length is not None and key in annotation and len(annotation[key]) != length:
                findings.problem(
                    f"annotations have '{key}' of another length than the 'file_names' of their video",
                    place(annotation, f"{len(annotation[key])}, video {length}"),
                )


def _frame_annotations(
    annotations: list[Entry], image_ids: dict[tuple[int | str, int], int]
) -> Iterable[Entry]:
    """An entry in COCO's form for each frame in which a track has a mask or a box."""
    for annotation in annotations:
        lists = {field: annotation[key] for key, field in _LISTS.items() if key in annotation}
        for index in range(max(map(len, lists.values()), default=0)):
            fields = {field: values[index] for field, values in lists.items()}
            if not fields.get("segmentation") and not fields.get("bbox"):
                continue
            yield {
                **fields,
                # For messages; ids that are texts become numbers.
                "id": f"{annotation['id']}, frame {index} of video {annotation['video_id']}",
                "image_id": image_ids[annotation["video_id"], index],
                "track_id": annotation.get("track_id", annotation["id"]),
                "category_id": annotation["category_id"],
                "iscrowd": annotation.get("iscrowd", 0),
            }


def _frames(videos: list[Entry], image_root: str) -> list[list[Entry]]:
    """For each video, entries of its frames in order: ``id`` (of all frames, from 1), ``file_name``,
    ``height``, ``width``, ``video_id``; of listed ones ``json_index``, of others ``is_labeled``."""
    folders = [{os.path.dirname(name) for name in video["file_names"]} for video in videos]
    used = Counter(folder for of_video in folders for folder in of_video)
    frames: list[list[Entry]] = []
    number = 0
    for video, of_video in zip(videos, folders, strict=True):
        there = {f: list_images(os.path.join(image_root, f)) for f in of_video}
        places = _places(video["file_names"], there)
        (folder, *more) = of_video
        if folder and not more and used[folder] == 1:
            places = _with_unlisted(places, folder, there[folder])
        of_frames = []
        for name, index in places.items():
            number += 1
            entry = {"id": number, "file_name": name, "video_id": video["id"]}
            entry.update(height=video["height"], width=video["width"])
            entry.update({"is_labeled": False} if index is None else {"json_index": index})
            of_frames.append(entry)
        frames.append(of_frames)
    return frames


def _places(names: Sequence[str], there: dict[str, list[str]]) -> dict[str, int | None]:
    """Name with extension → index in the list."""
    result: dict[str, int | None] = {}
    for index, name in enumerate(names):
        if not name.lower().endswith(IMAGE_SUFFIXES):
            folder, base = os.path.split(name)
            files = [n for n in there[folder] if os.path.splitext(n)[0] == base]
            name = os.path.join(folder, files[0]) if files else f"{name}.jpg"
        result[name] = index
    return result


def _with_unlisted(
    places: dict[str, int | None], folder: str, there: list[str]
) -> dict[str, int | None]:
    """Other images of the folder of the same kind, in the order of their names; nothing is added where
    the list itself has another order."""
    listed = list(places)
    suffixes = {os.path.splitext(name)[1].lower() for name in listed}
    others = [os.path.join(folder, n) for n in there if os.path.splitext(n)[1].lower() in suffixes]
    if sorted(listed, key=natural_order) != listed:
        return places
    return {name: places.get(name) for name in sorted({*listed, *others}, key=natural_order)}
