"""CenterNet (arXiv 1904.07850): objects as points, boxes and human poses."""

from d2ext.systems.centernet import checkpoint, config  # noqa: F401  (imported for registration)
from d2ext.systems.centernet.head import CenterNetHead
from d2ext.systems.centernet.losses import CenterNetCriterion
from d2ext.systems.centernet.model import CenterNet
from d2ext.systems.centernet.postprocess import CenterDetections
from d2ext.systems.centernet.targets import CenterNetTargets

__all__ = [
    "CenterDetections",
    "CenterNet",
    "CenterNetCriterion",
    "CenterNetHead",
    "CenterNetTargets",
]
