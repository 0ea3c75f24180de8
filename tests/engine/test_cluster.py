"""What the environment of a process says about its place in a training."""

from __future__ import annotations

import pytest

from d2ext.config import ConfigError
from d2ext.engine.cluster import Place, find_place, first_host

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "gpu1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
}
# A batch script, or a shell of salloc: the allocation has tasks, this process is none of them.
ALLOCATION = {
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_ID": "4711",
}


def test_torchrun() -> None:
    assert find_place(TORCHRUN) == Place(5, 8, 1, 4, "env://", "torchrun")
    one = TORCHRUN | dict.fromkeys(("RANK", "LOCAL_RANK"), "0")
    one |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1")
    assert find_place(one) == Place(0, 1, 0, 1, "env://", "torchrun")


def test_srun() -> None:
    place = find_place(SRUN)
    assert place is not None
    assert place == Place(5, 8, 1, 4, place.url, "srun")
    assert place.url.startswith("tcp://gpu03:")
    port = int(place.url.rpartition(":")[2])
    assert 1024 < port < 32768
    for other in ({"SLURM_JOB_ID": "4712"}, {"SLURM_STEP_ID": "1"}):
        moved = find_place(SRUN | other)
        assert moved is not None and moved.url != place.url
    own = find_place(SRUN | {"MASTER_ADDR": "gpu9", "MASTER_PORT": "777"})
    assert own is not None and own.url == "tcp://gpu9:777"


def test_torchrun_within_srun_decides() -> None:
    place = find_place(SRUN | TORCHRUN)
    assert place is not None and place.starter == "torchrun"


@pytest.mark.parametrize(
    "environment", [{}, ALLOCATION, ALLOCATION | SRUN | {"SLURM_STEP_NUM_TASKS": "1"}]
)
def test_one_process_is_no_cluster(environment: dict[str, str]) -> None:
    assert find_place(environment) is None


@pytest.mark.parametrize(
    ("environment", "name"), [(TORCHRUN, "LOCAL_WORLD_SIZE"), (SRUN, "SLURM_STEP_NODELIST")]
)
def test_lacking_variables_are_named(environment: dict[str, str], name: str) -> None:
    with pytest.raises(ConfigError, match=rf"lacks {name}, which (torchrun|srun) sets"):
        find_place({k: v for k, v in environment.items() if k != name})


@pytest.mark.parametrize(
    "changes", [{"SLURM_LOCALID": "0"}, {"SLURM_STEP_NUM_TASKS": "7"}], ids=["cyclic", "uneven"]
)
def test_ranks_must_follow_each_other(changes: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"same number of processes.*distribution=block"):
        find_place(SRUN | changes)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu7", "gpu7"),
        ("gpu7,gpu8", "gpu7"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("gpu[3,9]", "gpu3"),
        ("gpu-a[12-13]-ib,x", "gpu-a12-ib"),
        ("rack[2-3]node[01-08]", "rack2node01"),
        ("login,gpu[1-2]", "login"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
