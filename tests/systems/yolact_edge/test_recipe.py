"""The values of the published recipes (tests/reference/yolact_edge/NOTES.md)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.systems.recipes import assert_recipe, under
from tests.systems.yolact.test_recipe import COMMON

# config: iterations, rate, further values
VIDEO = {"STAGE": "video", "KEY_INTERVAL": 5, "KEY_PHASE": 0, "TEST_ALL_PHASES": True}
VIDEO |= {"MIN_SIMILARITY": -1, "REFINEMENT": True, "WARP_WEIGHT": 1, "FLOW_CHANNELS": 64}
PUBLISHED = {"PUBLISHED_FLOW_INIT": True, "PUBLISHED_WARP_CONVS": True}
STAGES: dict[str, tuple[int, float, dict[str, Any]]] = {
    "": (800_000, 1e-3, {"STAGE": "image"}),
    "ytvis": (500_000, 5e-4, {"STAGE": "image"}),
    "flow": (400_000, 2e-4, {"STAGE": "flow", "PUBLISHED_FLOW_INIT": True}),
    "vid": (200_000, 2e-4, VIDEO | PUBLISHED),
    "vid_minimal": (200_000, 2e-4, VIDEO | PUBLISHED | {"REFINEMENT": False, "WARP_WEIGHT": 0}),
}


@pytest.mark.parametrize("depth", [50, 101])
@pytest.mark.parametrize("stage", list(STAGES))
def test_recipe(stage: str, depth: int) -> None:
    if stage == "vid_minimal" and depth == 50:
        pytest.skip("published for ResNet-101 alone")
    iterations, rate, edge = STAGES[stage]
    facts = {"MODEL.RESNETS.DEPTH": depth, **under("MODEL.YOLACT_EDGE", edge)}
    solver: dict[str, Any] = {"MAX_ITER": iterations, "BASE_LR": rate, "WARMUP_ITERS": 500}
    if stage:
        solver |= {"STEPS": (), "LR_SCHEDULER_NAME": "WarmupCosineLR", "WARMUP_FACTOR": 0}
        facts["MODEL.YOLACT.NUM_CLASSES"] = 40
    if stage not in ("", "ytvis"):
        facts["INPUT.AUGMENTATION.EXPAND_PROB"] = 0
    facts |= under("SOLVER", solver)
    name = f"yolact_edge_{stage}_R_{depth}_550.yaml".replace("__", "_")
    assert_recipe(f"yolact_edge/{name}", COMMON | facts)


def test_recipe_of_mobilenet() -> None:
    facts = {"MODEL.YOLACT.IN_FEATURES": ["group3", "group4", "group6"]}
    assert_recipe("yolact_edge/yolact_edge_mobilenetv2_550.yaml", COMMON | facts)
