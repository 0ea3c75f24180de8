"""The separated form of panoptic annotations: instances and stuff maps, made of PNGs and JSON.

Detectron2's panoptic models read two files per image beside the picture: instances with masks, and a
label map in which all things are 0, stuff is 1..S and 255 is void. Where only COCO's panoptic form
exists, both follow from it: one instance per thing segment, its mask exactly the segment's pixels.
They are computed once and stay in the cache (:mod:`d2ext.data.cache`).
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from detectron2.utils.file_io import PathManager
from pycocotools import mask as mask_util

from d2ext.data.cache import cache_folder, folder_to_fill
from d2ext.data.coco_schema import Id
from d2ext.data.errors import AnnotationError, DatasetError, SampleError, shorten
from d2ext.data.panoptic import IGNORE_LABEL, read_segments
from d2ext.data.panoptic_json import PanopticSummary

logger = logging.getLogger(__name__)

# From this many images on, several processes share the work (about 20 ms per COCO image).
_PARALLEL_FROM = 256
_MAX_PROCESSES = 16
# Changes when the files would be made differently.
_VERSION = 2


class DetectionFiles(NamedTuple):
    """What :func:`panoptic_to_detection` gives."""

    json_file: str
    """Instances in COCO's form: masks as compressed RLE, exact; ``segment_id`` names the segment."""
    sem_seg_root: str
    """Folder of label maps, ``<name of the panoptic PNG>``: 0 things, 1..S stuff, 255 void."""


def panoptic_to_detection(
    name: str, summary: PanopticSummary, panoptic_root: str
) -> DetectionFiles:
    """Instances and stuff maps of a panoptic data set; made at the first call, then from the cache.

    Args:
        name: of the data set; becomes part of the folder's name
        summary: what :func:`d2ext.data.panoptic_json.check_panoptic_json` gives
        panoptic_root: folder of the PNGs

    Raises:
        DatasetError: PNGs that cannot be read or disagree with the JSON file or with the images'
            sizes; the message lists the first few
    """
    root = PathManager.get_local_path(panoptic_root)
    target = cache_folder("panoptic") / f"{name}-{_digest(summary, root)}"
    files = DetectionFiles(str(target / "instances.json"), str(target / "sem_seg"))
    if target.is_dir():
        return files
    logger.info(
        f"Data set '{name}': instances and stuff maps of {len(summary.annotations)} images are "
        f"made of their panoptic PNGs, once, in '{target}'."
    )
    with folder_to_fill(target) as folder:
        (folder / "sem_seg").mkdir()
        _write(summary, root, folder)
    return files


def _write(summary: PanopticSummary, root: str, folder: Path) -> None:
    things = set(summary.things)
    stuff = {category: rank + 1 for rank, category in enumerate(summary.stuff)}
    work = partial(_convert_image, root=root, folder=folder, things=things, stuff=stuff)
    annotations: list[dict[str, Any]] = []
    broken: list[str] = []
    entries = [(a, summary.images[i]) for i, a in summary.annotations.items()]
    for instances, error in map_images(work, entries):
        if error:
            broken.append(error)
        annotations.extend(instances)
    if broken:
        raise DatasetError(
            f"{len(broken)} of {len(entries)} panoptic PNGs cannot be used. Repair them, or take "
            f"their images out of the JSON file. {shorten(broken, 3)}"
        )
    for number, annotation in enumerate(annotations):
        annotation["id"] = number + 1  # 0 means "no annotation" to COCO's evaluation
    content = {
        "images": list(summary.images.values()),
        "annotations": annotations,
        "categories": [{"id": c, "name": n} for c, n in summary.things.items()],
    }
    (folder / "instances.json").write_text(json.dumps(content), encoding="utf-8")


def map_images(work: Any, entries: list[Any]) -> Iterator[Any]:
    """``work(entry)`` of each, in order; many entries are shared by several processes."""
    if len(entries) < _PARALLEL_FROM:
        yield from map(work, entries)
        return
    processes = min(_MAX_PROCESSES, os.cpu_count() or 1)
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(work, entries, chunksize=32)


def _convert_image(
    entry: tuple[dict[str, Any], dict[str, Any]],
    *,
    root: str,
    folder: Path,
    things: set[Id],
    stuff: Mapping[Id, int],
) -> tuple[list[dict[str, Any]], str]:
    """Write one image's stuff map; returns its instances and, if its PNG is broken, why."""
    annotation, image = entry
    segments = annotation["segments_info"]
    try:
        places = read_segments(os.path.join(root, annotation["file_name"]), segments)
        if places.shape != (image["height"], image["width"]):
            raise AnnotationError(
                f"'{annotation['file_name']}' has height and width {places.shape}, the JSON file "
                f"says {(image['height'], image['width'])}."
            )
        areas = np.bincount(places.reshape(-1), minlength=len(segments) + 1)[1:]
        for segment, area in zip(segments, areas.tolist(), strict=True):
            if segment.get("area", area) != area:
                raise AnnotationError(
                    f"Segment {segment['id']} of '{annotation['file_name']}' has {area} pixels, its "
                    f"'area' in the JSON file is {segment['area']}. Without 'area' the PNG counts."
                )
    except SampleError as error:
        return [], str(error)
    table = np.full(len(segments) + 1, IGNORE_LABEL, np.uint8)
    instances = []
    for place, segment in enumerate(segments):
        table[place + 1] = stuff.get(segment["category_id"], 0)
        if segment["category_id"] in things:
            mask = np.asfortranarray(places == place + 1, np.uint8)
            rle = mask_util.encode(mask)
            instances.append(
                {
                    "image_id": image["id"],
                    "category_id": segment["category_id"],
                    "iscrowd": int(segment.get("iscrowd", 0)),
                    "bbox": mask_util.toBbox(rle).tolist(),
                    "area": int(mask_util.area(rle)),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                    "segment_id": segment["id"],
                }
            )
    path = folder / "sem_seg" / annotation["file_name"]
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), table[places]):
        raise OSError(f"Could not write '{path}': is the disk full?")
    return instances, ""


def _digest(summary: PanopticSummary, root: str) -> str:
    """Changes with the annotations and with any PNG."""
    digest = hashlib.blake2b(f"{_VERSION}{root}".encode(), digest_size=8)
    parts = (summary.things, summary.stuff, list(summary.images.items()))
    digest.update(json.dumps(parts, sort_keys=True).encode())
    for annotation in summary.annotations.values():
        status = os.stat(os.path.join(root, annotation["file_name"]))
        digest.update(f"{json.dumps(annotation)}{status.st_size}{status.st_mtime_ns}".encode())
    return digest.hexdigest()
