"""The values of the published recipes (tests/reference/yolact/NOTES.md)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.systems.recipes import assert_recipe, under

LOSS = {"BOX_WEIGHT": 1.5, "CLASS_WEIGHT": 1, "MASK_WEIGHT": 6.125, "SEMANTIC_WEIGHT": 1}
LOSS |= {"MASK_IOU_WEIGHT": 25, "POSITIVE_IOU": 0.5, "NEGATIVE_IOU": 0.4, "CROWD_IOA": 0.7}
LOSS |= {"NEGATIVES_PER_POSITIVE": 3, "MAX_MASKS": 100, "MIN_MASK_IOU_AREA": 25}
TEST = {"SCORE_THRESH": 0.05, "NMS": "fast", "NMS_THRESH": 0.5, "NMS_TOP_K": 200}
TEST |= {"MAX_DETECTIONS": 100, "MASK_THRESH": 0.5, "CROP": "before", "TRUNCATE_BOXES": True}
SOLVER: dict[str, Any] = {"IMS_PER_BATCH": 8, "BASE_LR": 1e-3, "MOMENTUM": 0.9, "GAMMA": 0.1}
SOLVER |= {"WEIGHT_DECAY": 5e-4, "WEIGHT_DECAY_NORM": 5e-4, "MAX_ITER": 800_000}
SOLVER |= {"STEPS": (280_000, 600_000, 700_000, 750_000)}
SOLVER |= {"WARMUP_METHOD": "linear", "WARMUP_ITERS": 500, "WARMUP_FACTOR": 0.1}
AUGMENTATION: dict[str, Any] = {"NAME": "ssd", "SIZE": 550, "MEAN": [123.68, 116.78, 103.94]}
AUGMENTATION |= {"PHOTOMETRIC_PROB": 0.5, "BRIGHTNESS": 32, "CONTRAST": [0.5, 1.5], "HUE": 18}
AUGMENTATION |= {"SATURATION": [0.5, 1.5], "EXPAND_PROB": 0.5, "EXPAND_RATIO": [1, 4]}
AUGMENTATION |= {"CROP_MIN_IOUS": [0.1, 0.3, 0.7, 0.9], "CROP_SCALE": [0.3, 1], "CROP_TRIALS": 50}
AUGMENTATION |= {"CROP_ASPECT_RATIO": [0.5, 2], "CROP_ENFORCE_IOU": False, "FLIP_PROB": 0.5}
MODEL: dict[str, Any] = {"NUM_CLASSES": 80, "INPUT_SIZE": 550, "FPN_CHANNELS": 256}
MODEL |= {"NUM_EXTRA_LEVELS": 2, "HEAD_CHANNELS": 256, "NUM_PROTOTYPES": 32}
MODEL |= {"MIN_IMAGES_TO_TRAIN_BN": 6, "ANCHORS.SCALES": [24, 48, 96, 192, 384]}
MODEL |= {"ANCHORS.ASPECT_RATIOS": [1, 0.5, 2], "ANCHORS.SQUARE": True}
COMMON: dict[str, Any] = {"INPUT.FORMAT": "RGB", "INPUT.MIN_SIZE_TEST": 0}
COMMON |= {"MODEL.PIXEL_MEAN": [123.68, 116.78, 103.94], "MODEL.PIXEL_STD": [58.40, 57.12, 57.38]}
COMMON |= {"MODEL.BACKBONE.FREEZE_AT": 0}
COMMON |= under("MODEL.YOLACT", MODEL) | under("MODEL.YOLACT.LOSS", LOSS)
COMMON |= under("MODEL.YOLACT.TEST", TEST) | under("SOLVER", SOLVER)
COMMON |= under("INPUT.AUGMENTATION", AUGMENTATION)


def sized(pixels: int, scales: list[int]) -> dict[str, Any]:
    yolact = {"INPUT_SIZE": pixels, "ANCHORS.SCALES": scales}
    return {"INPUT.AUGMENTATION.SIZE": pixels, **under("MODEL.YOLACT", yolact)}


def plus(interval: int) -> dict[str, Any]:
    scales = [base * 2 ** (j / 3) for base in (24, 48, 96, 192, 384) for j in range(3)]
    yolact = {"ANCHORS.SCALES": scales, "ANCHORS.SQUARE": False, "MASK_RESCORING.ENABLED": True}
    stages = {"MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, True, True, True]}
    return {"MODEL.RESNETS.DEFORM_INTERVAL": interval, **stages, **under("MODEL.YOLACT", yolact)}


RECIPES: dict[str, dict[str, Any]] = {
    "R_50_550": {},
    "R_101_550": {},
    "R_101_400": sized(400, [17, 34, 69, 139, 279]),
    "R_101_700": {**sized(700, [30, 61, 122, 244, 488]), "MODEL.YOLACT.LOSS.MAX_MASKS": 300},
    "darknet53_550": {
        "MODEL.PIXEL_MEAN": [0, 0, 0],
        "MODEL.PIXEL_STD": [255, 255, 255],
        "MODEL.YOLACT.IN_FEATURES": ["dark3", "dark4", "dark5"],
    },
    "R_50_550_pascal": {
        "MODEL.YOLACT.NUM_CLASSES": 20,
        "MODEL.YOLACT.ANCHORS.SCALES": [32, 64, 128, 256, 512],
        "MODEL.YOLACT.ANCHORS.SQUARE": False,
        "SOLVER.MAX_ITER": 120_000,
        "SOLVER.STEPS": (60_000, 100_000),
        "TEST.MIN_TARGET_SIDE": 4 / 550,
        "TEST.AP_AT": (0.7,),
    },
    "plus_R_50_550": plus(1),
    "plus_R_101_550": plus(3),
}


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipe(name: str) -> None:
    depth = next(([int(x)] for x in name.split("_") if x in ("50", "101")), None)
    facts = {} if depth is None else {"MODEL.RESNETS.DEPTH": depth[0]}
    assert_recipe(f"yolact/yolact_{name}.yaml", COMMON | facts | RECIPES[name])
