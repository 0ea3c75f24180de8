"""DensePose-COCO's annotation file for bodies of `shapes`."""

from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_util

from d2ext.data.densepose.parts import COARSE_PARTS, NUM_COARSE_PARTS
from d2ext.data.shapes.bodies import Body, BodyFrame, SurfaceMap
from d2ext.data.shapes.coco import MAX_ANNOTATIONS, coco_file, image_entry
from d2ext.data.shapes.masks import mask_to_polygons

__all__ = ["BODY_MESH", "bodies_json", "body_annotations"]

BODY_MESH = "shapes_body"  # the mesh's name: ``ref_model``
# Side of the frame of points and masks, which is the box (NOTES.md, *Semantics*).
_FRAME = 256
# Points on n pixels of a part: the first times n to the power of the second, but at most one for so many
# pixels. About 100 on a person, as annotators gave; more on large parts, but not in proportion.
_POINTS, _POINT_PIXELS = (1.4, 0.36), 6
# What shows fewer pixels than this is no annotated person, and has no points below the second one.
_MIN_AREA, _MIN_POINTS_AREA = 20, 120


def body_annotations(frame: BodyFrame, image_id: int) -> list[dict[str, Any]]:
    """The persons of a picture, front to back, as DensePose-COCO has them: ``dp_x``, ``dp_y``,
    ``dp_I``, ``dp_U``, ``dp_V``, ``dp_masks``, and for CSE ``dp_vertex`` and ``ref_model``.

    Points are pixel centres, so that they have exactly what that pixel shows. The box is that of
    what can be seen, its mask polygons. People too small, and some others, have no points.
    """
    annotations = []
    for place, item in enumerate(frame.bodies):
        mask = frame.mask(item)
        area = cv2.countNonZero(mask)
        if area < _MIN_AREA:
            continue
        x0, y0, width, height = cv2.boundingRect(mask)
        polygons = mask_to_polygons(mask[y0 : y0 + height, x0 : x0 + width], x0, y0)
        if not polygons:
            continue
        annotation: dict[str, Any] = {
            "id": image_id * MAX_ANNOTATIONS + place + 1,
            "image_id": image_id,
            "category_id": 1,
            "bbox": [float(v) for v in (x0, y0, width, height)],
            "area": float(area),
            "iscrowd": 0,
            "segmentation": polygons,
        }
        body = frame.items[item]
        if isinstance(body, Body) and body.annotated and area >= _MIN_POINTS_AREA:
            surface = frame.surface(item)
            annotation.update(_points(surface, mask, (x0, y0, width, height)))
            annotation["dp_masks"] = _masks(surface, (x0, y0, width, height))
            annotation["ref_model"] = BODY_MESH
        annotations.append(annotation)
    return annotations


def _points(
    surface: SurfaceMap, mask: np.ndarray, box: tuple[int, int, int, int]
) -> dict[str, list[Any]]:
    """Points spread evenly over each part, off the outline where there is room."""
    x0, y0, width, height = box
    inner = cv2.erode(mask, np.ones((3, 3), np.uint8), borderValue=0)
    off = inner[surface.rows, surface.columns] > 0
    selected = []
    for part in np.unique(surface.parts):
        pixels = np.flatnonzero(surface.parts == part)
        factor, power = _POINTS
        number = min(len(pixels) // _POINT_PIXELS, round(factor * len(pixels) ** power))
        inside = pixels[off[pixels]]
        if len(inside) >= number:
            pixels = inside
        # Pixels go by rows: equal steps lead down the part, and to and fro across it.
        selected.append(
            pixels[((np.arange(number) + 0.5) / max(number, 1) * len(pixels)).astype(int)]
        )
    keep = np.concatenate(selected)
    x = (surface.columns[keep] + 0.5 - x0) * (_FRAME / width)
    y = (surface.rows[keep] + 0.5 - y0) * (_FRAME / height)
    u, v = surface.uv[keep].T
    return {
        "dp_x": np.round(x, 3).tolist(),
        "dp_y": np.round(y, 3).tolist(),
        "dp_I": surface.parts[keep].tolist(),
        "dp_U": np.round(u, 5).tolist(),
        "dp_V": np.round(v, 5).tolist(),
        "dp_vertex": surface.vertices[keep].tolist(),
    }


def _masks(surface: SurfaceMap, box: tuple[int, int, int, int]) -> list[Any]:
    """An RLE of 256 x 256 for each of the 14 coarse parts, [] for those that cannot be seen."""
    x0, y0, width, height = box
    parts = np.zeros((height, width), np.uint8)
    parts[surface.rows - y0, surface.columns - x0] = np.array(COARSE_PARTS)[surface.parts]
    parts = cv2.resize(parts, (_FRAME, _FRAME), interpolation=cv2.INTER_NEAREST_EXACT)
    masks: list[Any] = []
    for part in range(1, NUM_COARSE_PARTS + 1):
        mask = parts == part
        rle = mask_util.encode(np.asfortranarray(mask, np.uint8)) if mask.any() else None
        masks.append([] if rle is None else {**rle, "counts": rle["counts"].decode("ascii")})
    return masks


def bodies_json(frames: Iterable[tuple[int, str, BodyFrame]]) -> dict[str, Any]:
    """The file of some pictures: (image id, image's file name, picture)."""
    images, annotations = [], []
    for image_id, file_name, frame in frames:
        images.append(image_entry(frame, image_id, file_name))
        annotations += body_annotations(frame, image_id)
    category = {"id": 1, "name": "person", "supercategory": "person"}
    return coco_file(images, annotations, [category])
