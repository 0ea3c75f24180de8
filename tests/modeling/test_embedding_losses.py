"""Pull and push against the published values, and on small numbers of objects."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from d2ext.codecs.heatmaps import gather_at
from d2ext.modeling.embedding_losses import pull_push_loss
from tests.reference.fixture import Fixture, draw_tensor

REFERENCE = Path(__file__).parents[1] / "reference"


@pytest.mark.parametrize(("system", "seed"), [("cornernet", 1), ("centernet_triplets", 3)])
@pytest.mark.parametrize("stack", [0, 1])
def test_values_and_gradients_are_the_published_ones(system: str, seed: int, stack: int) -> None:
    fixture = Fixture(REFERENCE / system / "losses")
    maps, tags = [], []
    for corner in ("tl", "br"):
        drawn = draw_tensor(f"{corner}_tag_{stack}", (2, 1, 32, 32), seed)
        maps.append((torch.from_numpy(drawn) * 0.7).requires_grad_())
        index = torch.from_numpy(fixture.expected[f"{corner}_index"])
        tags.append(gather_at(maps[-1], index)[..., 0])
    pull, push = pull_push_loss(*tags, torch.from_numpy(fixture.expected["mask"]))
    assert pull.item() == pytest.approx(float(fixture.expected[f"pull_{stack}"]), rel=1e-5)
    assert push.item() == pytest.approx(float(fixture.expected[f"push_{stack}"]), rel=1e-5)
    # weight 0.1, average over the two stacks
    (0.1 * (pull + push) / 2).backward()
    for corner, drawn_map in zip(("tl", "br"), maps, strict=True):
        assert fixture.compare(f"grad_{corner}_tag_{stack}", drawn_map.grad) < 1e-5


@pytest.mark.parametrize("objects", [0, 1, 2])
def test_one_image_with_few_objects(objects: int) -> None:
    """The published code fails on a single image."""
    first = torch.tensor([[0.2, 0.5, 9.0]], requires_grad=True)
    second = torch.tensor([[0.4, 0.1, -9.0]], requires_grad=True)
    mask = torch.arange(3)[None] < objects
    pull, push = pull_push_loss(first, second, mask)
    (pull + push).backward()
    expected_pull = [0.0, 0.02 / 1.0001, (0.02 + 0.08) / 2.0001][objects]
    assert pull.item() == pytest.approx(expected_pull, rel=1e-5)
    # Of one object: (1 - 1 / 1.0001) / 1e-4, a constant.
    pairs = 2 * (1 - 0.0) + 2 * 1.0 - 4 / 2.0001
    assert push.item() == pytest.approx([0.0, 1 / 1.0001, pairs / 2.0001][objects], rel=2e-3)
    assert torch.isfinite(first.grad).all()
    assert first.grad[0, objects:].abs().sum() == 0
    if objects == 1:
        assert first.grad[0, 0].item() == pytest.approx(-second.grad[0, 0].item())


def test_far_objects_are_not_pushed() -> None:
    tags = torch.tensor([[0.0, 5.0]], requires_grad=True)
    pull_push_loss(tags, tags, torch.ones(1, 2))[1].backward()
    assert tags.grad.tolist() == [[0.0, 0.0]]


def test_losses_are_float32_and_sum_over_images() -> None:
    tags = torch.tensor([[0.1, 0.6]])
    mask = torch.ones(1, 2)
    one = pull_push_loss(tags, tags + 0.3, mask)
    two = pull_push_loss(tags.repeat(2, 1), tags.repeat(2, 1) + 0.3, mask.repeat(2, 1))
    assert two[0] == pytest.approx(2 * one[0]) and two[1] == pytest.approx(2 * one[1])
    half = pull_push_loss(tags.bfloat16(), tags.bfloat16() + 0.3, mask)
    assert all(value.dtype == torch.float32 for value in half)
