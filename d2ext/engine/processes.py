"""Starts the processes of a training, on GPUs or on the CPU, or joins those that a cluster started."""

import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import resource_tracker
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.config import CfgNode
from detectron2.utils import comm

from d2ext.config import ConfigError
from d2ext.engine.cluster import Place, find_place
from d2ext.utils.parent import end_with_parent

__all__ = ["Interrupted", "RankError", "launch", "set_cpu_threads"]

logger = logging.getLogger(__name__)

_TIMEOUT = timedelta(minutes=30)  # of a collective operation; as in Detectron2
# Seconds in which who started the processes ends the others after one died. Data loading workers of
# a killed process keep its connections open for up to 5 seconds.
_GRACE = 20.0
# Seconds in which a process whose starter is gone may end by itself. (Torch interrupts it, but it may be
# waiting for another one.)
_ORPHAN_GRACE = 4.0
_INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ends the training; all processes raise it after the same iteration."""


class RankError(RuntimeError):
    """One of several processes failed. The message names its rank and the cause."""


def launch(
    main_func: Callable[..., Any],
    num_processes: int | None = None,
    num_machines: int | None = None,
    machine_rank: int | None = None,
    dist_url: str = "auto",
    *,
    device: str = "cuda",
    args: tuple[Any, ...] = (),
) -> Any:
    """Run ``main_func(*args)`` in ``num_processes`` processes on this machine.

    Like Detectron2's ``launch``, with three differences. The device decides between NCCL and gloo,
    so that a training on the CPU of a GPU machine works too. A process that torchrun or srun
    started becomes one of theirs and starts no others. If one process fails, all end.

    Args:
        main_func: importable by name; the processes are spawned.
        num_processes: processes on this machine; on GPUs, one GPU each. None: as many as torchrun
            or srun started here, else 1.
        num_machines, machine_rank: as in Detectron2; call it on every machine. None: as torchrun or
            srun say, else 1 and 0.
        dist_url: ``tcp://host:port`` of the machine of rank 0; "auto" for a single machine, torchrun
            and srun.
        device: ``"cuda"``: NCCL; anything else: gloo, and the cores are shared out.

    Returns:
        What ``main_func`` returns if only one process runs, else None.

    Raises:
        ConfigError: more processes than GPUs; "auto" with several machines; arguments that do not
            agree with torchrun or srun.
        RankError: one of several processes failed. Under torchrun and srun only that process
            raises it; the others raise SystemExit.
        KeyboardInterrupt: Ctrl-C; the processes that were started here have ended. Under torchrun and
            srun only rank 0 raises it.
    """
    cuda = device.startswith("cuda")
    place = find_place(os.environ)
    # One process on each machine that is to start the others there: these say where they meet.
    starts_others = dist_url != "auto" and place is not None and place.local_size == 1
    if place is not None and not starts_others:
        _check_agreement(place, num_processes, num_machines, machine_rank, dist_url)
        return _join(main_func, args, place, cuda)

    num_processes, num_machines, machine_rank = (
        default if value is None else value
        for value, default in ((num_processes, 1), (num_machines, 1), (machine_rank, 0))
    )
    if num_processes < 1 or num_machines < 1:
        raise ConfigError("--num-gpus and --num-machines must be at least 1.")
    if cuda:
        _check_gpus(num_processes)
    if num_processes * num_machines == 1:
        return main_func(*args)
    if num_machines > 1 and dist_url == "auto":
        raise ConfigError("With several machines, give --dist-url tcp://HOST:PORT of machine 0.")
    with tempfile.TemporaryDirectory(prefix="d2ext-launch-") as folder:
        # A file as meeting point needs no free port.
        url = f"file://{os.path.join(folder, 'init')}" if dist_url == "auto" else dist_url
        first = machine_rank * num_processes
        world_size = num_processes * num_machines
        places = [
            Place(first + i, world_size, i, num_processes, url, "launch")
            for i in range(num_processes)
        ]
        _spawn(main_func, args, places, cuda)
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


def _check_agreement(
    place: Place,
    num_processes: int | None,
    num_machines: int | None,
    machine_rank: int | None,
    dist_url: str,
) -> None:
    for option, given, actual in (
        ("--num-gpus", num_processes, place.local_size),
        ("--num-machines", num_machines, place.world_size // place.local_size),
        ("--machine-rank", machine_rank, place.rank // place.local_size),
        ("--dist-url", dist_url, "auto"),
    ):
        if given is not None and given != actual:
            raise ConfigError(
                f"{option} is {given}, but {place.starter} started this process, as rank "
                f"{place.rank} of {place.world_size} with {place.local_size} on each machine: "
                f"{option} would be {actual}. Leave it out."
            )


def _check_gpus(num_processes: int) -> None:
    if num_processes > torch.cuda.device_count():
        raise ConfigError(
            f"{num_processes} processes on this machine (--num-gpus {num_processes}), but PyTorch "
            f"sees {torch.cuda.device_count()} GPU(s). For processes on the CPU set MODEL.DEVICE cpu."
        )


def _join(main_func: Callable[..., Any], args: tuple[Any, ...], place: Place, cuda: bool) -> Any:
    """Run as one of the processes that torchrun or srun started."""
    # srun --gpus-per-task shows each process only its own GPU.
    if cuda and not (place.starter == "srun" and torch.cuda.device_count() == 1):
        _check_gpus(place.local_size)
    if place.world_size == 1:
        return main_func(*args)
    try:
        _run_rank(main_func, args, place, cuda)
    except RankError as error:
        if str(error).startswith(f"rank {place.rank} "):
            raise
        raise SystemExit(1) from None  # that rank says it
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun may send it once more
        if place.rank == 0:
            raise
        raise SystemExit(_INTERRUPTED) from None
    return None


def _spawn(
    main_func: Callable[..., Any], args: tuple[Any, ...], places: list[Place], cuda: bool
) -> None:
    """Start this machine's processes and wait for their end; the first that fails ends all."""
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # whom it terminates
    # Until `_spawned` looks, Ctrl-C waits: nothing can handle it while a new process still imports.
    resource_tracker.ensure_running()  # whose start would lift the block
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    context = mp.start_processes(
        _spawned,
        (main_func, args, places, cuda),
        nprocs=len(places),
        join=False,
        start_method="spawn",
    )
    asked = done = False
    while not done:
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
            done = context.join()
        except KeyboardInterrupt:
            for process in filter(mp.Process.is_alive, context.processes):
                os.kill(process.pid, signal.SIGKILL if asked else signal.SIGINT)
            asked = True
        except mp.ProcessRaisedException as error:  # its text ends with that of the RankError
            raise RankError(error.msg.rpartition("RankError: ")[2].strip()) from None
        except mp.ProcessExitedException as error:
            if asked or error.exit_code == _INTERRUPTED:
                raise KeyboardInterrupt from None
            end = error.signal_name and f"signal {error.signal_name}"
            end = end or f"exit status {error.exit_code}"
            raise RankError(f"rank {places[error.error_index].rank} ended with {end}") from None


