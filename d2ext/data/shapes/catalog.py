"""`shapes` in Detectron2's catalogs.

For a split such as ``val`` the names are

=============================  ==================================================================
``shapes_val``                 instances, masks as polygons (stock configs read these)
``shapes_val_rle``             the same, masks exact, as RLE: set ``INPUT.MASK_FORMAT: bitmask``
``shapes_val_keypoints``       as ``person_keypoints`` of COCO: one class, 8 landmarks
``shapes_val_landmarks``       the same landmarks for top-down models: boxes hold the whole thing,
                               also what is hidden, and tell how much of it is
``shapes_val_panoptic``        instances, ``sem_seg`` and panoptic maps, as
                               ``coco_2017_*_panoptic_separated`` and, in the same dicts,
                               ``pan_seg_file_name`` and ``segments_info``
``shapes_val_semantic``        one label per pixel over all classes, things and stuff
``shapes_val_video``           clips: tracks of things with exact masks, as RLE
``shapes_val_video_panoptic``  clips of 30 frames, every fifth annotated as panoptic
``shapes_val_video_keypoints`` clips: tracks of things with landmarks
``shapes_val_flow``            pairs of frames with optical flow
``shapes_val_faces``           heads: boxes of faces, five points and meshes
``shapes_val_bodies``          persons: boxes, masks, points on the surface of a mesh
=============================  ==================================================================

:mod:`.clips` has those of videos, :mod:`.face_sets` those of faces, :mod:`.body_sets` those of
bodies.
"""

import contextlib
import json
import logging
import pickle
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from d2ext.data.shapes.classes import (
    KEYPOINT_CONNECTIONS,
    KEYPOINT_FLIP_MAP,
    KEYPOINT_NAMES,
    KEYPOINT_OKS_SIGMAS,
    STUFF_CLASSES,
    STUFF_COLORS,
    STUFF_IDS,
    THING_CLASSES,
    THING_COLORS,
    THING_IDS,
)
from d2ext.data.shapes.files import versioned_cache
from d2ext.data.shapes.frame import SEGMENT_ID_FACTOR, VOID, Frame
from d2ext.data.shapes.sets import ShapesSet, VideoSet
from d2ext.files import atomic_write

__all__ = [
    "DEFAULT_SETS",
    "TASKS",
    "load_shapes",
    "paths_metadata",
    "register_shapes",
    "shapes_metadata",
]

logger = logging.getLogger(__name__)

# What importing d2ext.data registers. Annotations of 2,000 images take some seconds to compute.
DEFAULT_SETS = (ShapesSet("train", 2000), ShapesSet("val", 200))

# Landmarks: a thing counts as occluded from this share of its outline that is hidden or outside the
# image, and is left out from this one: nobody could say where its landmarks are.
_OCCLUDED, _TOO_HIDDEN = 0.1, 0.5


def _category_dict(segment_info: dict[str, Any]) -> dict[str, Any]:
    """COCO's segment info with contiguous class ids and ``isthing``, as Detectron2 wants it."""
    category = segment_info["category_id"]
    isthing = category in THING_IDS
    # Of stuff, 0 is "things".
    contiguous = THING_IDS.index(category) if isthing else STUFF_IDS.index(category) + 1
    return {**segment_info, "category_id": contiguous, "isthing": isthing}


def _instances(
    frame: Frame, mask_format: str = "polygon", keypoints: bool = False
) -> dict[str, Any]:
    annotations = []
    for segment in frame.segments:
        annotation = frame.annotation(segment, mask_format)
        del annotation["area"]  # not a field of Detectron2's
        annotation["bbox_mode"] = BoxMode.XYWH_ABS
        annotation["category_id"] = 0 if keypoints else segment.category
        if keypoints:
            annotation["keypoints"] = frame.keypoints(segment).reshape(-1).tolist()
        annotations.append(annotation)
    return {"annotations": annotations}


