"""Files in COCO's form: the reader of all own data with instances, keypoints or landmarks.

:func:`read_coco_json` reads a file and checks it before anything depends on it. :func:`coco_records`
makes Detectron2's dicts of it for detection and keypoints, :mod:`d2ext.data.landmarks.readers` for
landmarks.
The checks of lists serve COCO's panoptic form (:mod:`d2ext.data.panoptic_json`), too.
"""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pycocotools.mask as mask_util
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from d2ext.data.errors import DatasetError, shorten

logger = logging.getLogger(__name__)

# How many image files are looked for on disk, evenly spread over the list.
CHECKED_IMAGES = 1000
# A larger part of them missing is an error, a smaller one a warning: training replaces them.
TOLERATED_MISSING = 0.1

Entry = dict[str, Any]
Record = dict[str, Any]

# What a file must have, by what it is read for. Landmark files, also those of pose toolkits, may lack
# sizes and names of categories: the kind of landmarks is known.
DETECTION: Mapping[str, Sequence[str]] = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id"),
    "categories": ("id", "name"),
}
LANDMARKS: Mapping[str, Sequence[str]] = {
    "images": ("id", "file_name"),
    "annotations": ("id", "image_id"),
}


@dataclass(frozen=True)
class CocoFile:
    """What is in a COCO-format file: its entries, categories by ascending id, which is the order of
    Detectron2's contiguous ids."""

    images: list[Entry]
    annotations: list[Entry]
    categories: list[Entry]

    @property
    def classes(self) -> dict[int, str]:
        """Category id → name."""
        return {c["id"]: c["name"] for c in self.categories}


def read_coco_json(
    json_file: str,
    image_root: str | None = None,
    required: Mapping[str, Sequence[str]] = DETECTION,
) -> CocoFile:
    """Read a COCO-format file and check that it can be trained on.

    Args:
        json_file: annotation file with ``images``, ``annotations`` and ``categories``
        image_root: folder that ``file_name`` of an image is relative to; None: images are not looked for
        required: :data:`DETECTION` or :data:`LANDMARKS`

    Raises:
        DatasetError: all problems in one message, with the first few examples of each
    """
    content = read_json(json_file)
    if not isinstance(content, dict):
        raise DatasetError(
            f"Annotation file '{json_file}' holds a {type(content).__name__}; a COCO-format file "
            "is an object with 'images', 'annotations' and 'categories'."
        )
    check_lists(json_file, content, required)
    images, annotations = content["images"], content["annotations"]
    categories = _without_roots(content.get("categories") or [], annotations)
    problems: list[str] = []
    for key, keys in required.items():
        problems += [*missing_keys(key, content[key], keys), *duplicates(key, "id", content[key])]
    problems += [
        *_check_owners(annotations, "image_id", "images", images),
        *_check_boxes(annotations),
    ]
    if "categories" in required:
        problems += _check_detection(annotations, categories)
    if not problems and image_root is not None:
        problems = check_image_files(images, image_root)
    raise_problems(json_file, "a COCO-format data set", problems)
    return CocoFile(images, annotations, sorted(categories, key=lambda c: c.get("id", 1)))


def _without_roots(categories: list[Entry], annotations: list[Entry]) -> list[Entry]:
    """Leave out categories that only repeat another one's name and have no annotations: some tools write
    a root of that kind above the only class."""
    used = {str(a.get("category_id")) for a in annotations}
    rows = [(str(c.get("name")), str(c.get("id")) in used) for c in categories]
    left_out = [
        category
        for i, (category, (name, is_used)) in enumerate(zip(categories, rows, strict=True))
        if not is_used and ((name, True) in rows or name in [n for n, _ in rows[i + 1 :]])
    ]
    for c in left_out:
        logger.warning(
            "Category '%s' (id %s) repeats the name of another one and has no annotations: it is left "
            "out.",
            c.get("name"),
            c.get("id"),
        )
    return [c for c in categories if c not in left_out]


def load_coco_json(json_file: str, image_root: str) -> list[Record]:
    """:func:`coco_records` of a file."""
    return coco_records(read_coco_json(json_file), image_root)


def coco_records(file: CocoFile, image_root: str) -> list[Record]:
    """Detectron2's dicts, by ascending image id, as its own reader of COCO files gives them.

    Annotations have ``bbox`` (``BoxMode.XYWH_ABS``), ``iscrowd``, ``segmentation`` and ``keypoints``
    as far as the file has them, and a contiguous ``category_id``. 0.5 is added to coordinates of
    keypoints, which are pixel indices in COCO: the centre of the first pixel is 0.5 in Detectron2.
    """
    contiguous = {category: i for i, category in enumerate(file.classes)}
    records = {image["id"]: image_record(image, image_root) for image in file.images}
    for entry in file.annotations:
        annotation: Record = {k: entry[k] for k in ("iscrowd", "bbox") if k in entry}
        if entry.get("segmentation"):
            annotation["segmentation"] = _segmentation(entry["segmentation"])
        if entry.get("keypoints"):
            annotation["keypoints"] = [
                v if i % 3 == 2 else v + 0.5 for i, v in enumerate(entry["keypoints"])
            ]
        annotation["id"] = entry["id"]
        annotation["bbox_mode"] = BoxMode.XYWH_ABS
        annotation["category_id"] = contiguous[entry["category_id"]]
        records[entry["image_id"]]["annotations"].append(annotation)
    return [records[image_id] for image_id in sorted(records)]


def _segmentation(value: Any) -> Any:
    """Compressed RLE, or polygons without those of fewer than three points (unless all are)."""
    if isinstance(value, list):
        return [
            p for p in value if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0
        ] or value
    if isinstance(value["counts"], list):
        return mask_util.frPyObjects(value, *value["size"])
    return value


