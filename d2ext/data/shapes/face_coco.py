"""COCO's keypoint file for faces of `shapes`, with meshes."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from d2ext.data.shapes.coco import MAX_ANNOTATIONS, coco_file, image_entry
from d2ext.data.shapes.face_mesh import POINT_CONNECTIONS, POINT_NAMES, mirror_vertices
from d2ext.data.shapes.faces import FaceFrame

__all__ = ["MESH_FILE", "faces_json"]

# The topology, beside the annotations.
MESH_FILE = "face.obj"


def faces_json(frames: Iterable[tuple[int, str, FaceFrame]]) -> dict[str, Any]:
    """COCO's file: boxes, five points and, from 12 pixels on, ``mesh`` (3 V numbers x, y, z).

    As in COCO, coordinates of points and vertices are pixel indices: 0.5 less than continuous ones; z is
    not shifted. The category has ``mesh_file``, relative to the file, and ``mesh_flip``.
    """
    images, annotations = [], []
    for image_id, file_name, frame in frames:
        images.append(image_entry(frame, image_id, file_name))
        for place, item in enumerate(frame.faces):
            x0, y0, x1, y1 = frame.box(item)
            points = frame.face_points(item)
            labelled = points[:, 2] > 0
            points[labelled, :2] -= 0.5
            box = [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)]
            annotation = {
                "id": image_id * MAX_ANNOTATIONS + place + 1,
                "image_id": image_id,
                "category_id": 1,
                "bbox": box,
                "area": round(box[2] * box[3], 2),
                "iscrowd": 0,
                "keypoints": np.round(points, 2).reshape(-1).tolist(),
                "num_keypoints": int(labelled.sum()),
            }
            mesh = frame.mesh(item)
            if mesh is not None:
                shifted = mesh.astype(np.float64) - (0.5, 0.5, 0)
                annotation["mesh"] = np.round(shifted, 2).reshape(-1).tolist()
            annotations.append(annotation)
    place_of = {name: i + 1 for i, name in enumerate(POINT_NAMES)}
    category = {
        "id": 1,
        "name": "face",
        "supercategory": "face",
        "keypoints": list(POINT_NAMES),
        "skeleton": [[place_of[a], place_of[b]] for a, b, _ in POINT_CONNECTIONS],
        "mesh_file": MESH_FILE,
        "mesh_flip": mirror_vertices().tolist(),
    }
    return coco_file(images, annotations, [category])
