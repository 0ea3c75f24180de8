"""Configs: the defaults of every part, and the loading and merging of files and options.

>>> from d2ext.config import get_cfg
>>> cfg = get_cfg()

In a Detectron2 project, ``add_d2ext_config(cfg)`` adds d2ext's keys to a config that is there.
"""

from d2ext.config.errors import ConfigError
from d2ext.config.loading import add_options_argument, load_config, merge_options
from d2ext.config.registry import CONFIG_REGISTRY, add_d2ext_config, get_cfg

__all__ = [
    "CONFIG_REGISTRY",
    "ConfigError",
    "add_d2ext_config",
    "add_options_argument",
    "get_cfg",
    "load_config",
    "merge_options",
]
