"""cornernet_hourglass104_511.yaml as a lazy config."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from d2ext.modeling import CornerNetHourglass
from d2ext.systems.cornernet import CornerNet, CornerNetCriterion, CornerNetHead

from ..common.training import training

dataloader, optimizer, lr_multiplier, train = training("cornernet/cornernet_hourglass104_511.yaml")
model = L(CornerNet)(
    backbone=L(CornerNetHourglass)(num_stacks=2),
    head=L(CornerNetHead)(
        input_shape={f"stack{i}": ShapeSpec(channels=256, stride=4) for i in (1, 2)},
        num_classes="${..num_classes}",
        pool_channels=128,
        hidden=256,
    ),
    criterion=L(CornerNetCriterion)(),
    num_classes=80,
    pixel_mean=[104.01361770, 114.03422010, 119.91659325],
    pixel_std=[73.60276140, 69.89081820, 70.91507925],
)
