"""Top-down samples: one per annotated instance for training, one per image with boxes for testing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import compress
from typing import Any

import numpy as np
from detectron2.data import Metadata, MetadataCatalog
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.structures import BoxMode

from d2ext.data.annotations import describe_dropped
from d2ext.data.dataset_dicts import shorten
from d2ext.data.errors import AnnotationError, DatasetError
from d2ext.data.landmarks.readers import read_json

__all__ = [
    "add_detections",
    "category_ids",
    "flip_indices",
    "in_categories",
    "instance_crop_box",
    "instance_points",
    "instance_records",
]

logger = logging.getLogger(__name__)
Record = dict[str, Any]

NO_POINTS = "no labelled point"
NO_BOX = "box without width and height"


def instance_records(records: Sequence[Record]) -> list[Record]:
    """One record per instance that can be trained on or evaluated.

    Crowds, instances without a labelled point and those whose box has neither width nor height or is
    not finite are left out; one line of the log counts them.

    Args:
        records: of images, with ``annotations``.

    Returns:
        dicts of images whose ``annotations`` has one entry.

    Raises:
        DatasetError: none is left.
    """
    dropped: Counter[str] = Counter()
    result = []
    for record in records:
        for annotation in usable_annotations(record, dropped):
            result.append({**record, "annotations": [annotation]})
    if dropped:
        logger.info(f"Instances without landmarks are left out: {describe_dropped(dropped)}.")
    if not result:
        raise DatasetError(
            "No instance is left to learn landmarks from: none has a labelled point and a box. "
            "Check the annotations' 'keypoints' (x, y, v with v > 0 where labelled)."
        )
    return result


def usable_annotations(record: Record, dropped: Counter[str] | None = None) -> list[Record]:
    """Annotations of an image that have landmarks to find, in their order."""
    usable = []
    for annotation in record.get("annotations", ()):
        reason = _flaw(annotation)
        if not reason:
            usable.append(annotation)
        elif dropped is not None:
            dropped[reason] += 1
    return usable


def _flaw(annotation: Record) -> str:
    if annotation.get("iscrowd", 0):
        return "crowd"
    visible = annotation.get("keypoints", ())[2::3]
    if not any(v > 0 for v in visible):
        return NO_POINTS
    x0, y0, x1, y1 = instance_crop_box(annotation)
    # A box of one side is no crop, but one without height has, with padding, the shape of the input.
    good = np.isfinite([x0, y0, x1, y1]).all() and x1 >= x0 and y1 >= y0 and max(x1 - x0, y1 - y0)
    return "" if good else NO_BOX


def instance_crop_box(annotation: Record) -> list[float]:
    """XYXY of what is to be cropped, before padding: ``crop_box``, or else ``bbox``."""
    if "crop_box" in annotation:
        return [float(v) for v in annotation["crop_box"]]
    mode = annotation.get("bbox_mode", BoxMode.XYXY_ABS)
    box = [float(v) for v in annotation.get("bbox", (0, 0, 0, 0))]
    return list(BoxMode.convert(box, mode, BoxMode.XYXY_ABS))


def instance_points(annotation: Record, count: int | None = None) -> np.ndarray:
    """(K, 3) float64 copy of an annotation's x, y, v.

    Raises:
        AnnotationError: not K points, or labelled ones that are not finite.
    """
    points = np.array(annotation["keypoints"], dtype=np.float64).reshape(-1)
    if len(points) % 3 or (count is not None and len(points) != 3 * count):
        raise AnnotationError(
            f"Annotation {annotation.get('id')} has {len(points) / 3:g} points; the data set has "
            f"{'whole triples' if count is None else count}."
        )
    points = points.reshape(-1, 3)
    if not np.isfinite(points).all():
        raise AnnotationError(f"Annotation {annotation.get('id')} has points that are not finite.")
    return points


def flip_indices(dataset: str) -> list[int]:
    """For each landmark of a registered data set, which one takes its place in a mirrored picture.

    Raises:
        DatasetError: the data set has no ``keypoint_names``.
    """
    metadata = MetadataCatalog.get(dataset)
    names = metadata.get("keypoint_names")
    if not names:
        raise DatasetError(
            f"Data set '{dataset}' has no landmarks: its metadata has no keypoint_names. Register "
            "it with d2ext.data.landmarks.register_landmarks."
        )
    partner = {name: name for name in names}
    for a, b in metadata.get("keypoint_flip_map", ()):
        if a not in partner or b not in partner:
            raise DatasetError(f"Data set '{dataset}': keypoint_flip_map has unknown names {a, b}.")
        partner[a], partner[b] = b, a
    place = {name: i for i, name in enumerate(names)}
    return [place[partner[name]] for name in names]


def category_ids(metadata: Metadata) -> set[int] | None:
    """Ids that files give to the categories of a data set, for :func:`in_categories`.

    Where the metadata have no ``thing_dataset_id_to_contiguous_id`` (Detectron2 fills it in when
    COCO's files are read), the ids that COCO has for its ``thing_classes``; None if it has none.
    """
    known = metadata.get("thing_dataset_id_to_contiguous_id")
    if known:
        return set(known)
    names = metadata.get("thing_classes") or ()
    return {category["id"] for category in COCO_CATEGORIES if category["name"] in names} or None


def in_categories(
    entries: Sequence[Record], categories: Collection[int] | None, path: str
) -> list[bool]:
    """Which detections are of the things with landmarks: a detector of many classes finds others, too.

    Args:
        entries: detections; ``category_id`` may be missing.
        categories: ids, as the files have them, of the categories wanted; None or empty: not known.
        path: of the file, for the log.

    Returns:
        for each entry: if any entry's ``category_id`` is among ``categories``, whether its own is or it
        has none, otherwise True; the log tells if the categories of a file are not used.
    """
    given = {entry["category_id"] for entry in entries if "category_id" in entry}
    wanted = given & set(categories or ())
    if wanted:
        return ["category_id" not in e or e["category_id"] in wanted for e in entries]
    if given:
        known = f"{sorted(categories)}, of which it has none" if categories else "not known"
        logger.warning(
            f"All boxes of '{path}' are looked into, of categories {shorten(sorted(given, key=str))}: "
            f"the data set's own are {known}."
        )
    return [True] * len(entries)


def add_detections(
    records: Sequence[Record],
    path: str,
    min_score: float = 0.0,
    categories: Collection[int] | None = None,
) -> list[Record]:
    """Give images the boxes of a detector.

    Args:
        records: of images.
        path: JSON list of detections in COCO's result format: ``image_id``, ``bbox`` (x, y, w, h),
            ``score`` and, from a detector of several classes, ``category_id``; other keys are ignored.
        min_score: detections below are left out.
        categories: ids of the categories with landmarks, see :func:`in_categories` and
            :func:`category_ids`.

    Returns:
        copies with ``detections``: a list of (XYXY box, score), best first; empty for images in
        which nothing was detected. Boxes without any side are left out.

    Raises:
        DatasetError: no such file, or not such a list.
    """
    content = read_json(path)
    if not isinstance(content, list) or not all(
        isinstance(entry, dict) and {"image_id", "bbox", "score"} <= set(entry) for entry in content
    ):
        raise DatasetError(
            f"'{path}' is no list of detections with 'image_id', 'bbox' and 'score' (COCO's result "
            "format)."
        )
    detections: dict[Any, list[tuple[list[float], float]]] = {r["image_id"]: [] for r in records}
    for entry in compress(content, in_categories(content, categories, path)):
        score = float(entry["score"])
        if entry["image_id"] in detections and score >= min_score:
            x, y, w, h = (float(v) for v in entry["bbox"])
            if min(w, h) >= 0 and max(w, h) > 0:
                detections[entry["image_id"]].append(([x, y, x + w, y + h], score))
    return [
        {**r, "detections": sorted(detections[r["image_id"]], key=lambda d: -d[1])} for r in records
    ]
