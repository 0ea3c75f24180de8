"""Training: the Trainer, optimizers, hooks, and the start of processes.

Names are imported when they are first used: ``d2ext.config`` needs only the settings, and the
settings of the command line need ``d2ext.config``.
"""

import importlib
from typing import TYPE_CHECKING, Any

from d2ext.engine.config import add_engine_config

if TYPE_CHECKING:
    from d2ext.engine.errors import ConfigError
    from d2ext.engine.optimizer import build_optimizer
    from d2ext.engine.processes import launch, set_cpu_threads
    from d2ext.engine.setup import find_config_file, load_config, merge_options
    from d2ext.engine.trainer import Trainer

_HOMES = {
    "ConfigError": "errors",
    "Trainer": "trainer",
    "build_optimizer": "optimizer",
    "find_config_file": "setup",
    "launch": "processes",
    "load_config": "setup",
    "merge_options": "setup",
    "set_cpu_threads": "processes",
}

__all__ = [
    "ConfigError",
    "Trainer",
    "add_engine_config",
    "build_optimizer",
    "find_config_file",
    "launch",
    "load_config",
    "merge_options",
    "set_cpu_threads",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