def image_record(entry: Entry, image_root: str) -> Record:
    """Detectron2's dict of an image, without annotations yet; sizes as far as the file has them."""
    return {
        "file_name": os.path.join(image_root, entry["file_name"]),
        **{key: entry[key] for key in ("height", "width") if key in entry},
        "image_id": entry["id"],
        "annotations": [],
    }


def read_text(path: str) -> str:
    """A text file in UTF-8, or :class:`DatasetError`."""
    try:
        with PathManager.open(path, "rb") as f:  # not all of its handlers know encodings
            return f.read().decode("utf-8")
    except FileNotFoundError as e:
        raise DatasetError(f"Annotation file '{path}' does not exist.") from e
    except IsADirectoryError as e:
        raise DatasetError(f"Annotation file '{path}' is a folder.") from e
    except UnicodeDecodeError as e:
        raise DatasetError(f"Annotation file '{path}' is not a text file: {e}") from e


def read_json(path: str) -> Any:
    """A parsed JSON file, or :class:`DatasetError`."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise DatasetError(f"Annotation file '{path}' is not valid JSON: {e}") from e


def check_same_categories(name: str, categories: dict[str, dict[int, str]]) -> None:
    """Raise :class:`DatasetError` unless all parts of a data set have the same categories.

    Args:
        name: of the data set
        categories: part → category id → name
    """
    first, *others = categories.values()
    for other in others:
        text = differences(first, other)
        if text:
            raise DatasetError(
                f"The {' and '.join(categories)} parts of data set '{name}' have different "
                f"'categories' ({text}). Give both files the same list; classes without annotations "
                "are allowed."
            )


def differences(a: Mapping[int, str], b: Mapping[int, str]) -> str:
    """Where two mappings of category ids differ, as text; empty if nowhere."""
    differing = [i for i in sorted({*a, *b}) if a.get(i) != b.get(i)]
    return shorten([f"id {i}: {a.get(i, 'none')} / {b.get(i, 'none')}" for i in differing])


def check_lists(json_file: str, content: Entry, keys: Iterable[str]) -> None:
    """Raise :class:`DatasetError` unless there are lists of objects, not empty but for annotations."""
    for key in keys:
        entries = content.get(key)
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            state = "has no" if key not in content else "has a malformed"
            raise DatasetError(
                f"Annotation file '{json_file}' {state} '{key}': a COCO-format file needs a list "
                f"of objects there. It has {shorten(sorted(content))}."
            )
        if not entries and key != "annotations":
            raise DatasetError(f"Annotation file '{json_file}': '{key}' is empty.")


def _check_owners(
    annotations: list[Entry], key: str, what: str, owners: list[Entry]
) -> Iterable[str]:
    known = {owner.get("id") for owner in owners}
    wrong = [a for a in annotations if key in a and a[key] not in known]
    yield from problem(
        f"annotations have a {key} that is not in '{what}'",
        [f"annotation {a.get('id')} ({key} {a[key]!r})" for a in wrong],
    )


def _check_boxes(annotations: list[Entry]) -> Iterable[str]:
    yield from problem(
        "annotations have a 'bbox' that is not four numbers (x, y, width, height)",
        [
            f"annotation {a.get('id')} ({a['bbox']!r})"
            for a in annotations
            if "bbox" in a and not _is_box(a["bbox"])
        ],
    )


def _check_detection(annotations: list[Entry], categories: list[Entry]) -> Iterable[str]:
    yield from _check_owners(annotations, "category_id", "categories", categories)
    yield from duplicates("categories", "name", categories)
    with_keypoints = [c["keypoints"] for c in categories if c.get("keypoints")]
    if any(keypoints != with_keypoints[0] for keypoints in with_keypoints):
        yield "categories have different 'keypoints'; Detectron2 supports one list for all"
    expected = max((3 * len(keypoints) for keypoints in with_keypoints), default=0)
    yield from problem(
        f"annotations have 'keypoints' of other than {expected} numbers (x, y, visibility for each "
        "keypoint of the category)",
        [
            f"annotation {a.get('id')} ({len(a['keypoints'])} numbers)"
            for a in annotations
            if a.get("keypoints") and len(a["keypoints"]) != expected
        ],
    )
    yield from problem(
        "annotations are marked 'ignore', which Detectron2 does not support; use 'iscrowd'",
        [f"annotation {a.get('id')}" for a in annotations if a.get("ignore", 0)],
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
        lacking = [e for e in entries if key not in e]
        yield from problem(
            f"{what} have no '{key}'",
            [f"the one with {shorten([f'{k}: {e[k]!r}' for k in list(e)[:2]])}" for e in lacking],
        )


def duplicates(what: str, key: str, entries: list[Entry]) -> Iterable[str]:
    """A line if a value of ``key`` occurs more than once."""
    counts = Counter(str(e[key]) for e in entries if key in e)
    yield from problem(
        f"values of '{key}' occur repeatedly in '{what}'",
        [f"{value} ({count} times)" for value, count in counts.items() if count > 1],
    )


def problem(text: str, examples: list[str]) -> Iterable[str]:
    """One line with the count and the first few examples; nothing if there are none."""
    if examples:
        yield f"{len(examples)} {text}: {shorten(examples)}"


def raise_problems(json_file: str, what: str, problems: list[str]) -> None:
    """Raise :class:`DatasetError` if there are any."""
    if problems:
        listed = "".join(f"\n  - {text}" for text in problems)
        raise DatasetError(f"'{json_file}' cannot be used as {what}:{listed}")


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(v, int | float) and not isinstance(v, bool) for v in box)
    )
