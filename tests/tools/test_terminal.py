"""The whole output of the real command: what its user can act on, and nothing else."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from d2ext.utils.terminal import silence_foreign
from tests.engine import toy

# Pages, and what is said of nothing.
NOISE = (
    *("not built correctly", "No CUDA runtime", "Loading from  ", "No checkpoint found", "Warning"),
    *("Running with full config", "Contents of args", "Command line arguments", "Conv2d("),
    "Serializ",
)


# The toy imports Detectron2 before d2ext can silence it.
QUIET = {"PYTHONWARNINGS": "ignore:`torch.jit.script` is deprecated:FutureWarning"}


def test_training_and_evaluation(toy_json: Path, tmp_path: Path) -> None:
    options = toy.options(tmp_path / "run", DATASETS__TEST="('toy',)", SOLVER__MAX_ITER=3)
    options += ["SOLVER.STEPS", "()"]
    output = toy.wait(toy.start(toy_json, *options, **QUIET), 0)
    assert not [words for words in NOISE if words in output]
    assert len(output.splitlines()) < 90
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "Running with full config" in log and "Conv2d(" in log and "PyTorch built with" in log
    weights = ["MODEL.WEIGHTS", str(tmp_path / "run" / "model_final.pth")]
    output = toy.wait(toy.start(toy_json, "--eval-only", *options, *weights, **QUIET), 0)
    assert not [words for words in NOISE if words in output]
    assert "model_final.pth ..." in output and "copypaste: AP" in output


def test_errors_that_are_known_at_the_start_stand_alone(toy_json: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"MODEL__WEIGHTS": "none.pth"}, "error: MODEL.WEIGHTS 'none.pth' does not exist"),
        ({"DATASETS__TRAIN": "()"}, "error: There is nothing to train on"),
    ):
        options = toy.options(tmp_path / "run", **changes)
        output = toy.wait(toy.start(toy_json, *options, **QUIET), 2)
        assert output.startswith(message) and len(output.splitlines()) == 1, output
    assert not (tmp_path / "run").exists()


def test_foreign_warnings_are_not_shown(recwarn: pytest.WarningsRecorder) -> None:
    silence_foreign()
    torch.meshgrid(torch.arange(2), torch.arange(2))  # as Detectron2 calls it, without `indexing`
    warnings.warn("one that its user can act on", stacklevel=1)
    assert [str(x.message) for x in recwarn] == ["one that its user can act on"]
