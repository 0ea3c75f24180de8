"""Landmark data sets in Detectron2's catalogs, with one call.

::

    register_landmarks("pose_train", "coco", "person_keypoints_train2017.json", "train2017/")
    register_landmarks("mpii_val", "mpii", "mpii_val.json", "images/", head_boxes="mpii_gt_val.mat")
    register_landmarks("hands", "custom", "hands.json", "images/")
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ext.data.coco_json import LANDMARKS, read_coco_json, read_json
from d2ext.data.dataset_facts import category_keypoints
from d2ext.data.errors import DatasetError
from d2ext.data.landmarks import hdf5, matlab  # noqa: F401  (they add their readers)
from d2ext.data.landmarks.datasets import LANDMARK_DATASETS, LandmarkDataset, landmark_metadata
from d2ext.data.landmarks.readers import READERS, detect_form

logger = logging.getLogger(__name__)
Record = dict[str, Any]


def register_landmarks(
    name: str,
    kind: str,
    annotations: str,
    images: str,
    *,
    form: str | None = None,
    origin: float | None = None,
    head_boxes: str | None = None,
) -> LandmarkDataset:
    """Register a landmark data set. Registering the same again is harmless.

    Args:
        name: of the data set in Detectron2's catalogs.
        kind: "coco", "posetrack18", "mpii", "300w", "wflw", "cofw", "aflw", or "custom" for a
            COCO-keypoint JSON whose category has names (and ``flip_pairs``, ``skeleton``,
            ``sigmas``).
        annotations: file, or folder of ``.pts`` files.
        images: folder that file names are relative to.
        form: of the file: "coco", "mpii", "wflw", "csv", "pts", or, by h5py, "hourglass" (MPII) and
            "cofw", or, by SciPy, "aflw_train" and "aflw_test", the parts of AFLW's one file; detected
            if not given, except AFLW's.
        origin: index of the first pixel in the file; by default 1 for MPII's list, ``.pts`` and COFW's
            file, 0.5 for the hourglass's, 0 otherwise.
        head_boxes: for PCKh: MPII's ``mpii_gt_val.mat`` (read with SciPy), or a JSON list with
            [x0, y0, x1, y1] for each annotation in the file's order.

    Returns:
        the kind.

    Raises:
        DatasetError: unknown kind or form, files that cannot be used, or a name that is taken.
    """
    dataset = landmark_kind(kind, annotations)
    form = form or detect_form(dataset, annotations)
    if form not in READERS:
        raise DatasetError(f"Form '{form}' is not known; choose from {', '.join(READERS)}.")
    source = (kind, annotations, images, form, origin, head_boxes)
    if name in DatasetCatalog.list():
        if MetadataCatalog.get(name).get("landmark_source") == source:
            return dataset
        raise DatasetError(f"Data set '{name}' is already registered. Choose another name.")
    load = partial(load_landmarks, dataset, annotations, images, form, origin, head_boxes)
    load()  # errors belong here, not to the first epoch
    DatasetCatalog.register(name, load)
    metadata = {**landmark_metadata(dataset), "image_root": images, "landmark_source": source}
    if form == "coco":
        metadata["thing_dataset_id_to_contiguous_id"] = {_category_id(annotations): 0}
        if "oks" in dataset.metrics and not origin:
            metadata["json_file"] = annotations  # COCO's own evaluation reads it
    MetadataCatalog.get(name).set(**metadata)
    return dataset


def load_landmarks(
    dataset: LandmarkDataset,
    annotations: str,
    images: str,
    form: str,
    origin: float | None = None,
    head_boxes: str | None = None,
) -> list[Record]:
    """The data set as Detectron2's dicts; see :mod:`d2ext.data.landmarks.readers` for their fields.

    Raises:
        DatasetError: files that cannot be used.
    """
    records = READERS[form](dataset, annotations, images, origin)
    if not any(record["annotations"] for record in records):
        raise DatasetError(f"'{annotations}' has no annotation.")
    if head_boxes is not None:
        people = [a for record in records for a in record["annotations"]]
        boxes = read_head_boxes(head_boxes)
        if len(boxes) != len(people):
            raise DatasetError(
                f"'{head_boxes}' has {len(boxes)} head boxes, '{annotations}' {len(people)} people."
            )
        for annotation, box in zip(_in_file_order(people, annotations, form), boxes, strict=True):
            annotation["head_box"] = box.tolist()
    return records


def _in_file_order(people: list[Record], path: str, form: str) -> list[Record]:
    """Annotations, which records hold image by image, in the order of their file."""
    if form == "coco":
        place = {entry["id"]: i for i, entry in enumerate(read_json(path)["annotations"])}
        return sorted(people, key=lambda annotation: place[annotation["id"]])
    return sorted(people, key=lambda annotation: annotation["id"])  # numbered in the file's order


def landmark_kind(kind: str, annotations: str) -> LandmarkDataset:
    """A kind by name; "custom" is read from the JSON file.

    Raises:
        DatasetError: unknown name, or a custom file without point names.
    """
    if kind in LANDMARK_DATASETS:
        return LANDMARK_DATASETS[kind]
    if kind == "custom":
        return custom_kind(annotations)
    raise DatasetError(
        f"Landmark kind '{kind}' is not known; known: {', '.join(LANDMARK_DATASETS)}, custom."
    )


def custom_kind(path: str) -> LandmarkDataset:
    """The kind that the (only) category of a COCO-keypoint JSON describes, see
    :func:`~d2ext.data.dataset_facts.category_keypoints`. Faces and the like are evaluated by NME of the
    box; with ``sigmas``, by OKS.
    """
    named = [c for c in read_coco_json(path, schema=LANDMARKS).categories if c.get("keypoints")]
    if len(named) != 1:
        raise DatasetError(
            f"'{path}' has {len(named)} categories with 'keypoints'; a custom landmark set needs "
            "exactly one, with the points' names."
        )
    keypoints = category_keypoints(named[0])
    return LandmarkDataset(
        "custom",
        str(named[0].get("name", "object")),
        keypoints.names,
        keypoints.flip_pairs,
        keypoints.skeleton,
        keypoints.sigmas,
        occlusion=True,
        metrics=("oks", "pck") if keypoints.sigmas else ("nme", "pck"),
    )


def read_head_boxes(path: str) -> np.ndarray:
    """(N, 4) XYXY head rectangles from MPII's ``.mat`` or from a JSON list.

    Raises:
        DatasetError: neither, or SciPy is missing.
    """
    if path.lower().endswith(".mat"):
        (corners,) = matlab.read_mat(path, "headboxes_src")  # (2 corners, x and y, people)
        boxes = np.asarray(corners, dtype=np.float64).transpose(2, 0, 1).reshape(-1, 4)
    else:
        try:
            boxes = np.array(read_json(path), dtype=np.float64)
        except (TypeError, ValueError) as e:
            raise DatasetError(f"'{path}' is no list of [x0, y0, x1, y1]: {e}") from e
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not np.isfinite(boxes).all():
        raise DatasetError(f"'{path}' is no list of [x0, y0, x1, y1].")
    return boxes


def _category_id(path: str) -> int:
    """Id of the category in a COCO-keypoint file, the first one with names of points if any has;
    Detectron2's evaluator wants it, and detections of other categories are left out."""
    categories = read_coco_json(path, schema=LANDMARKS).categories or [{"id": 1}]
    named = [category for category in categories if category.get("keypoints")]
    return int((named or categories)[0].get("id", 1))
