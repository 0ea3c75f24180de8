"""Pictures and annotations of a fixture as files, and what the training loader makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from fvcore.transforms.transform import Transform, TransformList

from d2ext.data import build_mapper, build_train_loader
from d2ext.data.custom import register_own_dataset


def coco_annotation(box: list[float], label: int, **fields: Any) -> dict[str, Any]:
    """An annotation in COCO's form of a box x1, y1, x2, y2 of class ``label``, from 0."""
    x1, y1, x2, y2 = box
    size = [x2 - x1, y2 - y1]
    area = max(size[0] * size[1], 0)
    return {"bbox": [x1, y1, *size], "category_id": label + 1, "iscrowd": 0, "area": area, **fields}


def write_coco(
    folder: Path,
    images: list[np.ndarray],
    annotations: list[list[dict[str, Any]]],
    categories: list[dict[str, Any]],
) -> dict[str, str]:
    """Files of pictures (BGR) and their annotations; arguments of ``register_own_dataset``."""
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
    for i, (image, listed) in enumerate(zip(images, annotations, strict=True)):
        cv2.imwrite(str(folder / f"{i}.png"), image)
        height, width = image.shape[:2]
        content["images"].append(
            {"id": i, "file_name": f"{i}.png", "height": height, "width": width}
        )
        for annotation in listed:
            number = len(content["annotations"]) + 1
            content["annotations"].append({"id": number, "image_id": i, **annotation})
    (folder / "train.json").write_text(json.dumps(content))
    return {"train_json": str(folder / "train.json"), "train_images": str(folder)}


def load_batch(
    cfg: CfgNode, files: dict[str, str], transforms: list[list[Transform]] | None = None
) -> list[dict[str, Any]]:
    """The training batch of a data set as large as one, in the order of its images.

    Args:
        cfg: must leave nothing to chance.
        files: arguments of ``register_own_dataset``.
        transforms: of each image, in place of those that ``cfg`` names.
    """
    register_own_dataset("fixture", **files)
    try:
        return first_batch(cfg, "fixture_train", transforms)
    finally:
        DatasetCatalog.remove("fixture_train")
        MetadataCatalog.remove("fixture_train")


def first_batch(
    cfg: CfgNode,
    name: str,
    transforms: list[list[Transform]] | None = None,
    count: int | None = None,
) -> list[dict[str, Any]]:
    """See :func:`load_batch`; of a registered data set of ``count`` samples, default: its records."""
    cfg = cfg.clone()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TRAIN_JOINT = (name,), ()
    records = DatasetCatalog.get(name)  # metadata of videos are known then
    cfg.SOLVER.IMS_PER_BATCH = count or len(records)
    cfg.DATALOADER.NUM_WORKERS = 0
    mapper = build_mapper(cfg, is_train=True)

    def with_transforms(record: dict[str, Any]) -> dict[str, Any]:
        assert transforms is not None
        return mapper.map(record, TransformList(transforms[record["image_id"]]))[0]

    loader = build_train_loader(cfg, mapper=with_transforms if transforms else mapper)
    return sorted(next(iter(loader)), key=lambda x: x["file_name"])


def classes(count: int, **fields: Any) -> list[dict[str, Any]]:
    """So many categories, ids from 1."""
    return [{"id": i, "name": f"class{i}", **fields} for i in range(1, count + 1)]
