"""Cityscapes-VPS (arXiv 2006.11339): its training part has no panoptic PNGs, but label maps and
instances, of which they are made once.

``cityscapes_vps/train/img`` and ``labelmap`` (train ids, 255 is void), and
``instances_train_city_vps_rle.json``, whose ``inst_id`` is constant over a clip. Thing pixels without
instance are void. The evaluation part is in COCO's panoptic form.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES

from d2ext.data.cache import cache_folder, folder_to_fill
from d2ext.data.coco_json import Entry, compressed_rle, read_coco_json
from d2ext.data.errors import DatasetError, SampleError, shorten
from d2ext.data.image_io import read_label_map
from d2ext.data.video.panoptic_video import by_place, place_of, read_panoptic_video
from d2ext.data.video.video_data import VideoData

# Segment id = (train id + 1) * this + number of the thing in its clip; 0 stays void.
_FACTOR = 1000
_VERSION = 1


def read_val(name: str, root: str) -> VideoData:
    """Records of the clips of the validation part.

    Args:
        name: of the data set
        root: folder ``cityscapes_vps``
    """
    json_file = os.path.join(root, "panoptic_gt_val_city_vps.json")
    folders = (os.path.join(root, "val", part) for part in ("img_all", "panoptic_video"))
    return read_panoptic_video(name, json_file, *folders)


def read_train(name: str, root: str) -> VideoData:
    """Records of the clips of the training part; PNGs are made at the first call, then from the cache.

    Args:
        name: of the data set
        root: folder ``cityscapes_vps``

    Raises:
        DatasetError: files that are missing or cannot be used
    """
    images = os.path.join(root, "train", "img")
    json_file = os.path.join(root, "instances_train_city_vps_rle.json")
    instances = read_coco_json(json_file)
    label_maps = by_place(os.path.join(root, "train", "labelmap"))
    missing = [
        i["file_name"] for i in instances.images if place_of(i["file_name"]) not in label_maps
    ]
    if missing:
        raise DatasetError(
            f"{len(missing)} of {len(instances.images)} images of '{json_file}' have no label map in "
            f"'{os.path.join(root, 'train', 'labelmap')}': {shorten(missing)}."
        )
    status = os.stat(json_file)
    key = f"{_VERSION} {os.path.abspath(json_file)} {status.st_size} {status.st_mtime_ns}"
    digest = hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    target = cache_folder("cityscapes_vps") / f"train-{digest}"
    if not target.is_dir():
        maps = {p: os.path.join(root, "train", "labelmap", n) for p, n in label_maps.items()}
        with folder_to_fill(target) as folder:
            (folder / "panoptic").mkdir()
            _make(instances.images, instances.annotations, maps, folder)
    return read_panoptic_video(name, str(target / "panoptic.json"), images)


def _make(
    images: Sequence[Entry],
    instances: Sequence[Entry],
    label_maps: dict[tuple[int, int], str],
    folder: Path,
) -> None:
    """Write ``panoptic.json`` and ``panoptic/``."""
    of_image: dict[Any, list[Entry]] = {image["id"]: [] for image in images}
    for instance in instances:
        of_image[instance["image_id"]].append(instance)
    numbers: dict[int, dict[Any, int]] = {}
    annotations = []
    for image in images:
        place = place_of(image["file_name"])
        assert place is not None  # read_train
        try:
            labels = read_label_map(label_maps[place]).astype(np.int32)
        except SampleError as e:
            raise DatasetError(f"A label map cannot be used: {e}") from e
        if labels.shape != (image["height"], image["width"]):
            raise DatasetError(
                f"'{label_maps[place]}' has height and width {labels.shape}, the JSON file says "
                f"{(image['height'], image['width'])}."
            )
        ids = _segment_ids(labels, of_image[image["id"]], numbers.setdefault(place[0], {}))
        name = f"{place[0]:04d}_{place[1]:04d}.png"
        bgr = np.stack([ids >> 16, ids >> 8 & 255, ids & 255], axis=2).astype(np.uint8)
        if not cv2.imwrite(str(folder / "panoptic" / name), bgr):
            raise OSError(f"Could not write '{folder / 'panoptic' / name}': is the disk full?")
        segments = [
            {"id": i, "category_id": i // _FACTOR - 1, "iscrowd": 0}
            for i in np.unique(ids).tolist()
            if i
        ]
        annotations.append({"image_id": image["id"], "file_name": name, "segments_info": segments})
    categories = [
        {"id": c["trainId"], **{key: c[key] for key in ("name", "isthing", "color")}}
        for c in CITYSCAPES_CATEGORIES
    ]
    content = {"images": list(images), "annotations": annotations, "categories": categories}
    (folder / "panoptic.json").write_text(json.dumps(content))


def _segment_ids(
    labels: np.ndarray, instances: Sequence[Entry], numbers: dict[Any, int]
) -> np.ndarray:
    """(H, W) int32; ``numbers`` holds those of the clip's things, by ``inst_id``; new ones are added."""
    stuff = [c["trainId"] for c in CITYSCAPES_CATEGORIES if not c["isthing"]]
    ids = np.where(np.isin(labels, stuff), (labels + 1) * _FACTOR, 0)
    for instance in instances:
        if "inst_id" not in instance or "segmentation" not in instance:
            raise DatasetError(
                f"Annotation {instance['id']} of Cityscapes-VPS has no 'inst_id' or no mask."
            )
        number = numbers.setdefault(instance["inst_id"], len(numbers) + 1)
        mask = mask_util.decode(compressed_rle(instance["segmentation"], *labels.shape)) > 0
        ids[mask] = (instance["category_id"] + 1) * _FACTOR + number
    return ids.astype(np.int32)
