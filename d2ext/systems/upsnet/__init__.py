"""UPSNet: unified panoptic segmentation (arXiv 1901.03784)."""

from d2ext.systems.upsnet import checkpoint, config  # noqa: F401  (imported for registration)
from d2ext.systems.upsnet.backbone import GlobalContextFPN, build_upsnet_fpn_backbone
from d2ext.systems.upsnet.boxes import DetectronAnchorGenerator, PyramidRoIAlign
from d2ext.systems.upsnet.head import UPSNetSemanticHead
from d2ext.systems.upsnet.model import UPSNet
from d2ext.systems.upsnet.panoptic_head import PanopticLogits, panoptic_logits, predict_panoptic
from d2ext.systems.upsnet.roi_heads import UPSNetROIHeads
from d2ext.systems.upsnet.rpn import UPSNetRPN
from d2ext.systems.upsnet.tta import UPSNetWithTTA

__all__ = [
    "DetectronAnchorGenerator",
    "GlobalContextFPN",
    "PanopticLogits",
    "PyramidRoIAlign",
    "UPSNet",
    "UPSNetROIHeads",
    "UPSNetRPN",
    "UPSNetSemanticHead",
    "UPSNetWithTTA",
    "build_upsnet_fpn_backbone",
    "panoptic_logits",
    "predict_panoptic",
]
