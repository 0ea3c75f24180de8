"""One training in one folder: a lock while it runs, an earlier run's files out of the way, and the
trained model read back."""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from torch import nn

from d2ext.checkpoint.checkpointer import Checkpointer
from d2ext.config import ConfigError, get_cfg, load_config
from d2ext.data.dataset_facts import section_of

logger = logging.getLogger(__name__)

# What a training writes into its folder, apart from what is computed anew from it (inference/).
_WRITTEN = (
    "*.pth",
    "last_checkpoint",
    "metrics.json",
    "experiments.json",
    "results.json",
    "config.yaml",
    "log.txt*",
    "events.out.*",
)


# Files that a trained model needs beside its weights, by their keys, and the folder of their copies.
_FILES = (
    "DATASETS.MESH_FILE",
    "DATASETS.DENSEPOSE_MESH",
    "DATASETS.DENSEPOSE_UV_SYMMETRY",
    "MODEL.RETINAFACE.MESH.FILE",
)
_COPIES = "files"


def load_run(path: str | os.PathLike[str]) -> CfgNode:
    """The config of a training's folder, with the weights that came of it.

    These are ``model_best.pth`` where ``TEST.BEST_METRIC`` chose one, or else the last checkpoint.
    Meshes are the folder's own copies. A config of a GPU becomes one of the CPU where there is none.

    Args:
        path: ``OUTPUT_DIR`` of the training, wherever it lies now.

    Returns:
        A config that can still be changed.

    Raises:
        ConfigError: the folder has no config or no checkpoint.
    """
    folder = Path(path)
    config = folder / "config.yaml"
    if not config.is_file():
        raise ConfigError(f"'{folder}' is no folder of a training: it has no config.yaml.")
    cfg = load_config(str(config))
    weights = trained_weights(folder, cfg.TEST.BEST_METRIC)
    if not weights:
        raise ConfigError(f"The training in '{folder}' has left no checkpoint so far.")
    logger.info("Weights: %s", weights)
    cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS = str(folder), weights
    if cfg.MODEL.DEVICE.startswith("cuda"):
        cfg.MODEL.DEVICE = get_cfg().MODEL.DEVICE
    for node, key in _file_keys(cfg):
        copy = folder / _COPIES / Path(node[key]).name
        if copy.is_file():
            node[key] = str(copy)
    return cfg


def trained_weights(folder: Path, best_metric: str) -> str:
    """``model_best.pth`` if ``TEST.BEST_METRIC`` chose one, else the last checkpoint, or ""."""
    best = folder / "model_best.pth"
    if best_metric and best.is_file():
        return str(best)
    return Checkpointer(nn.Module(), str(folder)).get_checkpoint_file()


def keep_files(cfg: CfgNode) -> None:
    """Copy meshes that the model needs into ``OUTPUT_DIR``, for :func:`load_run`."""
    folder = Path(cfg.OUTPUT_DIR) / _COPIES
    for node, key in _file_keys(cfg):
        source = Path(PathManager.get_local_path(node[key]))
        target = folder / source.name
        if source.is_file() and source.resolve() != target.resolve():
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def _file_keys(cfg: CfgNode) -> Iterator[tuple[CfgNode, str]]:
    """Node and last word of the keys of ``_FILES`` that are set."""
    for key in _FILES:
        node, leaf = section_of(cfg, key)
        if node[leaf]:
            yield node, leaf


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
