"""Painted scenes: every object has a colour of its own, and annotations of all kinds.

After a transform, the colours say where each object really is.
"""

from typing import Any, NamedTuple

import cv2
import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode

BACKGROUND = (20, 30, 40)
COLORS = ((220, 40, 40), (40, 220, 40), (40, 40, 220), (220, 220, 40), (220, 40, 220))


class Scene(NamedTuple):
    """``image`` H×W×3 uint8; ``masks`` N×H×W bool; annotations in Detectron2's format with polygons
    or with RLE; ``points`` N×2, float pixel coordinates inside the objects."""

    image: np.ndarray
    masks: np.ndarray
    polygon_annotations: list[dict[str, Any]]
    rle_annotations: list[dict[str, Any]]
    points: np.ndarray


def paint_scene(height: int = 120, width: int = 160, seed: int = 0) -> Scene:
    """Up to five objects on a 3×2 grid that do not touch: a star (concave), boxes and ellipses."""
    rng = np.random.default_rng(seed)
    image = np.empty((height, width, 3), np.uint8)
    image[:] = BACKGROUND
    masks, polygons, points = [], [], []
    cell_w, cell_h = width / 3, height / 2
    for i, color in enumerate(COLORS):
        cx = (i % 3 + 0.5) * cell_w + rng.uniform(-0.05, 0.05) * cell_w
        cy = (i // 3 + 0.5) * cell_h + rng.uniform(-0.05, 0.05) * cell_h
        angles = np.linspace(0, 2 * np.pi, 17)[:-1]
        radius = np.full(16, 0.4)
        if i % 2 == 0:
            radius[1::2] = 0.24  # a star
        polygon = np.stack(
            [cx + radius * cell_w * np.cos(angles), cy + radius * cell_h * np.sin(angles)], axis=1
        )
        mask = mask_util.decode(
            mask_util.frPyObjects([polygon.reshape(-1).tolist()], height, width)
        )
        mask = mask[..., 0].astype(bool)
        image[mask] = color
        masks.append(mask)
        polygons.append(polygon)
        points.append((cx, cy))
    polygon_annotations, rle_annotations = [], []
    for i, (mask, polygon, point) in enumerate(zip(masks, polygons, points, strict=True)):
        ys, xs = np.nonzero(mask)
        common = {
            "bbox": [float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)],
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": i,
            "iscrowd": 0,
            "keypoints": [*point, 2.0],
        }
        polygon_annotations.append({**common, "segmentation": [polygon.reshape(-1).tolist()]})
        rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
        rle_annotations.append({**common, "segmentation": rle})
    return Scene(image, np.stack(masks), polygon_annotations, rle_annotations, np.array(points))


def object_at(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """H×W bool: pixels nearer to ``color`` than to any other colour of the scene."""
    palette = np.array([color, BACKGROUND, *(c for c in COLORS if c != color)], np.float32)
    distance = np.abs(image.astype(np.float32)[:, :, None] - palette).sum(-1)
    return (distance.argmin(-1) == 0) & (distance[..., 0] < 150)


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boolean masks; 1 if both are empty."""
    union = np.logical_or(a, b).sum()
    return 1.0 if union == 0 else float(np.logical_and(a, b).sum() / union)


def write_image(path: Any, image: np.ndarray) -> str:
    """Write an RGB image without loss and return its path as text."""
    cv2.imwrite(str(path), image[:, :, ::-1])
    return str(path)
