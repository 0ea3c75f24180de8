"""scripts/benchmark_upsnet.py: its figures on a small model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark_upsnet.py"


def test_figures_of_a_small_model() -> None:
    spec = importlib.util.spec_from_file_location("benchmark_upsnet", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    figures = module.benchmark(
        "upsnet/upsnet_shapes.yaml",
        device="cpu",
        dtype="float32",
        mode="eager",
        instances=20,
        size=(96, 128),
        calls=2,
    )
    assert 0 < figures["kept"] <= 20
    assert 0 < figures["panoptic_head_ms"] < figures["whole_ms"]
    assert figures["share"] == figures["panoptic_head_ms"] / figures["whole_ms"]
