"""Configs by name, as in ``detectron2.model_zoo``.

>>> from d2ext import model_zoo
>>> model = model_zoo.get("yolact/yolact_R_50_550.yaml", device="cpu")

A name is a file's path relative to ``configs/``.
"""

from d2ext.model_zoo.model_zoo import (
    available,
    find_config_file,
    get,
    get_config,
    get_config_file,
)

__all__ = ["available", "find_config_file", "get", "get_config", "get_config_file"]
