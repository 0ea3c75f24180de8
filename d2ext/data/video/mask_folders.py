"""Folders of masks, one indexed PNG a frame, whose values are objects that keep their number.

Two forms, told apart by the depth of the first PNG:

- DAVIS: 8 bits; the value (index into the palette) is the object, 255 is void. Masks of one object with
  nothing but 0 and 255 have it at 255.
- MOTS: 16 bits; class x 1000 + object, 10000 is to be ignored and counts as background.

``MASKS/<video>/<frame>.png`` belongs to ``IMAGES/<video>/<frame>.jpg`` (any kind of image). Images
without mask are frames that are not annotated.
"""

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from d2ext.data.errors import AnnotationError, DatasetError, ImageReadError, shorten
from d2ext.data.image_io import label_bits, read_label_map, upright_size
from d2ext.data.video.records import Record, video_record
from d2ext.data.video.video_data import VideoData, list_images

_VOID = 255
_CLASS, _IGNORED = 1000, 10000
# Classes 1 and 2 of KITTI MOTS.
_MOTS_CLASSES = ("car", "pedestrian")


def read_mask_folders(
    root: str, image_root: str, classes: Sequence[str] | None = None
) -> VideoData:
    """Records of the videos of a folder of masks.

    Args:
        root: of the masks, ``<video>/<frame>.png``, or of one video's PNGs
        image_root: of the images, in folders of the same names
        classes: names; of MOTS those of the numbers from 1 on (default: car, pedestrian), of DAVIS the
            one that all objects have (default: object)

    Raises:
        DatasetError: no masks, masks without image, or values that no class has
    """
    videos = {folder: names for folder, names in _walk(root) if names}
    if not videos:
        raise DatasetError(f"There are no masks (PNG files) in '{root}' or its folders.")
    folder, names = next(iter(videos.items()))
    try:
        mots = label_bits(os.path.join(root, folder, names[0])) > 8
    except ImageReadError as e:
        raise DatasetError(str(e)) from e
    if classes is None:
        classes = _MOTS_CLASSES if mots else ("object",)
    records = []
    number = 0
    for folder, names in videos.items():
        frames = _frames(root, image_root, folder, names, number)
        number += len(frames)
        _annotate(frames, mots, classes)
        name = folder or os.path.basename(os.path.normpath(root))
        records.append(video_record(name, frames))
    metadata: dict[str, Any] = {
        "thing_classes": list(classes),
        "thing_dataset_id_to_contiguous_id": {i + 1: i for i in range(len(classes))},
        "evaluator_type": "ytvis",
        "mask_format": "bitmask",
        "video": True,
    }
    return VideoData(records, metadata)


def _walk(root: str, folder: str = "") -> list[tuple[str, list[str]]]:
    """Folders below the root, and the PNGs in each, in order."""
    path = os.path.join(root, folder)
    pngs = [name for name in list_images(path) if name.lower().endswith(".png")]
    inner = [os.path.join(folder, name) for name in sorted(PathManager.ls(path))]
    folders = [f for f in inner if PathManager.isdir(os.path.join(root, f))]
    return [(folder, pngs), *(below for f in folders for below in _walk(root, f))]


def _frames(
    root: str, image_root: str, folder: str, masks: Sequence[str], first_id: int
) -> list[Record]:
    """A dict for each image of a video; ``mask`` names the file, where there is one."""
    images = os.path.join(image_root, folder)
    by_stem = {os.path.splitext(mask)[0]: mask for mask in masks}
    names = list_images(images)
    alone = by_stem.keys() - {os.path.splitext(name)[0] for name in names}
    if alone:
        raise DatasetError(
            f"{len(alone)} of {len(masks)} masks in '{os.path.join(root, folder)}' have no image of "
            f"their name in '{images}': {shorten(sorted(alone))}."
        )
    frames = []
    for number, name in enumerate(names):
        frame: Record = {
            "file_name": os.path.join(images, name),
            "image_id": first_id + number + 1,
        }
        mask = by_stem.get(os.path.splitext(name)[0])
        if mask is not None:
            frame["mask"] = os.path.join(root, folder, mask)
        frames.append(frame)
    return frames


def _annotate(frames: list[Record], mots: bool, classes: Sequence[str]) -> None:
    """Replace each ``mask`` by the annotations in it, in place, and set the sizes."""
    maps = {}
    for frame in frames:
        if "mask" in frame:
            try:
                maps[frame["mask"]] = _compressed(read_label_map(frame["mask"]).astype(np.int32))
            except (ImageReadError, AnnotationError) as e:
                raise DatasetError(f"A mask cannot be used: {e}") from e
    values = {value for _, masks in maps.values() for value in masks}
    # 255 is the one object where there is no other.
    ignored = {_IGNORED} if mots else {_VOID} if values != {_VOID} else set()
    for frame in frames:
        file_name = frame.pop("mask", None)
        if file_name is None:
            with contextlib.suppress(OSError):  # a broken image is told when it is needed
                frame["height"], frame["width"] = upright_size(frame["file_name"])
            continue
        (frame["height"], frame["width"]), masks = maps[file_name]
        frame["annotations"] = [
            _annotation(file_name, value, rle, mots, classes)
            for value, rle in masks.items()
            if value not in ignored
        ]


def _compressed(labels: np.ndarray) -> tuple[tuple[int, int], dict[int, Record]]:
    """Size and, for each value but 0, its RLE."""
    values = [v for v in np.unique(labels).tolist() if v]
    masks = {v: mask_util.encode(np.asfortranarray(labels == v, np.uint8)) for v in values}
    return labels.shape, masks  # type: ignore[return-value]


def _annotation(
    file_name: str, value: int, rle: Record, mots: bool, classes: Sequence[str]
) -> Record:
    category = value // _CLASS - 1 if mots else 0
    if not 0 <= category < len(classes):
        raise DatasetError(
            f"'{file_name}' has the value {value}, an object of class {category + 1} (value // 1000), "
            f"but the classes are {shorten(classes)}, from 1 on. Name all: --semantic-classes a,b,c or "
            "a file with one name per line."
        )
    return {
        "track_id": value,
        "category_id": category,
        "iscrowd": 0,
        "bbox": mask_util.toBbox(rle).tolist(),
        "bbox_mode": BoxMode.XYWH_ABS,
        "segmentation": rle,
    }
