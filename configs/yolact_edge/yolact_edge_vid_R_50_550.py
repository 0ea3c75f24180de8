"""yolact_edge_vid_R_50_550.yaml as a lazy config."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from d2ext.systems.yolact import BilinearFPN, YOLACTCriterion, YOLACTHead
from d2ext.systems.yolact_edge import FlowNet, Refinement, YolactEdge

from ..common.resnet import resnet
from ..common.training import training

dataloader, optimizer, lr_multiplier, train = training("yolact_edge/yolact_edge_vid_R_50_550.yaml")
model = L(YolactEdge)(
    stage="video",
    flow_net=L(FlowNet)(channels=256, num_levels=3, width=64, published_init=True),
    refinement=L(Refinement)(channels=256, num_levels=2),
    test_all_phases=True,
    published_warp_convs=True,
    joint_images=True,
    backbone=L(BilinearFPN)(
        bottom_up=resnet(50, norm="BN", out_features=["res3", "res4", "res5"], stride_in_1x1=False),
        in_features=["res3", "res4", "res5"],
        out_channels=256,
        num_extra_levels=2,
    ),
    head=L(YOLACTHead)(
        input_shape=[ShapeSpec(channels=256, stride=stride) for stride in (8, 16, 32, 64, 128)],
        num_classes=40,
        num_prototypes=32,
        channels=256,
        priors_per_cell=3,
        semantic=True,
    ),
    criterion=L(YOLACTCriterion)(),
    input_size=550,
    anchor_scales=[[24.0], [48.0], [96.0], [192.0], [384.0]],
    anchor_ratios=[1.0, 0.5, 2.0],
    square_anchors=True,
    # The batch norms of fewer than six images a process stay as they are in the checkpoint.
    freeze_batch_norm=False,
    pixel_mean=[123.68, 116.78, 103.94],
    pixel_std=[58.40, 57.12, 57.38],
    input_format="RGB",
)
