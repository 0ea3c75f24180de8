"""Resuming from a checkpoint whose training state is none: one error, before the first step."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2ext.checkpoint.io import CheckpointError, load_untrusted
from d2ext.engine import Trainer
from tests.engine import toy

OPTIONS = {"MODEL_EMA__ENABLED": True, "TEST__BEST_METRIC": "toy/score", "TEST__EVAL_PERIOD": 2}
Start = Callable[..., Trainer]
State = dict[str, Any]


@pytest.fixture
def start(build: Start, tmp_path: Path) -> Start:
    """A trainer in the test's folder, evaluated by a constant."""

    def make(optimizer: str = "AdamW", end: int = 4) -> Trainer:
        options = {"SOLVER__OPTIMIZER": optimizer, "SOLVER__MAX_ITER": end, "SOLVER__STEPS": "(1,)"}
        trainer = build(tmp_path, **OPTIONS, **options)
        trainer.test = lambda cfg, model: {"toy": {"score": 1.0}}
        return trainer

    return make


def saved_state(start: Start, folder: Path, optimizer: str) -> State:
    start(optimizer, end=2).train()
    return load_untrusted(folder / "model_final.pth")


def resume(start: Start, folder: Path, state: State, optimizer: str = "AdamW") -> None:
    """Resume and train to the end."""
    torch.save(state, folder / "model_final.pth")
    trainer = start(optimizer)
    trainer.resume_or_load(resume=True)
    trainer.train()


def put(state: State, path: str, value: object) -> None:
    *parents, last = path.split("/")
    for key in parents:
        state = state[int(key) if key.isdigit() else key]
    state[int(last) if last.isdigit() else last] = value


ADAM = "trainer/_trainer/optimizer/state"
GROUPS = "trainer/_trainer/optimizer/param_groups"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        *(
            (f"trainer{part}/iteration", value, "iteration is .*not an integer from 0")
            for part in ("", "/_trainer")
            for value in (float("nan"), 13.5, 10**18, -1, "text", True, None, torch.tensor(1))
        ),
        ("trainer", [], "training state"),
        ("trainer", 5, "training state"),
        ("trainer/seed", -1, "seed is -1"),
        ("trainer/seed", "text", "seed is 'text'"),
        ("trainer/hooks", [], "training state"),
        ("trainer/hooks/LRScheduler", 3, "the schedule is 3"),
        ("trainer/hooks/LRScheduler/optimizer", "text", "the schedule is"),
        ("trainer/hooks/LRScheduler/base_lrs", [0.1], r"base_lrs is \[0.1\]"),
        ("trainer/hooks/LRScheduler/base_lrs/0", float("inf"), "base_lrs.0. is inf"),
        ("trainer/hooks/LRScheduler/last_epoch", 1.5, "last_epoch is 1.5"),
        ("trainer/hooks/MetricHistory", 3, "training state"),
        ("trainer/hooks/MetricHistory/total_loss", [[1.0]], "history of total_loss"),
        ("trainer/hooks/MetricHistory/total_loss", [[1.0, float("nan")]], "training state"),
        ("trainer/hooks/MetricHistory/total_loss", [["a", 1]], "history of total_loss"),
        ("trainer/_trainer", None, "training state"),
        ("trainer/_trainer/skipped", "ab", "skipped is 'ab'"),
        ("trainer/_trainer/optimizer", [1], r"optimizer's state is \[1\]"),
        (GROUPS, 3, "training state"),
        (f"{GROUPS}/0/lr", "text", "lr is 'text'"),
        (f"{GROUPS}/0/lr", float("nan"), "lr is nan"),
        (f"{GROUPS}/0/weight_decay", 10**30, "weight_decay is 1000"),
        (f"{GROUPS}/0/betas", (0.9,), "betas is"),
        (f"{GROUPS}/0/params", [0, 0, 0], "training state"),
        (f"{ADAM}/0/exp_avg", torch.zeros(1), r"exp_avg of a parameter of shape .* is \(1,\)"),
        (f"{ADAM}/0/exp_avg_sq", torch.zeros(2, 9), r"exp_avg_sq .* is \(2, 9\)"),
        (f"{ADAM}/0/exp_avg", None, "exp_avg .* is None"),
        (f"{ADAM}/0/step", torch.zeros(3), r"step .* is \(3,\)"),
        (f"{ADAM}/0/step", "two", "step .* is 'two'"),
        (f"{ADAM}/0", {"exp_avg": torch.zeros(4, 3, 3, 3)}, "that of another"),
        (f"{ADAM}/0", 7, "that of another"),
        (f"{ADAM}/99", {"step": torch.tensor(1.0)}, "that of another"),
        ("trained_weights", {}, "training state"),
        ("trained_weights/weights", {"x": torch.zeros(1)}, "training state"),
        ("trained_weights/updates", float("nan"), "updates of the average is nan"),
        ("trained_weights/updates", -3, "updates of the average is -3"),
    ],
)
def test_one_wrong_value(
    start: Start, tmp_path: Path, path: str, value: object, message: str
) -> None:
    state = saved_state(start, tmp_path, "AdamW")
    put(state, path, value)
    with pytest.raises(CheckpointError, match=f"Cannot resume from .*{message}") as error:
        resume(start, tmp_path, state)
    assert "\n" not in str(error.value)


