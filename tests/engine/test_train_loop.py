"""Single steps: losses that are not finite, accumulation, seeds."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from d2ext.config import ConfigError
from d2ext.engine.train_loop import StepTrainer, seed_step


class Scripted(nn.Module):
    """Each input is a number x; the loss is the mean of w·x after batch normalisation of x."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.fail: Callable[[Tensor], Tensor] = lambda loss: loss

    def forward(self, inputs: list[float]) -> dict[str, Tensor]:
        x = torch.tensor(inputs)
        self.norm(x[:, None])
        return {"loss_a": self.fail((self.weight * x).mean())}


def make(batches: list[list[float]], **options: object) -> tuple[StepTrainer, Scripted]:
    model = Scripted()
    optimizer = torch.optim.SGD([model.weight], lr=0.1, momentum=0.9)
    return StepTrainer(model, batches, optimizer, seed=0, **options), model


def steps(trainer: StepTrainer, count: int) -> EventStorage:
    with EventStorage(trainer.iter) as storage:
        for _ in range(count):
            storage.iter = trainer.iter
            trainer.run_step()
            trainer.iter += 1
    return storage


def everything(trainer: StepTrainer) -> list[Tensor]:
    state = [x.clone() for x in trainer.model.state_dict().values()]
    for entry in trainer.optimizer.state.values():
        state += [x.clone() for x in entry.values() if isinstance(x, Tensor)]
    return state


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_bad_step_changes_nothing_and_is_counted(
    bad: float, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, model = make([[1.0, 3.0], [1.0, bad], [1.0, 3.0]])
    steps(trainer, 1)
    before = everything(trainer)
    with caplog.at_level(logging.WARNING):
        storage = steps(trainer, 1)
    for a, b in zip(before, everything(trainer), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not trainer.updated and trainer.skipped == 1
    assert "iteration 1" in caplog.text and "SOLVER.BASE_LR" in caplog.text
    assert storage.latest()["skipped_iterations"] == (1.0, 1)
    assert "total_loss" not in storage.latest()  # a NaN would stay in the medians
    steps(trainer, 1)
    assert trainer.updated and trainer.skipped_in_a_row == 0
    assert model.weight != before[0]


@pytest.mark.parametrize("bad", ["", "first", "second"])
def test_the_iteration_ends_at_a_bad_step(bad: str, caplog: pytest.LogCaptureFixture) -> None:
    class TwoSteps(Scripted):
        training_steps = ("first", "second")
        asked: list[tuple[str, Any]] = []  # noqa: RUF012

        def forward(self, inputs: list[float], step: str, carried: Any) -> Any:  # type: ignore[override]
            self.asked.append((step, carried))
            factor = NAN if step == bad and inputs[0] == 2 else 1.0
            x = torch.tensor(inputs)
            self.norm(x[:, None])
            return {"loss_a": (self.weight * x).mean() * factor}, step

    model = TwoSteps()
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    trainer = StepTrainer(model, [[1.0, 3.0], [2.0, 2.0], [1.0, 3.0]], optimizer, seed=0)
    storage = steps(trainer, 1)
    assert model.weight.item() == pytest.approx(2 - 2 * 0.2)  # the gradient of each step is 2
    assert {"first/loss_a", "second/loss_a"} <= storage.latest().keys()
    count, before = model.norm.num_batches_tracked.item(), model.weight.item()
    with caplog.at_level(logging.WARNING):
        storage = steps(trainer, 1)
    done = {"first": 0, "second": 1, "": 2}[bad]
    assert model.weight.item() == pytest.approx(before - 0.2 * done)
    assert model.norm.num_batches_tracked == count + done
    assert trainer.updated == (done > 0) and trainer.skipped == (bad != "")
    assert ("nothing was updated" in caplog.text) == (bad == "first")
    assert ("before its step 'second'" in caplog.text) == (bad == "second")
    assert ("total_loss" in storage.latest()) == (bad == "")
    steps(trainer, 1)
    assert model.weight.item() == pytest.approx(before - 0.2 * done - 0.4)
    assert trainer.skipped_in_a_row == 0
    assert [x for x in TwoSteps.asked if x[0] == "second"] == [("second", "first")] * (
        2 + (bad != "first")
    )


def test_bad_gradient_with_a_good_loss_is_skipped() -> None:
    trainer, model = make([[1.0, 3.0]])
    # d sqrt(x) / dx at 0 is infinite
    model.fail = lambda loss: (loss - loss.detach()).sqrt()
    steps(trainer, 1)
    assert trainer.skipped == 1 and model.weight.item() == 2.0


def test_floating_point_error_of_the_model_is_a_bad_step() -> None:
    trainer, model = make([[1.0, 3.0], [1.0, 3.0]])

    def fail(loss: Tensor) -> Tensor:
        raise FloatingPointError("diverged")

    model.fail = fail
    steps(trainer, 1)
    assert trainer.skipped == 1


def test_an_error_of_the_model_names_the_images(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Scripted):
        def forward(self, inputs: list[dict[str, str]]) -> dict[str, Tensor]:
            raise IndexError("Target 7 is out of bounds.")

    batch = [{"file_name": "a.png"}, {"file_name": "b.png"}]
    trainer, _ = make([batch], accumulation_steps=2)
    trainer.model = Failing()
    with pytest.raises(IndexError), EventStorage(0):
        trainer.run_step()
    assert "failed on the images ['a.png']" in caplog.text


def test_limit_of_bad_steps_in_a_row() -> None:
    bad, good = [1.0, NAN], [1.0, 3.0]
    trainer, _ = make([bad, bad, good, bad, bad, bad], bad_step_limit=3)
    steps(trainer, 5)  # never three in a row
    assert trainer.skipped == 4
    with pytest.raises(FloatingPointError, match=r"3 iterations in a row.*SOLVER\.BASE_LR"):
        steps(trainer, 1)


def test_limit_of_one_stops_at_the_first_bad_step() -> None:
    trainer, _ = make([[1.0, NAN]], bad_step_limit=1)
    with pytest.raises(FloatingPointError, match=r"iteration 0.*loss_a.*1 iterations in a row"):
        steps(trainer, 1)


def test_counts_survive_in_the_state() -> None:
    trainer, _ = make([[1.0, NAN]] * 2)
    steps(trainer, 2)
    other, _ = make([])
    other.load_state_dict(trainer.state_dict())
    assert (other.skipped, other.skipped_in_a_row) == (2, 2)


def test_batch_that_cannot_be_cut() -> None:
    trainer, _ = make([[1.0, 2.0, 3.0]], accumulation_steps=2)
    with pytest.raises(ConfigError, match=r"3 images per iteration.*2 equal parts"):
        steps(trainer, 1)


def test_logged_losses_are_those_of_the_whole_batch() -> None:
    trainer, _ = make([[1.0, 2.0, 3.0, 6.0]], accumulation_steps=2)
    assert steps(trainer, 1).latest()["total_loss"][0] == pytest.approx(6.0)  # 2 · mean


def test_at_least_one_micro_batch() -> None:
    with pytest.raises(ConfigError, match=r"SOLVER\.ACCUMULATION_STEPS"):
        make([], accumulation_steps=0)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_seed_depends_on_all_three_numbers_and_nothing_else() -> None:
    seed_step(1, 2, 3)
    first = draw()
    draw()
    seed_step(1, 2, 3)
    assert draw() == first
    seen = {first}
    for other in [(2, 2, 3), (1, 3, 3), (1, 2, 4), (3, 2, 1)]:
        seed_step(*other)
        seen.add(draw())
    assert len({a for a, _, _ in seen}) == len({b for _, b, _ in seen}) == 5
    assert len({c for _, _, c in seen}) == 5
