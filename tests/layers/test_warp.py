"""Warping by flow: against naive loops and the published operators."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from d2ext.layers import warp
from tests.reference.fixture import Fixture, draw_tensor

OPERATORS = Path(__file__).parents[1] / "reference/vpsnet/operators"


def naive(features: Tensor, flow: Tensor, border: bool) -> Tensor:
    batch, _, height, width = features.shape
    result = torch.zeros_like(features)
    for i in range(batch):
        for y in range(height):
            for x in range(width):
                u, v = x + flow[i, 0, y, x].item(), y + flow[i, 1, y, x].item()
                if border:
                    u, v = min(max(u, 0), width - 1), min(max(v, 0), height - 1)
                left, top = math.floor(u), math.floor(v)
                for yy in (top, top + 1):
                    for xx in (left, left + 1):
                        if 0 <= yy < height and 0 <= xx < width:
                            weight = (1 - abs(u - xx)) * (1 - abs(v - yy))
                            result[i, :, y, x] += weight * features[i, :, yy, xx]
    return result


def published(name: str, **options: object) -> float:
    features = torch.from_numpy(draw_tensor("a", (1, 16, 20, 28)))
    flow = 3 * torch.from_numpy(draw_tensor("flow", (1, 2, 20, 28)))
    return Fixture(OPERATORS).compare(name, warp(features, flow, **options))


def test_equals_the_published_operators() -> None:
    assert published("resample2d", padding_mode="border") < 1e-5
    assert published("grid_sample_warp", published_grid=True) < 1e-5


@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
@pytest.mark.parametrize("size", [(5, 7), (1, 6), (4, 1)])
def test_equals_naive_loops(size: tuple[int, int], padding_mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn((2, 3, *size), generator=generator, dtype=torch.float64)
    flow = 3 * torch.randn((2, 2, *size), generator=generator, dtype=torch.float64)
    expected = naive(features, flow, padding_mode == "border")
    torch.testing.assert_close(warp(features, flow, padding_mode=padding_mode), expected)


def test_zero_flow() -> None:
    """Changes nothing; with the published grid x is x·W/(W - 1) - 1/2: 0 → -1/2, 1 → 1, 2 → 5/2."""
    features = torch.tensor([1.0, 2.0, 4.0]).view(1, 1, 1, 3).expand(1, 1, 3, 3)
    flow = torch.zeros(1, 2, 3, 3)
    torch.testing.assert_close(warp(features, flow), features.contiguous())
    middle = warp(features, flow, published_grid=True)[0, 0, 1]
    torch.testing.assert_close(middle, torch.tensor([0.5, 2.0, 2.0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coordinates_are_float32(dtype: torch.dtype) -> None:
    """Column 600 and a quarter is none that half precision has."""
    features = torch.arange(1024.0).remainder(2).view(1, 1, 1, 1024).to(dtype)
    flow = torch.zeros(1, 2, 1, 1024)
    flow[:, 0] = 0.25
    with torch.autocast("cpu", torch.bfloat16):
        result = warp(features, flow)
    assert result.dtype == dtype
    torch.testing.assert_close(result[0, 0, 0, 600].float(), torch.tensor(0.25), atol=1e-3, rtol=0)


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn((1, 2, 3, 4), generator=generator, dtype=torch.float64)
    flow = torch.rand((1, 2, 3, 4), generator=generator, dtype=torch.float64) * 0.8 + 0.1
    assert torch.autograd.gradcheck(warp, (features.requires_grad_(), flow.requires_grad_()))


def test_empty_batch_and_another_size() -> None:
    assert warp(torch.zeros(0, 3, 4, 5), torch.zeros(0, 2, 4, 5)).shape == (0, 3, 4, 5)
    with pytest.raises(ValueError, match="must be"):
        warp(torch.zeros(1, 3, 4, 5), torch.zeros(1, 2, 4, 4))
