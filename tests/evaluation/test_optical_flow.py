"""Errors of optical flow."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog

from d2ext import get_cfg
from d2ext.data.errors import AnnotationError
from d2ext.evaluation import build_evaluator
from d2ext.evaluation.optical_flow import OpticalFlowEvaluator


def write(path: Path, flow: np.ndarray) -> dict[str, Any]:
    height, width, _ = flow.shape
    path.write_bytes(struct.pack("<fii", 202021.25, width, height) + flow.astype("<f4").tobytes())
    return {"flow_file_name": str(path)}


def test_errors_over_all_known_pixels(tmp_path: Path) -> None:
    first = np.zeros((2, 3, 2))
    first[0, 0] = 1e10  # not known
    second = np.full((1, 1, 2), 2.0)
    inputs = [write(tmp_path / "1.flo", first), write(tmp_path / "2.flo", second)]
    evaluator = OpticalFlowEvaluator()
    flow = torch.zeros(2, 2, 3)
    flow[:, 1, 1] = torch.tensor([3.0, -4.0])
    flow[:, 1, 2] = torch.tensor([0.0, 3.0])  # not wrong yet
    evaluator.process(inputs, [{"flow": flow}, {"flow": torch.full((2, 1, 1), 2.0)}])
    results = evaluator.evaluate()
    assert results == {
        "optical_flow": {"EPE": pytest.approx(8 / 6), "wrong": pytest.approx(100 / 6)}
    }
    evaluator.reset()
    assert evaluator.evaluate() == {}


def test_another_size_is_refused(tmp_path: Path) -> None:
    x = write(tmp_path / "1.flo", np.zeros((2, 3, 2)))
    with pytest.raises(AnnotationError, match=r"\(2, 3\), the prediction \(3, 2\)"):
        OpticalFlowEvaluator().process([x], [{"flow": torch.zeros(2, 3, 2)}])


def test_pairs_of_images_are_evaluated_by_it(tmp_path: Path) -> None:
    for name in ("shapes_val_flow", "flying_chairs_val"):
        assert MetadataCatalog.get(name).evaluator_type == "optical_flow"
    evaluator = build_evaluator(get_cfg(), "shapes_val_flow", str(tmp_path))
    evaluator.reset()
    x = write(tmp_path / "1.flo", np.zeros((1, 1, 2)))
    evaluator.process([x], [{"flow": torch.ones(2, 1, 1)}])
    assert evaluator.evaluate()["optical_flow"]["EPE"] == pytest.approx(2**0.5)
