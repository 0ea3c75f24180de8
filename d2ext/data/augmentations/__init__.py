"""Augmentations and transforms in Detectron2's sense, and the recipes made of them."""

from d2ext.data.augmentations.affine import (
    PixelMirrorTransform,
    RandomAffineWarp,
    WarpTransform,
)
from d2ext.data.augmentations.base import (
    DetectionInput,
    DropsInstances,
    LabelAwareAugmentation,
    ReportsVisibleShares,
)
from d2ext.data.augmentations.build import AUGMENTATION_REGISTRY, build_augmentations
from d2ext.data.augmentations.canvas import (
    CanvasCropTransform,
    RandomCanvasCrop,
    RandomPixelMirror,
    SquareCanvas,
)
from d2ext.data.augmentations.crop import (
    CenterCropRuleTransform,
    RandomCrop,
    RandomIoUCrop,
    WindowCropTransform,
)
from d2ext.data.augmentations.expand import ExpandTransform, RandomExpand
from d2ext.data.augmentations.lighting import ColorLightingTransform, RandomColorLighting
from d2ext.data.augmentations.photometric import PhotometricTransform, RandomPhotometricDistortion
from d2ext.data.augmentations.resize import (
    BilinearResizeTransform,
    ResizeShortestEdge,
    ResizeToSquare,
)
from d2ext.data.augmentations.saccade import (
    ContentCropTransform,
    RandomObjectCrop,
    ScaleTransform,
)

__all__ = [
    "AUGMENTATION_REGISTRY",
    "BilinearResizeTransform",
    "CanvasCropTransform",
    "CenterCropRuleTransform",
    "ColorLightingTransform",
    "ContentCropTransform",
    "DetectionInput",
    "DropsInstances",
    "ExpandTransform",
    "LabelAwareAugmentation",
    "PhotometricTransform",
    "PixelMirrorTransform",
    "RandomAffineWarp",
    "RandomCanvasCrop",
    "RandomColorLighting",
    "RandomCrop",
    "RandomExpand",
    "RandomIoUCrop",
    "RandomObjectCrop",
    "RandomPhotometricDistortion",
    "RandomPixelMirror",
    "ReportsVisibleShares",
    "ResizeShortestEdge",
    "ResizeToSquare",
    "ScaleTransform",
    "SquareCanvas",
    "WarpTransform",
    "WindowCropTransform",
    "build_augmentations",
]
