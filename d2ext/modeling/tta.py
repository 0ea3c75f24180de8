"""Test-time augmentation as a wrapper of a model, like Detectron2's ``GeneralizedRCNNWithTTA``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
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


class MultiSizeTTA(nn.Module):
    """Wraps a model for inference: predicts on several sizes of an image, each also mirrored. Keys are
    those of ``MODEL.<section>.TEST.AUG``."""

    section = ""

    @configurable
    def __init__(
        self, model: nn.Module, *, min_sizes: Sequence[int], max_size: int, flip: bool
    ) -> None:
        """Args:
        model: predicts on each view.
        min_sizes: short sides in pixels; empty: the size that the model itself uses.
        max_size: longest side in pixels, with ``min_sizes``.
        flip: each size also mirrored.
        """
        super().__init__()
        if any(size < 1 for size in (*min_sizes, max_size)):
            raise ValueError(
                f"MODEL.{self.section}.TEST.AUG.MIN_SIZES and MAX_SIZE are positive numbers of pixels, "
                f"not {list(min_sizes)} and {max_size}."
            )
        self.model: Any = model
        self.training = model.training
        self.min_sizes = list(min_sizes)
        self.max_size = max_size
        self.flip = flip

    @classmethod
    def _keys(cls, cfg: CfgNode) -> CfgNode:
        return cfg.MODEL[cls.section].TEST.AUG

    @classmethod
    def enabled(cls, cfg: CfgNode) -> bool:
        """Whether the config enables it."""
        return cls._keys(cfg).ENABLED

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        options = {k.lower(): value for k, value in cls._keys(cfg).items() if k != "ENABLED"}
        return {"model": model, **options}