def _landmarks(frame: Frame) -> dict[str, Any]:
    """Things of which more than half can be seen, each with the box of its whole outline (not cut to the
    image), its landmarks and ``occlusion``, the share of its outline that is hidden or outside."""
    annotations = []
    for segment in frame.segments:
        if segment.layer < 0:
            continue
        low, high, area = frame.outline_extent(segment)
        occlusion = max(1 - segment.area / max(area, 1.0), 0.0)
        if occlusion >= _TOO_HIDDEN:
            continue
        annotations.append(
            {
                "id": segment.number,
                "bbox": [*low.tolist(), *high.tolist()],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 0,
                "iscrowd": 0,
                "area": float(np.prod(high - low)),
                "keypoints": frame.keypoints(segment).reshape(-1).tolist(),
                "occlusion": occlusion,
                "attributes": {"occluded": occlusion >= _OCCLUDED},
            }
        )
    return {"annotations": annotations}


def _panoptic(frame: Frame) -> dict[str, Any]:
    result = _instances(frame)
    for segment, annotation in zip(frame.segments, result["annotations"], strict=True):
        annotation["segment_id"] = segment.id
    result["segments_info"] = [_category_dict(info) for info in frame.panoptic_segments()]
    return result


# Task -> the fields of an image that have to be drawn, and the folders that it refers to.
_FIELDS: dict[str, tuple[Callable[[Frame], dict[str, Any]] | None, dict[str, str]]] = {
    "instances": (_instances, {}),
    "rle": (partial(_instances, mask_format="rle"), {}),
    "keypoints": (partial(_instances, keypoints=True), {}),
    "landmarks": (_landmarks, {}),
    "panoptic": (_panoptic, {"sem_seg_file_name": "sem_seg", "pan_seg_file_name": "panoptic"}),
    "semantic": (None, {"sem_seg_file_name": "semantic"}),
}
TASKS = tuple(_FIELDS)


@lru_cache(maxsize=8)
def _load(shapes: ShapesSet, task: str) -> bytes:
    """:func:`load_shapes`, pickled: takes a third of the memory, and is quicker to copy. What the
    default sets hold is drawn once and kept in the cache."""
    path = versioned_cache() / f"{shapes.name}-{task}.json"
    if shapes not in DEFAULT_SETS:
        return pickle.dumps(_draw(shapes, task))
    if path.is_file():
        dicts = json.loads(path.read_bytes())
        for annotation in (x for record in dicts for x in record.get("annotations", ())):
            annotation["bbox_mode"] = BoxMode(annotation["bbox_mode"])
            segmentation = annotation.get("segmentation")
            if isinstance(segmentation, dict):
                segmentation["counts"] = segmentation["counts"].encode()
        return pickle.dumps(dicts)
    logger.info("Drawing the annotations of %d pictures: some seconds.", shapes.num_frames)
    dicts = _draw(shapes, task)
    with contextlib.suppress(OSError), atomic_write(path, "w") as file:
        json.dump(dicts, file, default=bytes.decode)
    return pickle.dumps(dicts)


def _draw(shapes: ShapesSet, task: str) -> list[dict[str, Any]]:
    draw, folders = _FIELDS[task]
    annotated = [shapes.is_annotated(index) for index in range(shapes.num_frames)]
    dicts = [_record(shapes, i, folders if known else {}) for i, known in enumerate(annotated)]
    if draw is not None:
        for record, frame, known in zip(dicts, shapes.frames(), annotated, strict=True):
            if known:
                record.update(draw(frame))
                if isinstance(shapes, VideoSet):
                    _add_track_ids(record, frame)
    return dicts


def _add_track_ids(record: dict[str, Any], frame: Frame) -> None:
    for segment, annotation in zip(frame.segments, record["annotations"], strict=True):
        annotation["track_id"] = segment.number
    for info in record.get("segments_info", ()):
        if info["isthing"]:
            info["track_id"] = info["id"] % SEGMENT_ID_FACTOR


def _record(shapes: ShapesSet, index: int, folders: dict[str, str]) -> dict[str, Any]:
    """Fields of a picture for which nothing has to be drawn."""
    stem = shapes.stem(index)
    record: dict[str, Any] = {
        "file_name": f"{shapes.root}/images/{stem}.bmp",
        "image_id": index,
        "height": shapes.height,
        "width": shapes.width,
    }
    for key, folder in folders.items():
        record[key] = f"{shapes.root}/{folder}/{stem}.png"
    return record


def load_shapes(shapes: ShapesSet, task: str = "instances") -> list[dict[str, Any]]:
    """The set in Detectron2's format. Computed once per process; every call returns its own copy.

    Args:
        task: one of :data:`TASKS`.
    """
    if task not in _FIELDS:
        raise ValueError(f"unknown task {task!r}; choose from {', '.join(TASKS)}")
    return pickle.loads(_load(shapes, task))


