"""The values of the published recipes (tests/reference/centernet/NOTES.md)."""

from __future__ import annotations

import pytest

from d2ext import model_zoo

IMAGES, PERSON_IMAGES = 118287, 64115
# config: batch, learning rate, images, epochs, drops
RECIPES = {
    "R_18_dcn": (114, 5e-4, IMAGES, 140, (90, 120)),
    "R_101_dcn": (96, 3.75e-4, IMAGES, 140, (90, 120)),
    "dla34": (128, 5e-4, IMAGES, 230, (180, 210)),
    "hourglass104": (24, 2.5e-4, IMAGES, 50, (40,)),
    "pose_dla34": (128, 5e-4, PERSON_IMAGES, 320, (270, 300)),
    "pose_hourglass": (24, 2.5e-4, PERSON_IMAGES, 150, (130,)),
}


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipe(name: str) -> None:
    batch, rate, images, epochs, drops = RECIPES[name]
    cfg = model_zoo.get_config(f"centernet/centernet_{name}_512.yaml")
    solver, model, pose = cfg.SOLVER, cfg.MODEL.CENTERNET, name.startswith("pose")
    assert ("Adam", batch, rate) == (solver.OPTIMIZER, solver.IMS_PER_BATCH, solver.BASE_LR)
    done = [x * batch / images for x in (*solver.STEPS, solver.MAX_ITER)]
    assert done == pytest.approx([*drops, epochs], rel=5e-3)
    assert (solver.GAMMA, solver.WARMUP_ITERS) == (0.1, 0)
    assert solver.WEIGHT_DECAY == solver.WEIGHT_DECAY_NORM == 0
    mean = [255 * x for x in (0.40789654, 0.44719302, 0.47026115)]
    std = [255 * x for x in (0.28863828, 0.27408164, 0.27809835)]
    assert mean == pytest.approx(cfg.MODEL.PIXEL_MEAN) and std == pytest.approx(cfg.MODEL.PIXEL_STD)
    assert cfg.INPUT.FORMAT == "BGR" and cfg.INPUT.MIN_SIZE_TEST == 0
    assert cfg.MODEL.BACKBONE.FREEZE_AT == 0
    resnet = name.startswith("R_")
    assert (64 if resnet else 256) == model.HEAD_CHANNELS
    assert (0.001 if resnet else 0) == model.HEAD_INIT_STD
    assert ((1, 32) if pose else (80, 128)) == (model.NUM_CLASSES, model.MAX_OBJECTS)
    assert pose == cfg.MODEL.KEYPOINT_ON and pose == model.TEST.FLIP
    assert (0 if pose else 1) == cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    weights = model.LOSS
    assert (weights.HEATMAP_WEIGHT, weights.SIZE_WEIGHT, weights.OFFSET_WEIGHT) == (1, 0.1, 1)
    joints = weights.JOINT_WEIGHT, weights.JOINT_HEATMAP_WEIGHT, weights.JOINT_OFFSET_WEIGHT
    assert joints == (1, 1, 1) and model.MIN_OVERLAP == 0.7
    assert [[i, i + 1] for i in range(1, 17, 2)] == model.POSE.FLIP_PAIRS
    test = model.TEST
    assert (test.TOP_K, test.MAX_DETECTIONS, test.SCALES) == (100, 100, [1.0])
    assert (test.INPUT_SIZE, test.KEEP_RESOLUTION) == ([512, 512], True)
    augmentation = cfg.INPUT.AUGMENTATION
    assert (augmentation.SIZE, augmentation.FLIP_PROB) == (512, 0.5)
    assert (augmentation.COLOR_JITTER, augmentation.LIGHTING) == (0.4, 0.1)
    affine = augmentation.AFFINE
    assert (affine.MODE, affine.BORDER, affine.ROTATE_PROB) == ("crop", 128, 0)
    assert pytest.approx([0.6 + 0.1 * i for i in range(8)]) == affine.SCALES
    assert (affine.SHIFT, affine.ZOOM) == (0.1, 0.4)
