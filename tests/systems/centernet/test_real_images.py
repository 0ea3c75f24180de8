"""CenterNet's targets and a few steps of training on real images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from d2ext import model_zoo
from d2ext.data import D2extDatasetMapper

pytestmark = pytest.mark.real_data


def test_targets_and_training(real_coco: Path) -> None:
    cfg = model_zoo.get_config("centernet/centernet_R_18_dcn_512.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.INPUT.AUGMENTATION.SIZE = 128
    torch.manual_seed(0)
    np.random.seed(0)
    mapper, data = D2extDatasetMapper(cfg, True), DatasetCatalog.get("coco_2017_train")
    model = build_model(cfg).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    objects = 0
    for start in (0, 4):
        batch = [mapper(x) for x in data[start : start + 4]]
        _, targets = model.training_batch(batch)
        for i, sample in enumerate(batch):
            boxes = sample["instances"].gt_boxes.tensor.float() / 4
            boxes = boxes.clamp(0, 31)
            boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(dim=1)]
            x, y = ((boxes[:, :2] + boxes[:, 2:]) / 2).long().unbind(1)
            assert (targets.heatmap[i].amax(dim=0)[y, x] == 1).all()
            assert int(targets.mask[i].sum()) == len(boxes)
            objects += len(boxes)
        losses = model(batch)
        assert all(torch.isfinite(value) for value in losses.values())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
    assert objects > 20
    detections = model.eval()([{"image": batch[0]["image"]}])[0]["instances"]
    assert len(detections) == 100 and torch.isfinite(detections.pred_boxes.tensor).all()
