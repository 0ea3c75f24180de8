"""RetinaFace (arXiv 1905.00641): faces, their boxes and points in one pass."""

from d2ext.systems.retinaface import checkpoint, config  # noqa: F401  (imported for registration)
from d2ext.systems.retinaface.fpn import RetinaFaceFPN, build_retinaface_fpn_backbone
from d2ext.systems.retinaface.head import ContextModule, RetinaFaceHead, RetinaFacePredictions
from d2ext.systems.retinaface.losses import RetinaFaceCriterion
from d2ext.systems.retinaface.model import RetinaFace
from d2ext.systems.retinaface.targets import RetinaFaceTargets

__all__ = [
    "ContextModule",
    "RetinaFace",
    "RetinaFaceCriterion",
    "RetinaFaceFPN",
    "RetinaFaceHead",
    "RetinaFacePredictions",
    "RetinaFaceTargets",
    "build_retinaface_fpn_backbone",
]
