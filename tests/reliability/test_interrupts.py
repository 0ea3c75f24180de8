"""Ctrl-C: one line that says what was saved and how to go on; nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from d2ext.engine.hooks import _SAME_PRESS
from d2ext.tools import train
from tests.engine import toy
from tests.engine.test_processes import TORCHRUN
from tests.reliability.test_orphans import SECONDS, alive, children, command, wait_until

ENDLESS = {"SOLVER__MAX_ITER": 10**6, "SOLVER__STEPS": "()", "DATALOADER__NUM_WORKERS": 2}


def start(
    toy_json: Path, folder: Path, *arguments: str, **environment: Any
) -> subprocess.Popen[str]:
    """An endless training that writes to output.txt."""
    arguments = (*arguments, *toy.options(folder, **ENDLESS))
    with open(folder / "output.txt", "w") as output:
        return toy.start(toy_json, *arguments, stdout=output, **environment)


def press(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGINT)


def everyone(process: subprocess.Popen[str]) -> list[int]:
    """Whom Ctrl-C in a terminal reaches."""
    return [*children(process.pid), process.pid]


def interrupt(
    toy_json: Path,
    folder: Path,
    *arguments: str,
    whom: Callable[[subprocess.Popen[str]], list[int]] = everyone,
    presses: int = 1,
    **environment: Any,
) -> tuple[subprocess.Popen[str], str]:
    """The end of a training that was interrupted after three iterations."""
    process = start(toy_json, folder, *arguments, **environment)
    metrics = folder / "metrics.json"
    try:
        assert wait_until(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 3, 200)
        left = children(process.pid)
        # Two processes and one that tidies up after them; workers are copies, which need not import.
        assert len({command(x) for x in left}) <= 3
        press(*whom(process))
        for _ in range(presses - 1):
            time.sleep(2 * _SAME_PRESS)
            press(*whom(process))
        process.wait(60)
    finally:
        process.kill()
    assert wait_until(lambda: not any(map(alive, left)), SECONDS)
    return process, (folder / "output.txt").read_text()


def check_saved(folder: Path, output: str) -> int:
    """What was said holds: after how many iterations it ended."""
    assert "Traceback" not in output
    last = (folder / "last_checkpoint").read_text()
    end = f"interrupted: {folder / last} is saved; the same command with --resume goes on from it."
    assert output.splitlines().count(end) == 1
    assert output.count("interrupted: ending after this iteration; Ctrl-C again ends at once") == 1
    done = int(Path(last).stem[-7:]) + 1
    assert sorted(toy.losses(folder)) == list(range(done))
    return done


@pytest.mark.parametrize("arguments", [(), ("--num-gpus", "2")])
def test_a_training_saves_and_says_how_to_go_on(
    toy_json: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    process, output = interrupt(toy_json, tmp_path, *arguments)
    assert process.returncode == 130
    if not arguments:  # of several, another may still write
        assert output.splitlines()[-1].startswith("interrupted: ")
    done = check_saved(tmp_path, output)
    more = toy.options(tmp_path, SOLVER__MAX_ITER=done + 2, SOLVER__STEPS="()")
    toy.register(toy_json)
    assert train.run(["--resume", *more]) == 0
    assert sorted(toy.losses(tmp_path)) == list(range(done + 2))


def test_processes_of_torchrun_save_and_say_how_to_go_on(toy_json: Path, tmp_path: Path) -> None:
    _, output = interrupt(toy_json, tmp_path, starter=TORCHRUN)
    # Torchrun's own end is a traceback.
    check_saved(
        tmp_path, output.partition('Traceback (most recent call last):\n  File "<frozen')[0]
    )


@pytest.mark.attack
def test_one_that_is_asked_is_enough(toy_json: Path, tmp_path: Path) -> None:
    """As by ``kill -INT``."""
    rank_1 = lambda process: [x for x in children(process.pid) if len(children(x)) >= 2][1:]  # noqa: E731
    process, output = interrupt(toy_json, tmp_path, "--num-gpus", "2", whom=rank_1)
    assert process.returncode == 130
    assert "is saved; the same command with --resume" in output.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments", [(), pytest.param(("--num-gpus", "2"), marks=pytest.mark.attack)]
)
def test_the_second_time_ends_at_once(
    toy_json: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """Here the iteration never ends."""
    process, output = interrupt(toy_json, tmp_path, *arguments, presses=2, TOY_WAIT_AT="3")
    assert process.returncode == 130
    assert "Traceback" not in output
    assert "interrupted: nothing was saved yet." in output.splitlines()


@pytest.mark.attack
def test_before_the_training_begins(toy_json: Path, tmp_path: Path) -> None:
    """New processes import for seconds, and then know that it is over."""
    process = start(toy_json, tmp_path, "--num-gpus", "2")
    try:
        assert wait_until(lambda: len(children(process.pid)) >= 3, 60)
        press(*everyone(process))
        assert process.wait(60) == 130
    finally:
        process.kill()
    output = (tmp_path / "output.txt").read_text()
    assert output.splitlines()[-1] == "interrupted: nothing was saved yet."
    assert "Traceback" not in output


@pytest.mark.attack
def test_after_the_death_of_one_it_is_said_what_was_saved(toy_json: Path, tmp_path: Path) -> None:
    options = toy.options(tmp_path, **ENDLESS, SOLVER__CHECKPOINT_PERIOD=2)
    output = toy.wait(toy.start(toy_json, "--num-gpus", "2", *options, TOY_KILL_AT="3"), 1)
    saved = f"{tmp_path / 'model_0000001.pth'} is saved; the same command with --resume goes on"
    assert f"error: rank 1 ended with signal SIGKILL: {saved} from it." in output.splitlines()
