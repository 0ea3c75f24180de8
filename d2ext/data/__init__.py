"""Data sets, mappers, augmentations and loaders."""

from d2ext.data import config, landmarks, shapes  # noqa: F401  (imported for registration)
from d2ext.data.augmentations import AUGMENTATION_REGISTRY, build_augmentations
from d2ext.data.build import build_mapper, build_test_loader, build_train_loader, get_dataset_dicts
from d2ext.data.dataset_mapper import MAPPER_REGISTRY, D2extDatasetMapper, PoseMapper
from d2ext.data.densepose.mapper import DensePoseMapper
from d2ext.data.densepose.register import register_builtin_densepose, register_densepose
from d2ext.data.errors import (
    AnnotationError,
    DataError,
    DatasetError,
    ImageReadError,
    SampleError,
)
from d2ext.data.faces import FaceMapper, register_builtin_faces, register_faces
from d2ext.data.image_io import read_image
from d2ext.data.register_panoptic import register_cityscapes_separated
from d2ext.data.video import config as video_config  # noqa: F401
from d2ext.data.video.pair_mappers import ClipMapper, FlowPairMapper
from d2ext.data.video.records import flatten, video_record
from d2ext.data.video.register import register_builtin_videos

register_cityscapes_separated()
register_builtin_videos()
register_builtin_faces()
register_builtin_densepose()

__all__ = [
    "AUGMENTATION_REGISTRY",
    "MAPPER_REGISTRY",
    "AnnotationError",
    "ClipMapper",
    "D2extDatasetMapper",
    "DataError",
    "DatasetError",
    "DensePoseMapper",
    "FaceMapper",
    "FlowPairMapper",
    "ImageReadError",
    "PoseMapper",
    "SampleError",
    "build_augmentations",
    "build_mapper",
    "build_test_loader",
    "build_train_loader",
    "flatten",
    "get_dataset_dicts",
    "read_image",
    "register_densepose",
    "register_faces",
    "video_record",
]
