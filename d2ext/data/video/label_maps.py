"""Clips whose classes are in label maps and whose things are instances in COCO's form, with ``inst_id``
constant over a clip: the training parts of Cityscapes-VPS and VIPER. Panoptic PNGs are made of them,
once.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util

from d2ext.data.cache import cache_folder, folder_to_fill
from d2ext.data.coco_json import CocoFile, Entry, compressed_rle, read_coco_json
from d2ext.data.coco_schema import Id
from d2ext.data.errors import DatasetError, SampleError, shorten
from d2ext.data.image_io import label_values, read_label_map
from d2ext.data.panoptic import IGNORE_LABEL
from d2ext.data.panoptic_to_detection import map_images
from d2ext.data.video.panoptic_video import Place, by_place, places_by_name, read_panoptic_video
from d2ext.data.video.video_data import VideoData

# Segment id = (category + 1) * this + number of the thing in its clip; 0 stays void.
_FACTOR = 1000
_VERSION = 2


def read_label_map_clips(
    name: str,
    json_file: str,
    image_root: str,
    label_root: str,
    categories: Sequence[Entry],
) -> VideoData:
    """Records of clips; PNGs are made at the first call, then from the cache.

    Args:
        name: of the data set
        json_file: instances with ``inst_id``, as RLE; ``category_id`` is the label of the maps
        image_root: folder of the images
        label_root: folder of the label maps, of one channel; values are category ids, 255 is void. Those
            of a palette PNG are its indices. Pixels of things without an instance become void
        categories: ``id``, ``name``, ``isthing`` and, if known, ``color``

    Raises:
        DatasetError: files that are missing or cannot be used
    """
    file = read_coco_json(json_file)
    places = places_by_name(json_file, file.images, "id")
    label_maps = by_place(label_root)
    missing = [i["file_name"] for i in file.images if places[i["id"]] not in label_maps]
    if missing:
        raise DatasetError(
            f"{len(missing)} of {len(file.images)} images of '{json_file}' have no label map in "
            f"'{label_root}': {shorten(missing)}."
        )
    _check_instances(json_file, file, categories)
    maps = {i: os.path.join(label_root, label_maps[at]) for i, at in places.items()}
    digest = hashlib.blake2b(f"{_VERSION}{list(categories)}".encode(), digest_size=8)
    for path in (json_file, *maps.values()):
        status = os.stat(path)
        digest.update(f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}".encode())
    target = cache_folder("label_map_clips") / f"{name}-{digest.hexdigest()}"
    if not target.is_dir():
        with folder_to_fill(target) as folder:
            (folder / "panoptic").mkdir()
            _make(file, places, maps, categories, folder)
    return read_panoptic_video(name, str(target / "panoptic.json"), image_root)


def _check_instances(json_file: str, file: CocoFile, categories: Sequence[Entry]) -> None:
    no_label = [c["id"] for c in categories if c["id"] not in range(IGNORE_LABEL)]
    if no_label:
        raise DatasetError(
            f"Categories with ids {shorten(no_label)} cannot be labels of maps, which are 0 to "
            f"{IGNORE_LABEL - 1}."
        )
    names = {c["id"]: c["name"] for c in categories if c["isthing"]}
    for text, wrong in (
        (
            "annotations have no 'inst_id' or no mask",
            [a["id"] for a in file.annotations if not {"inst_id", "segmentation"} <= a.keys()],
        ),
        (
            f"annotations are of no thing ({', '.join(f'{i} {n}' for i, n in names.items())})",
            [a["id"] for a in file.annotations if a["category_id"] not in names],
        ),
    ):
        if wrong:
            raise DatasetError(f"{len(wrong)} {text} in '{json_file}': id {shorten(wrong)}.")


def _make(
    file: CocoFile,
    places: dict[Id, Place],
    label_maps: dict[Id, str],
    categories: Sequence[Entry],
    folder: Path,
) -> None:
    """Write ``panoptic.json`` and ``panoptic/``."""
    of_image: dict[Id, list[tuple[Entry, int]]] = {image["id"]: [] for image in file.images}
    numbers: dict[Id, dict[Any, int]] = {}
    for instance in file.annotations:
        of_clip = numbers.setdefault(places[instance["image_id"]][0], {})
        number = of_clip.setdefault(instance["inst_id"], len(of_clip) + 1)
        of_image[instance["image_id"]].append((instance, number))
    many = [clip for clip, of_clip in numbers.items() if len(of_clip) >= _FACTOR]
    if many:
        raise DatasetError(f"Clips {shorten(many)} have {_FACTOR} things or more.")
    entries = []
    for image in file.images:
        clip, frame = places[image["id"]]
        name = f"{clip:04d}_{frame:04d}.png"
        entries.append((image, label_maps[image["id"]], of_image[image["id"]], name))
    work = partial(_make_image, categories=categories, folder=folder / "panoptic")
    content = {
        "images": file.images,
        "annotations": list(map_images(work, entries)),
        "categories": list(categories),
    }
    (folder / "panoptic.json").write_text(json.dumps(content))


def _make_image(
    entry: tuple[Entry, str, list[tuple[Entry, int]], str],
    *,
    categories: Sequence[Entry],
    folder: Path,
) -> Entry:
    """Write a PNG, from an image, its label map, its instances with their numbers, and the PNG's name;
    returns its annotation."""
    image, label_map, instances, name = entry
    size = (image["height"], image["width"])
    labels = _read_labels(label_map, size, {c["id"] for c in categories})
    table = np.zeros(IGNORE_LABEL + 1, np.int32)
    for category in categories:
        if not category["isthing"]:
            table[category["id"]] = (category["id"] + 1) * _FACTOR
    ids = table[labels]
    for instance, number in instances:
        mask = mask_util.decode(compressed_rle(instance["segmentation"], *size))
        ids[mask.view(bool)] = (instance["category_id"] + 1) * _FACTOR + number
    bgr = np.stack([ids >> 16, ids >> 8 & 255, ids & 255], axis=2).astype(np.uint8)
    if not cv2.imwrite(str(folder / name), bgr):
        raise OSError(f"Could not write '{folder / name}': is the disk full?")
    segments = [
        {"id": i, "category_id": i // _FACTOR - 1, "iscrowd": 0}
        for i in np.flatnonzero(np.bincount(ids.reshape(-1))).tolist()
        if i
    ]
    return {"image_id": image["id"], "file_name": name, "segments_info": segments}


def _read_labels(file_name: str, size: tuple[int, int], known: set[int]) -> np.ndarray:
    """(H, W) uint8."""
    try:
        labels = read_label_map(file_name)
    except SampleError as e:
        raise DatasetError(f"A label map cannot be used: {e}") from e
    if labels.shape != size:
        raise DatasetError(
            f"'{file_name}' has height and width {labels.shape}, the JSON file says {size}."
        )
    wrong = [v for v in label_values(labels) if v not in known and v != IGNORE_LABEL]
    if wrong:
        raise DatasetError(
            f"Label map '{file_name}' has labels {shorten(wrong)}, which are no class (0 to "
            f"{max(known)}, 255 is void). Maps of instances (class * 1000 + object) are no label maps."
        )
    return labels.astype(np.uint8)
