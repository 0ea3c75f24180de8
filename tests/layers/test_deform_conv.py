"""The deformable layer against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from d2ext.layers.deform_conv import DeformConv, ModulatedDeformConv


def _bilinear(plane: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """plane (C, H, W) at a real position, zeros outside."""
    height, width = plane.shape[1:]
    y0, x0 = int(y // 1), int(x // 1)
    total = torch.zeros(len(plane), dtype=plane.dtype)
    for row, wy in ((y0, 1 - (y - y0)), (y0 + 1, y - y0)):
        for column, wx in ((x0, 1 - (x - x0)), (x0 + 1, x - x0)):
            if 0 <= row < height and 0 <= column < width:
                total += plane[:, row, column] * wy * wx
    return total


def test_starts_as_half_a_convolution() -> None:
    layer = ModulatedDeformConv(4, 6, stride=2)
    x = torch.rand(2, 4, 9, 11)
    expected = F.conv2d(x, layer.weight / 2, layer.bias, stride=2, padding=1)
    torch.testing.assert_close(layer(x), expected)


def test_equals_loops_over_taps() -> None:
    torch.manual_seed(0)
    layer = ModulatedDeformConv(2, 3).double()
    nn.init.normal_(layer.offset_mask.weight, std=0.5)
    nn.init.normal_(layer.bias)
    x = torch.rand(1, 2, 5, 6, dtype=torch.float64)
    predicted = layer.offset_mask(x)[0].detach()
    expected = torch.zeros(3, 5, 6, dtype=torch.float64)
    for i in range(5):
        for j in range(6):
            total = layer.bias.detach().clone()
            for tap in range(9):
                dy, dx = predicted[2 * tap, i, j], predicted[2 * tap + 1, i, j]
                weight = torch.sigmoid(predicted[18 + tap, i, j])
                value = _bilinear(x[0], float(i - 1 + tap // 3 + dy), float(j - 1 + tap % 3 + dx))
                total += layer.weight[:, :, tap // 3, tap % 3].detach() @ value * weight
            expected[:, i, j] = total
    torch.testing.assert_close(layer(x)[0].detach(), expected)


def test_norm_is_applied_and_gradients_flow() -> None:
    layer = ModulatedDeformConv(2, 3, norm=nn.BatchNorm2d(3))
    output = layer(torch.rand(4, 2, 6, 6))
    torch.testing.assert_close(output.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    output.square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_runs_under_autocast() -> None:
    layer = ModulatedDeformConv(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(torch.rand(1, 2, 6, 6))
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_infinite_offsets_do_not_crash(value: float) -> None:
    """torchvision's kernel reads outside the image where an offset is NaN."""
    conv = ModulatedDeformConv(3, 4)
    with torch.no_grad():
        conv.offset_mask.bias[:] = value
    output = conv(torch.rand(1, 3, 40, 50))
    assert output.shape == (1, 4, 40, 50)
    if value != value:
        assert output.isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_infinite_offsets_of_one_place_stay_there(value: float) -> None:
    """Without tap weights too, and what is far from a broken place of the input stays finite."""
    conv = DeformConv(2, 3)
    conv.offset.weight.data[:] = 0.01
    x = torch.rand(1, 2, 12, 14)
    x[0, 0, 5, 6] = value
    output = conv(x)
    assert output.shape == (1, 3, 12, 14)
    near, far = torch.zeros(12, 14, dtype=torch.bool), torch.ones(12, 14, dtype=torch.bool)
    near[4:7, 5:8] = True
    # Taps lie between cells: they interpolate with the next but one neighbour.
    far[3:8, 4:9] = False
    if value != value:
        assert output[0, :, near].isnan().all()
    assert output[0, :, far].isfinite().all()
