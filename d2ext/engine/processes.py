"""Starts the processes of a training, on GPUs or on the CPU."""

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.config import CfgNode
from detectron2.utils import comm

from d2ext.config import ConfigError

__all__ = ["launch"]

_TIMEOUT = timedelta(minutes=30)  # of a collective operation; as in Detectron2


def launch(
    main_func: Callable[..., Any],
    num_processes: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    *,
    device: str = "cuda",
    args: tuple[Any, ...] = (),
) -> Any:
    """Run ``main_func(*args)`` in ``num_processes`` processes on this machine.

    Like Detectron2's ``launch``, which chooses NCCL wherever there is a GPU; here the device
    decides, so that a training on the CPU of a GPU machine works too.

    Args:
        main_func: importable by name; the processes are spawned.
        num_processes: processes on this machine; on GPUs, one GPU each.
        num_machines, machine_rank: as in Detectron2; call it on every machine.
        dist_url: ``tcp://host:port`` of the machine of rank 0; "auto" for a single machine.
        device: ``"cuda"``: NCCL; anything else: gloo, and the cores are shared out.

    Returns:
        What ``main_func`` returns if only one process runs, else None.

    Raises:
        ConfigError: more processes than GPUs, or "auto" with several machines.
        torch.multiprocessing.ProcessRaisedException: a process raised; holds its traceback.
    """
    world_size = num_processes * num_machines
    cuda = device.startswith("cuda")
    if num_processes < 1 or num_machines < 1:
        raise ConfigError("--num-gpus and --num-machines must be at least 1.")
    if cuda and num_processes > torch.cuda.device_count():
        raise ConfigError(
            f"--num-gpus {num_processes}, but PyTorch sees {torch.cuda.device_count()} GPU(s). "
            "For processes on the CPU set MODEL.DEVICE cpu."
        )
    if world_size == 1:
        return main_func(*args)
    if num_machines > 1 and dist_url == "auto":
        raise ConfigError("With several machines, give --dist-url tcp://HOST:PORT of machine 0.")
    with tempfile.TemporaryDirectory(prefix="d2ext-launch-") as folder:
        # A file as meeting point needs no free port.
        url = f"file://{os.path.join(folder, 'init')}" if dist_url == "auto" else dist_url
        mp.start_processes(
            _worker,
            nprocs=num_processes,
            args=(main_func, num_processes, world_size, machine_rank, url, cuda, args),
            start_method="spawn",
        )
    return None


def set_cpu_threads(cfg: CfgNode) -> None:
    """Apply ``SOLVER.CPU_THREADS`` to this process.

    Raises:
        ConfigError: a negative number.
    """
    threads = cfg.SOLVER.CPU_THREADS
    if threads < 0:
        raise ConfigError(f"SOLVER.CPU_THREADS is {threads}; expected 0 or more.")
    if threads > 0 and torch.device(cfg.MODEL.DEVICE).type == "cpu":
        torch.set_num_threads(threads)


def _worker(
    local_rank: int,
    main_func: Callable[..., Any],
    num_processes: int,
    world_size: int,
    machine_rank: int,
    url: str,
    cuda: bool,
    args: tuple[Any, ...],
) -> None:
    if cuda:
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // num_processes))
    dist.init_process_group(
        backend="nccl" if cuda else "gloo",
        init_method=url,
        world_size=world_size,
        rank=machine_rank * num_processes + local_rank,
        timeout=_TIMEOUT,
    )
    comm.create_local_process_group(num_processes)
    comm.synchronize()
    try:
        main_func(*args)
        # All leave together: a process whose peer is gone may abort while it takes its group down.
        comm.synchronize()
    finally:
        dist.destroy_process_group()
