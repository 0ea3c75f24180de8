"""WIDER FACE's annotations: its own text file, and RetinaFace's ``label.txt`` with five points.

``wider_face_*_bbx_gt.txt``: the name of an image, the number of its faces, then for each face ten whole
numbers, x y w h blur expression illumination invalid occlusion pose. After a number of 0 there is a row
of zeros. ``wider_face_test_filelist.txt`` has names alone.

``label.txt``: "# name", then for each face x y w h, five times x y flag, blur; or x y w h alone
(validation). flag 0 is a visible point, 1 a hidden one, -1 none. Users report that the flags are noisy.

Coordinates are taken as they are, for points too: published training adds no half pixel.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from d2ext.data.coco_json import read_text
from d2ext.data.errors import DatasetError

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Row = tuple[int, str]

ATTRIBUTES = ("blur", "expression", "illumination", "invalid", "occlusion", "pose")
_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp")
# Columns of a row of label.txt: with points and blur, or a box alone.
_LABEL_COLUMNS = (20, 4)


def read_wider(path: str, images: str) -> list[Record]:
    """Either of the text files as Detectron2's dicts, told apart by the first line ("#").

    An annotation has ``bbox`` (``XYXY_ABS``), ``category_id`` 0, ``id``, ``iscrowd`` (1 for WIDER's
    ``invalid`` faces, which neither train nor count), ``attributes`` (name → whole number) and, if
    labelled, ``keypoints`` (15 numbers x, y, v). Dicts have no ``height`` and ``width``: the files do
    not say. Faces that a file names twice count once, with a line in the log; boxes without area and
    those that leave the image stay, the loader looks after them.

    Args:
        path: the text file
        images: folder that its names are relative to

    Raises:
        DatasetError: a line is not in the form; the message has its number
    """
    lines = [(n, line.strip()) for n, line in enumerate(read_text(path).splitlines(), 1)]
    lines = [(n, line) for n, line in lines if line]
    if not lines:
        raise DatasetError(f"'{path}' is empty.")
    if lines[0][1].startswith("#"):
        found = _label_images(path, lines)
    elif all(_is_image(line) for _, line in lines):
        return [_record(images, name, i) for i, (_, name) in enumerate(lines)]
    else:
        found = _split_images(path, lines)
    records, number, twice = [], 0, 0
    for image_id, (name, faces) in enumerate(found):
        boxes = set()
        kept = []
        for annotation in faces:
            box = tuple(annotation["bbox"])
            if box in boxes:
                twice += 1
                continue
            boxes.add(box)
            number += 1
            kept.append({"id": number, **annotation})
        records.append({**_record(images, name, image_id), "annotations": kept})
    if twice:
        logger.info("'%s' names %d faces twice: they count once.", path, twice)
    return records


def _record(images: str, name: str, image_id: int) -> Record:
    return {"file_name": os.path.join(images, name), "image_id": image_id}


def _is_image(line: str) -> bool:
    return line.lower().endswith(_ENDINGS)


def _split_images(path: str, lines: list[Row]) -> Iterator[tuple[str, list[Record]]]:
    at = 0
    while at < len(lines):
        number, name = lines[at]
        if not _is_image(name):
            raise DatasetError(f"Line {number} of '{path}' should name an image: {name!r}.")
        if at + 1 == len(lines) or not lines[at + 1][1].isdigit():
            raise DatasetError(
                f"Line {number} of '{path}' names an image; after it comes the number of its faces."
            )
        count = int(lines[at + 1][1])
        rows = lines[at + 2 : at + 2 + count]
        if len(rows) < count:
            raise DatasetError(f"'{path}' ends before the {count} faces of line {number + 1}.")
        yield name, [_split_face(path, row) for row in rows]
        at += 2 + count
        if count == 0 and at < len(lines) and set(lines[at][1].split()) == {"0"}:
            at += 1


def _split_face(path: str, row: Row) -> Record:
    values = _numbers(path, row)
    if len(values) != 4 + len(ATTRIBUTES) or not np.equal(np.floor(values), values).all():
        raise DatasetError(
            f"Line {row[0]} of '{path}' should be ten whole numbers, x y w h {' '.join(ATTRIBUTES)}: "
            f"{row[1]!r}. (The number of faces above it may be wrong.)"
        )
    attributes = {k: int(v) for k, v in zip(ATTRIBUTES, values[4:], strict=True)}
    return {**_box(values), "iscrowd": int(attributes["invalid"] != 0), "attributes": attributes}


def _label_images(path: str, lines: list[Row]) -> Iterator[tuple[str, list[Record]]]:
    starts = [i for i, (_, line) in enumerate(lines) if line.startswith("#")]
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        number, line = lines[start]
        name = line[1:].strip()
        if not name:
            raise DatasetError(f"Line {number} of '{path}' has no image after its '#'.")
        yield name, [_label_face(path, row) for row in lines[start + 1 : end]]


def _label_face(path: str, row: Row) -> Record:
    values = _numbers(path, row)
    if len(values) not in _LABEL_COLUMNS:
        raise DatasetError(
            f"Line {row[0]} of '{path}' has {len(values)} numbers; expected 20 (x y w h, five times x y "
            "flag, blur) or 4 (x y w h)."
        )
    annotation = {**_box(values), "iscrowd": 0}
    if len(values) == 4:
        return annotation
    annotation["attributes"] = {"blur": float(values[19])}
    points = values[4:19].reshape(5, 3)
    # Only the flag says it for a single point; a face without any has -1 everywhere.
    labelled = (points[:, 2] >= 0) & ~(points[:, :2] == -1).all(axis=1)
    if labelled.any():
        v = np.where(points[:, 2] > 0, 1.0, 2.0)
        keypoints = np.where(labelled[:, None], np.column_stack([points[:, :2], v]), 0.0)
        annotation.update(keypoints=keypoints.ravel().tolist(), num_keypoints=int(labelled.sum()))
    return annotation


def _numbers(path: str, row: Row) -> np.ndarray:
    try:
        values = np.array([float(v) for v in row[1].split()])
    except ValueError as e:
        raise DatasetError(f"Line {row[0]} of '{path}' is not a row of numbers: {row[1]!r}.") from e
    if not np.isfinite(values).all():
        raise DatasetError(
            f"Line {row[0]} of '{path}' has numbers that are not finite: {row[1]!r}."
        )
    return values


def _box(values: np.ndarray) -> Record:
    x, y, w, h = values[:4].tolist()
    return {"bbox": [x, y, x + w, y + h], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
