"""Training on the toy data, in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from d2ext.checkpoint.io import CheckpointError, load_untrusted
from d2ext.config import ConfigError
from tests.engine import toy
from tests.engine.conftest import Train


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=name)


def test_training_learns_and_leaves_everything_a_user_expects(train: Train, tmp_path: Path) -> None:
    trainer = train(
        SOLVER__MAX_ITER=200,
        SOLVER__STEPS="(150,)",
        SOLVER__OPTIMIZER="Adam",
        SOLVER__BASE_LR=0.01,
        SOLVER__CHECKPOINT_PERIOD=100,
        DATASETS__TEST="('toy',)",
    )
    losses = toy.losses(tmp_path / "run")
    assert sorted(losses) == list(range(200))
    first, last = list(losses.values())[:10], list(losses.values())[-10:]
    assert sum(last) < 0.2 * sum(first)

    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"model_0000099.pth", "model_0000199.pth", "model_final.pth"} <= files
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert not [name for name in files if ".tmp-" in name]
    assert (tmp_path / "run/last_checkpoint").read_text() == "model_final.pth"
    results = trainer._last_eval_results
    assert set(results) == {"bbox"} and results["bbox"]["AP50"] > 30
    logged = (tmp_path / "run/metrics.json").read_text().splitlines()
    assert any("bbox/AP" in json.loads(line) for line in logged)


def test_train_returns_results_of_the_last_evaluation(build: Train) -> None:
    with_test = build("a", SOLVER__MAX_ITER=1, DATASETS__TEST="('toy',)")
    assert with_test.train()["bbox"].keys() >= {"AP", "AP50"}
    assert build("b", SOLVER__MAX_ITER=1).train() is None


@pytest.mark.parametrize("steps", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    train: Train, tmp_path: Path, steps: int
) -> None:
    # Batch normalisation sees micro-batches, so it is off here.
    whole = train("whole", MODEL__RESNETS__NORM="none")
    parts = train("parts", MODEL__RESNETS__NORM="none", SOLVER__ACCUMULATION_STEPS=steps)
    assert_same(weights(whole.model), weights(parts.model), atol=1e-5)
    a, b = toy.losses(tmp_path / "whole"), toy.losses(tmp_path / "parts")
    assert a.keys() == b.keys()
    assert [a[i] for i in a] == pytest.approx([b[i] for i in a], abs=1e-5)


def test_batch_must_fit_the_accumulation(build: Train) -> None:
    with pytest.raises(ConfigError, match=r"IMS_PER_BATCH is 4.*multiple of 3"):
        build(SOLVER__ACCUMULATION_STEPS=3)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_optimizers(train: Train, tmp_path: Path, name: str) -> None:
    trainer = train(
        SOLVER__OPTIMIZER=name,
        SOLVER__BASE_LR=0.02 if name == "SGD" else 0.003,
        SOLVER__MAX_ITER=40,
        SOLVER__CLIP_GRADIENTS__ENABLED=True,
    )
    losses = list(toy.losses(tmp_path / "run").values())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert type(trainer.optimizer).__name__ == f"{name}WithGradientClip"
    assert isinstance(trainer.optimizer, getattr(torch.optim, name))


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("kind", ["value", "norm"])
def test_clipping_leaves_out_what_has_no_gradient(build: Train, name: str, kind: str) -> None:
    clip = {"ENABLED": True, "CLIP_TYPE": kind, "CLIP_VALUE": 0.25}
    options = {f"SOLVER__CLIP_GRADIENTS__{key}": value for key, value in clip.items()}
    trainer = build(SOLVER__OPTIMIZER=name, **options)
    before, head = weights(trainer.model), trainer.model.head
    head.weight.grad = torch.full_like(head.weight, 8.0)
    trainer.optimizer.step()
    limit = 0.25 if kind == "value" else 0.25 / head.weight.numel() ** 0.5
    torch.testing.assert_close(head.weight.grad, torch.full_like(head.weight, limit))
    after = weights(trainer.model)
    assert [x for x in after if not torch.equal(before[x], after[x])] == ["head.weight"]


def test_weight_decay_of_norms_is_separate_for_adamw(build: Train) -> None:
    trainer = build(SOLVER__OPTIMIZER="AdamW", SOLVER__WEIGHT_DECAY=0.1)
    decay = {
        id(p): group["weight_decay"]
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }
    assert decay[id(trainer.model.head.weight)] == 0.1
    assert decay[id(trainer.model.backbone[1].weight)] == 0.0  # SOLVER.WEIGHT_DECAY_NORM


def test_step_at_the_last_iteration_is_explained(build: Train) -> None:
    with pytest.raises(ConfigError, match=r"SOLVER\.STEPS \(10,\) must lie below .* 10"):
        build(SOLVER__STEPS="(10,)")


def test_threads_of_a_small_network(build: Train) -> None:
    before = torch.get_num_threads()
    wanted = before + 1
    try:
        build(SOLVER__CPU_THREADS=0)
        assert torch.get_num_threads() == before
        build(SOLVER__CPU_THREADS=wanted)
        assert torch.get_num_threads() == wanted
        with pytest.raises(ConfigError, match="CPU_THREADS"):
            build(SOLVER__CPU_THREADS=-1)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("wanted", [True, False])
def test_gradients_are_compressed_where_asked(
    build: Train, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    asked: dict[str, Any] = {}
    wrap = lambda model, **options: asked.update(options) or model  # noqa: E731
    monkeypatch.setattr("d2ext.engine.trainer.create_ddp_model", wrap)
    build(SOLVER__COMPRESS_GRADIENTS=wanted)
    assert asked["fp16_compression"] is wanted


def test_unknown_optimizer(build: Train) -> None:
    with pytest.raises(ConfigError, match=r"'Sgd'.*'SGD', 'Adam' or 'AdamW'"):
        build(SOLVER__OPTIMIZER="Sgd")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_on_the_cpu_is_bfloat16(train: Train, tmp_path: Path, dtype: str) -> None:
    trainer = train("amp", SOLVER__AMP__ENABLED=True, SOLVER__AMP__DTYPE=dtype)
    assert trainer._trainer.amp_dtype == torch.bfloat16
    assert not trainer._trainer.grad_scaler.is_enabled()
    train("plain")
    amp, plain = toy.losses(tmp_path / "amp"), toy.losses(tmp_path / "plain")
    assert amp != plain  # bfloat16 was used
    assert amp[0] == pytest.approx(plain[0], rel=0.05)
    assert next(trainer.model.parameters()).dtype == torch.float32


def test_channels_last(train: Train, tmp_path: Path) -> None:
    trainer = train("last", MODEL__CHANNELS_LAST=True)
    conv = trainer.model.backbone[0].weight
    assert conv.is_contiguous(memory_format=torch.channels_last) and not conv.is_contiguous()
    plain = train("first")
    assert_same(weights(plain.model), weights(trainer.model), atol=1e-4)


def test_average_follows_its_formula_and_is_what_checkpoints_hold(
    build: Train, tmp_path: Path
) -> None:
    ema = {"MODEL_EMA__ENABLED": True, "MODEL_EMA__DECAY": 0.5, "MODEL_EMA__WARMUP": True}
    trainer = build(SOLVER__MAX_ITER=4, **ema)
    seen: list[torch.Tensor] = []
    step = trainer._trainer.run_step

    def spy() -> None:
        step()
        seen.append(trainer.model.head.weight.detach().clone())

    trainer._trainer.run_step = spy
    trainer.train()
    expected = seen[0]
    for n, weight in enumerate(seen[1:], start=1):
        keep = min(0.5, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * weight
    average = trainer.evaluated_model
    torch.testing.assert_close(average.head.weight, expected)
    assert not torch.equal(average.head.weight, trainer.model.head.weight)
    # Statistics are copied.
    assert torch.equal(average.backbone[1].running_mean, trainer.model.backbone[1].running_mean)

    saved = load_untrusted(tmp_path / "run/model_final.pth")
    assert_same(saved["model"], weights(average))
    assert_same(saved["trained_weights"]["weights"], weights(trainer.model))
    resumed = build(SOLVER__MAX_ITER=8, **ema)
    resumed.resume_or_load(resume=True)
    assert resumed.start_iter == 4 and int(resumed._ema.n_averaged) == 4
    assert_same(weights(resumed.model), weights(trainer.model))
    assert_same(weights(resumed.evaluated_model), weights(average))


def test_average_starts_from_loaded_weights(train: Train, build: Train, tmp_path: Path) -> None:
    plain = train("plain")
    file = tmp_path / "plain/model_final.pth"
    trainer = build("ema", MODEL_EMA__ENABLED=True, MODEL__WEIGHTS=file)
    trainer.resume_or_load(resume=False)
    assert_same(weights(trainer.model), weights(plain.model))
    assert_same(weights(trainer.evaluated_model), weights(plain.model))


def test_best_checkpoint_survives_a_resume(build: Train, tmp_path: Path) -> None:
    options = {"TEST__BEST_METRIC": "toy/score", "TEST__EVAL_PERIOD": 2}
    best = tmp_path / "run/model_best.pth"

    def run(scores: list[float], end: int) -> None:
        trainer = build(SOLVER__MAX_ITER=end, SOLVER__CHECKPOINT_PERIOD=2, **options)
        values = iter(scores)
        # Called by EvalHook at each evaluation.
        trainer.test = lambda cfg, model: {"toy": {"score": next(values)}}
        trainer.resume_or_load(resume=True)
        trainer.train()

    run([3.0, 5.0, 4.0], end=6)
    stored = load_untrusted(best)
    assert (stored["best_metric"], stored["iteration"]) == (5.0, 3)
    assert "trainer" not in stored
    assert (tmp_path / "run/last_checkpoint").read_text() == "model_final.pth"
    run([4.5], end=8)  # better than the last, not better than the best
    assert load_untrusted(best)["best_metric"] == 5.0
    run([float("nan"), 6.0], end=12)
    assert load_untrusted(best)["best_metric"] == 6.0


@pytest.mark.parametrize(
    "options", [{"INPUT__FORMAT": "L"}, {"MODEL__PIXEL_MEAN": "[1.0]", "MODEL__PIXEL_STD": "[1.0]"}]
)
def test_other_than_three_channels_are_refused(build: Train, options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"three channels: INPUT\.FORMAT RGB or BGR"):
        build(**options)


def test_training_ends_early_and_stays_ended(build: Train, tmp_path: Path) -> None:
    options = {"TEST__BEST_METRIC": "toy/score", "TEST__EVAL_PERIOD": 2, "TEST__EARLY_STOPPING": 3}

    def run(scores: list[float], end: int = 20, **more: object) -> dict[str, float]:
        trainer = build(SOLVER__MAX_ITER=end, **options | more)
        values = iter(scores)
        trainer.test = lambda cfg, model: {"toy": {"score": next(values)}}
        trainer.resume_or_load(resume=True)
        results = trainer.train()
        assert not list(values), "fewer evaluations than expected"
        return results["toy"]

    run([3.0, 5.0, 4.0, 4.0], end=8)  # the best is of iteration 3
    assert run([4.5]) == {"score": 4.5}  # goes on counting: the third without a better one
    losses = toy.losses(tmp_path / "run")
    assert sorted(losses) == list(range(10))
    stored = load_untrusted(tmp_path / "run/model_final.pth")
    assert stored["iteration"] == 9 and "optimizer" in stored["trainer"]["_trainer"]
    assert run([4.0]) == {"score": 4.0} and toy.losses(tmp_path / "run") == losses
    run([6.0, 1.0, 1.0, 1.0], TEST__EARLY_STOPPING=4, end=18)  # more patience: it goes on
    assert sorted(toy.losses(tmp_path / "run")) == list(range(18))


def test_early_stopping_needs_to_know_what_is_better(build: Train) -> None:
    with pytest.raises(ConfigError, match=r"TEST\.BEST_METRIC"):
        build(TEST__EARLY_STOPPING=2, TEST__EVAL_PERIOD=2)


def test_resumed_run_continues_as_if_uninterrupted(
    build: Train, train: Train, tmp_path: Path
) -> None:
    options = {
        "SOLVER__MAX_ITER": 12,
        "SOLVER__CHECKPOINT_PERIOD": 5,
        "SOLVER__LOG_PERIOD": 3,  # medians: their history must survive
        "SOLVER__OPTIMIZER": "AdamW",
        "SOLVER__BASE_LR": 0.003,
        "MODEL_EMA__ENABLED": True,
        "MODEL__RESNETS__WIDTH_PER_GROUP": 64,  # dropout
    }
    whole = train("whole", **options)
    first = build("parts", **options)
    first.max_iter = 7  # iterations 5 and 6 are lost
    step = first._trainer.run_step

    def fail_at_seven() -> None:
        if first.iter == 7:
            raise KeyboardInterrupt
        step()

    first.max_iter = 12
    first._trainer.run_step = fail_at_seven
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = build("parts", **options)
    second.resume_or_load(resume=True)
    assert second.start_iter == 5
    second.train()
    assert_same(weights(whole.model), weights(second.model))
    assert_same(weights(whole.evaluated_model), weights(second.evaluated_model))
    logged = toy.metrics(tmp_path / "whole")
    assert len(logged) == 4 and logged == toy.metrics(tmp_path / "parts")


def test_drawn_seed_is_kept_in_the_checkpoint(build: Train, train: Train) -> None:
    first = train(SEED=-1, SOLVER__MAX_ITER=2)
    assert first.cfg.SEED >= 0
    resumed = build(SEED=-1, SOLVER__MAX_ITER=4)
    resumed.resume_or_load(resume=True)
    assert resumed.cfg.SEED == first.cfg.SEED == resumed._trainer.seed


def test_resume_with_another_optimizer_says_so(build: Train, train: Train) -> None:
    train(SOLVER__MAX_ITER=1, SOLVER__WEIGHT_DECAY_BIAS=0.5)
    other = build(SOLVER__MAX_ITER=2)
    with pytest.raises(CheckpointError, match=r"Cannot resume.*the run was started with"):
        other.resume_or_load(resume=True)


def test_complete_run_is_not_trained_again(build: Train, train: Train, tmp_path: Path) -> None:
    train(SOLVER__MAX_ITER=2)
    before = toy.losses(tmp_path / "run")
    again = build(SOLVER__MAX_ITER=2)
    again.resume_or_load(resume=True)
    again.train()
    assert toy.losses(tmp_path / "run") == before
