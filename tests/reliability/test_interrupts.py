"""Ctrl-C: one line that says what was saved and how to go on; nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from tests.engine import toy
from tests.reliability.test_orphans import children, wait_until

ENDLESS = {"SOLVER__MAX_ITER": 10**6, "SOLVER__STEPS": "()", "DATALOADER__NUM_WORKERS": 2}


def interrupt(
    toy_json: Path, folder: Path, *arguments: str, **environment: str
) -> tuple[subprocess.Popen[str], str]:
    """The end of a training that was interrupted under way, as by Ctrl-C in a terminal."""
    arguments = (*arguments, *toy.options(folder, **ENDLESS))
    with open(folder / "output.txt", "w") as output:
        process = toy.start(toy_json, *arguments, stdout=output, **environment)
    metrics = folder / "metrics.json"
    try:
        assert wait_until(lambda: metrics.is_file() and metrics.stat().st_size > 500, 120)
        for pid in (*children(process.pid), process.pid):  # all in the terminal
            os.kill(pid, signal.SIGINT)
        process.wait(60)
    finally:
        process.kill()
    return process, (folder / "output.txt").read_text()


def test_a_training_saves_and_says_how_to_go_on(toy_json: Path, tmp_path: Path) -> None:
    process, output = interrupt(toy_json, tmp_path)
    assert process.returncode == 130
    assert "Traceback" not in output
    last = (tmp_path / "last_checkpoint").read_text()
    end = (
        f"interrupted: {tmp_path / last} is saved; the same command with --resume goes on from it."
    )
    assert output.splitlines()[-1] == end
    done = int(Path(last).stem[-7:]) + 1
    assert sorted(toy.losses(tmp_path)) == list(range(done))
    more = {"SOLVER__MAX_ITER": done + 2, "SOLVER__STEPS": "()"}
    toy.wait(toy.start(toy_json, "--resume", *toy.options(tmp_path, **more)), 0)
    assert sorted(toy.losses(tmp_path)) == list(range(done + 2))


def test_several_processes_end_with_one_line(toy_json: Path, tmp_path: Path) -> None:
    process, output = interrupt(toy_json, tmp_path, "--num-gpus", "2")
    assert process.returncode == 130
    assert "Traceback" not in output
    # The other process may still write after it.
    assert "interrupted: nothing was saved yet." in output.splitlines()
