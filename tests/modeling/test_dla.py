"""DLA-34 and ResNet with up-sampling; their weights are compared in tests/systems/centernet."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_backbone
from torch import nn
from torch.nn import functional as F

from d2ext.config import get_cfg
from d2ext.modeling.dla import DLA34, DLAUp
from d2ext.modeling.inference import fold_norms
from d2ext.modeling.resnet_deconv import ResNetDeconv
from d2ext.modeling.upsampling import upsampling


def _resnet(depth: int = 18, deform: bool = True) -> ResNetDeconv:
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_resnet_deconv_backbone"
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if depth == 18 else 256
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.DECONV.DEFORM = deform
    cfg.MODEL.DECONV.CHANNELS = [32, 16, 8]
    return build_backbone(cfg)


def test_backbones_are_registered() -> None:
    assert "build_dla_up_backbone" in BACKBONE_REGISTRY
    backbone = BACKBONE_REGISTRY.get("build_dla_up_backbone")(get_cfg(), ShapeSpec(channels=3))
    assert isinstance(backbone, DLAUp) and backbone.size_divisibility == 32


@pytest.mark.parametrize("kind", ["dla", "dlav0", "dcn", "plain", "dcn_50"])
def test_output_shape(kind: str) -> None:
    torch.manual_seed(0)
    backbone: Backbone
    if kind.startswith("dla"):
        backbone = DLAUp(DLA34(), deform=kind == "dla")
    else:
        backbone = _resnet(50 if kind == "dcn_50" else 18, kind != "plain")
    backbone.eval()
    ((name, spec),) = backbone.output_shape().items()
    (output,) = backbone(torch.rand(2, 3, 64, 96)).values()
    assert output.shape == (2, spec.channels, 16, 24) and spec.stride == 4
    assert list(backbone(torch.rand(1, 3, 32, 32))) == [name]


def test_plain_upsampling_joins_by_concatenation() -> None:
    cfg = get_cfg()
    cfg.MODEL.DLA.DEFORM = False
    backbone = BACKBONE_REGISTRY.get("build_dla_up_backbone")(cfg, ShapeSpec(channels=3)).eval()
    assert not any("Deform" in type(module).__name__ for module in backbone.modules())
    step = backbone.steps[0]
    maps = [torch.rand(1, 256, 4, 6), torch.rand(1, 512, 2, 3)]
    (joined,) = step(maps)
    weight = step.nodes[0].conv.weight.data
    assert weight.shape == (256, 512, 3, 3) and step.projections[0].conv.kernel_size == (1, 1)
    weight[:, 256:] = 0  # what is enlarged comes second
    (coarse_ignored,) = step([maps[0], 2 * maps[1]])
    assert torch.equal(step(maps)[0], coarse_ignored) and not torch.equal(joined, coarse_ignored)


def test_levels_of_the_bottom_up_net() -> None:
    net = DLA34(out_features=["level0", "level3", "level5"]).eval()
    outputs = net(torch.rand(1, 3, 64, 32))
    assert {k: tuple(v.shape[1:]) for k, v in outputs.items()} == {
        "level0": (16, 64, 32),
        "level3": (128, 8, 4),
        "level5": (512, 2, 1),
    }
    assert {k: s.stride for k, s in net.output_shape().items()} == {
        "level0": 1,
        "level3": 8,
        "level5": 32,
    }
    with pytest.raises(ValueError, match="level6"):
        DLA34(out_features=["level6"])


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_upsampling_starts_bilinear(factor: int) -> None:
    x = torch.rand(1, 3, 7, 9)
    smooth = F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
    inner = (..., slice(factor, -factor), slice(factor, -factor))
    depthwise = upsampling(3, factor, depthwise=True)(x)
    assert depthwise.shape == smooth.shape
    torch.testing.assert_close(depthwise[inner], smooth[inner])
    mixing = upsampling(3, factor, depthwise=False)
    with torch.no_grad():
        others = ~torch.eye(3, dtype=torch.bool)
        mixing.weight[others] = 0
    torch.testing.assert_close(mixing(x)[inner], smooth[inner])


@pytest.mark.parametrize("kind", ["dla", "dcn"])
def test_norms_fold_away(kind: str) -> None:
    torch.manual_seed(0)
    net: nn.Module = DLAUp(DLA34()) if kind == "dla" else _resnet()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.normal_(module.running_mean, std=0.1)
    net.eval()
    folded = copy.deepcopy(net)
    fold_norms(folded)
    left = sum(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    # behind transposed convolutions they stay
    assert left == (0 if kind == "dla" else 3)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        (expected,), (actual,) = net(x).values(), folded(x).values()
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [2, 4])
def test_depthwise_upsampling_in_low_precision(cuda: torch.device, factor: int) -> None:
    torch.manual_seed(0)
    layer = upsampling(16, factor, depthwise=True).to(cuda)
    nn.init.normal_(layer.weight)
    x = torch.randn(2, 16, 9, 12, device=cuda).bfloat16()
    gradients = []
    for cast in (torch.Tensor.float, torch.Tensor.bfloat16):
        copy_of_x = cast(x).requires_grad_()
        # What a training under autocast gives the layer: weights in float32.
        with torch.autocast("cuda", torch.bfloat16, enabled=cast is torch.Tensor.bfloat16):
            y = layer(copy_of_x)
        assert y.dtype == copy_of_x.dtype and y.shape == (2, 16, 9 * factor, 12 * factor)
        weights = torch.linspace(-1, 1, y.numel(), device=cuda).view_as(y)
        gradients.append([y, *torch.autograd.grad((y * weights).sum(), (copy_of_x, layer.weight))])
    for exact, low in zip(*gradients, strict=True):
        assert (exact - low).norm() < 0.01 * exact.norm()
