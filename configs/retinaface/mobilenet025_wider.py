"""mobilenet025_wider.yaml as a lazy config."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from d2ext.modeling.mobilenet import MobileNetV1
from d2ext.systems.retinaface import (
    RetinaFace,
    RetinaFaceCriterion,
    RetinaFaceFPN,
    RetinaFaceHead,
)

from ..common.training import training

dataloader, optimizer, lr_multiplier, train = training("retinaface/mobilenet025_wider.yaml")
model = L(RetinaFace)(
    backbone=L(RetinaFaceFPN)(
        bottom_up=L(MobileNetV1)(width=0.25),
        in_features=["stage1", "stage2", "stage3"],
        out_channels=64,
    ),
    head=L(RetinaFaceHead)(
        input_shape=[ShapeSpec(channels=64, stride=stride) for stride in (8, 16, 32)],
        num_classes=1,
        num_points=5,
        priors_per_cell=2,
    ),
    criterion=L(RetinaFaceCriterion)(),
    anchor_scales=[[16.0, 32.0], [64.0, 128.0], [256.0, 512.0]],
    pixel_mean=[104.0, 117.0, 123.0],
    pixel_std=[1.0, 1.0, 1.0],
    channels_last=True,
)
