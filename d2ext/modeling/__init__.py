"""Parts that two or more systems use. Importing this package registers the backbones."""

from d2ext.modeling import flow  # noqa: F401  (registers the estimators of optical flow)
from d2ext.modeling.cornernet_hourglass import (
    CornerNetHourglass,
    build_cornernet_hourglass_backbone,
)
from d2ext.modeling.darknet import Darknet53, build_darknet53_backbone
from d2ext.modeling.dla import DLA34, DLAUp, build_dla_up_backbone
from d2ext.modeling.mobilenet import MobileNetV2, build_mobilenetv2_backbone
from d2ext.modeling.newell_hourglass import NewellHourglass
from d2ext.modeling.resnet_dcn import build_deformable_resnet, build_resnet_dcn_backbone
from d2ext.modeling.resnet_deconv import ResNetDeconv, build_resnet_deconv_backbone
from d2ext.modeling.unet import UNet, UNetBackbone

__all__ = [
    "DLA34",
    "CornerNetHourglass",
    "DLAUp",
    "Darknet53",
    "MobileNetV2",
    "NewellHourglass",
    "ResNetDeconv",
    "UNet",
    "UNetBackbone",
    "build_cornernet_hourglass_backbone",
    "build_darknet53_backbone",
    "build_deformable_resnet",
    "build_dla_up_backbone",
    "build_mobilenetv2_backbone",
    "build_resnet_dcn_backbone",
    "build_resnet_deconv_backbone",
]
