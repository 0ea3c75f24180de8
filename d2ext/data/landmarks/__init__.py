"""Landmark data sets (bodies, faces, anything with K named points) and their top-down samples.

::

    from d2ext.data.landmarks import register_landmarks
    register_landmarks("faces_train", "wflw", "list_98pt_rect_attr_train.txt", "WFLW_images/")
"""

from d2ext.data.dataset_facts import flip_indices
from d2ext.data.landmarks.datasets import (
    DESCRIBED,
    LANDMARK_DATASETS,
    LandmarkDataset,
    describe_datasets,
    landmark_metadata,
)
from d2ext.data.landmarks.mapper import TopDownMapper, TopDownTestMapper, make_crop_sample
from d2ext.data.landmarks.register import (
    load_landmarks,
    register_landmarks,
    write_coco_keypoints,
)
from d2ext.data.landmarks.samples import (
    add_detections,
    instance_crop_box,
    instance_points,
    instance_records,
)
from d2ext.data.landmarks.transforms import (
    AffineCropTransform,
    CutoutTransform,
    RandomCropGeometry,
    crop_transform,
    half_body_box,
)

describe_datasets()

__all__ = [
    "DESCRIBED",
    "LANDMARK_DATASETS",
    "AffineCropTransform",
    "CutoutTransform",
    "LandmarkDataset",
    "RandomCropGeometry",
    "TopDownMapper",
    "TopDownTestMapper",
    "add_detections",
    "crop_transform",
    "flip_indices",
    "half_body_box",
    "instance_crop_box",
    "instance_points",
    "instance_records",
    "landmark_metadata",
    "load_landmarks",
    "make_crop_sample",
    "register_landmarks",
    "write_coco_keypoints",
]
