"""The evaluators of a panoptic data set, end to end on `shapes` with predictions that are right."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from detectron2.utils.file_io import PathManager
from panopticapi.utils import rgb2id
from PIL import Image

from d2ext.config import get_cfg
from d2ext.data.shapes import ShapesSet, register_shapes
from d2ext.evaluation import build_evaluator

PREFIX = "evaluated"


@pytest.fixture(scope="module")
def dataset() -> Iterator[str]:
    before = set(DatasetCatalog.list())
    register_shapes(ShapesSet("val", num=3, height=64, width=64), prefix=PREFIX)
    added = set(DatasetCatalog.list()) - before
    (name,) = (x for x in added if x.endswith("_panoptic"))
    yield name
    for name in added:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def read(path: str) -> np.ndarray:
    with PathManager.open(path, "rb") as file:
        return np.array(Image.open(io.BytesIO(file.read())))


def right_outputs(name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(input, output) of each image: panoptic, semantic and instances from the annotations."""
    metadata = MetadataCatalog.get(name)
    pairs = []
    for record in DatasetCatalog.get(name):
        ids = rgb2id(read(record["pan_seg_file_name"]))
        labels = read(record["sem_seg_file_name"]).astype(np.int64)
        segments, masks, classes = [], [], []
        for segment in record["segments_info"]:
            thing = bool(segment["isthing"])
            segments.append(
                {"id": segment["id"], "isthing": thing, "category_id": segment["category_id"]}
            )
            if thing and not segment.get("iscrowd", 0):
                masks.append(ids == segment["id"])
                classes.append(segment["category_id"])
        semantic = torch.zeros(len(metadata.stuff_classes), *labels.shape)
        known = labels != metadata.ignore_label
        semantic[labels[known], known.nonzero()[0], known.nonzero()[1]] = 1
        instances = Instances(ids.shape)
        instances.pred_masks = torch.from_numpy(np.stack(masks))
        edges = [np.nonzero(mask) for mask in masks]
        instances.pred_boxes = Boxes(
            torch.tensor([[x.min(), y.min(), x.max() + 1, y.max() + 1] for y, x in edges]).float()
        )
        instances.pred_classes = torch.tensor(classes)
        instances.scores = torch.ones(len(masks))
        outputs = {
            "panoptic_seg": (torch.from_numpy(ids.astype(np.int32)), segments),
            "sem_seg": semantic,
            "instances": instances,
        }
        pairs.append((record, outputs))
    return pairs


@pytest.mark.parametrize(
    "keys", [("panoptic_seg", "sem_seg", "instances"), ("instances",), ("sem_seg",)]
)
def test_right_predictions_are_scored_full(
    dataset: str, tmp_path: Path, keys: tuple[str, ...]
) -> None:
    evaluator = build_evaluator(get_cfg(), dataset, str(tmp_path))
    evaluator.reset()
    for record, outputs in right_outputs(dataset):
        evaluator.process([record], [{key: outputs[key] for key in keys}])
    results = evaluator.evaluate()
    names = {
        "panoptic_seg": {"panoptic_seg"},
        "sem_seg": {"sem_seg"},
        "instances": {"bbox", "segm"},
    }
    assert set(results) == set().union(*(names[key] for key in keys))
    if "panoptic_seg" in keys:
        assert results["panoptic_seg"]["PQ"] == pytest.approx(100)
    if "sem_seg" in keys:
        assert results["sem_seg"]["mIoU"] == pytest.approx(100)
    if "instances" in keys:
        assert results["segm"]["AP50"] == pytest.approx(100, abs=0.5)
