"""Checking COCO-format annotation files before anything depends on them."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.utils.file_io import PathManager

from d2ext.data.dataset_dicts import shorten
from d2ext.data.errors import DatasetError

logger = logging.getLogger(__name__)

# How many image files are looked for on disk, evenly spread over the list.
CHECKED_IMAGES = 1000
# A larger part of them missing is an error, a smaller one a warning: training replaces them.
TOLERATED_MISSING = 0.1

Entry = dict[str, Any]


@dataclass(frozen=True)
class CocoSummary:
    """What is in a COCO-format file.

    Attributes:
        classes: names in the order of their category ids, which is the order of Detectron2's
            contiguous ids
        category_ids: the same classes' ids in the file
        num_images, num_annotations: counts
        keypoint_names: names of the keypoints, empty if the file has none
        skeleton: pairs of keypoint indices, 0-based
    """

    classes: list[str]
    category_ids: list[int]
    num_images: int
    num_annotations: int
    keypoint_names: list[str] = field(default_factory=list)
    skeleton: list[tuple[int, int]] = field(default_factory=list)


def check_coco_json(json_file: str, image_root: str) -> CocoSummary:
    """Read a COCO-format file and check that Detectron2 can load and train on it.

    Args:
        json_file: annotation file with ``images``, ``annotations`` and ``categories``
        image_root: folder that ``file_name`` of an image is relative to

    Raises:
        DatasetError: all problems in one message, with the first few examples of each
    """
    content = _read(json_file)
    images, annotations, categories = (
        content[key] for key in ("images", "annotations", "categories")
    )
    problems = [
        *_check_categories(categories),
        *check_image_entries(images),
        *_check_annotations(annotations, images, categories),
    ]
    if not problems:
        problems = check_image_files(images, image_root)
    if problems:
        listed = "".join(f"\n  - {text}" for text in problems)
        raise DatasetError(f"'{json_file}' cannot be used as a COCO-format data set:{listed}")
    categories = sorted(categories, key=lambda c: c["id"])
    keypoints = next((c for c in categories if c.get("keypoints")), {})
    return CocoSummary(
        classes=[c["name"] for c in categories],
        category_ids=[c["id"] for c in categories],
        num_images=len(images),
        num_annotations=len(annotations),
        keypoint_names=list(keypoints.get("keypoints", [])),
        skeleton=[(a - 1, b - 1) for a, b in keypoints.get("skeleton", [])],
    )


def _read(json_file: str) -> dict[str, list[Entry]]:
    """The parsed file, whose three lists exist and hold dicts."""
    try:
        with PathManager.open(json_file, "r", encoding="utf-8") as f:
            content = json.load(f)
    except FileNotFoundError as e:
        raise DatasetError(f"Annotation file '{json_file}' does not exist.") from e
    except IsADirectoryError as e:
        raise DatasetError(f"Annotation file '{json_file}' is a folder.") from e
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise DatasetError(f"Annotation file '{json_file}' is not valid JSON: {e}") from e
    if not isinstance(content, dict):
        raise DatasetError(
            f"Annotation file '{json_file}' holds a {type(content).__name__}; a COCO-format file "
            "is an object with 'images', 'annotations' and 'categories'."
        )
    for key in ("images", "annotations", "categories"):
        entries = content.get(key)
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            state = "has no" if key not in content else "has a malformed"
            raise DatasetError(
                f"Annotation file '{json_file}' {state} '{key}': a COCO-format file needs a list "
                f"of objects there. It has {shorten(sorted(content))}."
            )
        if not entries and key != "annotations":
            raise DatasetError(f"Annotation file '{json_file}': '{key}' is empty.")
    return content


def _check_categories(categories: list[Entry]) -> Iterable[str]:
    yield from missing_keys("categories", categories, ("id", "name"))
    yield from duplicates("categories", "id", categories)
    yield from duplicates("categories", "name", categories)
    with_keypoints = [c["keypoints"] for c in categories if c.get("keypoints")]
    if any(keypoints != with_keypoints[0] for keypoints in with_keypoints):
        yield "categories have different 'keypoints'; Detectron2 supports one list for all"


def check_image_entries(images: list[Entry]) -> Iterable[str]:
    """Problems of the list 'images'."""
    yield from missing_keys("images", images, ("id", "file_name", "height", "width"))
    yield from duplicates("images", "id", images)


def _check_annotations(
    annotations: list[Entry], images: list[Entry], categories: list[Entry]
) -> Iterable[str]:
    yield from missing_keys("annotations", annotations, ("id", "image_id", "category_id"))
    yield from duplicates("annotations", "id", annotations)
    for key, what, owners in (
        ("image_id", "images", images),
        ("category_id", "categories", categories),
    ):
        known = {owner.get("id") for owner in owners}
        wrong = [a for a in annotations if key in a and a[key] not in known]
        yield from problem(
            len(wrong),
            f"annotations have a {key} that is not in '{what}'",
            [f"annotation {a.get('id')} ({key} {a[key]!r})" for a in wrong[:5]],
        )
    wrong = [a for a in annotations if "bbox" in a and not _is_box(a["bbox"])]
    yield from problem(
        len(wrong),
        "annotations have a 'bbox' that is not four numbers (x, y, width, height)",
        [f"annotation {a.get('id')} ({a['bbox']!r})" for a in wrong[:5]],
    )
    expected = max((3 * len(c.get("keypoints") or ()) for c in categories), default=0)
    wrong = [a for a in annotations if a.get("keypoints") and len(a["keypoints"]) != expected]
    yield from problem(
        len(wrong),
        f"annotations have 'keypoints' of other than {expected} numbers (x, y, visibility for each "
        "keypoint of the category)",
        [f"annotation {a.get('id')} ({len(a['keypoints'])} numbers)" for a in wrong[:5]],
    )
    wrong = [a for a in annotations if a.get("ignore", 0)]
    yield from problem(
        len(wrong),
        "annotations are marked 'ignore', which Detectron2 does not support; use 'iscrowd'",
        [f"annotation {a.get('id')}" for a in wrong[:5]],
    )


def check_image_files(images: list[Entry], image_root: str) -> list[str]:
    """Look for some of the images on disk."""
    if not PathManager.isdir(image_root):
        return [f"the image folder '{image_root}' does not exist"]
    step = max(1, len(images) // CHECKED_IMAGES)
    names = [image["file_name"] for image in images[::step]]
    missing = [n for n in names if not PathManager.exists(os.path.join(image_root, n))]
    if not missing:
        return []
    text = (
        f"{len(missing)} of {len(names)} images looked for are not in '{image_root}': "
        f"{shorten(missing)}"
    )
    if len(missing) > TOLERATED_MISSING * len(names):
        return [text]
    logger.warning(f"{text}. Training leaves them out unless INPUT.STRICT is set.")
    return []


def missing_keys(what: str, entries: list[Entry], keys: Sequence[str]) -> Iterable[str]:
    """A line for each key that entries lack."""
    for key in keys:
        wrong = [e for e in entries if key not in e]
        examples = [shorten([f"{k}: {e[k]!r}" for k in list(e)[:2]]) for e in wrong[:5]]
        yield from problem(
            len(wrong), f"{what} have no '{key}'", [f"the one with {e}" for e in examples]
        )


def duplicates(what: str, key: str, entries: list[Entry]) -> Iterable[str]:
    """A line if a value of ``key`` occurs more than once."""
    counts = Counter(str(e[key]) for e in entries if key in e)
    repeated = [f"{value} ({count} times)" for value, count in counts.items() if count > 1]
    yield from problem(
        len(repeated), f"values of '{key}' occur repeatedly in '{what}'", repeated[:5]
    )


def problem(count: int, text: str, examples: list[str]) -> Iterable[str]:
    """Nothing if ``count`` is 0, otherwise one line."""
    if count:
        more = f", ... ({count - len(examples)} more)" if count > len(examples) else ""
        yield f"{count} {text}: {', '.join(examples)}{more}"


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in box)
    )
