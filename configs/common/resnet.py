"""Detectron2's ResNet."""

from typing import Any

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BasicStem, ResNet
from omegaconf import DictConfig


def resnet(
    depth: int, *, norm: str, out_features: list[str], freeze_at: int = 0, **blocks: Any
) -> DictConfig:
    """A lazy call of the network; ``blocks``: more arguments of its residual blocks."""
    return L(ResNet)(
        stem=L(BasicStem)(in_channels=3, out_channels=64, norm=norm),
        stages=L(ResNet.make_default_stages)(depth=depth, norm=norm, **blocks),
        out_features=out_features,
        freeze_at=freeze_at,
    )
