"""The values of the published recipes (tests/reference/centernet_triplets/NOTES.md)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.systems.cornernet.test_recipe import COMMON, corners
from tests.systems.recipes import assert_recipe

NODE = "MODEL.CENTERNET_TRIPLETS"
CHANGED: dict[str, dict[str, Any]] = {
    "hourglass104_511": {},
    "hourglass104_511_multi_scale": {
        f"{NODE}.TEST.SCALES": [0.6, 1, 1.2, 1.5, 1.8],
        f"{NODE}.TEST.NMS_MERGE": True,
    },
    "hourglass52_511": {"MODEL.CORNERNET_HOURGLASS.NUM_STACKS": 1},
}


@pytest.mark.parametrize("name", list(CHANGED))
def test_recipe(name: str) -> None:
    facts = COMMON | corners(NODE, MIN_OVERLAP=0.7, TOP_K=70)
    facts |= {"SOLVER.MAX_ITER": 480_000, "SOLVER.IMS_PER_BATCH": 48, "TEST.FALSE_DISCOVERY": True}
    config = f"centernet_triplets/centernet_triplets_{name}.yaml"
    assert_recipe(config, facts | CHANGED[name])
