"""The flow net's units and YolactEdge's own losses, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from d2ext.systems.yolact_edge.flow import warp
from d2ext.systems.yolact_edge.losses import flow_loss, flow_targets, warp_loss


def test_eight_units_of_flow_are_half_the_map() -> None:
    features = torch.arange(5.0).view(1, 1, 1, 5).expand(1, 1, 3, 5)
    # From the middle of one corner cell to that of the other there are four cells.
    flow = torch.tensor([4.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 3, 5)
    torch.testing.assert_close(warp(features, flow)[0, 0, 0], torch.tensor([1.0, 2, 3, 4, 0]))
    pixels = torch.tensor([20.0, -15.0]).view(1, 2, 1, 1).expand(1, 2, 60, 80)
    assert flow_targets(pixels)[0, :, 0, 0].tolist() == [4.0, -4.0]


def test_warp_loss_is_one_minus_the_cosine() -> None:
    """Of features and of what a convolution and a ReLU make of them, here those of the first channel."""
    conv = nn.Conv2d(2, 2, 3, padding=1)
    nn.init.dirac_(conv.weight)
    nn.init.zeros_(conv.bias)
    with torch.no_grad():
        conv.weight[1] = 0

    def level(x: float, y: float) -> Tensor:
        return torch.tensor([float(x), float(y)]).view(1, 2, 1, 1).expand(1, 2, 3, 3)

    def loss(*pairs: tuple[Tensor, Tensor]) -> float:
        carried, own = zip(*pairs, strict=True)
        return warp_loss(carried, own, [conv] * len(pairs)).item()

    equal, turned = (level(2, 2), level(1, 1)), (level(1, 0), level(1, 1))
    assert loss(equal) == pytest.approx(0, abs=1e-6)
    # An eighth of a turn, of which nothing is left in the first channel.
    assert loss(turned) == pytest.approx((1 - math.sqrt(0.5)) / 2)
    assert loss(equal, turned) == pytest.approx((1 - math.sqrt(0.5)) / 4)
    assert loss((level(-1, 0), level(1, 0))) == pytest.approx((2 + 1) / 2)


def test_flow_loss_is_a_mean_over_known_cells_and_a_sum_over_levels() -> None:
    targets = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    fine, coarse = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)
    assert flow_loss([fine, coarse], targets, valid).item() == pytest.approx(5 + 5)
    valid[:] = False
    valid[0, 1, 2] = True  # one cell; each of the coarser level reaches an unknown pixel
    fine[0, :, 1, 2] = torch.tensor([3.0, 2.0])
    assert flow_loss([fine, coarse], targets, valid).item() == pytest.approx(2)
