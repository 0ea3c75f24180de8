"""Panoptic quality from unresized pictures in files, through loader, model and evaluator.

In place of the learnt layers stands a network that knows the pictures' colours, each of which is one
segment. It sees what the model gives it, so what a wrong size or place on the way costs shows in the
quality of the segments.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from d2ext.data import build_test_loader
from d2ext.data.custom import apply_dataset_to_config, register_own_dataset
from d2ext.evaluation import COCOPanopticEvaluator
from d2ext.systems.upsnet.head import SemanticPredictions, UPSNetPredictions
from d2ext.systems.upsnet.model import UPSNet
from d2ext.systems.upsnet.postprocess import STRIDE
from d2ext.testing import tiny_config
from tests.data.panoptic_files import CATEGORIES, id_to_rgb, paint_ids

NAME = "upsnet_quality"
GROW = 4
# Segment of `paint_ids` → colour, RGB, far from all others; and from black, which is void.
COLORS = {
    1: (0, 0, 255),
    70000: (0, 255, 0),
    300: (255, 255, 0),
    301: (255, 0, 255),
    9_000_000: (255, 0, 0),
    16_000_001: (0, 255, 255),
}


@pytest.fixture
def dataset(tmp_path: Path) -> Any:
    """Scenes of 160 x 240 pixels, without odd sizes that would fit a factor by chance."""
    for folder in ("images", "panoptic"):
        (tmp_path / folder).mkdir()
    images, annotations = [], []
    for i in range(2):
        ids, segments = paint_ids(i)
        ids = np.kron(ids, np.ones((GROW, GROW), np.int64))[: 157 + i, : 239 - i]
        picture = np.zeros((*ids.shape, 3), np.uint8)
        for segment, color in COLORS.items():
            picture[ids == segment] = color
        Image.fromarray(picture).save(tmp_path / f"images/{i}.png")
        Image.fromarray(id_to_rgb(ids)).save(tmp_path / f"panoptic/{i}.png")
        height, width = ids.shape
        images.append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
        for segment in segments:
            segment["area"] = int((ids == segment["id"]).sum())
            segment["bbox"] = [GROW * v for v in segment["bbox"]]
        annotations.append({"image_id": i, "file_name": f"{i}.png", "segments_info": segments})
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (tmp_path / "panoptic.json").write_text(json.dumps(content))
    names = register_own_dataset(
        NAME,
        val_panoptic_json=str(tmp_path / "panoptic.json"),
        val_panoptic_root=str(tmp_path / "panoptic"),
        val_images=str(tmp_path / "images"),
    )
    yield names[0]
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


class ColorNetwork:
    """Stands in for the network and the heads on regions of a model."""

    def __init__(self, model: UPSNet, metadata: Any) -> None:
        self.model = model
        self.labels = torch.empty(0)
        _, segments = paint_ids(0)
        category = {s["id"]: s["category_id"] for s in segments}
        things = metadata.thing_dataset_id_to_contiguous_id
        stuff = metadata.stuff_dataset_id_to_contiguous_id
        # channel of the semantic score: stuff from 0, things after it
        self.channels = [
            model.num_stuff + things[category[s]]
            if category[s] in things
            else stuff[category[s]] - 1
            for s in COLORS
        ]
        self.palette = torch.tensor([(0, 0, 0), *COLORS.values()]).float().flip(1)  # BGR

    def predict(self, images: Tensor) -> UPSNetPredictions:
        """Normalised images → the class of each cell, and which segment each pixel shows."""
        pixels = images * self.model.pixel_std + self.model.pixel_mean
        distance = torch.cdist(pixels.permute(0, 2, 3, 1).flatten(1, 2), self.palette[None])
        self.labels = distance.argmin(dim=2).view(len(images), *images.shape[-2:]) - 1
        score = pixels.new_zeros(
            (len(images), self.model.postprocessor.num_classes, *images.shape[-2:])
        )
        for segment, channel in enumerate(self.channels):
            score[:, channel] += (self.labels == segment).float()
        score = 20 * F.avg_pool2d(score, STRIDE) - 10
        return UPSNetPredictions({}, [], [], SemanticPredictions(score, score))

    def detect(self, _: Any, sizes: list[tuple[int, int]]) -> list[tuple[Instances, Instances]]:
        """The segments of things, as detections and as candidates of the panoptic head."""
        found = []
        for labels, size in zip(self.labels, sizes, strict=True):
            masks = [
                (labels[: size[0], : size[1]] == segment).float()
                for segment, channel in enumerate(self.channels)
                if channel >= self.model.num_stuff
            ]
            classes = [c - self.model.num_stuff for c in self.channels if c >= self.model.num_stuff]
            # Pixels at edges have a mixture of colours, which may be another one's.
            clear = [F.max_pool2d(-F.max_pool2d(-m[None], 3, 1, 1), 3, 1, 1)[0] for m in masks]
            boxes = []
            for mask in clear:
                ys, xs = mask.nonzero(as_tuple=True)
                boxes.append([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            result = Instances(size)
            result.pred_boxes = Boxes(torch.tensor(boxes).float())
            result.pred_classes = torch.tensor(classes)
            result.scores = torch.linspace(0.95, 0.9, len(classes))
            logits = [
                roi_align(m[None, None], [b[None]], 28, sampling_ratio=2, aligned=True)[0, 0]
                for m, b in zip(clear, result.pred_boxes.tensor, strict=True)
            ]
            result.mask_logits = 20 * torch.stack(logits) - 10
            found.append((result, result))
        return found


@pytest.mark.parametrize(
    "short, longest, best", [(205, 1000, 96.83), (131, 1000, 95.99), (400, 300, 97.36)]
)
def test_panoptic_quality_from_the_unresized_image(
    dataset: str,
    short: int,
    longest: int,
    best: float,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """``best``: what classes on a quarter of the resolution and masks of 28 x 28 cells leave."""
    cfg = tiny_config("UPSNet")
    cfg.MODEL.DEVICE = "cpu"
    cfg.INPUT.FORMAT = "BGR"
    cfg.MODEL.UPSNET.TEST.MIN_SIZE, cfg.MODEL.UPSNET.TEST.MAX_SIZE = short, longest
    apply_dataset_to_config(cfg, NAME)
    cfg.DATALOADER.NUM_WORKERS = 0
    model = build_model(cfg).eval()
    network = ColorNetwork(model, MetadataCatalog.get(dataset))
    monkeypatch.setattr(
        type(model.inference_network), "__call__", lambda _, images, sizes: network.predict(images)
    )
    monkeypatch.setattr(model, "detect", network.detect)
    evaluator = COCOPanopticEvaluator(dataset, str(tmp_path / "out"))
    results = inference_on_dataset(model, build_test_loader(cfg, dataset), evaluator)
    quality = results["panoptic_seg"]
    assert quality["RQ"] == 100
    assert quality["PQ"] == pytest.approx(best, abs=0.15)
