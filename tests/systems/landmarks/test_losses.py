"""Losses of landmarks, against values worked out by hand and naive loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.systems.landmarks.losses import (
    MAP_LOSSES,
    POINT_LOSSES,
    adaptive_wing_loss,
    cross_entropy_loss,
    kl_loss,
    mse_loss,
    point_loss,
    smooth_l1,
    wing,
)


def maps(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Predicted maps and targets (2, 3, 6, 8), weights of which one is 0."""
    generator = torch.Generator().manual_seed(seed)
    predicted = torch.randn((2, 3, 6, 8), generator=generator)
    target = torch.rand((2, 3, 6, 8), generator=generator) * 0.9
    target.flatten(2)[..., 17] = 1
    weights = torch.ones(2, 3)
    weights[1, 2] = 0
    return predicted, target, weights


def test_mse_counts_everything_in_its_mean() -> None:
    predicted, target, weights = maps()
    expected = sum(
        float(((predicted[i, j] - target[i, j]) ** 2).mean()) for i in range(2) for j in range(3)
    ) - float(((predicted[1, 2] - target[1, 2]) ** 2).mean())
    assert float(mse_loss(predicted, target, weights)) == pytest.approx(expected / 6, rel=1e-5)


@pytest.mark.parametrize("name", sorted(MAP_LOSSES))
def test_what_does_not_count_gets_no_gradient(name: str) -> None:
    predicted, target, weights = maps()
    predicted.requires_grad_()
    MAP_LOSSES[name](predicted, target, weights).backward()
    assert predicted.grad is not None
    assert predicted.grad[1, 2].eq(0).all()
    assert predicted.grad.flatten(2).abs().sum(-1)[weights > 0].gt(0).all()


@pytest.mark.parametrize("name", sorted(MAP_LOSSES))
def test_nothing_that_counts_is_no_nan(name: str) -> None:
    predicted, target, _ = maps()
    for some, weights in ((slice(0, 2), torch.zeros(2, 3)), (slice(0, 0), torch.zeros(0, 3))):
        prediction = predicted[some].clone().requires_grad_()
        loss = MAP_LOSSES[name](prediction, target[some], weights)
        loss.backward()
        assert float(loss.detach()) == 0 and prediction.grad is not None
        assert prediction.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(MAP_LOSSES))
def test_the_target_itself_is_best(name: str) -> None:
    _, target, weights = maps()
    prediction = target.log() if name == "cross_entropy" else target
    best = float(MAP_LOSSES[name](prediction, target, weights))
    worse = float(MAP_LOSSES[name](prediction + 0.5 * maps(1)[0], target, weights))
    assert best < 0.7 * worse
    assert best == pytest.approx(0, abs=1e-3)


def test_adaptive_wing_by_hand() -> None:
    for value, goal in ((0.3, 0.1), (0.9, 0.0), (-1.0, 1.0), (0.2, 0.9)):
        target = torch.zeros(1, 1, 9, 9)
        target[0, 0, 4, 4] = goal
        predicted = target.clone()
        predicted[0, 0, 4, 4] = value
        d, power = abs(value - goal), 2.1 - goal
        slope = 14 * (1 / (1 + 0.5**power)) * power * 0.5 ** (power - 1)
        constant = 0.5 * slope - 14 * math.log(1 + 0.5**power)
        expected = 14 * math.log(1 + d**power) if d < 0.5 else slope * d - constant
        expected *= 11 if goal > 0.2 else 1
        loss = adaptive_wing_loss(predicted, target, torch.ones(1, 1))
        assert float(loss) == pytest.approx(expected / 81, rel=1e-4)


def test_adaptive_wing_emphasises_cells_near_targets_above_a_fifth() -> None:
    losses = []
    for height in (0.19, 0.21):
        target = torch.zeros(1, 1, 5, 5)
        target[..., 2, 2] = height
        losses.append(float(adaptive_wing_loss(target + 1, target, torch.ones(1, 1))))
    # Nine of 25 cells count eleven times.
    assert losses[1] / losses[0] == pytest.approx((16 + 9 * 11) / 25, rel=0.1)


def test_adaptive_wing_has_finite_gradients_at_its_target() -> None:
    target = torch.rand(1, 2, 5, 5)
    predicted = target.clone().requires_grad_()
    adaptive_wing_loss(predicted, target, torch.ones(1, 2)).backward()
    assert predicted.grad is not None and predicted.grad.isfinite().all()


def test_cross_entropy_is_a_divergence_from_the_target_of_sum_one() -> None:
    predicted, target, weights = maps()
    expected = []
    for i in range(2):
        for j in range(3):
            if weights[i, j]:
                p = (target[i, j] / target[i, j].sum()).flatten()
                expected.append(
                    float((p * (p.log() - predicted[i, j].flatten().log_softmax(0))).sum())
                )
    loss = cross_entropy_loss(predicted, target, weights)
    assert float(loss) == pytest.approx(sum(expected) / 5, rel=1e-4)
    # Whatever the target's sum, as of a bump that is partly outside.
    assert float(cross_entropy_loss(predicted, 0.01 * target, weights)) == pytest.approx(
        float(loss)
    )
    # A landmark without a bump on its map does not count.
    target[0, 0] = 0
    fewer = cross_entropy_loss(predicted, target, weights)
    assert float(fewer) == pytest.approx(sum(expected[1:]) / 4, rel=1e-4)


def test_divergence_of_bins() -> None:
    logits = torch.tensor([[[0.0, 1.0, 2.0], [5.0, 0.0, 0.0]]])
    target = torch.tensor([[[0.0, 1.0, 0.0], [0.2, 0.3, 0.5]]])
    expected = -float(F.log_softmax(logits[0, 0], dim=0)[1])
    assert float(kl_loss(logits, target, torch.tensor([[1.0, 0.0]]))) == pytest.approx(expected)


def test_wing_and_smooth_l1_by_hand() -> None:
    distances = torch.tensor([0.0, 1.0, -4.0, 9.999, 10.001, -30.0])
    constant = 10 - 10 * math.log(6)
    expected = [
        0,
        *(10 * math.log(1 + d / 2) for d in (1, 4, 9.999)),
        10.001 - constant,
        30 - constant,
    ]
    assert wing(distances).tolist() == pytest.approx(expected, rel=1e-5)
    assert smooth_l1(torch.tensor([1.0, -2.0, 5.0])).tolist() == pytest.approx([0.25, 1.0, 4.0])


@pytest.mark.parametrize("name", sorted(POINT_LOSSES))
def test_coordinates(name: str) -> None:
    target = torch.tensor([[[10.0, 20.0], [30.0, 40.0], [1.0, 1.0]]])
    predicted = target + torch.tensor([[[3.0, -4.0], [0.0, 1.0], [100.0, 100.0]]])
    predicted.requires_grad_()
    loss = point_loss(name, predicted, target, torch.tensor([[1.0, 1.0, 0.0]]), 50)
    each = POINT_LOSSES[name](torch.tensor([3.0, 4.0, 0.0, 1.0]))
    assert float(loss.detach()) == pytest.approx(float(each.mean()) / 50, rel=1e-5)
    loss.backward()
    assert predicted.grad is not None and predicted.grad[0, 2].eq(0).all()
    assert float(point_loss(name, predicted.detach(), target, torch.zeros(1, 3), 50)) == 0
    alone = point_loss(name, predicted.detach(), target, torch.tensor([[1.0, 0.0, 0.0]]), 50)
    assert float(alone) == pytest.approx(float(each[:2].mean()) / 50, rel=1e-5)
