"""VPSNet: panoptic segmentation of videos (arXiv 2006.11339)."""

from d2ext.systems.vpsnet import checkpoint, config  # noqa: F401  (imported for registration)
from d2ext.systems.vpsnet.head import FusionNeck, TrackHead
from d2ext.systems.vpsnet.model import VPSNet, VPSNetMemory
from d2ext.systems.vpsnet.roi_heads import VPSNetROIHeads
from d2ext.systems.vpsnet.rpn import RoundedAnchorGenerator, VPSNetRPN

__all__ = [
    "FusionNeck",
    "RoundedAnchorGenerator",
    "TrackHead",
    "VPSNet",
    "VPSNetMemory",
    "VPSNetROIHeads",
    "VPSNetRPN",
]
