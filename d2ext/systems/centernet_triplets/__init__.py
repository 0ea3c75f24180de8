"""CenterNet with keypoint triplets (arXiv 1904.08189): corner pairs that a centre confirms."""

from d2ext.systems.centernet_triplets import checkpoint, config  # noqa: F401  (imported for registration)
from d2ext.systems.centernet_triplets.head import CenterNetTripletsHead
from d2ext.systems.centernet_triplets.model import CenterNetTriplets

__all__ = ["CenterNetTriplets", "CenterNetTripletsHead"]
