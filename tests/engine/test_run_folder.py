"""Two trainings, one folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from d2ext.config import ConfigError
from d2ext.engine.run_folder import run_folder

HOLD = """
import sys, time
from d2ext.engine.run_folder import run_folder
with run_folder(sys.argv[1], resume=True):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_training_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline().strip() == "held"
        refused = pytest.raises(ConfigError, match=f"process {holder.pid} on")
        with refused, run_folder(tmp_path, resume=True):
            pass
        os.kill(holder.pid, signal.SIGKILL)  # leaves the file behind
        holder.wait()
        assert (tmp_path / ".lock").exists()
        with run_folder(tmp_path, resume=True):
            assert str(os.getpid()) in (tmp_path / ".lock").read_text()
        assert not (tmp_path / ".lock").exists()
    finally:
        holder.kill()
        holder.wait()


def test_an_earlier_run_is_kept(tmp_path: Path) -> None:
    names = ("model_final.pth", "model_0000003.pth", "experiments.json", "metrics.json", "log.txt")
    for round_ in (1, 2):
        for name in names:
            (tmp_path / name).write_text(f"{name} of {round_}")
        (tmp_path / "notes.txt").write_text("mine")
        with run_folder(tmp_path, resume=True):
            assert all((tmp_path / name).exists() for name in names)
        with run_folder(tmp_path, resume=False):
            assert not any((tmp_path / name).exists() for name in names)
            assert (tmp_path / "notes.txt").exists()
        for name in names:
            assert (tmp_path / f"earlier_{round_}" / name).read_text() == f"{name} of {round_}"


def test_the_weights_to_begin_with_stay(tmp_path: Path) -> None:
    for name in ("model_final.pth", "model_0000003.pth"):
        (tmp_path / name).write_text("x")
    with run_folder(tmp_path, resume=False, weights=str(tmp_path / "model_final.pth")):
        assert (tmp_path / "model_final.pth").exists()
    assert (tmp_path / "earlier_1" / "model_0000003.pth").exists()


def test_a_folder_without_checkpoints_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    with run_folder(tmp_path, resume=False):
        assert (tmp_path / "metrics.json").exists()
