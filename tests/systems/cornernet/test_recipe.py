"""The values of the published recipes (tests/reference/cornernet/NOTES.md)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.systems.recipes import assert_recipe, under

BGR_MEAN = [255 * x for x in (0.40789654, 0.44719302, 0.47026115)]
BGR_STD = [255 * x for x in (0.28863828, 0.27408164, 0.27809835)]
HOURGLASS: dict[str, Any] = {"NUM_STACKS": 2, "CHANNELS": [256, 256, 384, 384, 384, 512]}
HOURGLASS |= {"BLOCKS": [2, 2, 2, 2, 2, 4], "STEM_BLOCKS": 1, "BLOCK": "residual"}
CORNERS: dict[str, Any] = {"NUM_CLASSES": 80, "POOL_CHANNELS": 128, "HEAD_CHANNELS": 256}
CORNERS |= {"HEAD_KERNEL": 3}
LOSS = {"MIN_OVERLAP": 0.3, "HEAT_WEIGHT": 1, "PULL_WEIGHT": 0.1, "PUSH_WEIGHT": 0.1}
LOSS |= {"OFFSET_WEIGHT": 1}
TEST: dict[str, Any] = {"SCALES": [1], "FLIP": True, "TOP_K": 100, "MAX_DISTANCE": 0.5}
TEST |= {"MAX_PAIRS": 1000, "NMS_SIGMA": 0.5, "SCORE_THRESH": 0.001, "NMS_MERGE": False}
TEST |= {"NMS_MERGE_EXPONENT": 10, "KEEP_STALE": True, "MAX_DETECTIONS": 100}
SOLVER: dict[str, Any] = {"OPTIMIZER": "Adam", "BASE_LR": 2.5e-4, "WEIGHT_DECAY": 0, "GAMMA": 0.1}
SOLVER |= {"MAX_ITER": 500_000, "STEPS": (450_000,), "IMS_PER_BATCH": 49, "WARMUP_ITERS": 0}
AUGMENTATION: dict[str, Any] = {"NAME": "cornernet", "SIZE": 511, "FLIP_PROB": 0.5}
AUGMENTATION |= {"COLOR_JITTER": 0.4, "LIGHTING": 0.1, "CENTER_CROP.BORDER": 128}
AUGMENTATION |= {"CENTER_CROP.SCALES": [0.6 + 0.1 * i for i in range(8)], "CROP_ENABLED": True}
COMMON: dict[str, Any] = {"INPUT.FORMAT": "BGR", "INPUT.MIN_SIZE_TEST": 0}
COMMON |= {"INPUT.PUBLISHED_CROWDS": True, "TEST.PUBLISHED_ROUNDING": True}
COMMON |= {"MODEL.PIXEL_MEAN": BGR_MEAN, "MODEL.PIXEL_STD": BGR_STD}
COMMON |= under("MODEL.CORNERNET_HOURGLASS", HOURGLASS) | under("SOLVER", SOLVER)
COMMON |= under("INPUT.AUGMENTATION", AUGMENTATION)


def corners(node: str, **changes: Any) -> dict[str, Any]:
    """Values under a system's node; ``changes`` of its loss and test keys."""
    loss = LOSS | {k: v for k, v in changes.items() if k in LOSS}
    test = TEST | {k: v for k, v in changes.items() if k in TEST}
    heads = CORNERS | {k: v for k, v in changes.items() if k in CORNERS}
    return under(node, heads) | under(f"{node}.LOSS", loss) | under(f"{node}.TEST", test)


SACCADE: dict[str, Any] = {"INPUT_SIZE": 255, "FIRST_SIZES": [192, 255], "ATTENTION_THRESH": 0.3}
SACCADE |= {"ATTENTION_SCALES": [1, 2, 4], "ATTENTION_RANGES": [96, 256, 32, 96, 0, 32]}
SACCADE |= {"FIRST_SCORE": 0.3, "CONFIDENT_SCORE": 0.5, "MAX_CROPS": 30, "MIN_SIDE": 16}
SACCADE |= {"MIN_SHARE": 0.5, "CLIP_BOXES": False}
NODE = "MODEL.CORNERNET"
RECIPES: dict[str, dict[str, Any]] = {
    "hourglass104_511": corners(NODE),
    "hourglass104_511_multi_scale": corners(NODE, SCALES=[0.5, 0.75, 1, 1.25, 1.5], NMS_MERGE=True),
    "hourglass52_511": corners(NODE) | {"MODEL.CORNERNET_HOURGLASS.NUM_STACKS": 1},
    "squeeze_511": corners(NODE, HEAD_KERNEL=1, FLIP=False, TOP_K=20, MAX_PAIRS=100)
    | {
        "MODEL.CORNERNET_HOURGLASS.BLOCK": "fire",
        "MODEL.CORNERNET_HOURGLASS.STEM_BLOCKS": 2,
        "MODEL.CORNERNET_HOURGLASS.CHANNELS": [256, 256, 384, 384, 512],
        "MODEL.CORNERNET_HOURGLASS.BLOCKS": [2, 2, 2, 2, 4],
        "INPUT.AUGMENTATION.PAD_TO_SQUARE": False,
        "SOLVER.IMS_PER_BATCH": 55,
    },
    "saccade_255": corners(
        NODE,
        **{"MIN_OVERLAP": 0.5, "FLIP": False, "TOP_K": 12, "MAX_PAIRS": 12, "MAX_DISTANCE": 0.3},
        **{"NMS_SIGMA": 0.7, "KEEP_STALE": False},
    )
    | under(f"{NODE}.SACCADE", SACCADE)
    | {
        "MODEL.CORNERNET_HOURGLASS.NUM_STACKS": 3,
        "MODEL.CORNERNET_HOURGLASS.CHANNELS": [256, 384, 384, 512],
        "MODEL.CORNERNET_HOURGLASS.BLOCKS": [1, 1, 1, 1],
        "INPUT.AUGMENTATION.NAME": "cornernet_saccade",
        "INPUT.AUGMENTATION.SIZE": 255,
        "INPUT.AUGMENTATION.CENTER_CROP.SCALES": [0.5 + 0.1 * i for i in range(7)],
        "SOLVER.IMS_PER_BATCH": 48,
    },
}


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipe(name: str) -> None:
    assert_recipe(f"cornernet/cornernet_{name}.yaml", COMMON | RECIPES[name])
