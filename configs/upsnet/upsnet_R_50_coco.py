"""upsnet_R_50_coco.yaml as a lazy config."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
)

from d2ext.systems.upsnet import (
    DetectronAnchorGenerator,
    GlobalContextFPN,
    PyramidRoIAlign,
    UPSNet,
    UPSNetROIHeads,
    UPSNetRPN,
    UPSNetSemanticHead,
)
from d2ext.systems.upsnet.postprocess import UPSNetPostprocessor

from ..common.resnet import resnet
from ..common.training import training

_stages = ["res2", "res3", "res4", "res5"]
_levels = ["p2", "p3", "p4", "p5"]
_strides = [4, 8, 16, 32]

dataloader, optimizer, lr_multiplier, train = training("upsnet/upsnet_R_50_coco.yaml")
model = L(UPSNet)(
    backbone=L(GlobalContextFPN)(
        bottom_up=resnet(
            50, norm="FrozenBN", out_features=_stages, freeze_at=2, stride_in_1x1=True
        ),
        in_features=_stages,
        out_channels=256,
    ),
    proposal_generator=L(UPSNetRPN)(
        in_features=[*_levels, "p6"],
        head=L(StandardRPNHead)(in_channels=256, num_anchors=3),
        anchor_generator=L(DetectronAnchorGenerator)(
            sizes=[[32], [64], [128], [256], [512]],
            aspect_ratios=[[0.5, 1.0, 2.0]],
            strides=[*_strides, 64],
            offset=0.0,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=(2000, 1000),
        post_nms_topk=(2000, 1000),
        nms_thresh=0.7,
    ),
    roi_heads=L(UPSNetROIHeads)(
        num_classes=80,
        batch_size_per_image=512,
        positive_fraction=0.25,
        proposal_matcher=L(Matcher)(
            thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False
        ),
        box_in_features=_levels,
        box_pooler=L(PyramidRoIAlign)(size=7, strides=_strides),
        box_head=L(FastRCNNConvFCHead)(
            input_shape=ShapeSpec(channels=256, height=7, width=7),
            conv_dims=[],
            fc_dims=[1024, 1024],
        ),
        box_predictor=L(FastRCNNOutputLayers)(
            input_shape=ShapeSpec(channels=1024),
            box2box_transform=L(Box2BoxTransform)(weights=(10, 10, 5, 5)),
            num_classes="${..num_classes}",
            test_score_thresh=0.05,
            loss_weight={"loss_box_reg": 1.0},
        ),
        mask_in_features=_levels,
        mask_pooler=L(PyramidRoIAlign)(size=14, strides=_strides),
        mask_head=L(MaskRCNNConvUpsampleHead)(
            input_shape=ShapeSpec(channels=256, width=14, height=14),
            num_classes="${..num_classes}",
            conv_dims=[256, 256, 256, 256, 256],
        ),
    ),
    sem_seg_head=L(UPSNetSemanticHead)(
        input_shape={
            name: ShapeSpec(channels=256, stride=stride)
            for name, stride in zip(_levels, _strides, strict=True)
        },
        in_features=_levels,
        channels=[256, 128, 128],
        num_classes=133,
    ),
    postprocessor=L(UPSNetPostprocessor)(num_stuff=53, num_things=80),
    labels_with_things=True,
    min_size=800,
    max_size=1333,
    pixel_mean=[102.9801, 115.9465, 122.7717],
    pixel_std=[1.0, 1.0, 1.0],
)
