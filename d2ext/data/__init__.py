"""Data sets, mappers, augmentations and loaders."""

from d2ext.data import config, landmarks, shapes  # noqa: F401  (imported for registration)
from d2ext.data.augmentations import AUGMENTATION_REGISTRY, build_augmentations
from d2ext.data.build import build_mapper, build_test_loader, build_train_loader, get_dataset_dicts
from d2ext.data.dataset_mapper import MAPPER_REGISTRY, D2extDatasetMapper
from d2ext.data.errors import (
    AnnotationError,
    DataError,
    DatasetError,
    ImageReadError,
    SampleError,
)
from d2ext.data.image_io import read_image
from d2ext.data.register_panoptic import register_cityscapes_separated

register_cityscapes_separated()

__all__ = [
    "AUGMENTATION_REGISTRY",
    "MAPPER_REGISTRY",
    "AnnotationError",
    "D2extDatasetMapper",
    "DataError",
    "DatasetError",
    "ImageReadError",
    "SampleError",
    "build_augmentations",
    "build_mapper",
    "build_test_loader",
    "build_train_loader",
    "get_dataset_dicts",
    "read_image",
]
