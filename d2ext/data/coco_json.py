"""Files in COCO's form: the one reader of instances, keypoints and landmarks, also for evaluation.

:func:`read_coco_json` reads a file, repairs what has only one meaning and checks the rest
(:mod:`d2ext.data.coco_schema`) before anything depends on it. :func:`coco_records` makes Detectron2's
dicts of it for detection and keypoints, :mod:`d2ext.data.landmarks.readers` for landmarks, and
:func:`evaluation_content` what COCO's evaluation reads.
The checks of lists serve COCO's panoptic form (:mod:`d2ext.data.panoptic_json`), too.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import pycocotools.mask as mask_util
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n

from d2ext.data.annotations import BAD_POLYGON, EMPTY_MASK, NO_GEOMETRY
from d2ext.data.coco_schema import (
    INSTANCES,
    LANDMARKS,
    Findings,
    Id,
    Schema,
    check_ids,
    link,
    normalize,
    place,
    run_lengths,
)
from d2ext.data.densepose.fields import DENSEPOSE, check_points, compact
from d2ext.data.errors import DatasetError, shorten

__all__ = ["INSTANCES", "LANDMARKS", "CocoFile", "coco_records", "load_coco_json", "read_coco_json"]

logger = logging.getLogger(__name__)

# How many image files are looked for on disk, evenly spread over the list.
CHECKED_IMAGES = 1000
# A larger part of them missing is an error, a smaller one a warning: training replaces them.
TOLERATED_MISSING = 0.1

OUTSIDE = "outside of the image"

# Fields of annotations that Detectron2's dicts have as they are.
_KEPT = ("id", "iscrowd", "bbox", "track_id")

Entry = dict[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class CocoFile:
    """What is in a COCO-format file: its entries, categories by ascending id, which is the order of
    Detectron2's contiguous ids."""

    images: list[Entry]
    annotations: list[Entry]
    categories: list[Entry]

    @property
    def classes(self) -> dict[Id, str]:
        """Category id → name."""
        return {c["id"]: c["name"] for c in self.categories}


def read_coco_json(
    json_file: str, image_root: str | None = None, *, schema: Schema = INSTANCES
) -> CocoFile:
    """Read a COCO-format file and check that it can be trained on; see :func:`coco_file`.

    Args:
        json_file: annotation file with ``images``, ``annotations`` and ``categories``
    """
    return coco_file(json_file, read_json(json_file), image_root, schema=schema)


def coco_file(
    json_file: str, content: Any, image_root: str | None = None, *, schema: Schema = INSTANCES
) -> CocoFile:
    """The content of a COCO-format file in the form that everything else expects.

    Fields are as :mod:`d2ext.data.coco_schema` has them. Annotations have whole numbers as ids,
    ``iscrowd``, ``area`` and ``bbox`` (from mask or keypoints, where the file has none with width and
    height), ``segmentation`` and ``keypoints`` only where there is something in them. Repairs are
    counted and annotations that describe nothing left out, both with a line in the log.

    Args:
        json_file: for messages
        content: parsed; not modified
        image_root: folder that ``file_name`` of an image is relative to; None: images are not looked for
        schema: ``INSTANCES`` or ``LANDMARKS``, whose boxes and areas the readers make

    Raises:
        DatasetError: all problems in one message, with the first few places of each
    """
    if not isinstance(content, dict):
        raise DatasetError(
            f"Annotation file '{json_file}' holds a {type(content).__name__}; a COCO-format file "
            "is an object with 'images', 'annotations' and 'categories'."
        )
    if "images" not in content and isinstance(content.get("videos"), list):
        raise DatasetError(
            f"'{json_file}' is a file of videos: give it as --train-video-json or --val-video-json."
        )
    none = schema is LANDMARKS and not content.get("categories")
    check_lists(json_file, content, [key for key in schema if not (none and key == "categories")])
    findings = Findings()
    fields = dict(schema)
    if schema is not LANDMARKS:
        fields["annotations"] = {**schema["annotations"], **DENSEPOSE}
    lists = {key: normalize(content.get(key) or [], key, fields[key], findings) for key in fields}
    lists["categories"] = _without_roots(lists["categories"], lists["annotations"])
    images, annotations, categories = lists["images"], lists["annotations"], lists["categories"]
    for key, entries in lists.items():
        check_ids(entries, key, findings)
    link(annotations, "annotations", "image_id", images, "images", findings)
    if schema is not LANDMARKS:
        link(annotations, "annotations", "category_id", categories, "categories", findings)
        _check_detection(annotations, categories, findings)
        if not findings.problems:
            check_points(annotations, findings)
    if not findings.problems:
        annotations = _complete(annotations, images, schema is LANDMARKS, findings)
        _count_skeletons_from_1(categories, findings)
    problems = findings.lines()
    if not problems and image_root is not None:
        problems = check_image_files(images, image_root)
    raise_problems(json_file, "a COCO-format data set", problems)
    log_findings(json_file, findings)
    ignored = sum(bool(image.get("ignore_regions_x")) for image in images)
    if ignored:
        logger.warning(
            "%d images of '%s' have ignore regions (PoseTrack), which are not read: in training they "
            "are background, and detections in them count as false.",
            ignored,
            json_file,
        )
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


