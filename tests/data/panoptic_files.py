"""Small panoptic data sets as files, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data.datasets.builtin_meta import CITYSCAPES_CATEGORIES
from PIL import Image

# Not sorted, not contiguous, things and stuff mixed, as own files often are.
CATEGORIES = [
    {"id": 40, "name": "grass", "isthing": 0, "color": [0, 200, 0]},
    {"id": 7, "name": "pear", "isthing": 1, "color": [200, 200, 0]},
    {"id": 12, "name": "sky", "isthing": 0, "color": [0, 0, 200]},
    {"id": 3, "name": "apple", "isthing": 1, "color": [200, 0, 0]},
]
SIZE = (40, 60)


def id_to_rgb(ids: np.ndarray) -> np.ndarray:
    return np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=2).astype(np.uint8)


def paint_ids(number: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """H×W segment ids and segments: sky above grass, two pears, an apple, a crowd, a void corner."""
    rng = np.random.RandomState(number)
    ids = np.zeros(SIZE, np.int64)
    ids[:20], ids[20:] = 1, 70000
    ids[5:15, 5:20] = 300
    ids[10:30, 15:30] = 301  # in front of the first pear
    y, x = rng.randint(2, 12), rng.randint(34, 40)
    ids[y : y + 12, x : x + 12] = 9_000_000
    ids[30:38, 40:58] = 16_000_001
    ids[-3:, :4] = 0
    listed = [(1, 12, 0), (70000, 40, 0), (300, 7, 0), (301, 7, 0), (9_000_000, 3, 0)]
    segments = []
    for segment_id, category, crowd in [*listed, (16_000_001, 3, 1)]:
        ys, xs = np.nonzero(ids == segment_id)
        box = [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
        segments.append(
            {
                "id": segment_id,
                "category_id": category,
                "iscrowd": crowd,
                "area": len(xs),
                "bbox": [int(v) for v in box],
            }
        )
    return ids, segments


def write_panoptic(folder: Path, count: int = 3, extension: str = ".jpg") -> dict[str, Any]:
    """``images/``, ``panoptic/`` and ``panoptic.json`` in ``folder``; returns the JSON's content."""
    images, annotations = [], []
    for name in ("images", "panoptic"):
        (folder / name).mkdir(parents=True)
    for i in range(count):
        ids, segments = paint_ids(i)
        colors = np.random.RandomState(i).randint(0, 255, (32, 3)).astype(np.uint8)
        Image.fromarray(colors[ids % 31]).save(folder / f"images/scene_{i}{extension}")
        Image.fromarray(id_to_rgb(ids)).save(folder / f"panoptic/scene_{i}.png")
        images.append(
            {
                "id": 10 + i,
                "file_name": f"scene_{i}{extension}",
                "height": SIZE[0],
                "width": SIZE[1],
            }
        )
        annotations.append(
            {"image_id": 10 + i, "file_name": f"scene_{i}.png", "segments_info": segments}
        )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [dict(c) for c in CATEGORIES],
    }
    save(folder, content)
    return content


def save(folder: Path, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "panoptic.json").write_text(text, encoding="utf-8")


def write_cityscapes(root: Path, count: int = 2) -> None:
    """A tree as Cityscapes and its preparation scripts make it, for the split "train"."""
    pngs = root / "gtFine/cityscapes_panoptic_train"
    folders = [root / f"{x}/train/aachen" for x in ("leftImg8bit", "gtFine")]
    for folder in (*folders, pngs):
        folder.mkdir(parents=True)
    # (segment id, category id, trainId, rows, columns, crowd): road 7, sky 23, cars 26, a group of
    # persons 24 whose id is the category's, as the scripts number groups.
    painted = [
        (7, 7, 0, slice(20, 40), slice(0, 60), 0),
        (23, 23, 10, slice(0, 20), slice(0, 60), 0),
        (26000, 26, 13, slice(15, 30), slice(5, 20), 0),
        (26001, 26, 13, slice(15, 32), slice(25, 45), 0),
        (24, 24, 11, slice(14, 24), slice(48, 58), 1),
    ]
    images, annotations = [], []
    for i in range(count):
        stem = f"aachen_{i:06d}_000019"
        ids, labels = np.zeros(SIZE, np.int64), np.full(SIZE, 255, np.uint8)
        for segment_id, _, train_id, rows, columns, _ in painted:
            ids[rows, columns], labels[rows, columns] = segment_id, train_id
        ids[:2], labels[:2] = 0, 255
        Image.fromarray(np.full((*SIZE, 3), 40 * i, np.uint8)).save(
            folders[0] / f"{stem}_leftImg8bit.png"
        )
        Image.fromarray(labels).save(folders[1] / f"{stem}_gtFine_labelTrainIds.png")
        Image.fromarray(id_to_rgb(ids)).save(pngs / f"{stem}_gtFine_panoptic.png")
        segments = []
        for segment_id, category, _, _, _, crowd in painted:
            ys, xs = np.nonzero(ids == segment_id)
            box = [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1]
            segments.append(
                {
                    "id": segment_id,
                    "category_id": category,
                    "area": len(xs),
                    "bbox": [int(v) for v in box],
                    "iscrowd": crowd,
                }
            )
        name = f"{stem}_gtFine_panoptic.png"
        annotations.append({"image_id": stem, "file_name": name, "segments_info": segments})
        images.append(
            {
                "id": stem,
                "height": SIZE[0],
                "width": SIZE[1],
                "file_name": f"{stem}_gtFine_leftImg8bit.png",
            }
        )
    categories = [
        {k: c[k] for k in ("id", "name", "color", "isthing")} for c in CITYSCAPES_CATEGORIES
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "gtFine/cityscapes_panoptic_train.json").write_text(json.dumps(content))
