"""Augmentations and transforms in Detectron2's sense, and the recipes made of them."""

from d2ext.data.augmentations.base import (
    DetectionInput,
    DropsInstances,
    LabelAwareAugmentation,
    ReportsVisibleShares,
)
from d2ext.data.augmentations.build import AUGMENTATION_REGISTRY, build_augmentations

__all__ = [
    "AUGMENTATION_REGISTRY",
    "DetectionInput",
    "DropsInstances",
    "LabelAwareAugmentation",
    "ReportsVisibleShares",
    "build_augmentations",
]
