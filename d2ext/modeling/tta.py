"""Test-time augmentation as a wrapper of a model, like Detectron2's ``GeneralizedRCNNWithTTA``."""

from __future__ import annotations

from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import nn

TTA_REGISTRY = Registry("TTA")
TTA_REGISTRY.__doc__ = """
Wrappers, called ``<meta-architecture>WithTTA``: ``Wrapper(cfg, model)`` predicts as the model does, and
``Wrapper.enabled(cfg)`` says whether the config enables it.
"""


def build_tta(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """The model, wrapped if its meta-architecture has test-time augmentation and ``cfg`` enables it."""
    name = f"{cfg.MODEL.META_ARCHITECTURE}WithTTA"
    if name in TTA_REGISTRY and TTA_REGISTRY.get(name).enabled(cfg):
        return TTA_REGISTRY.get(name)(cfg, model)
    return model
