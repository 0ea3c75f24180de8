"""hourglass_2stack_mpii_256.yaml as a lazy config."""

from detectron2.config import LazyCall as L

from d2ext.codecs.landmark_heatmaps import HeatmapCodec
from d2ext.modeling import NewellHourglass
from d2ext.systems.landmarks import HeatmapHead, LandmarkNet

from ..common.training import training

dataloader, optimizer, lr_multiplier, train = training("landmarks/hourglass_2stack_mpii_256.yaml")
model = L(LandmarkNet)(
    backbone=L(NewellHourglass)(num_stacks=2, num_maps="${..num_keypoints}"),
    head=L(HeatmapHead)(
        in_features=["maps1", "maps2"],
        num_keypoints="${..num_keypoints}",
        codec=L(HeatmapCodec)(
            input_size=[256, 256],
            map_size=[64, 64],
            sigma=1.0,
            center="hourglass",
            decoder="hourglass",
        ),
        loss="mse",
    ),
    num_keypoints=16,
    input_size=[256, 256],
    crop_method="hourglass",
    flip_indices=[5, 4, 3, 2, 1, 0, 6, 7, 8, 9, 15, 14, 13, 12, 11, 10],
    truncate=True,
    pixel_mean=[0.0, 0.0, 0.0],
    pixel_std=[255.0, 255.0, 255.0],
    input_format="RGB",
)
