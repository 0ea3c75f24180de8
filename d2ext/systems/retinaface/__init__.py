"""RetinaFace (arXiv 1905.00641; CVPR 2020): faces, their boxes, points and meshes in one pass."""

from d2ext.systems.retinaface import checkpoint, config  # noqa: F401  (imported for registration)
from d2ext.systems.retinaface.fpn import RetinaFaceFPN, build_retinaface_fpn_backbone
from d2ext.systems.retinaface.head import ContextModule, RetinaFaceHead, RetinaFacePredictions
from d2ext.systems.retinaface.losses import RetinaFaceCriterion
from d2ext.systems.retinaface.mesh import MeshHead, MeshTopology, mesh_topology
from d2ext.systems.retinaface.model import RetinaFace
from d2ext.systems.retinaface.targets import RetinaFaceTargets
from d2ext.systems.retinaface.tta import RetinaFaceWithTTA

__all__ = [
    "ContextModule",
    "MeshHead",
    "MeshTopology",
    "RetinaFace",
    "RetinaFaceCriterion",
    "RetinaFaceFPN",
    "RetinaFaceHead",
    "RetinaFacePredictions",
    "RetinaFaceTargets",
    "RetinaFaceWithTTA",
    "build_retinaface_fpn_backbone",
    "mesh_topology",
]
