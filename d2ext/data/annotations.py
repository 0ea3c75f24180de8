"""Checks on annotations in Detectron2's data set format, shared by the loader and the mapper."""

from collections import Counter
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode

Annotation = dict[str, Any]

# Why an annotation is dropped. The texts are what people read in the log.
NO_GEOMETRY = "neither box nor mask"
BAD_BOX = "box without area or not finite"
BAD_POLYGON = "polygons with fewer than three points or without area"
EMPTY_MASK = "empty mask"


def normalize_annotation(annotation: Annotation) -> tuple[Annotation | None, str]:
    """Bring one annotation into the form that the rest of the data path expects.

    A missing box is computed from the mask, uncompressed RLE is compressed, and polygons that
    enclose nothing are removed.

    Args:
        annotation: Detectron2's annotation dict; not modified

    Returns:
        a copy whose box, polygons and keypoints may be modified in place, and ``""``; or None and
        the reason why the annotation cannot be used
    """
    annotation = dict(annotation)
    if "keypoints" in annotation:
        annotation["keypoints"] = np.array(annotation["keypoints"], dtype=np.float64)
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list) and segmentation:
        segmentation = [p for p in map(_as_polygon, segmentation) if p is not None]
        if not segmentation:
            return None, BAD_POLYGON
        annotation["segmentation"] = segmentation
    elif isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
            annotation["segmentation"] = segmentation
        if mask_util.area(segmentation) == 0:
            return None, EMPTY_MASK
    else:  # absent, None or an empty list: no mask
        annotation.pop("segmentation", None)

    box = annotation.get("bbox")
    if box is None or len(box) == 0:
        if "segmentation" not in annotation:
            return None, NO_GEOMETRY
        annotation["bbox"] = _box_of(annotation["segmentation"])
        annotation["bbox_mode"] = BoxMode.XYXY_ABS
    x0, y0, x1, y1 = BoxMode.convert(
        [float(v) for v in annotation["bbox"]],
        annotation.get("bbox_mode", BoxMode.XYWH_ABS),
        BoxMode.XYXY_ABS,
    )
    if not np.isfinite([x0, y0, x1, y1]).all() or x1 <= x0 or y1 <= y0:
        return None, BAD_BOX
    annotation["bbox"] = [x0, y0, x1, y1]
    annotation["bbox_mode"] = BoxMode.XYXY_ABS
    return annotation, ""


def obvious_flaw(annotation: Annotation) -> str:
    """The reason why an annotation describes nothing, as far as a quick look shows it, or ``""``.

    It is for whole data sets (a few µs; :func:`normalize_annotation` takes ten times as long)
    and never finds fault with what :func:`normalize_annotation` accepts.
    """
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, list) and segmentation:
        if not any(len(p) >= 6 and len(p) % 2 == 0 for p in segmentation):
            return BAD_POLYGON
    elif isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            if sum(segmentation["counts"][1::2]) == 0:
                return EMPTY_MASK
        elif mask_util.area(segmentation) == 0:
            return EMPTY_MASK
    else:
        segmentation = None
    box = annotation.get("bbox")
    if box is None or len(box) == 0:
        return NO_GEOMETRY if segmentation is None else ""
    x0, y0, x1, y1 = box
    if annotation.get("bbox_mode", BoxMode.XYWH_ABS) == BoxMode.XYWH_ABS:
        x0, y0 = 0, 0
    # Written so that NaN counts as a flaw.
    return "" if x1 > x0 and y1 > y0 else BAD_BOX


def normalize_annotations(annotations: list[Annotation], dropped: Counter[str]) -> list[Annotation]:
    """:func:`normalize_annotation` for a list; ``dropped`` counts why others are left out."""
    usable = []
    for annotation in annotations:
        result, reason = normalize_annotation(annotation)
        if result is None:
            dropped[reason] += 1
        else:
            usable.append(result)
    return usable


def describe_dropped(dropped: Counter[str]) -> str:
    """``"3 (box without area or not finite), 1 (empty mask)"``"""
    return ", ".join(f"{count} ({reason})" for reason, count in dropped.most_common())


def _as_polygon(polygon: Any) -> np.ndarray | None:
    """Flat x, y, x, y, ... → float64 array, or None if it encloses nothing."""
    if len(polygon) < 6 or len(polygon) % 2:
        return None
    points = np.array(polygon, dtype=np.float64)
    x, y = points[0::2], points[1::2]
    # Twice the signed area; NaN and infinity fail the comparison, too.
    area = np.dot(x[:-1], y[1:]) - np.dot(y[:-1], x[1:]) + x[-1] * y[0] - y[-1] * x[0]
    return points if 0 < abs(area) < np.inf else None


def _box_of(segmentation: Any) -> list[float]:
    """XYXY box around polygons or around a compressed RLE mask."""
    if isinstance(segmentation, dict):
        x, y, w, h = mask_util.toBbox(segmentation).tolist()
        return [x, y, x + w, y + h]
    points = np.concatenate(segmentation).reshape(-1, 2)
    return [*points.min(axis=0).tolist(), *points.max(axis=0).tolist()]
