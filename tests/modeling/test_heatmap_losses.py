"""Losses on heat maps against the published values of three systems."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from d2ext.codecs.heatmaps import gather_at
from d2ext.modeling.heatmap_losses import (
    dense_l1,
    l1_at_cells,
    penalty_reduced_focal_loss,
    smooth_l1_at_cells,
)
from tests.reference.fixture import Fixture, draw_tensor

REFERENCE = Path(__file__).parents[1] / "reference"
# system → seed of its drawn maps, and its kinds of points
SYSTEMS = {"cornernet": (1, ("tl", "br")), "centernet_triplets": (3, ("tl", "br", "ct"))}


def _drawn(name: str, shape: tuple[int, ...], seed: int, scale: float, shift: float) -> Tensor:
    values = torch.from_numpy(draw_tensor(name, shape, seed)) * scale + shift
    return values.requires_grad_()


def _expected(fixture: Fixture, name: str) -> Tensor:
    return torch.from_numpy(fixture.expected[name])


@pytest.mark.parametrize("system", list(SYSTEMS))
@pytest.mark.parametrize("stack", [0, 1])
def test_focal_and_offset_losses(system: str, stack: int) -> None:
    seed, corners = SYSTEMS[system]
    fixture = Fixture(REFERENCE / system / "losses")
    for corner in corners:
        logits = _drawn(f"{corner}_heat_{stack}", (2, 5, 32, 32), seed, 1.5, -2.0)
        offsets = _drawn(f"{corner}_offset_{stack}", (2, 2, 32, 32), seed, 0.6, 0.0)
        focal = penalty_reduced_focal_loss(logits, _expected(fixture, f"gt_{corner}_heat"))
        offset = smooth_l1_at_cells(
            offsets,
            _expected(fixture, f"{corner}_index"),
            _expected(fixture, f"{corner}_offset"),
            _expected(fixture, "mask"),
        )
        assert focal.item() == pytest.approx(
            float(fixture.expected[f"focal_{corner}_{stack}"]), rel=1e-5
        )
        assert offset.item() == pytest.approx(
            float(fixture.expected[f"offset_{corner}_{stack}"]), rel=1e-5
        )
        # both losses have weight 1 and are averaged over the two stacks
        ((focal + offset) / 2).backward()
        assert fixture.compare(f"grad_{corner}_heat_{stack}", logits.grad) < 1e-5
        assert fixture.compare(f"grad_{corner}_offset_{stack}", offsets.grad) < 1e-5


def test_focal_loss_without_positives_is_not_divided() -> None:
    fixture = Fixture(REFERENCE / "cornernet" / "losses")
    logits = _drawn("tl_heat_0", (2, 5, 32, 32), 1, 1.5, -2.0)
    loss = penalty_reduced_focal_loss(logits, _expected(fixture, "gt_tl_heat") / 2)
    assert loss.item() == pytest.approx(
        float(fixture.expected["focal_without_positives"]), rel=1e-5
    )


def test_focal_loss_of_certain_errors() -> None:
    """Probabilities are clamped to 1e-4 and 1 - 1e-4."""
    wrong = -math.log(1e-4) * (1 - 1e-4) ** 2
    for logit, target in ((-50.0, 1.0), (50.0, 0.0)):
        loss = penalty_reduced_focal_loss(torch.full((1, 1), logit), torch.full((1, 1), target))
        # as float32 has them
        assert loss.item() == pytest.approx(wrong, rel=1e-4)


def test_focal_loss_with_a_mask() -> None:
    """A masked cell counts neither in the sum nor as a reason to change the divisor."""
    logits = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(1, 1, 4, 4)
    target[0, 0, 1, 1] = target[0, 0, 2, 3] = 1
    mask = torch.ones(1, 1, 4, 4)
    mask[0, 0, 1, 1] = mask[0, 0, 0, 0] = 0
    values = []
    for y, x in ((1, 1), (0, 0)):
        p = logits[0, 0, y, x].sigmoid()
        values.append(
            -torch.log(p) * (1 - p) ** 2 if target[0, 0, y, x] else -torch.log(1 - p) * p**2
        )
    plain = penalty_reduced_focal_loss(logits, target)
    masked = penalty_reduced_focal_loss(logits, target, mask)
    torch.testing.assert_close(masked, plain - sum(values) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32(dtype: torch.dtype) -> None:
    """Thousands of small terms: a sum in low precision would stop growing."""
    logits = torch.full((2, 4, 64, 64), -3.0, dtype=dtype)
    target = torch.zeros(2, 4, 64, 64)
    loss = penalty_reduced_focal_loss(logits, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, penalty_reduced_focal_loss(logits.float(), target))
    maps, index = torch.rand(2, 2, 8, 8).to(dtype), torch.randint(0, 64, (2, 5))
    goal, mask = torch.rand(2, 5, 2), torch.ones(2, 5)
    for function in (l1_at_cells, smooth_l1_at_cells):
        assert function(maps, index, goal, mask).dtype == torch.float32


def test_focal_loss_survives_extreme_logits() -> None:
    logits = torch.tensor([[[[1e4, -1e4], [-1e4, 1e4]]]], requires_grad=True)
    target = torch.tensor([[[[1.0, 1.0], [0.0, 0.0]]]])
    loss = penalty_reduced_focal_loss(logits, target)
    loss.backward()
    assert torch.isfinite(loss) and not logits.grad.any()


def test_l1_counts_values() -> None:
    prediction = torch.rand(1, 2, 3, 4)
    index = torch.tensor([[5, 0, 11]])
    target = torch.rand(1, 3, 2)
    difference = (gather_at(prediction, index) - target).abs()
    two_objects = l1_at_cells(prediction, index, target, torch.tensor([[1, 0, 1]]))
    torch.testing.assert_close(two_objects, difference[0, [0, 2]].sum() / 4.0001)
    mask = torch.tensor([[[1, 0], [0, 0], [1, 1]]], dtype=torch.bool)
    torch.testing.assert_close(
        l1_at_cells(prediction, index, target, mask), difference[mask].sum() / 3.0001
    )
    whole = torch.rand(1, 2, 3, 4)
    dense_mask = torch.rand(1, 2, 3, 4) > 0.5
    torch.testing.assert_close(
        dense_l1(prediction, whole, dense_mask),
        (prediction - whole)[dense_mask].abs().sum() / (dense_mask.sum() + 1e-4),
    )


def test_smooth_l1_counts_objects() -> None:
    prediction = torch.zeros(1, 2, 2, 2)
    target = torch.tensor([[[0.5, 3.0], [9.0, 9.0]]])
    index, mask = torch.tensor([[2, 0]]), torch.tensor([[1, 0]])
    loss = smooth_l1_at_cells(prediction, index, target, mask)
    torch.testing.assert_close(loss, torch.tensor((0.125 + 2.5) / 1.0001))


def test_no_objects_at_all() -> None:
    prediction = torch.rand(1, 2, 3, 4, requires_grad=True)
    index, target = torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0, 2)
    loss = l1_at_cells(prediction, index, target, torch.zeros(1, 0)) + smooth_l1_at_cells(
        prediction, index, target, torch.zeros(1, 0)
    )
    loss.backward()
    assert loss.item() == 0 and not prediction.grad.any()
