"""Every config of configs/landmarks builds its model, and the converter tells strangers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.utils.visualizer import Visualizer

from d2ext import model_zoo
from d2ext.checkpoint import convert_state_dict
from d2ext.checkpoint.convert import ConversionError
from d2ext.data.saved_metadata import class_metadata
from d2ext.systems.landmarks import (
    HeatmapHead,
    IntegralHead,
    LandmarkHead,
    LandmarkNet,
    RegressionHead,
    SimCCHead,
)

# Config → head, landmarks, parameters in millions.
CONFIGS: dict[str, tuple[type[LandmarkHead], int, float]] = {
    "hourglass_2stack_mpii_256": (HeatmapHead, 16, 6.57),
    "hourglass_8stack_mpii_256": (HeatmapHead, 16, 25.43),
    "hourglass_2stack_coco_256x192": (HeatmapHead, 17, 6.57),
    "hourglass_2stack_wflw_256": (HeatmapHead, 98, 6.63),
    "hourglass_2stack_overfit": (HeatmapHead, 16, 6.57),
    "regression_R_18_wflw_256": (RegressionHead, 98, 11.28),
    "simcc_R_50_coco_256x192": (SimCCHead, 17, 23.59),
    "heatmap_gaussian_shapes": (HeatmapHead, 8, 0.58),
    "heatmap_cauchy_shapes": (HeatmapHead, 8, 0.58),
    "integral_shapes": (IntegralHead, 8, 0.58),
    "regression_shapes": (RegressionHead, 8, 0.85),
    "simcc_shapes": (SimCCHead, 8, 0.65),
}


def test_all_are_here() -> None:
    names = {
        name.removeprefix("landmarks/").removesuffix(".yaml")
        for name in model_zoo.available()
        if name.startswith("landmarks/") and "/Base-" not in name
    }
    assert names == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_builds_its_model(name: str) -> None:
    head, landmarks, millions = CONFIGS[name]
    cfg = model_zoo.get_config(f"landmarks/{name}.yaml")
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        model = build_model(cfg)
    assert isinstance(model, LandmarkNet) and type(model.head) is head
    assert model.num_keypoints == landmarks
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize("name", CONFIGS)
def test_predicts_and_draws_without_data(name: str) -> None:
    """Detectron2's predictor and visualizer, with no annotation file of any data set: names, mirror
    partners and lines are there, and a line is seen."""
    cfg = model_zoo.get_config(f"landmarks/{name}.yaml")
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    hourglass = cfg.MODEL.NEWELL_HOURGLASS  # narrow: the weights are random anyway
    hourglass.CHANNELS, hourglass.STEM_CHANNELS, hourglass.NUM_STACKS = 32, [8, 16, 32], 1
    predictor = DefaultPredictor(cfg)
    picture = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    detections = predictor(picture)["instances"]
    _, landmarks, _ = CONFIGS[name]
    assert detections.pred_keypoints.shape == (1, landmarks, 3)
    if name == "hourglass_2stack_overfit":
        assert not cfg.DATASETS.TEST  # for whatever data --dataset names
        metadata = None
    else:
        metadata = predictor.metadata
        assert len(metadata.keypoint_names) == landmarks and metadata.keypoint_flip_map
        assert class_metadata(cfg) is metadata
        partners = predictor.model.partners.tolist()
        assert partners != list(range(landmarks))
        assert [partners[i] for i in partners] == list(range(landmarks))
    points = torch.tensor([[10.0 + i % 10 * 7, 10 + i // 10 * 4, 1.0] for i in range(landmarks)])
    detections.pred_keypoints = points[None]
    drawn = {}
    for lines in (True, False):
        visualizer = Visualizer(picture, metadata if lines else None)
        drawn[lines] = visualizer.draw_instance_predictions(detections).get_image()
    assert (drawn[True] != picture).any()
    if metadata is not None:
        assert (drawn[True] != drawn[False]).any(axis=-1).sum() > 50


def test_strangers_are_told() -> None:
    with pytest.raises(ConversionError, match="hgs"):
        convert_state_dict("landmarks", {"backbone.weight": torch.zeros(1)})
    known = {"model.module.hgs.0.0.up1.conv1.conv.weight": torch.zeros(1)}
    with pytest.raises(ConversionError, match="tail"):
        convert_state_dict("landmarks", {**known, "model.module.tail.weight": torch.zeros(1)})
