"""The stacked hourglass as a backbone."""

from __future__ import annotations

import pytest
import torch

from d2ext.modeling.inference import fold_norms
from d2ext.modeling.newell_hourglass import NewellHourglass


def small(**kwargs: object) -> NewellHourglass:
    torch.manual_seed(0)
    options = {
        "num_stacks": 3,
        "num_maps": 5,
        "channels": 8,
        "stem_channels": (4, 6, 8),
        "depth": 2,
    }
    return NewellHourglass(**{**options, **kwargs})  # type: ignore[arg-type]


def settled(**kwargs: object) -> NewellHourglass:
    """One whose norms have seen something, and whose biases show."""
    net = small(**kwargs).train()
    with torch.no_grad():
        for name, value in net.named_parameters():
            if name.endswith("bias"):
                value.uniform_(-1, 1)
    for _ in range(3):
        net(torch.rand(4, 3, 32, 32))
    return net.eval()


def test_outputs_are_those_announced() -> None:
    net = small()
    outputs = net(torch.rand(2, 3, 32, 48))
    shapes = net.output_shape()
    assert list(outputs) == list(shapes)
    assert list(outputs) == ["stack1", "maps1", "stack2", "maps2", "stack3", "maps3"]
    for name, value in outputs.items():
        assert value.shape == (2, shapes[name].channels, 8, 12) and shapes[name].stride == 4
    assert net.size_divisibility == 16


def test_without_maps() -> None:
    net = small(num_maps=0).eval()
    assert list(net(torch.rand(1, 3, 16, 16))) == ["stack1", "stack2", "stack3"]
    assert not any("maps" in name or "predictor" in name for name in net.state_dict())


def test_maps_and_features_of_a_stack_reach_the_next() -> None:
    net = small().eval()
    images = torch.rand(1, 3, 32, 32)
    before = net(images)["maps2"]
    for part in ("merge_maps", "merge_features"):
        changed = small().eval()
        changed.load_state_dict(net.state_dict())
        getattr(changed.stacks[0], part).weight.data.zero_()
        after = changed(images)
        torch.testing.assert_close(after["maps1"], net(images)["maps1"])
        assert (after["maps2"] - before).abs().max() > 1e-3
    assert net.stacks[2].merge_maps is None and net.stacks[2].merge_features is None


@pytest.mark.parametrize(("every_level", "innermost"), [(False, 12), (True, 16)])
def test_inner_levels_may_be_wider(every_level: bool, innermost: int) -> None:
    net = small(increase=4, increase_every_level=every_level).eval()
    assert net.stacks[0].hourglass.low1.conv3.out_channels == 12
    assert net.stacks[0].hourglass.low2.low1.conv3.out_channels == innermost
    assert net(torch.rand(1, 3, 16, 16))["maps3"].shape == (1, 5, 4, 4)


def test_folded_norms_say_the_same() -> None:
    net = settled()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(images)
        fold_norms(net)
        found = net(images)
    # The norms after convolutions are gone; those before the first convolution of a block stay.
    left = [n for n, m in net.named_modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert left and all(name.endswith("pre_norm") for name in left)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def test_wrong_settings() -> None:
    for options in ({"num_stacks": 0}, {"depth": 0}, {"norm": ""}):
        with pytest.raises(ValueError, match="NUM_STACKS"):
            small(**options)
    for options in ({"channels": 9}, {"stem_channels": (4, 5, 8)}, {"stem_channels": (4, 8)}):
        with pytest.raises(ValueError, match="even"):
            small(**options)
    with pytest.raises(ValueError, match="multiples of 16"):
        small()(torch.rand(1, 3, 40, 32))


@pytest.mark.parametrize("num_maps", [0, 5])
def test_prepared_for_inference_says_the_same(num_maps: int) -> None:
    net = settled(num_maps=num_maps, increase=2, increase_every_level=True)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = net(images)
        fold_norms(net)
        net.prepare_inference()
        found = net(images)
    summed = [n for n, m in net.named_modules() if n.endswith("conv3") and m.bias is not None]
    assert not summed and net.stacks[0].merge_maps is None
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)


def test_norms_of_the_input_are_left_as_they_are() -> None:
    net = small(norm="GN", channels=64, stem_channels=(64, 64, 64)).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fold_norms(net)
    net.prepare_inference()
    assert all(torch.equal(net.state_dict()[name], value) for name, value in before.items())
    assert net.stacks[0].merge_maps is not None