def test_momentum_of_another_shape(start: Start, tmp_path: Path) -> None:
    state = saved_state(start, tmp_path, "SGD")
    put(state, f"{ADAM}/0/momentum_buffer", torch.zeros(1))
    with pytest.raises(CheckpointError, match=r"momentum_buffer .* is \(1,\)"):
        resume(start, tmp_path, state, "SGD")


def test_switches_are_the_run_s(start: Start, tmp_path: Path) -> None:
    state = saved_state(start, tmp_path, "AdamW")
    put(state, f"{GROUPS}/0/amsgrad", True)  # would need a part of the state that is not there
    put(state, f"{GROUPS}/0/capturable", "text")
    resume(start, tmp_path, state)


def test_weights_alone_are_no_run(start: Start, tmp_path: Path) -> None:
    state = saved_state(start, tmp_path, "AdamW")
    with pytest.raises(CheckpointError, match="there is none"):
        resume(start, tmp_path, {"model": state["model"]})


@pytest.mark.parametrize(
    "best",
    [
        [1],
        {"best_metric_name": "toy/score"},
        {"best_metric_name": "toy/score", "best_metric": "x", "iteration": 1},
        {"best_metric_name": "toy/score", "best_metric": 0.5, "iteration": float("nan")},
    ],
)
def test_a_best_checkpoint_that_is_none_is_replaced(
    start: Start, tmp_path: Path, best: object, caplog: pytest.LogCaptureFixture
) -> None:
    state = saved_state(start, tmp_path, "AdamW")
    torch.save(best, tmp_path / "model_best.pth")
    resume(start, tmp_path, state)
    assert "replaced at the next evaluation" in caplog.text
    assert load_untrusted(tmp_path / "model_best.pth")["best_metric"] == 1.0


def test_metrics_that_are_no_lines_of_json(start: Start, tmp_path: Path) -> None:
    state = saved_state(start, tmp_path, "AdamW")
    first = toy.losses(tmp_path)
    with open(tmp_path / "metrics.json", "ab") as file:
        file.write(b'\xff\xfe\x00\n[3]\n{"iteration": "x"}\n5\n{"iteration":')
    resume(start, tmp_path, state)
    assert sorted(toy.losses(tmp_path)) == [0, 1, 2, 3] and toy.losses(tmp_path)[0] == first[0]


HOSTILE: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        2**31,
        10**30,
        13.5,
        float("nan"),
        float("inf"),
        "text",
        b"\xff",
        "",
        (),
        [],
    ),
    *(
        {},
        {"a": 1},
        [[]],
        torch.zeros(0),
        torch.zeros(3, 3),
        torch.tensor(float("nan")),
        np.float64(2),
    ),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths to all that lies in dicts and lists."""
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def attack(start: Start, folder: Path, cases: int, seed: int) -> dict[str, int]:
    """How many changed training states were taken over and trained with, and refused."""
    random = np.random.default_rng(seed)
    logging.disable()
    outcomes = {"resumed": 0, "refused": 0, "diverged": 0}
    try:
        valid = {name: saved_state(start, folder, name) for name in ("SGD", "AdamW")}
        for case in range(cases):
            name = ("SGD", "AdamW")[case % 2]
            state = copy.deepcopy(valid[name])
            rest = {key: value for key, value in state.items() if key != "model"}
            paths = list(places(rest))
            for _ in range(random.integers(1, 3)):
                *parents, last = paths[random.integers(0, len(paths))]
                target: Any = state
                try:
                    for key in parents:
                        target = target[key]
                    if random.random() < 0.2:
                        del target[last]
                    else:
                        target[last] = HOSTILE[random.integers(0, len(HOSTILE))]
                except (TypeError, KeyError, IndexError):  # an earlier change took it away
                    continue
            try:
                resume(start, folder, state, name)
                outcomes["resumed"] += 1
            except CheckpointError as error:
                assert "\n" not in str(error)
                outcomes["refused"] += 1
            except FloatingPointError:
                outcomes["diverged"] += 1
    finally:
        logging.disable(logging.NOTSET)
    return outcomes


def test_some_changed_states(start: Start, tmp_path: Path) -> None:
    outcomes = attack(start, tmp_path, 60, seed=0)
    assert outcomes["resumed"] and outcomes["refused"], outcomes


@pytest.mark.attack
@pytest.mark.timeout(3600)
def test_many_changed_states(start: Start, tmp_path: Path) -> None:
    print(attack(start, tmp_path, 3000, seed=1))
