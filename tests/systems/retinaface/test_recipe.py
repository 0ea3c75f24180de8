"""The values of the published recipes (tests/reference/retinaface/NOTES.md)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.systems.recipes import assert_recipe, under

IMAGES = 12_880
LOSS = {"BOX_WEIGHT": 2, "CLASS_WEIGHT": 1, "LANDMARK_WEIGHT": 1, "POSITIVE_IOU": 0.35}
LOSS |= {"NEGATIVE_IOU": 0.35, "FORCED_IOU": 0.2, "NEGATIVES_PER_POSITIVE": 7}
LOSS |= {"MIN_NEGATIVES": 0, "MINING": "image", "SMOOTH_L1_BETA": 1}
TEST = {"MIN_SIZE": 0, "MAX_SIZE": 2150, "SCORE_THRESH": 0.02, "NMS_THRESH": 0.4}
TEST |= {"PRE_NMS_TOP_K": 5000, "MAX_DETECTIONS": 750, "CLIP_BOXES": False}
# The paper's.
TEST |= {"AUG.MIN_SIZES": [500, 800, 1100, 1400, 1700], "AUG.VOTE_IOU": 0.4}
MODEL: dict[str, Any] = {"NUM_CLASSES": 1, "NUM_EXTRA_LEVELS": 0, "DEFORMABLE": False}
MODEL |= {"SHARED_HEADS": False, "ANCHORS.SCALES": [16, 32, 64, 128, 256, 512]}
INPUT: dict[str, Any] = {"FORMAT": "BGR", "MIN_SIZE_TEST": 0, "AUGMENTATION.NAME": "retinaface"}
INPUT |= {"AUGMENTATION.MEAN": [123, 117, 104], "AUGMENTATION.FLIP_PROB": 0.5}
INPUT |= {"AUGMENTATION.PHOTOMETRIC_PROB": 0.5, "AUGMENTATION.BRIGHTNESS": 32}
INPUT |= {"AUGMENTATION.CONTRAST": [0.5, 1.5], "AUGMENTATION.SATURATION": [0.5, 1.5]}
INPUT |= {"AUGMENTATION.HUE": 18, "AUGMENTATION.SQUARE_CROP.TRIALS": 250}
INPUT |= {"AUGMENTATION.SQUARE_CROP.SCALES": [0.3, 0.45, 0.6, 0.8, 1]}
# Of the meshes, ours.
LOSS |= {"VERTEX_WEIGHT": 5, "EDGE_WEIGHT": 5}
MODEL["MESH.MAX_MESHES"] = 64
SOLVER = {"MOMENTUM": 0.9, "WEIGHT_DECAY": 5e-4, "WEIGHT_DECAY_NORM": 5e-4, "GAMMA": 0.1}
COMMON = {"MODEL.PIXEL_MEAN": [104, 117, 123], "MODEL.PIXEL_STD": [1, 1, 1]}
COMMON |= {"TEST.DETECTIONS_PER_IMAGE": 750, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 5}
COMMON |= {"MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": 0, "MODEL.BACKBONE.FREEZE_AT": 0}
COMMON |= under("INPUT", INPUT) | under("SOLVER", SOLVER)
PAPER: dict[str, Any] = {"NUM_EXTRA_LEVELS": 1, "DEFORMABLE": True, "SHARED_HEADS": True}
PAPER_LOSS = {"POSITIVE_IOU": 0.5, "NEGATIVE_IOU": 0.3, "NEGATIVES_PER_POSITIVE": 3}
PAPER_LOSS |= {"MINING": "batch", "BOX_WEIGHT": 0.25, "LANDMARK_WEIGHT": 0.1}
# config: batch, pixels, epochs, drops, rate, epochs of warm-up, channels
RECIPES = {
    "mobilenet025_wider": (32, 640, 250, (190, 220), 1e-3, 0, 64),
    "R_50_wider": (24, 840, 100, (70, 90), 1e-3, 0, 256),
    "R_50_dcn_5level_wider": (32, 640, 80, (55, 68), 1e-2, 5, 256),
}


@pytest.mark.parametrize("mesh", ["", "_mesh"])
@pytest.mark.parametrize("name", list(RECIPES))
def test_recipe(name: str, mesh: str) -> None:
    batch, pixels, epochs, drops, rate, warm_up, channels = RECIPES[name]
    paper = name == "R_50_dcn_5level_wider"
    if paper and mesh:
        pytest.skip("there is no such config")
    epoch = IMAGES // batch
    facts = COMMON | under("MODEL.RETINAFACE", MODEL | (PAPER if paper else {}))
    facts |= under("MODEL.RETINAFACE.LOSS", LOSS | (PAPER_LOSS if paper else {}))
    facts |= under("MODEL.RETINAFACE.TEST", TEST)
    if paper:
        scales = [pytest.approx(16 * 2 ** (i / 3), rel=1e-3) for i in range(15)]
        facts["MODEL.RETINAFACE.ANCHORS.SCALES"] = scales
    if name.startswith("R_50"):
        facts["MODEL.RESNETS.DEPTH"] = 50
    facts |= {"MODEL.RETINAFACE.FPN_CHANNELS": channels, "INPUT.AUGMENTATION.SIZE": pixels}
    facts["INPUT.AUGMENTATION.SQUARE_CROP.PUBLISHED_CLIPPED_POINTS"] = not mesh
    # The paper's mesh of 1,103 vertices.
    facts["MODEL.RETINAFACE.MESH.NUM_VERTICES"] = 1103 if mesh else 0
    solver = {"IMS_PER_BATCH": batch, "BASE_LR": rate, "WARMUP_ITERS": warm_up * epoch}
    solver |= {"MAX_ITER": epochs * epoch, "STEPS": [x * epoch for x in drops]}
    if warm_up:
        solver["WARMUP_FACTOR"] = 0.1
    assert_recipe(f"retinaface/{name}{mesh}.yaml", facts | under("SOLVER", solver))