def _spawned(
    local_rank: int,
    main_func: Callable[..., Any],
    args: tuple[Any, ...],
    places: list[Place],
    cuda: bool,
) -> None:
    end_with_parent(grace=_ORPHAN_GRACE)
    # A spawned process would spawn its loaders' workers too, each of which imports for seconds. The
    # first is the system's default, as in a training of one process or under torchrun.
    mp.set_start_method(mp.get_all_start_methods()[0], force=True)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if not cuda and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, torch.get_num_threads() // len(places)))
        _run_rank(main_func, args, places[local_rank], cuda)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


def _run_rank(
    main_func: Callable[..., Any], args: tuple[Any, ...], place: Place, cuda: bool
) -> None:
    """Run ``main_func`` as one of several processes. Raises RankError for any error."""
    # Detectron2 logs the traceback of any exception in training. Here one is logged, that of the
    # process that failed first, whatever it was doing.
    logging.getLogger("detectron2.engine.train_loop").addFilter(lambda line: not line.exc_info)
    store = None
    try:
        if cuda:
            torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
        store, rank, world_size = next(
            dist.rendezvous(place.url, place.rank, place.world_size, timeout=_TIMEOUT)
        )
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=_TIMEOUT,
        )
        comm.create_local_process_group(place.local_size)
        comm.synchronize()
        end: Interrupted | None = None
        try:
            main_func(*args)
        except Interrupted as interrupted:
            end = interrupted
        # All leave together: a process whose peer is gone may abort while it takes its group down.
        comm.synchronize()
    except Exception as error:
        raise RankError(_explain(error, place.rank, store)) from error
    dist.destroy_process_group()
    if end is not None:
        raise end


def _explain(error: Exception, rank: int, store: dist.Store | None) -> str:
    """Which rank failed first and why. If it was another, wait to be ended with it."""
    lost = isinstance(error, dist.DistError) or "/gloo/" in str(error)
    what = "lost its connection to another process" if lost else "failed"
    text = f"rank {rank} {what}: {type(error).__name__}: {error}"
    # While this one waits, torchrun, srun or launch notes the other's end and ends this one too.
    if lost:
        time.sleep(_GRACE)
    first = _first_failure(store, text)
    if first == text:
        logger.error("Rank %d failed:", rank, exc_info=error)
        if summary := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun quotes it at its end
            extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
            with open(summary, "w", encoding="utf-8") as file:
                json.dump({"message": {"message": text, "extraInfo": extra}}, file)
    elif not lost:
        time.sleep(_GRACE)
    return first


def _first_failure(store: dist.Store | None, text: str) -> str:
    """What the first process said that called this; ``text`` if it is this one."""
    try:
        return store.compare_set("d2ext/failure", "", text).decode() if store else text
    except RuntimeError:  # the process that kept the store is gone
        return text
