"""Environment variables of torchrun and SLURM's srun that describe the processes they started."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from d2ext.config import ConfigError

__all__ = ["Place", "find_place"]

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_SRUN = (
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_NUM_NODES",
    "SLURM_STEP_NODELIST",
)


@dataclass(frozen=True)
class Place:
    """A process among those of one training. Ranks count from 0, machine by machine."""

    rank: int
    world_size: int
    local_rank: int
    """Rank on the process's machine."""
    local_size: int
    """Processes on each machine."""
    url: str
    """Rendezvous: ``tcp://HOST:PORT`` of the machine of rank 0, ``file://`` or ``env://``."""
    starter: str
    """"torchrun", "srun" or "launch"."""

    def __post_init__(self) -> None:
        if self.world_size % self.local_size or self.rank % self.local_size != self.local_rank:
            raise ConfigError(
                f"{self.starter} placed rank {self.rank} of {self.world_size} as number "
                f"{self.local_rank} on its machine. Every machine must have the same number of "
                "processes, with ranks that follow each other (srun --distribution=block)."
            )


def find_place(environment: Mapping[str, str]) -> Place | None:
    """Place of this process, or None if neither torchrun nor srun started several.

    Raises:
        ConfigError: the variables say that there are several processes, but not which this one is.
    """
    if int(environment.get("WORLD_SIZE", 1)) > 1 or set(_TORCHRUN) <= environment.keys():
        rank, world_size, local_rank, local_size = _numbers(environment, "torchrun", _TORCHRUN[:4])
        return Place(rank, world_size, local_rank, local_size, "env://", "torchrun")
    # A shell of an allocation knows its number of tasks (SLURM_NTASKS), but is one process.
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        rank, local_rank, world_size, machines = _numbers(environment, "srun", _SRUN[:4])
        url = f"tcp://{_host(environment)}:{_port(environment)}"
        return Place(rank, world_size, local_rank, world_size // machines, url, "srun")
    return None


def first_host(node_list: str) -> str:
    """First machine of SLURM's short form: ``"gpu[03-05,9],cpu1"`` gives ``"gpu03"``."""
    match = re.match(r"([^\[,]*)(?:\[([^\]]*)\])?(.*)", node_list)
    assert match is not None  # any text matches
    prefix, numbers, rest = match.groups()
    if numbers is None:
        return prefix
    # Several brackets ("rack[1-2]node[1-8]") are possible.
    suffix = "" if rest.startswith(",") else first_host(rest)
    return prefix + re.split("[-,]", numbers)[0] + suffix


def _numbers(environment: Mapping[str, str], starter: str, names: tuple[str, ...]) -> list[int]:
    """The values of ``names``, after a check that all of the starter's variables are there."""
    needed = _TORCHRUN if starter == "torchrun" else _SRUN
    missing = [name for name in needed if name not in environment]
    if missing:
        raise ConfigError(
            f"The environment names several processes, but lacks {', '.join(missing)}, which "
            f"{starter} sets. Start the processes with torchrun, srun or --num-gpus."
        )
    return [int(environment[name]) for name in names]


def _host(environment: Mapping[str, str]) -> str:
    return environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])


def _port(environment: Mapping[str, str]) -> int:
    """Different for steps that may run at once; below the ports that systems give out (32768)."""
    job, step = (int(environment.get(f"SLURM_{name}", 0)) for name in ("JOB_ID", "STEP_ID"))
    return int(environment.get("MASTER_PORT") or 10_000 + (37 * job + step) % 20_000)
