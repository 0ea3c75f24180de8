"""Schedules of own data."""

from __future__ import annotations

from typing import Any

import pytest
from detectron2.config import CfgNode

from d2ext.config import get_cfg
from d2ext.engine.schedule import fit_schedule

KEYS = ("SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS", "SOLVER.CHECKPOINT_PERIOD")


def config(*changes: Any) -> CfgNode:
    cfg = get_cfg()
    published = (800_000, (280_000, 600_000, 750_000), 500, 10_000)
    cfg.merge_from_list([x for pair in zip(KEYS, published, strict=True) for x in pair])
    cfg.merge_from_list(["SOLVER.IMS_PER_BATCH", 8, "TEST.EVAL_PERIOD", 10_000, *changes])
    return cfg


def values(cfg: CfgNode) -> tuple[Any, ...]:
    solver = cfg.SOLVER
    periods = solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD
    return solver.MAX_ITER, tuple(solver.STEPS), solver.WARMUP_ITERS, *periods


@pytest.mark.parametrize(
    ("images", "epochs", "expected"),
    [
        # 24,000 images; 50 epochs; and no more than the config's own
        (100, None, (3000, (1050, 2250, 2812), 300, 300, 300)),
        (2000, None, (12_500, (4375, 9375, 11_719), 500, 1250, 1250)),
        (1_000_000, None, (800_000, (280_000, 600_000, 750_000), 500, 10_000, 10_000)),
        (59, 10, (74, (26, 56, 69), 7, 8, 8)),
        (1_000_000, 10, (1_250_000, (437_500, 937_500, 1_171_875), 500, 10_000, 10_000)),
        (3, 1, (1, (), 0, 1, 1)),
    ],
)
def test_rule(images: int, epochs: int | None, expected: tuple[Any, ...]) -> None:
    cfg = config()
    line = fit_schedule(cfg, 800_000, images, epochs=epochs)
    assert values(cfg) == expected
    if expected == values(config()):
        assert line == ""
    else:
        assert f"MAX_ITER {expected[0]} (was 800000)" in line and f"fits {images} images" in line


def test_what_is_given_stays() -> None:
    cfg = config("SOLVER.MAX_ITER", 1000, "TEST.EVAL_PERIOD", 400)
    line = fit_schedule(cfg, 800_000, 100, epochs=7, keep=["SOLVER.MAX_ITER", "TEST.EVAL_PERIOD"])
    assert values(cfg) == (1000, (350, 750, 938), 100, 100, 400)
    assert "MAX_ITER" not in line and "80 epochs" in line
    # no evaluation but the last
    cfg = config("TEST.EVAL_PERIOD", 0, "SOLVER.STEPS", (5,))
    fit_schedule(cfg, 800_000, 100, keep=["SOLVER.STEPS"])
    assert values(cfg) == (3000, (5,), 300, 300, 0)
