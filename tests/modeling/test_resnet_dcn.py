"""ResNets with deformable convolutions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling.backbone.resnet import build_resnet_backbone

from d2ext.config import get_cfg
from d2ext.layers.deform_conv import DeformConv, ModulatedDeformConv
from d2ext.modeling import build_deformable_resnet, build_resnet_dcn_backbone

IMAGE = ShapeSpec(channels=3)


def config(**resnets: object) -> CfgNode:
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, True, False, True]
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.merge_from_list([x for k, v in resnets.items() for x in (f"MODEL.RESNETS.{k}", v)])
    return cfg


@pytest.mark.parametrize("interval", [1, 3])
def test_blocks_that_are_deformable(interval: int) -> None:
    cfg = config(DEFORM_INTERVAL=interval, STRIDE_IN_1X1=False, NORM="BN")
    cfg.MODEL.BACKBONE.FREEZE_AT = 3
    with torch.device("meta"):
        resnet = build_resnet_dcn_backbone(cfg, IMAGE)
        plain = build_resnet_backbone(config(DEFORM_ON_PER_STAGE=[False] * 4), IMAGE)
    for number, (stage, as_it_was) in enumerate(zip(resnet.stages, plain.stages, strict=True)):
        for i, block in enumerate(stage):
            deformable = number in (1, 3) and i % interval == 0
            assert isinstance(block.conv2, ModulatedDeformConv) == deformable
            assert (block.conv2.bias is not None) == deformable
            # res2 and res3 are frozen, their deformable convolutions too.
            frozen = number < 2
            assert all(p.requires_grad != frozen for p in block.parameters())
            assert isinstance(block.conv2.norm, FrozenBatchNorm2d) == frozen
        assert len(stage) == len(as_it_was)
        stride = stage[0].conv2.stride
        assert (stride if isinstance(stride, int) else stride[0]) == (2 if number else 1)
    # Parameters keep the places that they have in a plain ResNet, for optimizers' states.
    names = [n for n in resnet.state_dict() if ".offset_mask." not in n and "conv2.bias" not in n]
    expected = [n for n in plain.state_dict() if "num_batches_tracked" not in n]
    assert [n for n in names if "num_batches_tracked" not in n] == expected


def test_new_layers_are_plain_convolutions() -> None:
    """Offsets start at zero."""
    torch.manual_seed(0)
    cfg = config(DEPTH=18, RES2_OUT_CHANNELS=64)
    resnet = build_deformable_resnet(cfg, IMAGE, partial(DeformConv, bias=False)).eval()
    plain = build_resnet_backbone(
        config(DEPTH=18, RES2_OUT_CHANNELS=64, DEFORM_ON_PER_STAGE=[False] * 4), IMAGE
    ).eval()
    plain.load_state_dict(resnet.state_dict(), strict=False)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for name, value in plain(x).items():
            torch.testing.assert_close(resnet(x)[name], value, rtol=1e-4, atol=1e-4)


def test_the_interval_is_positive() -> None:
    with pytest.raises(ValueError, match="DEFORM_INTERVAL"):
        build_resnet_dcn_backbone(config(DEFORM_INTERVAL=0), IMAGE)
