"""Reading landmark annotation files in the forms in which the data sets are published.

Every reader gives Detectron2's data set dicts, one per image. Coordinates become Detectron2's
continuous ones: the centre of the first pixel is 0.5, so 0.5 is added to 0-based pixel indices,
also to fractional ones, and 0.5 subtracted from 1-based ones. An annotation holds

``bbox``        [x0, y0, x1, y1] (``BoxMode.XYXY_ABS``) as annotated, or around the points
``crop_box``    where the data set defines it by a centre and a scale: the published box before
                padding, [x0, y0, x1, y1]; not shifted by 0.5 (half a pixel of the image)
``keypoints``   flat x, y, v; v = 0 not labelled (x = y = 0), 1 hidden, 2 visible
``id``          unique in the data set
``area``, ``iscrowd``, ``category_id`` (0)

and, where known, ``attributes`` (name → bool), ``box_size`` (AFLW, pixels), ``person_scale`` (MPII:
person height / 200), ``head_box`` [x0, y0, x1, y1].
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager
from PIL import Image

from d2ext.data.coco_json import LANDMARKS, image_record, read_coco_json, read_json, read_text
from d2ext.data.errors import DatasetError
from d2ext.data.landmarks.datasets import LandmarkDataset

Record = dict[str, Any]
Reader = Callable[[LandmarkDataset, str, str, float | None], list[Record]]

# MPII crops are moved down by this many pixels per unit of scale (the published preparation).
_MPII_SHIFT = 15.0
# Margin of boxes that are made from landmarks, fraction of their extent on each side.
_BODY_MARGIN, _FACE_MARGIN = 0.15, 0.1
WFLW_ATTRIBUTES = ("pose", "expression", "illumination", "make_up", "occlusion", "blur")


def read_coco(
    dataset: LandmarkDataset, path: str, images: str, origin: float | None
) -> list[Record]:
    """COCO-keypoint JSON, also mmpose's, whose category may have no names.

    ``origin`` defaults to 0. ``center`` and ``scale`` of an annotation give its ``crop_box``; those
    of MPII are 1-based as in the source and get the published shift. A ``crop_box``
    [x0, y0, x1, y1] in the file wins over them and is taken as it is.

    Raises:
        DatasetError: see :func:`~d2ext.data.coco_json.read_coco_json`; annotations with another number
            of points, or with boxes that are not four numbers.
    """
    file = read_coco_json(path, schema=LANDMARKS)
    records = {entry["id"]: image_record(entry, images) for entry in file.images}
    for entry in file.annotations:
        where = f"annotation {entry['id']} of '{path}'"
        points = checked_points(
            dataset, entry.get("keypoints") or [0] * 3 * len(dataset.keypoints), where
        )
        extra: Record = {"id": entry["id"], "iscrowd": int(entry.get("iscrowd", 0))}
        x, y, w, h = entry.get("bbox") or (0, 0, 0, 0)
        if w >= 0 and h >= 0 and w + h > 0:  # else the box is made from the points
            extra["bbox"] = [x, y, x + w, y + h]
            extra["area"] = float(entry.get("area", w * h))
        if "center" in entry and "scale" in entry:
            extra.update(_centered(dataset, entry["center"], float(entry["scale"])))
        if "crop_box" in entry:
            extra["crop_box"] = _four_numbers(entry, "crop_box", where)
        for key in ("box_size", "attributes", "track_id", "segmentation"):
            if key in entry:
                extra[key] = entry[key]
        if "bbox_head" in entry:
            x, y, w, h = _four_numbers(entry, "bbox_head", where)
            extra["head_box"] = [x, y, x + w, y + h]
        annotation = make_annotation(dataset, points, origin or 0, extra)
        records[entry["image_id"]]["annotations"].append(annotation)
    return list(records.values())


def read_mpii(
    dataset: LandmarkDataset, path: str, images: str, origin: float | None
) -> list[Record]:
    """MPII as a JSON list of people: image, joints, joints_vis, center, scale.

    ``origin`` defaults to 1. The people of one image become one record. There is no box in the
    source; ``bbox`` is the joints' extent and 15 % more on each side, cut to the image.
    ``joints_vis`` says which joints are labelled, not which can be seen.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise DatasetError(f"'{path}' is not in MPII's form, a list of people.")
    origin = 1.0 if origin is None else origin
    records: dict[str, Record] = {}
    for number, entry in enumerate(content):
        where = f"person {number} of '{path}'"
        missing = sorted({"image", "joints", "joints_vis", "center", "scale"} - set(entry))
        if missing:
            raise DatasetError(f"{where} has no {', '.join(missing)}.")
        joints = np.asarray(entry["joints"], dtype=np.float64).reshape(-1, 2)
        visible = np.asarray(entry["joints_vis"], dtype=np.float64).reshape(-1)
        if len(visible) != len(joints):
            raise DatasetError(f"{where} has {len(joints)} joints but {len(visible)} joints_vis.")
        points = checked_points(dataset, np.column_stack([joints, visible > 0]), where)
        record = record_of(records, images, entry["image"])
        extra = {"id": number, **_centered(dataset, entry["center"], float(entry["scale"]))}
        record["annotations"].append(make_annotation(dataset, points, origin, extra, record))
    return list(records.values())


