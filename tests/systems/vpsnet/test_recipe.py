"""The values of the published recipes (tests/reference/vpsnet/NOTES.md)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.systems.recipes import assert_recipe, under
from tests.systems.upsnet.test_recipe import NETWORK, PANOPTIC

MODEL = NETWORK | {"PIXEL_MEAN": [123.675, 116.28, 103.53], "PIXEL_STD": [58.395, 57.12, 57.375]}
MODEL |= {"RPN.PRE_NMS_TOPK_TRAIN": 1000, "RPN.POST_NMS_TOPK_TRAIN": 1000, "RESNETS.DEPTH": 50}
UPSNET: dict[str, Any] = {"GLOBAL_CONTEXT": False, "SEMANTIC_HEAD.CHANNELS": [256, 128, 128]}
UPSNET |= {"SEMANTIC_HEAD.NORM": "GN", "LOSS.SEMANTIC_WEIGHT": 1, "LOSS.SEMANTIC_ROI_WEIGHT": 0}
UPSNET |= {"LOSS.PANOPTIC_WEIGHT": 0.5, "LOSS.KEEP_FRACTION": 1, "TEST.MIN_SIZE": 0}
UPSNET |= {"TEST.UNKNOWN": False, "TEST.STUFF_AREA_LIMIT": 2048, **PANOPTIC}
VPSNET: dict[str, Any] = {"MAX_DISPLACEMENT": 4, "TRACK_FC_DIM": 1024, "MATCH_LOSS_WEIGHT": 0.5}
VPSNET |= {"MATCH_WEIGHTS": [1, 2, 10], "MAX_OBJECTS": 0, "PUBLISHED_WARP": True}
VPSNET |= {"PUBLISHED_DUMMY": True, "PUBLISHED_ID_LOOKUP": True}
INPUT: dict[str, Any] = {"FORMAT": "RGB", "MIN_SIZE_TEST": 0, "RANDOM_FLIP": "horizontal"}
INPUT |= {"VIDEO.REFERENCE_OFFSETS": [-1, 1], "AUGMENTATION.RESIZE_SCALE": [0.8, 1.5]}
INPUT |= {"CROP.SIZE": [800, 1600], "CROP.TYPE": "absolute", "CROP.ENABLED": True}
SOLVER: dict[str, Any] = {"IMS_PER_BATCH": 8, "BASE_LR": 0.005, "MOMENTUM": 0.9, "GAMMA": 0.1}
SOLVER |= {"WEIGHT_DECAY": 1e-4, "WEIGHT_DECAY_NORM": 1e-4, "WARMUP_ITERS": 500}
SOLVER |= {"CLIP_GRADIENTS.CLIP_TYPE": "full_model", "CLIP_GRADIENTS.CLIP_VALUE": 35}
# An epoch: 2,400 annotated frames, 8 times, 8 in a step.
EPOCH = 2400
# stuff, things
CLASSES = {"cityscapes_vps": (11, 8), "viper": (13, 10)}


@pytest.mark.parametrize("data", list(CLASSES))
@pytest.mark.parametrize("kind", ["fuse", "track", "fusetrack"])
def test_recipe(kind: str, data: str) -> None:
    stuff, things = CLASSES[data]
    facts = under("MODEL.UPSNET", UPSNET | {"NUM_STUFF": stuff}) | under("INPUT", INPUT)
    switches = {"FUSION": "fuse" in kind, "TRACK": "track" in kind}
    facts |= under("MODEL.VPSNET", VPSNET | switches)
    facts |= under("MODEL", MODEL | {"ROI_HEADS.NUM_CLASSES": things})
    # Fuse on Cityscapes-VPS: 24 epochs, steps 16 and 22.
    long = 2 if (kind, data) == ("fuse", "cityscapes_vps") else 1
    steps = [8 * long * EPOCH, 11 * long * EPOCH]
    facts |= under("SOLVER", SOLVER | {"MAX_ITER": 12 * long * EPOCH, "STEPS": steps})
    facts["SOLVER.WARMUP_FACTOR"] = 0.3333333
    assert_recipe(f"vpsnet/vpsnet_{kind}_R_50_{data}.yaml", facts)
