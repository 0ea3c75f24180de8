"""Top-down samples: one per annotated instance for training, one per image with boxes for testing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from d2ext.data.annotations import describe_dropped
from d2ext.data.coco_results import read_coco_results
from d2ext.data.errors import AnnotationError, DatasetError, shorten

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
    return instance_box(annotation)


def instance_box(annotation: Record) -> list[float]:
    """XYXY of ``bbox``."""
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


def add_detections(
    records: Sequence[Record],
    path: str,
    min_score: float = 0.0,
    categories: Collection[int] | None = None,
) -> list[Record]:
    """Give images the boxes of a detector.

    Args:
        records: of images.
        path, min_score, categories: see :func:`~d2ext.data.coco_results.read_coco_results`.

    Returns:
        copies with ``detections``: a list of (XYXY box, score), best first; empty for images in
        which nothing was detected.

    Raises:
        DatasetError: no such file, no list of detections, or none of these images.
    """
    # Some tools write "1" for 1.
    results = {str(i): boxes for i, boxes in read_coco_results(path, min_score, categories).items()}
    ids = [str(record["image_id"]) for record in records]
    if results and not results.keys() & set(ids):
        raise DatasetError(
            f"No box of '{path}' belongs to the data: its image ids ({shorten(list(results), 3)}) are "
            f"none of the images' ({shorten(ids, 3)}). Write the ids of the annotation file."
        )
    return [
        {**record, "detections": sorted(results.get(i, []), key=lambda d: -d[1])}
        for i, record in zip(ids, records, strict=True)
    ]
