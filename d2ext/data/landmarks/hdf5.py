"""Landmark annotations in HDF5: the stacked hourglass's MPII files, and COFW's ``.mat`` (MATLAB 7.3).

Both need h5py (``pip install h5py``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image

from d2ext.data.errors import DatasetError
from d2ext.data.landmarks.datasets import LandmarkDataset
from d2ext.data.landmarks.readers import READERS, Record, checked_points, make_annotation, record_of
from d2ext.files import atomic_write

# The scale in the hourglass's files is this many times MPII's (hourglass/NOTES.md).
HOURGLASS_SCALE = 1.25


@contextmanager
def _opened(path: str, fields: tuple[str, ...]) -> Iterator[Any]:
    """An open HDF5 file with all ``fields``.

    Raises:
        DatasetError: h5py is missing, or the file cannot be read or has not all fields.
    """
    try:
        import h5py
    except ImportError as e:
        raise DatasetError(f"Reading '{path}' needs h5py: pip install h5py.") from e
    try:
        file = h5py.File(path, "r")
    except OSError as e:
        raise DatasetError(f"'{path}' is no HDF5 file: {e}") from e
    with file:
        missing = [field for field in fields if field not in file]
        if missing:
            raise DatasetError(f"'{path}' has no {', '.join(missing)}; it has {', '.join(file)}.")
        yield file


def read_hourglass(
    dataset: LandmarkDataset, path: str, images: str, origin: float | None
) -> list[Record]:
    """``train.h5``, ``valid.h5`` of the stacked hourglass (its NOTES.md, *Data and pre-processing*).

    Its ``center`` and ``scale`` are the ``crop_box``, with the published enlargement taken out of it,
    and ``person_scale`` is MPII's. ``origin`` defaults to 0.5: the published code takes all
    coordinates of the file as continuous ones. A joint is labelled unless its x is 0, whether
    ``visible`` or not, as in the published evaluation.
    """
    origin = 0.5 if origin is None else origin
    records: dict[str, Record] = {}
    with _opened(path, ("imgname", "center", "scale", "part")) as file:
        names, centers, scales, parts = (
            file[field][()] for field in ("imgname", "center", "scale", "part")
        )
    for number, (name, center, scale, part) in enumerate(
        zip(names, centers, scales, parts, strict=True)
    ):
        part = np.asarray(part, dtype=np.float64).reshape(-1, 2)
        where = f"person {number} of '{path}'"
        points = checked_points(dataset, np.column_stack([part, part[:, 0] != 0]), where)
        record = record_of(records, images, _text(name))
        person_scale = float(scale) / HOURGLASS_SCALE
        (x, y), half = (float(v) for v in center), 100 * person_scale
        extra = {
            "id": number,
            "person_scale": person_scale,
            "crop_box": [x - half, y - half, x + half, y + half],
        }
        record["annotations"].append(make_annotation(dataset, points, origin, extra, record))
    return list(records.values())


def read_cofw(
    dataset: LandmarkDataset, path: str, images: str, origin: float | None
) -> list[Record]:
    """A ``.mat`` of COFW (landmarks/NOTES.md, section 6), whose pictures lie in the file itself: those
    that are not yet in the folder ``images`` are written there, as PNG.

    ``origin`` defaults to 1. Points that the file calls occluded get v = 1. Boxes are made of points.
    """
    origin = 1.0 if origin is None else origin
    count = len(dataset.keypoints)
    records: dict[str, Record] = {}
    with _opened(path, ()) as file:
        part = next((p for p in ("Tr", "T") if f"phis{p}" in file and f"Is{p}" in file), None)
        if part is None:
            raise DatasetError(f"'{path}' has neither IsTr and phisTr nor IsT and phisT.")
        # MATLAB's arrays have their axes in reverse order.
        values = np.asarray(file[f"phis{part}"][()], dtype=np.float64).T
        if values.ndim != 2 or values.shape[1] != 3 * count:
            raise DatasetError(
                f"'{path}' has points of shape {values.shape}, not (N, {3 * count})."
            )
        stem = os.path.splitext(os.path.basename(path))[0]
        for number, (row, reference) in enumerate(
            zip(values, np.ravel(file[f"Is{part}"][()]), strict=True)
        ):
            name = f"{stem}_{number:04d}.png"
            _write_once(os.path.join(images, name), np.asarray(file[reference][()]).T)
            x, y, occluded = row.reshape(3, count)
            points = np.column_stack([x, y, np.where(occluded > 0, 1, 2)])
            points = checked_points(dataset, points, f"face {number} of '{path}'")
            record = record_of(records, images, name)
            extra = {"id": number}
            record["annotations"].append(make_annotation(dataset, points, origin, extra, record))
    return list(records.values())


def _text(value: Any) -> str:
    """A string of HDF5: bytes, or the codes of its characters."""
    if isinstance(value, np.ndarray):
        value = bytes(value.astype(np.uint8).tolist())
    return value.decode().rstrip("\0") if isinstance(value, bytes) else str(value)


def _write_once(path: str, picture: np.ndarray) -> None:
    """Write (H, W) or (H, W, 3) RGB as PNG, unless there is such a file."""
    if os.path.exists(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with atomic_write(path) as file:
        Image.fromarray(np.ascontiguousarray(picture.astype(np.uint8))).save(file, format="PNG")


READERS.update(hourglass=read_hourglass, cofw=read_cofw)