def _complete(
    annotations: list[Entry], images: list[Entry], landmarks: bool, findings: Findings
) -> list[Entry]:
    """Add what follows from other fields; leave out annotations that describe nothing."""
    sizes = {image["id"]: (image.get("height", 0), image.get("width", 0)) for image in images}
    named_by_text = any(isinstance(a["id"], str) for a in annotations)
    result = []
    for number, annotation in enumerate(annotations):
        size = sizes[annotation["image_id"]]
        reason = _complete_mask(annotation, *size, findings)
        if not landmarks and not _complete_box(annotation, *size, findings):
            findings.left_out.setdefault(reason or NO_GEOMETRY, []).append(annotation["id"])
            continue
        annotation.setdefault("iscrowd", 0)
        annotation.pop("num_keypoints", None)
        if "keypoints" in annotation:
            annotation["num_keypoints"] = sum(v > 0 for v in annotation["keypoints"][2::3])
        if named_by_text:  # COCO's evaluation and the matching of landmarks need numbers
            annotation["id"] = number + 1
        result.append(annotation)
    return result


def _complete_mask(annotation: Entry, height: int, width: int, findings: Findings) -> str:
    """Keep a mask only if it covers something; returns why it does not, or ``""``.

    ``height`` and ``width`` of the image are 0 where they are not known.
    """
    mask = annotation.get("segmentation")
    if mask is None:
        return ""
    reason = ""
    if isinstance(mask, list):
        polygons = [p for p in mask if len(p) >= 6 and len(p) % 2 == 0]
        if not polygons:
            reason = BAD_POLYGON
        elif height and all(_is_outside(p, height, width) for p in polygons):
            reason = OUTSIDE
        annotation["segmentation"] = polygons
    else:
        runs = run_lengths(mask["counts"])
        assert runs is not None  # the schema has read them
        size = mask.get("size") or [height, width]
        annotation["segmentation"] = {**mask, "size": size}
        if height and size != [height, width]:
            findings.problem(
                "annotations have an RLE of another height and width than their image",
                place(annotation, f"{size}, image {[height, width]}"),
            )
        elif runs.sum() != size[0] * size[1]:
            findings.problem(
                "annotations have an RLE of another number of pixels than their image",
                place(annotation, f"{runs.sum()}, image {size[0] * size[1]}"),
            )
        elif runs[1::2].sum() == 0:
            reason = EMPTY_MASK
    if reason:
        del annotation["segmentation"]
        findings.repairs[f"masks without pixels ({reason}) taken away"] += 1
    return reason


def _is_outside(polygon: list[float], height: int, width: int) -> bool:
    x, y = polygon[0::2], polygon[1::2]
    return max(x) <= 0 or max(y) <= 0 or min(x) >= width or min(y) >= height


