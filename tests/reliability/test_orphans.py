"""Nothing of a training is there 10 s after it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engine import toy

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
SECONDS = 10.0
Start = Callable[..., subprocess.Popen[str]]


def children(pid: int) -> list[int]:
    """Processes that ``pid`` started, theirs too."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        direct = [int(x) for task in tasks for x in (task / "children").read_text().split()]
    except OSError:
        return []
    return direct + [x for child in direct for x in children(child)]


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return done


@pytest.fixture
def start(toy_json: Path, tmp_path: Path) -> Iterator[Start]:
    """An endless training, started and under way: its messages are larger than a pipe."""
    started: list[subprocess.Popen[str]] = []
    everyone: set[int] = set()

    def run(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        more = {"SOLVER__MAX_ITER": 10**6, "DATALOADER__NUM_WORKERS": 2}
        more |= {"SOLVER__IMS_PER_BATCH": 256, "SOLVER__STEPS": "()"}
        with open(tmp_path / "output.txt", "w") as output:
            arguments = (*arguments, *toy.options(tmp_path, **more))
            process = toy.start(toy_json, *arguments, stdout=output, **environment)
        started.append(process)
        metrics = tmp_path / "metrics.json"
        under_way = wait_until(lambda: metrics.is_file() and metrics.stat().st_size > 0, 120)
        everyone.update(children(process.pid))
        assert under_way, (tmp_path / "output.txt").read_text()[-2000:]
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()
    for pid in filter(alive, everyone):  # of a failed test
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_trainer(start: Start, how: signal.Signals) -> None:
    process = start()
    left = children(process.pid)
    assert len(left) >= 2
    time.sleep(1)  # the workers fill their pipe
    process.send_signal(how)
    process.wait()
    assert wait_until(lambda: not any(map(alive, left)), SECONDS)


def test_processes_end_with_who_started_them(start: Start) -> None:
    process = start(
        "--num-gpus", "2", TOY_DEAF_AT="0"
    )  # torch sends SIGINT: one waits for something
    left = children(process.pid)
    assert len(left) >= 6  # two processes with two workers each
    process.kill()
    process.wait()
    assert wait_until(lambda: not any(map(alive, left)), SECONDS)


@pytest.mark.attack
def test_all_end_with_a_peer(start: Start, tmp_path: Path) -> None:
    process = start("--num-gpus", "2")
    left = children(process.pid)
    ranks = [pid for pid in left if len(children(pid)) >= 2]
    assert len(ranks) == 2, [command(pid) for pid in left]
    os.kill(ranks[1], signal.SIGKILL)
    assert wait_until(lambda: not any(map(alive, left)), SECONDS)
    assert process.wait(SECONDS) == 1
    assert "ended with signal SIGKILL" in (tmp_path / "output.txt").read_text()
