"""vpsnet_fusetrack_R_50_cityscapes_vps.yaml as a lazy config."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
)

from d2ext.modeling.flow import FlowNet2
from d2ext.systems.upsnet import UPSNetSemanticHead
from d2ext.systems.vpsnet import (
    FusionNeck,
    RoundedAnchorGenerator,
    TrackHead,
    VPSNet,
    VPSNetROIHeads,
    VPSNetRPN,
)
from d2ext.systems.vpsnet.postprocess import VPSNetPostprocessor
from d2ext.systems.vpsnet.roi_heads import VPSNetRoIAlign

from ..common.resnet import resnet
from ..common.training import training

_stages = ["res2", "res3", "res4", "res5"]
_levels = ["p2", "p3", "p4", "p5"]
_strides = [4, 8, 16, 32]

dataloader, optimizer, lr_multiplier, train = training(
    "vpsnet/vpsnet_fusetrack_R_50_cityscapes_vps.yaml"
)
model = L(VPSNet)(
    flow=L(FlowNet2)(),
    fusion=L(FusionNeck)(channels=256, max_displacement=4, published_warp=True),
    track_head=L(TrackHead)(inputs=256 * 7 * 7, channels=1024),
    max_objects=0,
    backbone=L(FPN)(
        bottom_up=resnet(50, norm="BN", out_features=_stages, freeze_at=2, stride_in_1x1=False),
        in_features=_stages,
        out_channels=256,
        top_block=L(LastLevelMaxPool)(),
    ),
    proposal_generator=L(VPSNetRPN)(
        in_features=[*_levels, "p6"],
        head=L(StandardRPNHead)(in_channels=256, num_anchors=3),
        anchor_generator=L(RoundedAnchorGenerator)(
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
        pre_nms_topk=(1000, 1000),
        post_nms_topk=(1000, 1000),
        nms_thresh=0.7,
    ),
    roi_heads=L(VPSNetROIHeads)(
        num_classes=8,
        batch_size_per_image=512,
        positive_fraction=0.25,
        proposal_matcher=L(Matcher)(
            thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False
        ),
        box_in_features=_levels,
        box_pooler=L(VPSNetRoIAlign)(size=7, strides=_strides),
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
        mask_pooler=L(VPSNetRoIAlign)(size=14, strides=_strides),
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
        num_classes=19,
        norm="GN",
    ),
    postprocessor=L(VPSNetPostprocessor)(
        num_stuff=11,
        num_things=8,
        unknown=False,
        stuff_area_limit=2048,
        published_dummy=True,
        published_id_lookup=True,
    ),
    labels_with_things=True,
    semantic_weight=1.0,
    semantic_roi_weight=0.0,
    panoptic_weight=0.5,
    keep_fraction=1.0,
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
    input_format="RGB",
)
