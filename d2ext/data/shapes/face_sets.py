"""Faces of `shapes` in Detectron2's catalogs, in COCO's form, and as files.

``shapes_train_faces`` and ``shapes_val_faces``: 2,000 and 200 pictures of 256 x 256 with 0 to 8 heads of
:mod:`.faces`, 8 to 200 pixels high. A box is that of the face from forehead to chin, without ears, also
where it is hidden, cut to the picture. Faces below 12 pixels have neither points nor mesh: WIDER FACE's
tiny ones have no points either.
"""

import pickle
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from d2ext.data.shapes.coco import MAX_ANNOTATIONS
from d2ext.data.shapes.export import export_items
from d2ext.data.shapes.face_coco import MESH_FILE, faces_json
from d2ext.data.shapes.face_mesh import (
    NUM_VERTICES,
    POINT_CONNECTIONS,
    POINT_FLIP_MAP,
    POINT_NAMES,
    POINT_VERTICES,
    mirror_vertices,
    topology_obj,
)
from d2ext.data.shapes.files import versioned_cache
from d2ext.data.shapes.sets import FaceSet
from d2ext.files import atomic_write

__all__ = [
    "DEFAULT_FACE_SETS",
    "export_faces",
    "load_shapes_faces",
    "register_shapes_faces",
]

DEFAULT_FACE_SETS = (FaceSet("train", 2000), FaceSet("val", 200))


def _draw_annotations(shapes: FaceSet) -> dict[str, np.ndarray]:
    """The annotations of F faces, M of them with meshes, picture after picture: ``counts`` (num,) int64,
    ``boxes`` (F, 4) and ``points`` (F, 5, 3) float64, ``has_mesh`` (F,) bool, ``meshes`` (M, 1103, 3)
    float32."""
    counts, faces = [], []
    for frame in shapes.frames():
        counts.append(len(frame.faces))
        faces += [(frame.box(i), frame.face_points(i), frame.mesh(i)) for i in frame.faces]
    meshes = [mesh for _, _, mesh in faces if mesh is not None]
    return {
        "counts": np.array(counts),
        "boxes": np.array([box for box, _, _ in faces]).reshape(-1, 4),
        "points": np.array([points for _, points, _ in faces]).reshape(-1, 5, 3),
        "has_mesh": np.array([mesh is not None for _, _, mesh in faces], bool),
        "meshes": np.array(meshes, np.float32).reshape(-1, NUM_VERTICES, 3),
    }


def _cached_annotations(shapes: FaceSet) -> dict[str, np.ndarray]:
    """:func:`_draw_annotations`, kept in the cache: they take a minute for 2,000 pictures."""
    path = versioned_cache() / f"{shapes.name}.npz"
    if not path.is_file():
        with atomic_write(path) as file:
            np.savez(file, **_draw_annotations(shapes))
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


@lru_cache(maxsize=4)
def _load(shapes: FaceSet) -> bytes:
    known = _cached_annotations(shapes)
    meshes = iter(known["meshes"])
    annotations: Iterator[dict[str, Any]] = (
        {
            "bbox": box,
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": 0,
            "iscrowd": 0,
            "keypoints": points,
            **({"mesh": next(meshes)} if has_mesh else {}),
        }
        for box, points, has_mesh in zip(
            known["boxes"].tolist(),
            known["points"].reshape(-1, 15).tolist(),
            known["has_mesh"].tolist(),
            strict=True,
        )
    )
    dicts = [
        {
            "file_name": f"{shapes.root}/images/{shapes.stem(index)}.bmp",
            "image_id": index,
            "height": shapes.height,
            "width": shapes.width,
            "annotations": [
                {"id": index * MAX_ANNOTATIONS + place + 1, **next(annotations)}
                for place in range(count)
            ],
        }
        for index, count in enumerate(known["counts"].tolist())
    ]
    return pickle.dumps(dicts)


def load_shapes_faces(shapes: FaceSet) -> list[dict[str, Any]]:
    """The set in Detectron2's format. Computed once and kept in d2ext's cache; every call returns its
    own copy.

    Returns:
        A dict per picture. Annotations have ``bbox``, ``category_id`` 0, ``keypoints`` (15 numbers:
        five points x, y, v; v = 0: outside or too small, 1: hidden, 2: visible) and, from 12 pixels on,
        ``mesh`` (1103, 3) float32: x, y in pixels, z in pixels from the head's mean depth, towards the
        camera negative.
    """
    return pickle.loads(_load(shapes))


def register_shapes_faces(shapes: FaceSet, prefix: str = "shapes") -> str:
    """Register a set as ``<prefix>_<split>_faces``; returns the name.

    Raises:
        AssertionError: from Detectron2's catalog, if the name is taken.
    """
    name = f"{prefix}_{shapes.split}_faces"
    DatasetCatalog.register(name, partial(load_shapes_faces, shapes))
    MetadataCatalog.get(name).set(
        evaluator_type="faces",
        thing_classes=["face"],
        thing_colors=[(220, 20, 60)],
        thing_dataset_id_to_contiguous_id={1: 0},
        keypoint_names=POINT_NAMES,
        keypoint_flip_map=list(POINT_FLIP_MAP),
        keypoint_connection_rules=list(POINT_CONNECTIONS),
        image_root=f"{shapes.root}/images",
        json_file=f"{shapes.root}/annotations/faces.json",
        mesh_file=f"{shapes.root}/annotations/{MESH_FILE}",
        mesh_flip=mirror_vertices().tolist(),
        # The mesh's vertices that are the five points.
        mesh_keypoints=list(POINT_VERTICES),
    )
    return name


def export_faces(
    shapes: FaceSet, out: Path, *, overwrite: bool = False, progress: bool = True
) -> list[str]:
    """Write pictures, ``annotations/faces_<split>2017.json`` with points and meshes, and the OBJ that it
    names; see :func:`~d2ext.data.shapes.export.export_items`."""
    files = {MESH_FILE: lambda: topology_obj().encode()}
    options = {"overwrite": overwrite, "progress": progress}
    return export_items(shapes, out, "faces", faces_json, files, **options)
