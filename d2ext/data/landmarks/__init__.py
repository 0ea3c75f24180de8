"""Landmark data sets (bodies, faces, anything with K named points) and their top-down samples.

::

    from d2ext.data.landmarks import register_landmarks
    register_landmarks("faces_train", "wflw", "list_98pt_rect_attr_train.txt", "WFLW_images/")
"""

from d2ext.data.dataset_facts import flip_indices
from d2ext.data.landmarks import config  # noqa: F401  (registers its keys)
from d2ext.data.landmarks.datasets import (
    LANDMARK_DATASETS,
    LandmarkDataset,
    describe_datasets,
    landmark_metadata,
)
from d2ext.data.landmarks.mapper import TopDownMapper, TopDownTestMapper
from d2ext.data.landmarks.register import load_landmarks, register_landmarks
from d2ext.data.landmarks.samples import add_detections, instance_records

describe_datasets()

__all__ = [
    "LANDMARK_DATASETS",
    "LandmarkDataset",
    "TopDownMapper",
    "TopDownTestMapper",
    "add_detections",
    "flip_indices",
    "instance_records",
    "landmark_metadata",
    "load_landmarks",
    "register_landmarks",
]
