"""Checkpoints on a full disk, logs."""

from __future__ import annotations

import errno
import json
import logging
import resource
from pathlib import Path

import pytest
from detectron2.utils.events import EventWriter

from d2ext.checkpoint.checkpointer import CheckpointSaveError
from d2ext.checkpoint.io import load_untrusted
from d2ext.engine import Trainer
from d2ext.engine.hooks import LogWriter, drop_metrics_from
from tests.engine import toy
from tests.engine.conftest import Train


def test_full_disk_leaves_the_previous_checkpoint(
    build: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # A checkpoint of this width is about 1 MB; logs are much smaller.
    options = {
        "MODEL__RESNETS__STEM_OUT_CHANNELS": 256,
        "SOLVER__BASE_LR": 0.0001,
        "SOLVER__CHECKPOINT_PERIOD": 2,
    }
    trainer = build(SOLVER__MAX_ITER=9, **options)
    step = trainer._trainer.run_step

    def limited_from_iteration_3() -> None:
        step()
        if trainer.iter == 3:
            # Writes beyond these bytes of a file fail, as on a full disk.
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    trainer._trainer.run_step = limited_from_iteration_3
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointSaveError, match=r"model_final\.pth.*OUTPUT_DIR"):
            trainer.train()  # the final checkpoint cannot be written: that is an error
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    # The periodic ones of iterations 3, 5 and 7 were reported, and training went on.
    reports = [r.getMessage() for r in caplog.records if "Training goes on" in r.getMessage()]
    assert len(reports) == 3 and "model_0000003.pth" in reports[0]
    run = tmp_path / "run"
    assert sorted(toy.losses(run)) == list(range(9))
    assert sorted(x.name for x in run.glob("model*")) == ["model_0000001.pth"]
    assert (run / "last_checkpoint").read_text() == "model_0000001.pth"
    resumed = build(SOLVER__MAX_ITER=9, **options)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 2
    resumed.train()
    assert load_untrusted(run / "model_final.pth")["iteration"] == 8


def test_old_checkpoints_are_removed(train: Train, tmp_path: Path) -> None:
    train(SOLVER__MAX_ITER=8, SOLVER__CHECKPOINT_PERIOD=2, SOLVER__CHECKPOINT_MAX_TO_KEEP=2)
    names = sorted(x.name for x in (tmp_path / "run").glob("model*"))
    assert names == ["model_0000005.pth", "model_0000007.pth", "model_final.pth"]


def test_checkpoints_before_a_resume_are_removed_too(build: Train, tmp_path: Path) -> None:
    def go_on(end: int, most: int) -> list[str]:
        keep = {"SOLVER__CHECKPOINT_PERIOD": 2, "SOLVER__CHECKPOINT_MAX_TO_KEEP": most}
        trainer = build(SOLVER__MAX_ITER=end, **keep)
        trainer.resume_or_load(resume=True)
        trainer.train()
        return sorted(x.stem[-2:] for x in (tmp_path / "run").glob("model_0*"))

    assert go_on(6, 3) == ["01", "03", "05"]
    assert go_on(8, 3) == ["03", "05", "07"]
    assert go_on(10, 2) == ["07", "09"]


def test_metrics_before_the_first_checkpoint_are_written_once(build: Train, tmp_path: Path) -> None:
    first = build(SOLVER__MAX_ITER=5)
    step = first._trainer.run_step

    def killed_at_three() -> None:
        if first.iter == 3:
            raise KeyboardInterrupt
        step()

    first._trainer.run_step = killed_at_three
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert sorted(toy.losses(tmp_path / "run")) == [0, 1, 2]
    again = build(SOLVER__MAX_ITER=5)
    again.resume_or_load(resume=True)
    again.train()
    assert sorted(toy.losses(tmp_path / "run")) == list(range(5))  # fails for one logged twice


def test_leftovers_of_a_killed_run_are_removed(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "model_0000003.pth.tmp-123").write_text("half")
    (run / "last_checkpoint.tmp-123").write_text("half")
    (run / "notes.tmp-mine").write_text("keep")
    train(SOLVER__MAX_ITER=1)
    assert [x.name for x in run.glob("*.tmp-*")] == ["notes.tmp-mine"]


def test_metrics_after_the_resumed_iteration_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    lines = [json.dumps({"iteration": i, "total_loss": 1.0}) for i in (1, 3, 5, 7)]
    path.write_text("\n".join(lines) + '\n{"iteration": 9, "tot')
    drop_metrics_from(str(path), 5)
    assert path.read_text().splitlines() == lines[:2]
    drop_metrics_from(str(tmp_path / "absent.json"), 5)  # nothing to do


class Failing(EventWriter):
    def __init__(self) -> None:
        self.calls = 0

    def write(self) -> None:
        self.calls += 1
        raise OSError(errno.ENOSPC, "No space left on device")


def test_no_evaluation_after_an_error(build: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the error came in the last iteration."""
    evaluated = []
    monkeypatch.setattr(Trainer, "test", lambda *args: evaluated.append(args) or {})
    trainer = build(SOLVER__MAX_ITER=1)
    monkeypatch.setattr(trainer, "run_step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not evaluated
    build("other", SOLVER__MAX_ITER=1).train()
    assert len(evaluated) == 1


def test_writer_that_fails_does_not_end_the_training(
    build: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = build(SOLVER__MAX_ITER=4)
    failing = Failing()
    writers = trainer.build_writers
    trainer._hooks = [h for h in trainer._hooks if not isinstance(h, LogWriter)]
    trainer.register_hooks([LogWriter(lambda: [failing, *writers()], 1)])
    with caplog.at_level(logging.ERROR):
        trainer.train()
    assert failing.calls >= 4
    assert sum("No space left" in r.getMessage() for r in caplog.records) == 1
    assert sorted(toy.losses(tmp_path / "run")) == [0, 1, 2, 3]  # the others still write
