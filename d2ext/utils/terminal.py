"""What the terminal shows of a run: what its user can act on. ``log.txt`` holds the rest, too."""

import logging
import sys
import warnings

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

__all__ = ["show_log", "silence_foreign", "start_logging"]

# Beginnings of messages that the terminal does not show: pages of environment, config and network, and
# what is said of nothing.
_ONLY_IN_FILE = (
    "Environment info:",
    "Command line arguments:",
    "Contents of args.config_file=",
    "Running with full config:",
    "Model:\n",
    "[Checkpointer] Loading from  ...",
    "[DetectionCheckpointer] Loading from  ...",
    "No checkpoint found. Initializing model from scratch",
    "Serializing ",
    "Serialized dataset takes",
)
# What other packages say and no user can act on: logger -> beginning of a message; warnings.
_FOREIGN = {"torch.utils.cpp_extension": "No CUDA runtime is found"}
_WARNINGS = ("torch.meshgrid: in an upcoming release",)  # Detectron2's anchors


class _Without(logging.Filter):
    """Drops messages by their beginnings."""

    def __init__(self, *beginnings: str) -> None:
        super().__init__()
        self._beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether ``record`` is shown."""
        return not str(record.msg).startswith(self._beginnings)


def silence_foreign() -> None:
    """Do not show what other packages say and no user can act on."""
    for name, beginning in _FOREIGN.items():
        logging.getLogger(name).addFilter(_Without(beginning))
    for beginning in _WARNINGS:
        warnings.filterwarnings("ignore", message=beginning)


def show_log(*names: str) -> None:
    """Let these loggers write to the terminal, except those that write somewhere already."""
    for name in names:
        if not logging.getLogger(name).handlers:
            setup_logger(name=name)


def start_logging(folder: str) -> None:
    """Loggers of Detectron2 and d2ext for the terminal, of the main process, and ``folder/log.txt``."""
    silence_foreign()
    rank = comm.get_rank()
    # Called as Detectron2's default_setup does, which then finds them ready.
    for logger in (
        setup_logger(folder, distributed_rank=rank, name="fvcore"),
        setup_logger(folder, distributed_rank=rank),
        setup_logger(folder, distributed_rank=rank, name="d2ext"),
    ):
        for handler in logger.handlers:
            if getattr(handler, "stream", None) is sys.stdout:
                handler.addFilter(_Without(*_ONLY_IN_FILE))
