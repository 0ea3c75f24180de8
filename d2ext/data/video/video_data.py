"""What readers of videos share: what they give, the fields of frames, and folders of images."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.utils.file_io import PathManager

from d2ext.data.coco_json import INSTANCES, CocoFile, Entry, coco_records, image_record
from d2ext.data.coco_schema import Field, identifier, integer
from d2ext.data.dataset_facts import category_metadata
from d2ext.data.video.records import Record, video_record

# Extensions of images. Other names have none, and their file is looked for.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")

# COCO's fields and those of frames.
FRAMES = {
    **INSTANCES,
    "images": {
        **INSTANCES["images"],
        "video_id": Field(identifier, True),
        "frame_id": Field(integer),
    },
    "annotations": {**INSTANCES["annotations"], "track_id": Field(identifier, True)},
}


@dataclass(frozen=True)
class VideoData:
    """What a reader gives: records of videos, and the metadata of the data set."""

    videos: list[Record]
    metadata: dict[str, Any]


def videos_of_images(
    file: CocoFile, videos: Sequence[Sequence[Entry]], image_root: str, annotated: bool
) -> VideoData:
    """Records of videos and metadata of tracks.

    Args:
        file: the annotated frames as images
        videos: of each the entries of all its frames in order; ``is_labeled`` False: not annotated
        image_root: folder that the names are relative to
        annotated: False: no frame is
    """
    records = {record["image_id"]: record for record in coco_records(file, image_root)}
    result = []
    for images in videos:
        frames = []
        for image in images:
            frame = records.get(image["id"]) or image_record(image, image_root)
            if not annotated or image.get("is_labeled") is False:
                del frame["annotations"]
            frames.append(frame | {k: image[k] for k in ("json_index",) if k in image})
        result.append(video_record(images[0]["video_id"], frames))
    return VideoData(result, _metadata(file, result))


def _metadata(file: CocoFile, videos: Sequence[Record]) -> dict[str, Any]:
    """Metadata of tracks: classes, keypoints, ``evaluator_type``, and ``mask_format`` if any is RLE."""
    metadata = {**category_metadata(file.categories), "video": True}
    metadata["evaluator_type"] = "video_keypoints" if "keypoint_names" in metadata else "ytvis"
    masks = (
        a.get("segmentation")
        for video in videos
        for frame in video["frames"]
        for a in frame.get("annotations", ())
    )
    if any(isinstance(mask, dict) for mask in masks):
        metadata["mask_format"] = "bitmask"
    return metadata


def list_images(folder: str) -> list[str]:
    """Names of the images in a folder, in natural order; none without a folder."""
    if not PathManager.isdir(folder):
        return []
    names = [n for n in PathManager.ls(folder) if n.lower().endswith(IMAGE_SUFFIXES)]
    return sorted(names, key=natural_order)


def natural_order(name: str) -> list[tuple[str, int]]:
    """A key by which 2.jpg comes before 10.jpg."""
    return [(text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name)]
