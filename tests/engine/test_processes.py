"""Trainings of two processes on the CPU, whoever starts them, and the death of one of them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from d2ext.config import ConfigError
from d2ext.engine import launch
from d2ext.engine.cluster import Place
from d2ext.engine.processes import RankError, _explain
from tests.engine import toy

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
COMMON = {"SOLVER__MAX_ITER": 6, "SOLVER__STEPS": "(4,)"}


def srun_variables(rank: int, size: int = 2) -> dict[str, str]:
    """What srun tells one of ``size`` tasks on this machine. The job's number decides the port."""
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": str(os.getpid()),
    }


def test_every_starter_gives_the_same_training(toy_json: Path, tmp_path: Path) -> None:
    """Of --num-gpus: tests/tools/test_train.py, which compares with one process."""

    def options(name: str) -> list[str]:
        return toy.options(tmp_path / name, **COMMON)

    under_torchrun = toy.start(toy_json, *options("torchrun"), starter=TORCHRUN)
    assert "World size: 2" in toy.wait(under_torchrun, 0)
    tasks = [toy.start(toy_json, *options("srun"), **srun_variables(rank)) for rank in (0, 1)]
    outputs = [toy.wait(task, 0) for task in tasks]
    assert "World size: 2" in outputs[0]
    assert "Starting training" not in outputs[1]  # only rank 0 speaks
    expected = toy.losses(tmp_path / "torchrun")
    assert sorted(expected) == list(range(6)) and toy.losses(tmp_path / "srun") == expected
    for name in ("torchrun", "srun"):
        assert (tmp_path / name / "log.txt.rank1").is_file()


def test_a_failing_process_ends_all_and_is_named(
    tmp_path: Path,
    train_ranks: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TOY_RAISE_AT", "2")
    assert train_ranks("--num-gpus", "2", *toy.options(tmp_path, **COMMON)) == 1
    output = "".join(capfd.readouterr())
    assert output.count("error: rank 1 failed: LookupError: nothing there\n") == 1
    check_failed(output, tmp_path)


def check_failed(output: str, folder: Path) -> None:
    assert len(re.findall("error: rank", output)) == 1
    assert "by peer" not in output  # what the other saw
    assert "nothing there" in (folder / "log.txt.rank1").read_text()


def test_a_killed_process_ends_all_and_is_named(
    tmp_path: Path,
    train_ranks: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TOY_KILL_AT", "2")
    assert train_ranks("--num-gpus", "2", *toy.options(tmp_path, **COMMON)) == 1
    output = "".join(capfd.readouterr())
    assert output.count("error: rank 1 ended with signal SIGKILL\n") == 1
    assert "by peer" not in output


@pytest.mark.attack
@pytest.mark.parametrize("what", ["TOY_RAISE_AT", "TOY_KILL_AT"])
def test_under_torchrun_too(toy_json: Path, tmp_path: Path, what: str) -> None:
    options = toy.options(tmp_path, **COMMON)
    output = toy.wait(toy.start(toy_json, *options, starter=TORCHRUN, **{what: "2"}), 1)
    if what == "TOY_RAISE_AT":
        check_failed(output, tmp_path)
        assert "traceback : rank 1 failed: LookupError: nothing there" in output
    else:  # in its own words
        assert "by peer" not in output
        cause = output.rpartition("Root Cause")[2]
        assert re.search(r"rank +: 1 .*\n.*-9 ", cause) and "SIGKILL" in cause


GLOO = RuntimeError("[/pytorch/third_party/gloo/gloo/x.cc:547] Connection closed by peer [::1]:9")


def test_the_first_failure_is_what_all_report(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    store = dist.HashStore()
    first = _explain(ValueError("no file"), 3, store)
    assert first == "rank 3 failed: ValueError: no file" and not waits
    # A second failure and its consequences wait, to be ended, and then say what was first.
    assert _explain(ValueError("no file"), 1, store) == first and len(waits) == 1
    assert _explain(GLOO, 0, store) == first and len(waits) == 2


def test_a_connection_lost_for_unknown_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    class Gone(dist.HashStore):
        def compare_set(self, *_: str) -> bytes:
            raise dist.DistStoreError("the server is gone")

    for store in (None, dist.HashStore(), Gone()):
        text = _explain(GLOO, 2, store)
        assert text.startswith("rank 2 lost its connection to another process: RuntimeError: [")


@pytest.mark.usefixtures("as_torchrun")
def test_only_the_process_that_failed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RankError(message)

    monkeypatch.setattr("d2ext.engine.processes._run_rank", fail)
    message = "rank 0 failed"
    with pytest.raises(RankError):
        launch(pytest.fail, device="cpu")
    message = "rank 1 failed"
    with pytest.raises(SystemExit) as stopped:
        launch(pytest.fail, device="cpu")
    assert stopped.value.code == 1


@pytest.fixture
def as_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of two on one machine."""
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("as_torchrun")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_processes": 1}, r"--num-gpus is 1, but torchrun started .* would be 2\."),
        ({"num_machines": 2}, r"--num-machines is 2, .* would be 1\."),
        ({"machine_rank": 1}, r"--machine-rank is 1, .* would be 0\."),
        ({"dist_url": "tcp://localhost:1"}, r"--dist-url is tcp.* Leave it out"),
    ],
)
def test_options_must_agree_with_torchrun(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        launch(pytest.fail, **arguments, device="cpu")


@pytest.mark.usefixtures("as_torchrun")
def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"2 processes.*1 GPU"):
        launch(pytest.fail, device="cuda")


def test_a_task_on_each_machine_may_start_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """``srun --ntasks-per-node=1``, with Detectron2's options for several machines."""
    for name, value in srun_variables(0).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "2")
    with pytest.raises(ConfigError, match="at least 1"):  # the options are read as without srun
        launch(pytest.fail, 0, 2, 0, "tcp://localhost:1", device="cpu")


def test_ranks_are_counted_machine_by_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    spawned: list[Place] = []
    monkeypatch.setattr(
        "d2ext.engine.processes._spawn", lambda main, args, places, cuda: spawned.extend(places)
    )
    launch(pytest.fail, 2, 3, 1, "tcp://gpu1:9", device="cpu")
    assert spawned == [
        Place(2, 6, 0, 2, "tcp://gpu1:9", "launch"),
        Place(3, 6, 1, 2, "tcp://gpu1:9", "launch"),
    ]


def test_a_task_may_see_only_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """``srun --gpus-per-task=1``."""
    devices: list[int] = []
    for name, value in srun_variables(1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.set_device", devices.append)
    monkeypatch.setattr(
        "torch.distributed.rendezvous", lambda *_, **__: iter([(dist.HashStore(), 1, 2)])
    )
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: None)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    monkeypatch.setattr("detectron2.utils.comm.create_local_process_group", lambda size: None)
    done: list[str] = []
    launch(done.append, device="cuda", args=("done",))
    assert devices == [0] and done == ["done"]
