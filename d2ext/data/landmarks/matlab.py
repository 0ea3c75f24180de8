"""MATLAB's files before 7.3, by SciPy; AFLW's landmarks, ``AFLWinfo_release.mat`` (doi
10.1109/CVPR.2016.371)."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from d2ext.data.errors import DatasetError
from d2ext.data.landmarks.datasets import LandmarkDataset
from d2ext.data.landmarks.readers import READERS, Record, checked_points, make_annotation, record_of

# So many faces, the first of the file's permutation, are for training, all others the full test.
_NUM_TRAIN = 20_000


def read_mat(path: str, *fields: str) -> list[Any]:
    """Arrays of a ``.mat`` before MATLAB 7.3.

    Raises:
        DatasetError: SciPy is missing, or the file cannot be read or has not all fields.
    """
    try:
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    except ImportError as e:
        raise DatasetError(f"Reading '{path}' needs SciPy: pip install scipy.") from e
    try:
        content = loadmat(path)
        return [content[field] for field in fields]
    except (OSError, ValueError, KeyError, NotImplementedError, MatReadError) as e:
        raise DatasetError(f"'{path}' has no readable {', '.join(fields)}: {e}") from e


def read_aflw(
    dataset: LandmarkDataset, path: str, images: str, origin: float | None, *, train: bool
) -> list[Record]:
    """The faces of one part, those for training or the full test set.

    All 19 points are labelled, whether seen or not, as in the published evaluation. ``attributes`` has
    ``frontal``: all of them are seen. ``box_size`` is the square root of the box's area; ``origin`` 0.
    """
    count = len(dataset.keypoints)
    names, values, seen, boxes, order = read_mat(path, "nameList", "data", "mask_new", "bbox", "ra")
    faces = len(values)
    if values.shape != (faces, 2 * count) or {len(names), len(seen), len(boxes)} != {faces}:
        raise DatasetError(f"'{path}' has points of shape {values.shape}, not (N, {2 * count}).")
    order = np.ravel(order).astype(int) - 1
    records: dict[str, Record] = {}
    for number in (order[:_NUM_TRAIN] if train else order[_NUM_TRAIN:]).tolist():
        x, y = values[number].reshape(2, count)
        where = f"face {number} of '{path}'"
        points = checked_points(dataset, np.column_stack([x, y, np.ones(count)]), where)
        left, right, top, bottom = (float(v) for v in boxes[number])
        extra = {
            "id": number,
            "bbox": [left, top, right, bottom],
            "box_size": float(np.sqrt((right - left) * (bottom - top))),
            "attributes": {"frontal": bool((seen[number] == 1).all())},
        }
        record = record_of(records, images, str(np.ravel(names[number])[0].item()))
        record["annotations"].append(make_annotation(dataset, points, origin or 0, extra, record))
    return list(records.values())


READERS.update(aflw_train=partial(read_aflw, train=True), aflw_test=partial(read_aflw, train=False))
