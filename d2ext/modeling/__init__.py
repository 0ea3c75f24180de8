"""Parts that two or more systems use. Importing this package registers the backbones."""

from d2ext.modeling.darknet import Darknet53, build_darknet53_backbone
from d2ext.modeling.resnet_dcn import build_resnet_dcn, build_resnet_dcn_backbone
from d2ext.modeling.stacked_hourglass import StackedHourglass

__all__ = [
    "Darknet53",
    "StackedHourglass",
    "build_darknet53_backbone",
    "build_resnet_dcn",
    "build_resnet_dcn_backbone",
]