def _complete_box(annotation: Entry, height: int, width: int, findings: Findings) -> bool:
    """Add the box and the area where they are missing; False: there is nothing to make them of."""
    box = annotation.get("bbox")
    if box is not None:
        x, y, w, h = box
        if x >= width or y >= height or x + w <= 0 or y + h <= 0:
            box = None
    rle = None
    if "segmentation" in annotation and (box is None or "area" not in annotation):
        if findings.problems:
            return True  # there will be no data set: do not decode what may be broken
        rle = compressed_rle(annotation["segmentation"], height, width)
    if box is None:
        if isinstance(annotation.get("segmentation"), list):
            box = _extent([v for p in annotation["segmentation"] for v in p])
        elif rle is not None:
            box = mask_util.toBbox(rle).tolist()
        else:
            points = annotation.get("keypoints", [])
            labelled = [i for i in range(0, len(points), 3) if points[i + 2] > 0]
            box = _extent([v for i in labelled for v in points[i : i + 2]]) if labelled else None
        if box is None or box[2] <= 0 or box[3] <= 0:
            return False
        annotation["bbox"] = box
        findings.repairs["boxes computed"] += 1
    if "area" not in annotation:
        annotation["area"] = float(mask_util.area(rle)) if rle is not None else box[2] * box[3]
        findings.repairs["areas computed"] += 1
    return True


