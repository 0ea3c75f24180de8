"""Detections in COCO's result format: the reader of boxes that a detector wrote."""

import logging
from collections.abc import Collection, Sequence
from typing import Any

from detectron2.data import Metadata
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from d2ext.data.coco_json import read_json
from d2ext.data.errors import DatasetError, shorten

logger = logging.getLogger(__name__)
Entry = dict[str, Any]
Detections = list[tuple[list[float], float]]


def read_coco_results(
    path: str, min_score: float = 0.0, categories: Collection[int] | None = None
) -> dict[Any, Detections]:
    """Boxes and scores of each image.

    A detector of many classes finds others than those wanted, too: if any entry's ``category_id`` is
    among ``categories``, those of others are left out. Otherwise all count, and the log says so.

    Args:
        path: JSON list of detections: ``image_id``, ``bbox`` (x, y, width, height) and, as a rule,
            ``score`` (1 where it is missing) and ``category_id``; other keys are ignored
        min_score: detections below are left out
        categories: ids, as the files have them, of the categories wanted, see :func:`category_ids`; None
            or empty: not known

    Returns:
        image id → (XYXY box, score) in the order of the file; boxes without any side are left out

    Raises:
        DatasetError: no such file, or not such a list
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise DatasetError(f"'{path}' is no list of detections (COCO's result format).")
    read = [_read_entry(entry, path) for entry in content]
    result: dict[Any, Detections] = {}
    for (image_id, box, score), wanted in zip(
        read, _in_categories(content, categories, path), strict=True
    ):
        sides = box[2] - box[0], box[3] - box[1]
        if wanted and score >= min_score and min(sides) >= 0 and max(sides) > 0:
            result.setdefault(image_id, []).append((box, score))
    return result


def category_ids(metadata: Metadata) -> set[int] | None:
    """Ids that files give to the categories of a data set.

    Where the metadata have no ``thing_dataset_id_to_contiguous_id`` (Detectron2 fills it in when
    COCO's files are read), the ids that COCO has for its ``thing_classes``; None if it has none.
    """
    known = metadata.get("thing_dataset_id_to_contiguous_id")
    if known:
        return set(known)
    names = metadata.get("thing_classes") or ()
    return {category["id"] for category in COCO_CATEGORIES if category["name"] in names} or None


def _read_entry(entry: Any, path: str) -> tuple[Any, list[float], float]:
    """Image id, XYXY box and score."""
    try:
        x, y, width, height = (float(value) for value in entry["bbox"])
        return entry["image_id"], [x, y, x + width, y + height], float(entry.get("score", 1))
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise DatasetError(
            f"An entry of '{path}' is no detection with image_id, bbox (4 numbers) and score: "
            f"{str(entry)[:100]}"
        ) from e


def _in_categories(
    entries: Sequence[Entry], categories: Collection[int] | None, path: str
) -> list[bool]:
    """Which entries are of the categories wanted, as :func:`read_coco_results` has it."""
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
