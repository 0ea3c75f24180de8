"""centernet_R_18_dcn_512.yaml as a lazy config."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from d2ext.modeling import ResNetDeconv
from d2ext.systems.centernet import CenterNet, CenterNetCriterion, CenterNetHead

from ..common.resnet import resnet
from ..common.training import training

dataloader, optimizer, lr_multiplier, train = training("centernet/centernet_R_18_dcn_512.yaml")
model = L(CenterNet)(
    backbone=L(ResNetDeconv)(
        bottom_up=resnet(18, norm="BN", out_features=["res5"]), channels=[256, 128, 64], deform=True
    ),
    head=L(CenterNetHead)(
        input_shapes=[ShapeSpec(channels=64, stride=4)],
        channels={"heatmap": "${...num_classes}", "size": 2, "offset": 2},
        hidden=64,
        init_std=0.001,
    ),
    criterion=L(CenterNetCriterion)(),
    in_features=["deconv"],
    num_classes=80,
    pixel_mean=[104.0136177, 114.0342201, 119.91659325],
    pixel_std=[73.6027614, 69.8908182, 70.91507925],
)
