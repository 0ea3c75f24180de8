"""The flow net on the real pair of images with known flow, from files to the loss."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from detectron2.modeling import build_model

from d2ext.data import build_mapper
from d2ext.data.video.flow_pairs import flow_pairs
from d2ext.testing import tiny_config


def test_flow_stage_learns_a_real_pair(real_data: Path, tmp_path: Path) -> None:
    """In FlyingChairs' form; by heart, so only that the error falls well below that of no motion."""
    source = real_data / "flow/RubberWhale"
    for old, new in (("frame10.png", "1_img1.png"), ("frame11.png", "1_img2.png")):
        shutil.copy(source / old, tmp_path / new)
    shutil.copy(source / "flow10.flo", tmp_path / "1_flow.flo")
    (record,) = flow_pairs(str(tmp_path))
    cfg = tiny_config("YolactEdge")
    cfg.MODEL.YOLACT_EDGE.STAGE = "flow"
    cfg.MODEL.YOLACT.INPUT_SIZE = 128
    cfg.INPUT.MAPPER = "FlowPairMapper"
    cfg.INPUT.AUGMENTATION.NAME = "none"
    sample = build_mapper(cfg, is_train=True)(record)
    assert 0.97 < sample["flow_valid"].float().mean() < 0.99  # 98.4 % of the pixels are known
    torch.manual_seed(0)
    model = build_model(cfg).train()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=3e-3)
    errors = []
    for _ in range(60):
        loss = model([sample])["loss_flow"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert min(errors[-5:]) < 0.6 * errors[0], errors
