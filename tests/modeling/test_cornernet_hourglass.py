"""CornerNet's stacked hourglass. Agreement with the published network: tests/systems/cornernet."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone
from torch.nn import functional as F

from d2ext.config import get_cfg
from d2ext.modeling.cornernet_hourglass import CornerNetHourglass, FireBlock, ResidualBlock
from d2ext.modeling.inference import fold_norms


def small(**options: object) -> CornerNetHourglass:
    torch.manual_seed(0)
    arguments: dict[str, object] = {
        "channels": (8, 10, 12),
        "blocks": (1, 2, 1),
        "stem_channels": 4,
        "out_channels": 6,
    }
    return CornerNetHourglass(**{**arguments, **options}).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("block", ["residual", "fire"])
@pytest.mark.parametrize("stem_blocks", [1, 2])
def test_outputs_have_the_promised_shapes(block: str, stem_blocks: int) -> None:
    model = small(block=block, stem_blocks=stem_blocks, out_levels=True)
    unit = model.size_divisibility
    assert unit == 2 ** (1 + stem_blocks) * 4
    for height, width in ((unit, 2 * unit), (2 * unit - 1, unit - 1)):
        outputs = model(torch.rand(2, 3, height, width))
        shapes = model.output_shape()
        assert set(outputs) == set(shapes)
        for name, value in outputs.items():
            stride = shapes[name].stride
            size = ((height + 1) // stride, (width + 1) // stride)
            assert value.shape == (2, shapes[name].channels, *size), name


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        small()(torch.rand(1, 3, 16, 24))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": "bottleneck"}, "BLOCK"),
        ({"blocks": (1, 2)}, "BLOCKS"),
        ({"num_stacks": 0}, "NUM_STACKS"),
        ({"block": "fire", "channels": (8, 9, 12)}, "even"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


@pytest.mark.parametrize(
    ("options", "values", "entries"),
    [
        # Values and entries of the published hourglasses without corner modules and heads. A fire
        # module has one norm over both halves there and one for each (5 entries more) here.
        ({}, 187_818_016, 960),
        ({"num_stacks": 1}, 93_721_552, 480),
    ],
)
def test_published_size(options: dict[str, int], values: int, entries: int) -> None:
    with torch.device("meta"):
        state = CornerNetHourglass(**options).state_dict()
    assert len(state) == entries
    assert sum(x.numel() for x in state.values()) == values


def test_second_stack_sees_the_first() -> None:
    model = small()
    x = torch.rand(1, 3, 16, 16)
    first = model(x)
    with torch.no_grad():
        model.convs[0].conv.weight.mul_(0.5)
        model.convs[0].conv.norm.bias.add_(0.1)
    second = model(x)
    assert not torch.allclose(first["stack1"], second["stack1"])
    assert not torch.allclose(first["stack2"], second["stack2"])


def test_residual_block_by_hand() -> None:
    torch.manual_seed(1)
    block = ResidualBlock(4, 4, norm="BN", stride=2).eval()
    x = torch.randn(1, 4, 6, 6)
    y = F.relu(F.conv2d(x, block.conv1.weight, stride=2, padding=1) / (1 + 1e-5) ** 0.5)
    y = F.conv2d(y, block.conv2.weight, padding=1) / (1 + 1e-5) ** 0.5
    y = F.relu(y + F.conv2d(x, block.skip.weight, stride=2) / (1 + 1e-5) ** 0.5)
    torch.testing.assert_close(block(x), y)
    assert ResidualBlock(4, 4, norm="BN").skip is None


def test_fire_block_by_hand() -> None:
    torch.manual_seed(1)
    x = torch.randn(1, 6, 5, 5)
    for stride, out, has_skip in ((1, 6, True), (2, 6, False), (1, 8, False)):
        block = FireBlock(6, out, norm="", stride=stride)
        with torch.no_grad():
            squeezed = block.squeeze(x)
            halves = [block.expand1x1(squeezed), block.expand3x3(squeezed)]
            expected = torch.cat(halves, dim=1) + (x if has_skip else 0)
            assert (squeezed < 0).any()  # no ReLU before the two convolutions
            torch.testing.assert_close(block(x), expected.clamp(min=0))
        assert block.expand3x3.weight.shape == (out // 2, 1, 3, 3)


def test_intermediate_supervision_reaches_every_stack() -> None:
    model = small(num_stacks=3).train()
    outputs = model(torch.rand(2, 3, 32, 32))
    outputs["stack2"].square().sum().backward()
    assert model.stacks[0].up[0].conv1.weight.grad is not None
    assert model.stacks[2].up[0].conv1.weight.grad is None


@pytest.mark.parametrize("block", ["residual", "fire"])
def test_norms_fold_away(block: str) -> None:
    model = small(block=block)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.1)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    folded = copy.deepcopy(model)
    fold_norms(folded)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
    x = torch.rand(1, 3, 31, 16)
    for name, value in model(x).items():
        torch.testing.assert_close(folded(x)[name], value, atol=1e-4, rtol=1e-4)


def test_from_config() -> None:
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_cornernet_hourglass_backbone"
    cfg.MODEL.CORNERNET_HOURGLASS.CHANNELS = [4, 6]
    cfg.MODEL.CORNERNET_HOURGLASS.BLOCKS = [1, 1]
    cfg.MODEL.CORNERNET_HOURGLASS.OUT_CHANNELS = 5
    cfg.MODEL.CORNERNET_HOURGLASS.NUM_STACKS = 1
    model = build_backbone(cfg, ShapeSpec(channels=3))
    assert isinstance(model, CornerNetHourglass)
    assert {k: (v.channels, v.stride) for k, v in model.output_shape().items()} == {
        "stack1": (5, 4)
    }
