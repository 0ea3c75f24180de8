"""CornerNet (arXiv 1808.01244) and CornerNet-Lite (arXiv 1904.08900): objects as pairs of corners."""

from d2ext.systems.cornernet import checkpoint, config  # noqa: F401  (imported for registration)
from d2ext.systems.cornernet.head import CornerNetHead, CornerNetPredictions
from d2ext.systems.cornernet.losses import CornerNetCriterion
from d2ext.systems.cornernet.model import CornerNet
from d2ext.systems.cornernet.saccade import CornerNetSaccade

__all__ = [
    "CornerNet",
    "CornerNetCriterion",
    "CornerNetHead",
    "CornerNetPredictions",
    "CornerNetSaccade",
]
