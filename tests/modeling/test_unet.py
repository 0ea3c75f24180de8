"""The small U-Net as a backbone."""

from __future__ import annotations

import pytest
import torch

from d2ext.modeling.unet import UNetBackbone


@pytest.mark.parametrize("stem", [2, 4])
def test_outputs_are_those_announced(stem: int) -> None:
    torch.manual_seed(0)
    net = UNetBackbone(3, (4, 6, 8), 5, stem_stride=stem)
    assert net.size_divisibility == stem * 4
    images = torch.rand(2, 3, 32, 48)
    outputs, shapes = net(images), net.output_shape()
    assert list(outputs) == list(shapes) == ["image", "unet"]
    for name, x in outputs.items():
        stride = shapes[name].stride
        assert x.shape == (2, shapes[name].channels, 32 // stride, 48 // stride)
    assert torch.equal(outputs["image"], images)
    assert shapes["unet"].stride == 2 * stem
    outputs["unet"].sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_sees_beyond_its_finest_level() -> None:
    """What the coarsest level sees comes up to each cell of the result."""
    torch.manual_seed(0)
    net = UNetBackbone(3, (4, 6, 8, 8), 5).eval()
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    net(images)["unet"][0, :, 0, 0].sum().backward()
    assert images.grad is not None
    seen = images.grad.abs().sum(dim=(0, 1)).nonzero().amax(0)
    assert (seen > 40).all()
