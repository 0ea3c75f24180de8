"""What stands for a ``GeneralizedRCNN`` in exported files predicts what the model predicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from d2ext.modeling import region_slots
from d2ext.systems.densepose.exported import ExportableDensePoseROIHeads
from d2ext.testing import random_inputs, tiny_config

HEAD = "MODEL.ROI_DENSEPOSE_HEAD"
MESHES = {x: {"TYPE": "vertex_direct", "NUM_VERTICES": 9, "INIT_FILE": ""} for x in ("a", "b")}
OPTIONS: dict[str, list[Any]] = {
    "published": ["MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlign"],
    "few slots": ["TEST.DETECTIONS_PER_IMAGE", 3, "MODEL.RPN.POST_NMS_TOPK_TEST", 20],
    "above a score": ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.25, f"{HEAD}.DECODER_ON", False],
    "nobody": ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0],
    "one box of all classes": ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True],
    "sigmoids": ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True],
    "large proposals": ["MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 12],
    "confidences": [f"{HEAD}.SEGM_CONFIDENCE.ENABLED", True, f"{HEAD}.UV_CONFIDENCE.ENABLED", True],
    "embeddings": [
        *(f"{HEAD}.PREDICTOR_NAME", "DensePoseEmbeddingPredictor"),
        *(f"{HEAD}.CSE.EMBEDDERS", MESHES),
    ],
}


@pytest.mark.parametrize("name", OPTIONS)
def test_predicts_what_the_model_predicts(name: str) -> None:
    cfg = tiny_config("DensePose")
    cfg.merge_from_list(OPTIONS[name])
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    with torch.no_grad():  # scores and boxes that differ
        model.roi_heads.box_predictor.cls_score.weight.mul_(20)
        model.roi_heads.box_predictor.bbox_pred.weight.mul_(500)
    stand_in = ExportableDensePoseROIHeads(cfg, model).eval()
    counts = []
    for inputs in random_inputs(2):
        (actual,), (expected,) = (
            stand_in([inputs | {"height": 90}]),
            model([inputs | {"height": 90}]),
        )
        own, other = actual["instances"], expected["instances"]
        counts.append(len(other))
        assert own.image_size == other.image_size == (90, 80)
        assert own.pred_classes.tolist() == other.pred_classes.tolist()
        torch.testing.assert_close(own.scores, other.scores)
        torch.testing.assert_close(own.pred_boxes.tensor, other.pred_boxes.tensor)
        maps, expected_maps = (x.pred_densepose.maps() for x in (own, other))
        torch.testing.assert_close(maps, expected_maps, rtol=1e-4, atol=1e-5)
        if name == "embeddings":
            vertices = own.pred_densepose.vertices, other.pred_densepose.vertices
            torch.testing.assert_close(*vertices)
    assert counts == [0, 0] if name == "nobody" else min(counts) > 0, counts
    assert name != "few slots" or counts == [3, 3]


@pytest.mark.parametrize("kind", ["ROIAlign", "ROIAlignV2"])
@pytest.mark.parametrize("fixed", [False, True])
def test_pooling_is_detectron2s(kind: str, fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region_slots, "needs_fixed_shapes", lambda _: fixed)
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 3, 64 >> i, 80 >> i, generator=generator) for i in range(3)]
    corners = torch.rand(2, 30, 2, generator=generator) * 200
    boxes = torch.cat(
        [corners, corners + torch.rand(2, 30, 2, generator=generator) ** 3 * 900 + 1], dim=2
    )
    pooler = ROIPooler(7, [1 / 4, 1 / 8, 1 / 16], 2, kind)
    expected = pooler(features, [Boxes(x) for x in boxes])
    images = torch.arange(2).repeat_interleave(30)
    actual = region_slots.pool(pooler, features, boxes.flatten(0, 1), images)
    torch.testing.assert_close(actual, expected)
