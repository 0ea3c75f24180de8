"""One training in one folder: a lock while it runs, and an earlier run's files out of the way."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d2ext.config import ConfigError

logger = logging.getLogger(__name__)

# What a training writes into its folder, apart from what is computed anew from it (inference/).
_WRITTEN = (
    "*.pth",
    "last_checkpoint",
    "metrics.json",
    "results.json",
    "config.yaml",
    "log.txt*",
    "events.out.*",
)


@contextmanager
def run_folder(path: str | os.PathLike[str], *, resume: bool, weights: str = "") -> Iterator[None]:
    """Hold a training's folder; for the main process.

    The lock (``.lock``: host, process, start) is the operating system's, so it ends with the process,
    however that ends. Without ``resume``, checkpoints of an earlier run move to ``earlier_1/`` (or the
    next number that is free): nothing is overwritten.

    Args:
        path: ``OUTPUT_DIR``; made if it is not there.
        resume: the training goes on with what the folder has.
        weights: ``MODEL.WEIGHTS``; a file in the folder stays where it is.

    Raises:
        ConfigError: another training holds the folder.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    with open(lock, "a+", encoding="utf-8") as file:
        if not _lock(file.fileno()):
            file.seek(0)
            raise ConfigError(
                f"Another training writes to {folder}: {_owner(file.read())}. Wait for it, end it, or "
                "choose another OUTPUT_DIR."
            )
        file.truncate(0)
        own = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}
        file.write(json.dumps(own))
        file.flush()
        if not resume:
            _move_aside(folder, weights)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # before the lock is given back: nobody else holds it


def _lock(descriptor: int) -> bool:
    """Whether this process has the lock now; True as well where the file system has none."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.warning("This file system has no locks (%s): start one training a folder.", error)
    return True


def _owner(content: str) -> str:
    try:
        own = json.loads(content)
        return f"process {own['pid']} on {own['host']}, since {own['since']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has just started"


def _move_aside(folder: Path, weights: str) -> None:
    files = sorted({file for pattern in _WRITTEN for file in folder.glob(pattern)})
    files = [file for file in files if not weights or file.resolve() != Path(weights).resolve()]
    if not any(file.suffix == ".pth" for file in files):
        return
    number = next(
        n for n in range(1, len(os.listdir(folder)) + 2) if not _earlier(folder, n).exists()
    )
    target = _earlier(folder, number)
    target.mkdir()
    for file in files:
        file.rename(target / file.name)
    logger.warning(
        "%s has the checkpoints of an earlier training: they are in %s now. With --resume it would "
        "have gone on.",
        folder,
        target,
    )


def _earlier(folder: Path, number: int) -> Path:
    return folder / f"earlier_{number}"
