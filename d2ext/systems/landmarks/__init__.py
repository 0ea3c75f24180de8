"""Landmarks: stacked hourglass (arXiv 1603.06937), heat map, integral, regression and SimCC heads."""

from d2ext.systems.landmarks import checkpoint, config  # noqa: F401  (imported for registration)
from d2ext.systems.landmarks.head import (
    LANDMARK_HEAD_REGISTRY,
    HeatmapHead,
    IntegralHead,
    LandmarkHead,
    RegressionHead,
    SimCCHead,
    build_landmark_head,
)
from d2ext.systems.landmarks.model import LandmarkNet

__all__ = [
    "LANDMARK_HEAD_REGISTRY",
    "HeatmapHead",
    "IntegralHead",
    "LandmarkHead",
    "LandmarkNet",
    "RegressionHead",
    "SimCCHead",
    "build_landmark_head",
]
