"""The values of the published recipes (tests/reference/upsnet/NOTES.md)."""

from __future__ import annotations

from typing import Any

import pytest

from d2ext import model_zoo
from tests.systems.recipes import assert_recipe, under

PYRAMID = ["p2", "p3", "p4", "p5"]
# What VPSNet shares.
NETWORK: dict[str, Any] = {"BACKBONE.FREEZE_AT": 2, "FPN.OUT_CHANNELS": 256}
NETWORK |= {"ANCHOR_GENERATOR.SIZES": [8 * x for x in (4, 8, 16, 32, 64)]}
NETWORK |= {"ANCHOR_GENERATOR.ASPECT_RATIOS": [0.5, 1, 2], "ANCHOR_GENERATOR.OFFSET": 0}
NETWORK |= {"RPN.IN_FEATURES": [*PYRAMID, "p6"], "RPN.IOU_THRESHOLDS": [0.3, 0.7]}
NETWORK |= {"RPN.BATCH_SIZE_PER_IMAGE": 256, "RPN.POSITIVE_FRACTION": 0.5, "RPN.NMS_THRESH": 0.7}
NETWORK |= {"RPN.PRE_NMS_TOPK_TEST": 1000, "RPN.POST_NMS_TOPK_TEST": 1000}
NETWORK |= {"RPN.BBOX_REG_WEIGHTS": [1, 1, 1, 1]}
NETWORK |= {"ROI_HEADS.IN_FEATURES": PYRAMID, "ROI_HEADS.BATCH_SIZE_PER_IMAGE": 512}
NETWORK |= {"ROI_HEADS.POSITIVE_FRACTION": 0.25, "ROI_HEADS.IOU_THRESHOLDS": [0.5]}
NETWORK |= {"ROI_HEADS.SCORE_THRESH_TEST": 0.05, "ROI_HEADS.NMS_THRESH_TEST": 0.5}
NETWORK |= {"ROI_BOX_HEAD.BBOX_REG_WEIGHTS": [10, 10, 5, 5], "ROI_BOX_HEAD.NUM_FC": 2}
NETWORK |= {"ROI_BOX_HEAD.FC_DIM": 1024, "ROI_BOX_HEAD.POOLER_RESOLUTION": 7}
NETWORK |= {"ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2, "ROI_MASK_HEAD.NUM_CONV": 4}
NETWORK |= {"ROI_MASK_HEAD.CONV_DIM": 256, "ROI_MASK_HEAD.POOLER_RESOLUTION": 14}
NETWORK |= {"ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": 2, "SEM_SEG_HEAD.IN_FEATURES": PYRAMID}
PANOPTIC = {"TEST.SCORE_THRESH": 0.6, "TEST.NMS_THRESH": 0.5, "TEST.MAX_INSTANCES": 100}
PANOPTIC |= {"TEST.OVERLAP_FRACTION": 0.3, "TEST.PANOPTIC": "head"}

COMMON = NETWORK | {"PIXEL_MEAN": [102.9801, 115.9465, 122.7717], "PIXEL_STD": [1, 1, 1]}
COMMON |= {"RPN.PRE_NMS_TOPK_TRAIN": 2000, "RPN.POST_NMS_TOPK_TRAIN": 2000}
COMMON |= {"UPSNET.LOSS.KEEP_FRACTION": 0.7, "UPSNET.TEST.UNKNOWN": True}
COMMON |= under("UPSNET", PANOPTIC)
INPUT = {"INPUT.FORMAT": "BGR", "INPUT.MIN_SIZE_TEST": 0, "INPUT.AUGMENTATION.NAME": "upsnet"}
INPUT |= {"INPUT.RANDOM_FLIP": "horizontal", "TEST.DETECTIONS_PER_IMAGE": 100, "SEED": 235}
SOLVER: dict[str, Any] = {"IMS_PER_BATCH": 16, "BASE_LR": 0.02, "MOMENTUM": 0.9, "GAMMA": 0.1}
SOLVER |= {"WEIGHT_DECAY": 1e-4, "WEIGHT_DECAY_BIAS": 0, "BIAS_LR_FACTOR": 2}
SOLVER |= {"WARMUP_ITERS": 1500, "WARMUP_FACTOR": 0.1, "WARMUP_METHOD": "linear"}
DATA: dict[str, dict[str, Any]] = {
    "coco": {
        "ROI_HEADS.NUM_CLASSES": 80,
        "UPSNET.NUM_STUFF": 53,
        "UPSNET.GLOBAL_CONTEXT": True,
        "UPSNET.SEMANTIC_HEAD.CHANNELS": [256, 128, 128],
        "UPSNET.LOSS.SEMANTIC_WEIGHT": 0.2,
        "UPSNET.LOSS.SEMANTIC_ROI_WEIGHT": 0.2,
        "UPSNET.LOSS.PANOPTIC_WEIGHT": 0.1,
        "UPSNET.TEST.MIN_SIZE": 800,
        "UPSNET.TEST.MAX_SIZE": 1333,
        "UPSNET.TEST.STUFF_AREA_LIMIT": 4096,
    },
    "cityscapes": {
        "ROI_HEADS.NUM_CLASSES": 8,
        "UPSNET.NUM_STUFF": 11,
        "UPSNET.GLOBAL_CONTEXT": False,
        "UPSNET.SEMANTIC_HEAD.CHANNELS": [128, 128],
        "UPSNET.LOSS.SEMANTIC_WEIGHT": 1,
        "UPSNET.LOSS.SEMANTIC_ROI_WEIGHT": 0,
        "UPSNET.LOSS.PANOPTIC_WEIGHT": 0.5,
        "UPSNET.TEST.MIN_SIZE": 1024,
        "UPSNET.TEST.MAX_SIZE": 2048,
        "UPSNET.TEST.STUFF_AREA_LIMIT": 2048,
    },
}
# config: thousands of iterations and their decays, short sides in training
RECIPES = {
    "R_50_coco": (90, [60, 80], [800], {}),
    "R_101_dcn_coco": (270, [210, 250], range(640, 833, 32), {}),
    "R_50_cityscapes": (12, [9], range(800, 1025, 32), {}),
    "R_101_cityscapes": (3, [2], range(800, 1025, 32), {"WARMUP_ITERS": 0}),
}


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipe(name: str) -> None:
    iterations, steps, sides, changed = RECIPES[name]
    data = DATA[name.rpartition("_")[2]]
    solver = SOLVER | {"MAX_ITER": 1000 * iterations, "STEPS": [1000 * x for x in steps], **changed}
    facts = INPUT | under("MODEL", COMMON | data) | under("SOLVER", solver)
    facts |= {"INPUT.MIN_SIZE_TRAIN": [*sides], "MODEL.RESNETS.DEPTH": int(name.split("_")[1])}
    facts["INPUT.MAX_SIZE_TRAIN"] = data["UPSNET.TEST.MAX_SIZE"]
    assert_recipe(f"upsnet/upsnet_{name}.yaml", facts)


@pytest.mark.parametrize("data", ["coco", "cityscapes"])
@pytest.mark.parametrize("gpus", [8, 4])
def test_recipes_of_fewer_gpus_see_as_many_images(data: str, gpus: int) -> None:
    """Published: the rate by 1/2 and 1/4, iterations by 2 and 4."""
    full = model_zoo.get_config(f"upsnet/upsnet_R_50_{data}.yaml")
    cfg = model_zoo.get_config(f"upsnet/upsnet_R_50_{data}_{gpus}gpu.yaml")
    factor = 16 // gpus
    solver = full.SOLVER
    solver.IMS_PER_BATCH = gpus
    solver.BASE_LR /= factor
    solver.MAX_ITER *= factor
    solver.STEPS = tuple(factor * step for step in solver.STEPS)
    assert cfg == full
