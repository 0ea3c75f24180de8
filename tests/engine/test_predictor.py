"""The batch predictor gives what Detectron2's predictor gives for each image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from d2ext.checkpoint.io import CheckpointError
from d2ext.engine.predictor import BatchPredictor
from d2ext.testing import tiny_config


def with_weights(folder: Path) -> CfgNode:
    cfg = tiny_config("YOLACT")
    cfg.DATASETS.TEST = ()
    torch.save({"model": build_model(cfg).state_dict()}, folder / "weights.pth")
    cfg.MODEL.WEIGHTS = str(folder / "weights.pth")
    return cfg


@pytest.mark.parametrize("channels", ["RGB", "BGR"])
@pytest.mark.parametrize("min_size", [0, 50])
@pytest.mark.parametrize("sizes", [((40, 60), (70, 30), (64, 64)), ((40, 60), (40, 60))])
def test_equals_detectron2_s_predictor(
    tmp_path: Path, channels: str, min_size: int, sizes: tuple[tuple[int, int], ...]
) -> None:
    cfg = with_weights(tmp_path)
    cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST = channels, min_size
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*s, 3), dtype=np.uint8) for s in sizes]
    one, several = DefaultPredictor(cfg), BatchPredictor(cfg)
    for image, output in zip(images, several(images), strict=True):
        actual, expected = output["instances"], one(image)["instances"]
        assert actual.image_size == image.shape[:2]
        assert len(actual) == len(expected) > 0
        torch.testing.assert_close(actual.scores, expected.scores, atol=1e-5, rtol=0)
        assert actual.pred_classes.tolist() == expected.pred_classes.tolist()
        assert torch.equal(actual.pred_masks, expected.pred_masks)
    assert several([]) == []
    sent = several.upload(images[:1])[0]["image"]
    if min_size == 0:
        order = images[0][:, :, ::-1] if channels == "RGB" else images[0]
        assert torch.equal(sent, torch.from_numpy(np.ascontiguousarray(order)).permute(2, 0, 1))
    else:
        assert tuple(sent.shape) == (3, 50, 75)


def test_wrong_images_and_weights_are_errors(tmp_path: Path) -> None:
    cfg = with_weights(tmp_path)
    predictor = BatchPredictor(cfg)
    for image in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ValueError, match="height x width x 3 bytes"):
            predictor([image])
    cfg.INPUT.FORMAT = "L"
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT"):
        BatchPredictor(cfg, predictor.model)
    cfg.INPUT.FORMAT, cfg.MODEL.YOLACT.NUM_CLASSES = "RGB", 4
    with pytest.raises(CheckpointError, match="class count"):
        BatchPredictor(cfg)