def _read_lines(
    dataset: LandmarkDataset, path: str, images: str, origin: float | None
) -> list[Record]:
    """WFLW's text: 196 coordinates, box x0 y0 x1 y1, six attributes, file name; ``origin`` 0."""
    count = 2 * len(dataset.keypoints)
    records: dict[str, Record] = {}
    for number, line in enumerate(read_text(path).splitlines()):
        if not line.strip():
            continue
        where = f"line {number + 1} of '{path}'"
        fields = line.split(maxsplit=count + 4 + len(WFLW_ATTRIBUTES))
        if len(fields) != count + 5 + len(WFLW_ATTRIBUTES):
            raise DatasetError(
                f"{where} has {len(fields)} fields; expected {count} coordinates, 4 of the box, "
                f"{len(WFLW_ATTRIBUTES)} attributes and the file name."
            )
        values = _numbers(fields[:-1], where)
        points = np.column_stack([values[:count].reshape(-1, 2), np.ones(count // 2)])
        attributes = values[count + 4 :].astype(bool).tolist()
        extra = {
            "id": number,
            "bbox": values[count : count + 4].tolist(),
            "crop_box": extent_crop_box(points[:, :2]),
            "attributes": dict(zip(WFLW_ATTRIBUTES, attributes, strict=True)),
        }
        name = fields[-1].strip()
        record = record_of(records, images, name)
        record["annotations"].append(make_annotation(dataset, points, origin or 0, extra))
    return list(records.values())


def _read_csv(
    dataset: LandmarkDataset, path: str, images: str, origin: float | None
) -> list[Record]:
    """HRNet's CSV: image, scale, [box_size,] centre x, y, then the points; ``origin`` 0.

    Box size is there for AFLW. A point at x <= 0 and y <= 0 is not labelled.
    """
    count = 2 * len(dataset.keypoints)
    records: dict[str, Record] = {}
    for number, row in enumerate(csv.reader(read_text(path).splitlines())):
        if number == 0 or not row:  # column names
            continue
        where = f"line {number + 1} of '{path}'"
        if len(row) not in (count + 4, count + 5):
            raise DatasetError(
                f"{where} has {len(row)} fields; expected image, scale, center_w, center_h (AFLW: "
                f"box_size before these two) and {count} coordinates of '{dataset.name}'."
            )
        values = _numbers(row[1:], where)
        head, points = values[: len(values) - count], values[-count:].reshape(-1, 2)
        labelled = (points > 0).any(axis=1)
        extra = {"id": number - 1, **_centered(dataset, head[-2:], float(head[0]))}
        if len(head) == 4:
            extra["box_size"] = float(head[1])
        record = record_of(records, images, row[0])
        record["annotations"].append(
            make_annotation(
                dataset, np.column_stack([points, labelled]), origin or 0, extra, record
            )
        )
    return list(records.values())


def _read_pts(
    dataset: LandmarkDataset, path: str, images: str, origin: float | None
) -> list[Record]:
    """A folder of ``.pts`` files, or of folders of them (300-W's 01_Indoor and 02_Outdoor), each beside
    or named as its image; ``origin`` defaults to 1."""
    origin = 1.0 if origin is None else origin
    folders = ["", *(f for f in PathManager.ls(path) if PathManager.isdir(os.path.join(path, f)))]
    names = sorted(
        os.path.join(folder, name)
        for folder in folders
        for name in PathManager.ls(os.path.join(path, folder))
        if name.endswith(".pts")
    )
    if not names:
        raise DatasetError(f"Folder '{path}' has no .pts file, nor have the folders in it.")
    records = []
    for number, name in enumerate(names):
        file = os.path.join(path, name)
        stem = name[: -len(".pts")]
        names = [
            stem + end
            for end in (".png", ".jpg", ".jpeg", ".bmp")
            if PathManager.exists(os.path.join(images, stem + end))
        ]
        if not names:
            raise DatasetError(f"There is no image '{stem}.png' or .jpg in '{images}'.")
        xy = _pts_points(file)
        points = checked_points(dataset, np.column_stack([xy, np.ones(len(xy))]), f"'{file}'")
        record = _image_record(images, names[0], number)
        extra = {"id": number, "crop_box": extent_crop_box(points[:, :2] - origin)}
        record["annotations"].append(make_annotation(dataset, points, origin, extra, record))
        records.append(record)
    return records


READERS: dict[str, Reader] = {
    "coco": read_coco,
    "mpii": read_mpii,
    "wflw": _read_lines,
    "csv": _read_csv,
    "pts": _read_pts,
}


def detect_form(dataset: LandmarkDataset, path: str) -> str:
    """Which of :data:`READERS` a file is in.

    Raises:
        DatasetError: there is no such file, or its form is not supported.
    """
    if not PathManager.exists(path):
        raise DatasetError(f"Annotation file '{path}' does not exist.")
    end = os.path.splitext(path)[1].lower()
    if PathManager.isdir(path):
        return "pts"
    if end == ".json":
        return "mpii" if isinstance(read_json(path), list) else "coco"
    if end == ".csv":
        return "csv"
    if end == ".txt" and dataset.name == "wflw":
        return "wflw"
    if end in (".h5", ".hdf5") and dataset.name == "mpii":
        return "hourglass"
    if end == ".mat" and dataset.name == "cofw":
        return "cofw"
    if end == ".mat" and dataset.name == "aflw":
        raise DatasetError(
            f"'{path}' holds both parts of AFLW: register_landmarks() takes one of them with the form "
            "'aflw_train' or 'aflw_test'."
        )
    raise DatasetError(
        f"'{path}' is in no form that is read for '{dataset.name}': COCO-keypoint JSON, MPII's JSON "
        "list or the stacked hourglass's .h5, WFLW's .txt, COFW's .mat, HRNet's .csv, or a folder of "
        ".pts files."
    )


def extent_crop_box(points: np.ndarray) -> list[float]:
    """The published box of faces without one: a square about the landmarks' whole-pixel extent.

    Args:
        points: (K, 2) pixel indices from 0.

    Returns:
        XYXY; the side is the larger of the extent's sides.
    """
    low, high = np.floor(points.min(axis=0)), np.ceil(points.max(axis=0))
    half = float((high - low).max()) / 2
    x, y = ((low + high) / 2).tolist()
    return [x - half, y - half, x + half, y + half]


def _four_numbers(entry: Record, key: str, where: str) -> list[float]:
    try:
        a, b, c, d = (float(v) for v in entry[key])
    except (TypeError, ValueError) as e:
        raise DatasetError(f"{where}: '{key}' is not four numbers: {entry[key]!r}.") from e
    return [a, b, c, d]


def _numbers(fields: Iterable[str], where: str) -> np.ndarray:
    try:
        return np.array([float(field) for field in fields])
    except ValueError as e:
        raise DatasetError(f"{where}: {e}.") from e


def _pts_points(path: str) -> np.ndarray:
    """(K, 2) numbers between the braces of a .pts file."""
    text = read_text(path)
    if "{" not in text or "}" not in text:
        raise DatasetError(f"'{path}' has no points between {{ and }}.")
    values = _numbers(text[text.index("{") + 1 : text.rindex("}")].split(), f"'{path}'")
    if len(values) % 2:
        raise DatasetError(f"'{path}' has an odd number of coordinates.")
    return values.reshape(-1, 2)


def checked_points(dataset: LandmarkDataset, values: Any, where: str) -> np.ndarray:
    """(K, 3) float64, checked."""
    points = np.asarray(values, dtype=np.float64).reshape(-1)
    if len(points) != 3 * len(dataset.keypoints):
        raise DatasetError(
            f"{where} has {len(points) / 3:g} points; '{dataset.name}' has {len(dataset.keypoints)}."
        )
    points = points.reshape(-1, 3)
    if not np.isfinite(points).all():
        raise DatasetError(f"{where} has coordinates that are not finite.")
    return points


def make_annotation(
    dataset: LandmarkDataset,
    points: np.ndarray,
    origin: float,
    extra: Record,
    record: Record | None = None,
) -> Record:
    """One annotation. Without a ``bbox`` in ``extra``, it is made from the points.

    Args:
        points: (K, 3) as in the file.
        origin: index of the first pixel in the file.
        record: cut the box to this image's size, if it is known.
    """
    points = points.copy()
    labelled = points[:, 2] > 0
    if not dataset.occlusion:
        points[labelled, 2] = 2
    points[labelled, :2] += 0.5 - origin
    points[~labelled] = 0
    result = {
        "category_id": 0,
        "iscrowd": 0,
        "keypoints": points.reshape(-1).tolist(),
        "num_keypoints": int(labelled.sum()),
        **extra,
        "bbox_mode": BoxMode.XYXY_ABS,
    }
    if "bbox" not in result:
        margin = _BODY_MARGIN if dataset.category == "person" else _FACE_MARGIN
        # As pixel indices, which is how the published conversions make boxes.
        result["bbox"] = _extent(points[labelled, :2] - 0.5, margin, record or {})
    x0, y0, x1, y1 = result["bbox"]
    result.setdefault("area", (x1 - x0) * (y1 - y0))
    return result


def _extent(points: np.ndarray, margin: float, record: Record) -> list[float]:
    if len(points) == 0:
        return [0.0, 0.0, 0.0, 0.0]
    low, high = points.min(axis=0), points.max(axis=0)
    low, high = low - margin * (high - low), high + margin * (high - low)
    if "width" in record:
        limit = np.array([record["width"], record["height"]], dtype=np.float64)
        low, high = low.clip(0, limit), high.clip(0, limit)
    return [*low.tolist(), *high.tolist()]


def _centered(dataset: LandmarkDataset, center: Any, scale: float) -> Record:
    """``crop_box`` of a published centre (pixel indices) and scale (box side / 200)."""
    x, y = (float(v) for v in center)
    result: Record = {}
    if dataset.name == "mpii":
        result["person_scale"] = scale
        x, y = x - 1, y - 1 + _MPII_SHIFT * scale
    half = 100 * scale
    return {**result, "crop_box": [x - half, y - half, x + half, y + half]}


def record_of(records: dict[str, Record], images: str, name: str) -> Record:
    """The record of an image, made when its first annotation comes."""
    if name not in records:
        records[name] = _image_record(images, name, len(records))
    return records[name]


def _image_record(images: str, name: str, image_id: int) -> Record:
    """A record without annotations; with the size, if the image can be opened."""
    file_name = os.path.join(images, name)
    record: Record = {"file_name": file_name, "image_id": image_id, "annotations": []}
    try:
        with PathManager.open(file_name, "rb") as f, Image.open(f) as image:
            record["width"], record["height"] = image.size
            if image.getexif().get(0x0112, 1) >= 5:  # orientation: turned by 90 degrees
                record["width"], record["height"] = record["height"], record["width"]
    except OSError:
        pass  # the mapper will say so, if the image is used
    return record
