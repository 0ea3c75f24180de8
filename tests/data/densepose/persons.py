"""A small file in DensePose-COCO's form, with its images."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from d2ext.utils.drawing import write_picture

HEIGHT, WIDTH = 60, 80
# XYWH boxes of the two persons of the first image, one of the second; the third has none.
BOXES = ([10.0, 5.0, 20.0, 40.0], [45.0, 10.0, 24.0, 30.0], [30.5, 20.25, 16.0, 32.0])
MESH, NUM_VERTICES = "blob", 12


def rle(rows: slice, columns: slice) -> dict[str, Any]:
    mask = np.zeros((256, 256), np.uint8, order="F")
    mask[rows, columns] = 1
    encoded = mask_util.encode(mask)
    return {"size": [256, 256], "counts": encoded["counts"].decode()}


def content() -> dict[str, Any]:
    """Persons have 16 points on a grid on parts 3 (right hand) and 4 (left), on charts and on a mesh;
    masks say torso above and, on the left of the image, right hand below."""
    side = [32.0, 96.0, 160.0, 224.0]
    x, y = [v for _ in side for v in side], [v for v in side for _ in side]
    points = {
        "dp_x": x,
        "dp_y": y,
        "dp_I": [3.0 if v < 128 else 4.0 for v in x],
        "dp_U": [v / 256 for v in x],
        "dp_V": [v / 256 for v in y],
        "dp_vertex": [i % NUM_VERTICES for i in range(16)],
        "ref_model": MESH,
        "dp_masks": [
            rle(slice(0, 128), slice(0, 256)),
            rle(slice(128, 256), slice(0, 128)),
            *[[]] * 12,
        ],
    }
    annotations = []
    for i, box in enumerate(BOXES):
        x0, y0, w, h = box
        annotations.append(
            {
                "id": i + 1,
                "image_id": 1 + i // 2,
                "category_id": 1,
                "iscrowd": 0,
                "bbox": box,
                "area": w * h,
                "segmentation": [[x0, y0, x0 + w, y0, x0 + w, y0 + h, x0, y0 + h]],
                **copy.deepcopy(points),
            }
        )
    return {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in (1, 2, 3)
        ],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "person"}],
    }


def write_persons(
    folder: Path, change: Callable[[list[dict[str, Any]]], Any] | None = None
) -> tuple[str, str]:
    """The JSON file and the folder of its images; ``change`` gets the annotations before."""
    data = content()
    if change is not None:
        change(data["annotations"])
    images = folder / "images"
    for image in data["images"]:
        pixels = np.random.default_rng(image["id"]).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        write_picture(images / image["file_name"], pixels)
    (folder / "persons.json").write_text(json.dumps(data))
    return str(folder / "persons.json"), str(images)


def write_surface(folder: Path) -> dict[str, str]:
    """Files of the surface: arguments of ``SurfaceFiles``."""
    rng = np.random.default_rng(0)
    mirror = np.arange(NUM_VERTICES) ^ 1
    np.savez(folder / "mesh.npz", vertices=rng.random((NUM_VERTICES, 3)), vertex_transforms=mirror)
    np.save(folder / "geodesics.npy", rng.random(NUM_VERTICES * (NUM_VERTICES - 1) // 2))
    grid = np.linspace(0, 1, 256, dtype=np.float32)
    u = np.broadcast_to(1 - grid, (24, 256, 256))
    v = np.broadcast_to(grid[:, None], (24, 256, 256))
    np.savez(folder / "mirror.npz", U_transforms=u, V_transforms=v)
    names = {"mesh": "mesh.npz", "geodesics": "geodesics.npy", "uv_symmetry": "mirror.npz"}
    return {key: str(folder / name) for key, name in names.items()}