def shapes_metadata(task: str) -> dict[str, Any]:
    """Metadata that does not depend on where the images are: class names, ids, colours, landmarks.

    It also suits ``register_coco_instances`` and ``register_coco_panoptic_separated`` for the files
    that ``python -m d2ext.data.shapes`` writes.
    """
    if task in ("instances", "rle"):
        return {
            "thing_classes": list(THING_CLASSES),
            "thing_colors": list(THING_COLORS),
            "thing_dataset_id_to_contiguous_id": {d: c for c, d in enumerate(THING_IDS)},
        }
    if task == "landmarks":
        return {
            **shapes_metadata("keypoints"),
            "landmark_kind": "shapes",
            "landmark_metrics": ("nme", "pck"),
            "landmark_norm": "box",
            "landmark_norms": {},
            "landmark_not_scored": (),
            "landmark_failure": 0.1,
            "landmark_occlusion": True,
        }
    if task == "keypoints":
        return {
            "thing_classes": ["thing"],
            "thing_colors": [THING_COLORS[0]],
            "thing_dataset_id_to_contiguous_id": {1: 0},
            "keypoint_names": KEYPOINT_NAMES,
            "keypoint_flip_map": KEYPOINT_FLIP_MAP,
            "keypoint_connection_rules": list(KEYPOINT_CONNECTIONS),
            # For TEST.KEYPOINT_OKS_SIGMAS, which Detectron2 takes from the config.
            "keypoint_oks_sigmas": KEYPOINT_OKS_SIGMAS,
        }
    if task == "panoptic":
        # As in Detectron2's "separated" COCO panoptic data, stuff class 0 stands for all things.
        return {
            **shapes_metadata("instances"),
            "stuff_classes": ["things", *STUFF_CLASSES],
            "stuff_colors": [(82, 18, 128), *STUFF_COLORS],
            "stuff_dataset_id_to_contiguous_id": {
                0: 0,
                **{d: c + 1 for c, d in enumerate(STUFF_IDS)},
            },
        }
    if task == "semantic":
        return {
            "stuff_classes": [*THING_CLASSES, *STUFF_CLASSES],
            "stuff_colors": [*THING_COLORS, *STUFF_COLORS],
            "stuff_dataset_id_to_contiguous_id": {
                d: c for c, d in enumerate((*THING_IDS, *STUFF_IDS))
            },
        }
    raise ValueError(f"unknown task {task!r}; choose from {', '.join(TASKS)}")


def paths_metadata(shapes: ShapesSet, task: str) -> dict[str, Any]:
    """Metadata that names files, and the type by which an evaluator is chosen."""
    root = shapes.root
    paths: dict[str, Any] = {"image_root": f"{root}/images", "evaluator_type": "coco"}
    if task == "semantic":
        paths.update(sem_seg_root=f"{root}/semantic", evaluator_type="sem_seg", ignore_label=VOID)
        return paths
    if task == "landmarks":
        return {**paths, "evaluator_type": "landmarks"}
    name = {"rle": "instances_rle", "keypoints": "keypoints"}.get(task, "instances")
    paths["json_file"] = f"{root}/annotations/{name}.json"
    if task == "panoptic":
        paths.update(
            panoptic_root=f"{root}/panoptic",
            panoptic_json=f"{root}/annotations/panoptic.json",
            sem_seg_root=f"{root}/sem_seg",
            evaluator_type="coco_panoptic_seg",
            ignore_label=VOID,
            label_divisor=SEGMENT_ID_FACTOR,
        )
    return paths


def register_shapes(shapes: ShapesSet, prefix: str = "shapes") -> list[str]:
    """Register a set for every task.

    Args:
        prefix: first part of the names; the split follows, then, but for instances, the task.

    Returns:
        The names, in the order of :data:`TASKS`.

    Raises:
        AssertionError: from Detectron2's catalog, if a name is taken.
    """
    names = []
    for task in TASKS:
        name = f"{prefix}_{shapes.split}" + ("" if task == "instances" else f"_{task}")
        DatasetCatalog.register(name, partial(load_shapes, shapes, task))
        MetadataCatalog.get(name).set(**shapes_metadata(task), **paths_metadata(shapes, task))
        names.append(name)
    return names
