"""The whole output of the real command: what its user can act on, and nothing else."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import pytest
import torch

from d2ext.tools.main import main
from d2ext.utils.terminal import show_log, silence_foreign, start_logging
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
    options = toy.options(tmp_path / "run", MODEL__WEIGHTS="none.pth")
    output = toy.wait(toy.start(toy_json, *options, **QUIET), 2)
    assert output.startswith("error: MODEL.WEIGHTS 'none.pth' does not exist")
    assert len(output.splitlines()) == 1, output
    assert not (tmp_path / "run").exists()


def test_foreign_warnings_are_not_shown(recwarn: pytest.WarningsRecorder) -> None:
    silence_foreign()
    torch.meshgrid(torch.arange(2), torch.arange(2))  # as Detectron2 calls it, without `indexing`
    warnings.warn("one that its user can act on", stacklevel=1)
    assert [str(x.message) for x in recwarn] == ["one that its user can act on"]


def test_a_tool_within_a_training_does_not_say_everything_twice(tmp_path: Path) -> None:
    loggers = [logging.getLogger(name) for name in ("d2ext", "fvcore")]
    before = [(x, x.handlers, x.propagate) for x in loggers]
    try:
        for logger in loggers:
            logger.handlers = []
        start_logging(str(tmp_path))
        handlers = [list(x.handlers) for x in loggers]
        assert all(handlers)
        missing = ["--config-file", "centernet/centernet_dla34_512.yaml"]
        assert (
            main(
                [
                    "predict",
                    *missing,
                    "--input",
                    str(tmp_path),
                    "--output",
                    str(tmp_path),
                    "--opts",
                    "MODEL.WEIGHTS",
                    "none.pth",
                ]
            )
            != 0
        )
        assert [list(x.handlers) for x in loggers] == handlers
    finally:
        for logger, old, propagate in before:
            logger.handlers, logger.propagate = old, propagate


def test_shown_where_nothing_is_set_up() -> None:
    show_log("d2ext.shown")
    assert len(logging.getLogger("d2ext.shown").handlers) == 1
