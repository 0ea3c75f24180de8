"""Detectron2's defaults plus those of all parts of d2ext."""

import torch
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg
from fvcore.common.registry import Registry

from d2ext.config.renamed import RenamingCfgNode

CONFIG_REGISTRY = Registry("CONFIG")
CONFIG_REGISTRY.__doc__ = """Functions ``add_NAME_config(cfg)`` that add a part's keys to a config.

A part registers its own when it is imported. Each may count on Detectron2's keys, on no other part's.
"""


def add_d2ext_config(cfg: CfgNode) -> None:
    """Add the keys of all parts of d2ext to ``cfg``, in place. Existing keys keep their values.

    ``cfg`` then also understands the keys of earlier versions (:mod:`d2ext.config.renamed`).
    """
    defaults = get_detectron2_cfg()
    for _, add_config in CONFIG_REGISTRY:
        add_config(defaults)
    _add_missing(cfg, defaults)
    if type(cfg) is CfgNode:
        object.__setattr__(cfg, "__class__", RenamingCfgNode)  # CfgNode's own makes it a key


def get_cfg() -> CfgNode:
    """Detectron2's default config with d2ext's keys.

    ``MODEL.DEVICE`` is ``"cuda"`` where PyTorch sees a GPU and ``"cpu"`` elsewhere, so that every
    tool and ``DefaultPredictor`` runs unchanged on a machine without one.
    """
    cfg = get_detectron2_cfg()
    add_d2ext_config(cfg)
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    return cfg


def _add_missing(node: CfgNode, defaults: CfgNode) -> None:
    for key, value in defaults.items():
        if key not in node:
            setattr(node, key, value)
        elif isinstance(value, CfgNode):
            _add_missing(node[key], value)
