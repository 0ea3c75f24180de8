"""The published recipes on real images: targets at the objects' corners, a few steps without NaN."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model

from d2ext import model_zoo
from d2ext.data import build_train_loader

pytestmark = pytest.mark.real_data
CONFIGS = [
    "cornernet/cornernet_squeeze_511.yaml",
    "cornernet/cornernet_saccade_255.yaml",
    "centernet_triplets/centernet_triplets_hourglass52_511.yaml",
]


def narrow(name: str) -> Any:
    """The config with its recipe and depth, but few channels."""
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.CHANNELS_LAST = False
    hourglass = cfg.MODEL.CORNERNET_HOURGLASS
    hourglass.CHANNELS = [8] * len(hourglass.CHANNELS)
    hourglass.STEM_CHANNELS = hourglass.OUT_CHANNELS = 8
    for node in (cfg.MODEL.CORNERNET, cfg.MODEL.CENTERNET_TRIPLETS):
        node.POOL_CHANNELS = node.HEAD_CHANNELS = 8
    cfg.INPUT.STRICT = True
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


@pytest.mark.parametrize("name", CONFIGS)
def test_recipe_trains(name: str, real_coco: Path) -> None:
    cfg = narrow(name)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2.5e-4)
    objects = 0
    for batch in itertools.islice(build_train_loader(cfg), 2):
        images, targets = model.training_batch(batch)
        assert torch.isfinite(images).all()
        targets = getattr(targets, "corners", targets)
        for i, inputs in enumerate(batch):
            mask = targets.mask[i, : len(inputs["instances"])]
            labels = inputs["instances"].gt_classes[mask]
            for target in targets[:3]:
                if target is None:
                    continue
                own = target.heat[i].flatten(1)[labels, target.index[i][: len(mask)][mask]]
                assert (own == 1).all()
                # As many peaks as objects, but for those that share a cell.
                assert int((target.heat[i] == 1).sum()) <= len(labels)
            objects += len(labels)
        losses = model(batch)
        total = sum(losses.values())
        assert torch.isfinite(total), losses
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert objects > 0
