"""densepose_rcnn_R_50_FPN_s1x.yaml as a lazy config: Detectron2's Faster R-CNN with the branch."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.model_zoo import get_config
from detectron2.modeling.poolers import ROIPooler

from d2ext.systems.densepose import (
    ChartLoss,
    DensePoseChartPredictor,
    DensePoseDecoder,
    DensePoseROIHeads,
    DensePoseV1ConvXHead,
)

from ..common.training import training

_levels = ["p2", "p3", "p4", "p5"]
_strides = [4, 8, 16, 32]

dataloader, optimizer, lr_multiplier, train = training("densepose/densepose_rcnn_R_50_FPN_s1x.yaml")
model = get_config("common/models/mask_rcnn_fpn.py").model
model.backbone.bottom_up.freeze_at = 2
model.vis_period = 0
model.roi_heads.pop("mask_in_features")
model.roi_heads.pop("mask_pooler")
model.roi_heads.pop("mask_head")
model.roi_heads.update(
    _target_=DensePoseROIHeads,
    num_classes=1,
    densepose_in_features=_levels,
    decoder=L(DensePoseDecoder)(
        input_shape={
            name: ShapeSpec(channels=256, stride=stride)
            for name, stride in zip(_levels, _strides, strict=True)
        },
        channels=256,
    ),
    densepose_pooler=L(ROIPooler)(
        output_size=28, scales=[1 / 4], sampling_ratio=2, pooler_type="ROIAlign"
    ),
    densepose_head=L(DensePoseV1ConvXHead)(in_channels=256, num_convs=8, channels=512, kernel=3),
    densepose_predictor=L(DensePoseChartPredictor)(in_channels=512, coarse_channels=2),
    embedder=None,
    densepose_criterion=L(ChartLoss)(),
)
model.roi_heads.box_pooler.update(sampling_ratio=2, pooler_type="ROIAlign")
model.roi_heads.box_predictor.loss_weight = {"loss_box_reg": 1.0}