def _extent(coordinates: list[float]) -> list[float]:
    """XYWH box around x, y, x, y, ..."""
    x, y = coordinates[0::2], coordinates[1::2]
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def compressed_rle(segmentation: Any, height: int, width: int) -> Entry:
    """Compressed RLE of polygons or of any RLE."""
    if isinstance(segmentation, list):
        return mask_util.merge(mask_util.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return mask_util.frPyObjects(segmentation, *segmentation["size"])
    return segmentation


def _count_skeletons_from_1(categories: list[Entry], findings: Findings) -> None:
    """COCO counts keypoints of a skeleton from 1; one with a 0 in it was counted from 0."""
    for category in categories:
        if any(0 in pair for pair in category.get("skeleton", ())):
            category["skeleton"] = [[i + 1 for i in pair] for pair in category["skeleton"]]
            findings.repairs["skeletons counted from 0"] += 1


def load_coco_json(json_file: str, image_root: str) -> list[Record]:
    """:func:`coco_records` of a file."""
    return coco_records(read_coco_json(json_file), image_root)


def coco_records(file: CocoFile, image_root: str) -> list[Record]:
    """Detectron2's dicts, by ascending image id, as its own reader of COCO files gives them.

    Annotations have ``id``, ``bbox`` (``BoxMode.XYWH_ABS``) and ``iscrowd``; ``segmentation``,
    ``keypoints``, ``track_id`` and DensePose's fields (:mod:`d2ext.data.densepose.fields`, arrays) as
    far as the file has them; and a contiguous ``category_id``. 0.5 is added to coordinates of keypoints,
    which are pixel indices in COCO: the centre of the first pixel is 0.5 in Detectron2.
    """
    contiguous = {category: i for i, category in enumerate(file.classes)}
    records = {image["id"]: image_record(image, image_root) for image in file.images}
    for entry in file.annotations:
        annotation: Record = {k: entry[k] for k in _KEPT if k in entry}
        if "segmentation" in entry:
            mask = entry["segmentation"]
            annotation["segmentation"] = (
                mask if isinstance(mask, list) else compressed_rle(mask, 0, 0)
            )
        if "keypoints" in entry:
            annotation["keypoints"] = [
                v if i % 3 == 2 else v + 0.5 for i, v in enumerate(entry["keypoints"])
            ]
        annotation.update(compact(entry), bbox_mode=BoxMode.XYWH_ABS)
        annotation["category_id"] = contiguous[entry["category_id"]]
        records[entry["image_id"]]["annotations"].append(annotation)
    return [records[image_id] for image_id in sorted(records)]


def evaluation_content(file: CocoFile) -> Entry:
    """What ``pycocotools`` evaluates on: the file with all fields that it reads.

    Annotation ids count from 1 (0 means "no match" there). Those without keypoints have some that are
    not labelled, if others have keypoints. Categories and images keep their ids.
    """
    points = max((len(a.get("keypoints", ())) for a in file.annotations), default=0)
    categories = [{"id": 1, "name": "object", **c} for c in file.categories or [{}]]
    category = next((c for c in categories if c.get("keypoints")), categories[0])
    annotations = []
    for number, entry in enumerate(file.annotations):
        annotation = {"category_id": category["id"], **entry, "id": number + 1}
        if points and "keypoints" not in entry:
            annotation.update(keypoints=[0] * points, num_keypoints=0)
        if "bbox" not in entry:  # of landmarks
            xyv = annotation.get("keypoints", [])
            labelled = [v for i, v in enumerate(xyv) if i % 3 < 2 and xyv[i - i % 3 + 2] > 0]
            annotation["bbox"] = _extent(labelled) if labelled else [0, 0, 0, 0]
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
        annotations.append(annotation)
    return {
        "info": {},
        "images": file.images,
        "annotations": annotations,
        "categories": categories,
    }


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
            return f.read().decode("utf-8-sig")  # Windows' editors write a mark
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


def check_same_categories(name: str, categories: dict[str, dict[Id, str]]) -> None:
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


def differences(a: Mapping[Id, str], b: Mapping[Id, str]) -> str:
    """Where two mappings of category ids differ, as text; empty if nowhere."""
    differing = [i for i in sorted({*a, *b}, key=_by_type) if a.get(i) != b.get(i)]
    return shorten([f"id {i}: {a.get(i, 'none')} / {b.get(i, 'none')}" for i in differing])


def _by_type(value: Id) -> tuple[bool, Id]:
    return isinstance(value, str), value  # numbers and text cannot be compared


def check_lists(json_file: str, content: Entry, keys: Iterable[str]) -> None:
    """Raise :class:`DatasetError` unless there are lists of objects, not empty but for annotations."""
    for key in keys:
        entries = content.get(key)
        if not isinstance(entries, list):
            state = "has no" if key not in content else "has a malformed"
            raise DatasetError(
                f"Annotation file '{json_file}' {state} '{key}': a COCO-format file needs a list "
                f"of objects there. It has {shorten(sorted(content))}."
            )
        for number, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise DatasetError(
                    f"Annotation file '{json_file}' has a malformed '{key}': entry {number} is "
                    f"{str(entry)[:40]!r}, not an object. Correct it, or take it out."
                )
        if not entries and key != "annotations":
            raise DatasetError(f"Annotation file '{json_file}': '{key}' is empty.")


def _check_detection(annotations: list[Entry], categories: list[Entry], findings: Findings) -> None:
    check_ids(categories, "categories", findings, "name")
    with_keypoints = [c["keypoints"] for c in categories if c.get("keypoints")]
    for keypoints in with_keypoints:
        if keypoints != with_keypoints[0]:
            findings.problem(
                "categories have other 'keypoints' than the first; Detectron2 supports one list for all",
                f"{len(keypoints)} instead of {len(with_keypoints[0])}",
            )
    expected = max((3 * len(keypoints) for keypoints in with_keypoints), default=0)
    for annotation in annotations:
        count = len(annotation.get("keypoints", ()))
        if count not in (0, expected):
            findings.problem(
                f"annotations have 'keypoints' of other than {expected} numbers (x, y, visibility for "
                "each keypoint of the category)",
                place(annotation, f"{count} numbers"),
            )
        if annotation.get("ignore"):
            findings.problem(
                "annotations are marked 'ignore', which Detectron2 does not support; use 'iscrowd'",
                place(annotation),
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


def raise_problems(json_file: str, what: str, problems: list[str]) -> None:
    """Raise :class:`DatasetError` if there are any."""
    if problems:
        listed = "".join(f"\n  - {text}" for text in problems)
        raise DatasetError(
            f"'{json_file}' cannot be used as {what}:{listed}\n"
            "Correct the file, or take out what is listed."
        )


def log_findings(json_file: str, findings: Findings) -> None:
    """Log what was repaired and left out, once for a file."""
    if findings.repairs:
        listed = ", ".join(f"{n} {what}" for what, n in findings.repairs.most_common())
        message = f"'{json_file}': {findings.repairs.total()} repairs: {listed}."
        log_first_n(logging.INFO, message, key="message", name=__name__)
    for reason, ids in findings.left_out.items():
        message = (
            f"'{json_file}': annotations that describe nothing are left out: {len(ids)} ({reason}): id "
            f"{shorten(ids)}."
        )
        log_first_n(logging.WARNING, message, key="message", name=__name__)
