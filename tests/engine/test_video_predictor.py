"""VideoPredictor: memory and ids go from frame to frame, and end with the video."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from torch import nn

import d2ext
from d2ext.config import ConfigError
from d2ext.engine.top_down import BoxSource
from d2ext.testing import tiny_config
from tests.engine.toy_video import ToyVideo


@pytest.fixture
def cfg() -> CfgNode:
    cfg = tiny_config("YOLACT")
    cfg.INPUT.FORMAT = "BGR"
    return cfg


def frame(value: int, size: tuple[int, int] = (24, 32)) -> np.ndarray:
    return np.full((*size, 3), value, dtype=np.uint8)


class Bright(nn.Module):
    """Without memory: two squares, the first at the column that the image's first pixel says."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self.batches.append(len(inputs))
        outputs = []
        for x in inputs:
            left = float(x["image"][0, 0, 0])
            instances = x.get("instances", Instances((x["height"], x["width"])))
            instances.pred_boxes = Boxes(torch.tensor([[0.0, 0, 9, 9], [left, 8, left + 8, 24]]))
            instances.scores = torch.tensor([0.3, 0.9])
            instances.pred_classes = torch.tensor([0, 0])
            outputs.append({"instances": instances})
        return outputs


def test_memory_is_handed_on_until_reset(cfg: CfgNode) -> None:
    model = ToyVideo()
    predictor = d2ext.VideoPredictor(cfg, model=model)
    outputs = [predictor(frame(1)), *predictor.batch([frame(2), frame(3, (30, 20))])]
    predictor.reset()
    outputs.append(predictor(frame(4)))
    widths = [float(o["instances"].pred_boxes.tensor[0, 2]) for o in outputs]
    assert widths == [9, 10, 11, 9]
    assert all(o["instances"].track_ids.tolist() == [7] for o in outputs)
    fields = [tuple(x[key] for key in ("frame", "is_first", "height")) for x in model.inputs]
    assert fields == [(0, True, 24), (1, False, 24), (2, False, 30), (0, True, 24)]
    videos = [x["video_id"] for x in model.inputs]
    assert videos[0] == videos[1] == videos[2] != videos[3]
    assert [int(x["image"][0, 0, 0]) for x in model.inputs] == [1, 2, 3, 4]


def test_ids_of_a_model_without_memory(cfg: CfgNode) -> None:
    pytest.importorskip("norfair", reason="needs norfair-enough")
    model = Bright()
    predictor = d2ext.VideoPredictor(cfg, tracker="NorfairTracker", model=model)
    outputs = predictor.batch([frame(8), frame(10), frame(12)])
    outputs += [predictor(frame(14)), predictor(frame(100))]
    assert model.batches == [3, 1, 1]
    ids = [o["instances"].track_ids.tolist() for o in outputs]
    assert ids == [[1, 2]] * 4 + [[1, 3]]
    predictor.reset()
    assert predictor(frame(100))["instances"].track_ids.tolist() == [1, 2]
    strict = d2ext.VideoPredictor(cfg, tracker="NorfairTracker", model=model, threshold=0.5)
    found = strict(frame(8))["instances"]
    assert found.track_ids.tolist() == [1] and found.scores.tolist() == pytest.approx([0.9])
    without = d2ext.VideoPredictor(cfg, model=model)
    assert not without(frame(8))["instances"].has("track_ids")
    with pytest.raises(ConfigError, match="gives ids itself"):
        d2ext.VideoPredictor(cfg, tracker="NorfairTracker", model=ToyVideo())


def test_boxes_of_a_top_down_model(cfg: CfgNode) -> None:
    class Boxed(BoxSource):
        asked: list[int] = []  # noqa: RUF012

        def __call__(self, image_ids: Any, images: Any) -> list[Instances]:
            self.asked += image_ids
            return [
                Instances(x.shape[:2], pred_boxes=Boxes(torch.ones(2, 4)), given=torch.ones(2))
                for x in images
            ]

    predictor = d2ext.VideoPredictor(cfg, model=Bright(), boxes=Boxed())
    outputs = [predictor(frame(8)), *predictor.batch([frame(9), frame(10)])]
    assert Boxed.asked == [1, 2, 3] and all(o["instances"].has("given") for o in outputs)
