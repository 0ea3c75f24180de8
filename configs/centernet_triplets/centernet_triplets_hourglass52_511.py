"""centernet_triplets_hourglass52_511.yaml as a lazy config."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from d2ext.modeling import CornerNetHourglass
from d2ext.systems.centernet_triplets import CenterNetTriplets, CenterNetTripletsHead
from d2ext.systems.cornernet import CornerNetCriterion

from ..common.training import training

dataloader, optimizer, lr_multiplier, train = training(
    "centernet_triplets/centernet_triplets_hourglass52_511.yaml"
)
model = L(CenterNetTriplets)(
    backbone=L(CornerNetHourglass)(num_stacks=1),
    head=L(CenterNetTripletsHead)(
        input_shape={"stack1": ShapeSpec(channels=256, stride=4)},
        num_classes="${..num_classes}",
        pool_channels=128,
        hidden=256,
    ),
    criterion=L(CornerNetCriterion)(),
    num_classes=80,
    min_overlap=0.7,
    top_k=70,
    pixel_mean=[104.01361770, 114.03422010, 119.91659325],
    pixel_std=[73.60276140, 69.89081820, 70.91507925],
)
