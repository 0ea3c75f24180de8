"""The values of the recipes (tests/reference/hourglass/NOTES.md; the families of landmark networks)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.systems.recipes import assert_recipe, under

# Per keypoint, of nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles.
SIGMAS = [0.026, *(x for y in (25, 35, 79, 72, 62, 107, 87, 89) for x in [y / 1000] * 2)]
ADAM: dict[str, Any] = {"OPTIMIZER": "Adam", "WEIGHT_DECAY": 0}
HOURGLASS: dict[str, Any] = {"MODEL.PIXEL_MEAN": [0, 0, 0], "MODEL.PIXEL_STD": [255] * 3}
HOURGLASS |= {"MODEL.NEWELL_HOURGLASS.NUM_STACKS": 2, "MODEL.NEWELL_HOURGLASS.CHANNELS": 256}
HOURGLASS |= {"MODEL.NEWELL_HOURGLASS.DEPTH": 4, "MODEL.NEWELL_HOURGLASS.INCREASE": 0}
HOURGLASS |= {"MODEL.NEWELL_HOURGLASS.STEM_CHANNELS": [64, 128, 128], "SOLVER.WARMUP_ITERS": 0}
RESNET = {"MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53], "SOLVER.WARMUP_ITERS": 500}
RESNET |= {"MODEL.PIXEL_STD": [58.395, 57.12, 57.375], "MODEL.BACKBONE.FREEZE_AT": 0}
MPII = {"NUM_KEYPOINTS": 16, "INPUT_SIZE": [256, 256], "TARGET.SIGMA": 1, "TEST.FLIP": True}
MPII |= {"FLIP_INDICES": [5, 4, 3, 2, 1, 0, 6, 7, 8, 9, 15, 14, 13, 12, 11, 10]}
MPII |= {"TARGET.CENTER": "hourglass", "DECODER": "hourglass", "CROP.METHOD": "hourglass"}
MPII |= {"TEST.TRUNCATE": True, "LOSS.MAPS": "mse", "TARGET.WINDOW": 0}
PEOPLE = {"NUM_KEYPOINTS": 17, "INPUT_SIZE": [256, 192], "CROP.PADDING": 1.25}
PEOPLE |= {"TEST.FLIP": True, "TEST.KEYPOINT_THRESH": 0.2}
FACES: dict[str, Any] = {"NUM_KEYPOINTS": 98, "INPUT_SIZE": [256, 256], "CROP.PADDING": 1.25}
PEOPLE_INPUT = {"ROTATION": 40, "SCALE": 0.35, "HALF_BODY_PROB": 0.3}
FACES_INPUT = {"ROTATION": 30, "ROTATION_PROB": 0.6, "SCALE": 0.25}
FACES_INPUT |= {"CUTOUT_PROB": 0.3, "COLOR_PROB": 0.5}
OKS_NMS = {"TEST.KEYPOINT_OKS_NMS": 0.9, "TEST.KEYPOINT_OKS_SIGMAS": SIGMAS}
HALVED = {"BASE_LR": 1e-3, "GAMMA": 0.2, "STEPS": [100_000], "MAX_ITER": 200_000}
# config: network, landmarks, augmentation, batch, epochs and drops of so many samples, further values
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "hourglass_2stack_mpii_256": (HOURGLASS, MPII, {}, {"IMS_PER_BATCH": 16, **HALVED}),
    "hourglass_8stack_mpii_256": (
        HOURGLASS | {"MODEL.NEWELL_HOURGLASS.NUM_STACKS": 8},
        MPII,
        {},
        {"IMS_PER_BATCH": 16, **HALVED},
    ),
    "hourglass_2stack_coco_256x192": (
        HOURGLASS | OKS_NMS,
        PEOPLE | {"TARGET.SIGMA": 2, "TARGET.CENTER": "exact", "DECODER": "taylor"},
        PEOPLE_INPUT,
        {"IMS_PER_BATCH": 64, "BASE_LR": 1e-3, "GAMMA": 0.1, "EPOCHS": (170, 200, 210)},
    ),
    "simcc_R_50_coco_256x192": (
        RESNET | OKS_NMS | {"MODEL.RESNETS.DEPTH": 50},
        PEOPLE | {"SIMCC.RATIO": 2, "SIMCC.SIGMA": 6},
        PEOPLE_INPUT,
        {"IMS_PER_BATCH": 64, "BASE_LR": 5e-4, "GAMMA": 0.1, "EPOCHS": (170, 200, 210)},
    ),
    "hourglass_2stack_wflw_256": (
        HOURGLASS,
        FACES | {"TARGET.SIGMA": 1.5, "LOSS.MAPS": "adaptive_wing", "DECODER": "taylor"},
        FACES_INPUT,
        {"IMS_PER_BATCH": 16, "BASE_LR": 5e-4, "GAMMA": 0.1, "EPOCHS": (40, 50, 60)},
    ),
    "regression_R_18_wflw_256": (
        RESNET | {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64},
        FACES | {"LOSS.POINTS": "wing", "REGRESSION.POOL": 1, "REGRESSION.HIDDEN": 0},
        FACES_INPUT,
        {"IMS_PER_BATCH": 64, "BASE_LR": 5e-4, "GAMMA": 0.1, "EPOCHS": (170, 200, 210)},
    ),
}


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipe(name: str) -> None:
    network, landmarks, augmentation, solver = (dict(x) for x in RECIPES[name])
    if epochs := solver.pop("EPOCHS", None):
        samples = 7_500 if "wflw" in name else 150_000
        epoch = samples / solver["IMS_PER_BATCH"]
        *steps, last = [pytest.approx(x * epoch, rel=5e-3) for x in epochs]
        solver |= {"STEPS": steps, "MAX_ITER": last}
    facts = network | under("MODEL.LANDMARKS", landmarks) | under("SOLVER", ADAM | solver)
    facts |= {"INPUT.FORMAT": "RGB", "INPUT.MIN_SIZE_TEST": 0}
    assert_recipe(f"landmarks/{name}.yaml", facts | under("INPUT.LANDMARKS", augmentation))


def test_defaults() -> None:
    """Of what no recipe above says: the stacked hourglass, simple baselines and SimCC as published."""
    facts = {"NUM_KEYPOINTS": 16, "INPUT_SIZE": [256, 256], "TARGET.SIGMA": 1, "DECODER_BLUR": 11}
    facts |= {"UPSAMPLE.NUM_LAYERS": 3, "UPSAMPLE.CHANNELS": 256, "SIMCC.RATIO": 2}
    facts |= {"SIMCC.SIGMA": 6}
    assert_recipe("landmarks/Base-Landmarks.yaml", under("MODEL.LANDMARKS", facts))
