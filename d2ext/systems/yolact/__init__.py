"""YOLACT (arXiv 1904.02689) and YOLACT++ (arXiv 1912.06218): instance masks from prototypes."""

from d2ext.systems.yolact import checkpoint, config  # noqa: F401  (imported for registration)
from d2ext.systems.yolact.fpn import BilinearFPN, build_yolact_fpn_backbone
from d2ext.systems.yolact.head import MaskScorer, YOLACTHead, YOLACTPredictions
from d2ext.systems.yolact.losses import YOLACTCriterion
from d2ext.systems.yolact.model import YOLACT
from d2ext.systems.yolact.targets import YOLACTTargets

__all__ = [
    "YOLACT",
    "BilinearFPN",
    "MaskScorer",
    "YOLACTCriterion",
    "YOLACTHead",
    "YOLACTPredictions",
    "YOLACTTargets",
    "build_yolact_fpn_backbone",
]
