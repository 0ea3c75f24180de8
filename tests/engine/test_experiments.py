"""W&B, MLflow and ClearML get what TensorBoard gets, by fakes that write down how they are called."""

from __future__ import annotations

import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.utils.events import get_event_storage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2ext.config import ConfigError
from d2ext.engine import Trainer
from d2ext.engine.experiments import LOGGER_REGISTRY
from tests.engine import toy
from tests.engine.conftest import Train

NAMES = ("Wandb", "MLflow", "ClearML")
OPTIONS = {"SOLVER__MAX_ITER": 5, "SOLVER__LOG_PERIOD": 2, "TEST__EVAL_PERIOD": 3}


class Fakes:
    """The packages' public functions as far as they are used.

    ``begun``: (package, id that was asked for, name, parameters); ``scalars``: package -> {(name,
    iteration): value}; ``images``; ``ended``: (package, failed). ``down``: no server answers.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[tuple[str, str | None, str, dict[str, Any]]] = []
        self.scalars: dict[str, dict[tuple[str, int], float]] = {x: {} for x in NAMES}
        self.images: list[tuple[str, str, int, np.ndarray]] = []
        self.single: dict[str, float] = {}
        self.ended: list[tuple[str, bool]] = []
        self.down = False
        for name, make in (
            ("wandb", self.wandb),
            ("mlflow", self.mlflow),
            ("clearml", self.clearml),
        ):
            module = ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            vars(module).update(make())
            monkeypatch.setitem(sys.modules, name, module)

    def put(
        self, package: str, scalars: dict[str, float], step: int, error: type[Exception]
    ) -> None:
        if self.down:
            raise error("no server")
        for name, value in scalars.items():
            assert (name, step) not in self.scalars[package], "written twice"
            self.scalars[package][name, step] = value

    def wandb(self) -> dict[str, Any]:
        class Error(Exception):
            pass

        last = [-1]

        def log(data: dict[str, Any], step: int) -> None:
            assert step >= last[0], "W&B drops steps that go back"
            last[0] = step
            images = {k: v for k, v in data.items() if isinstance(v, SimpleNamespace)}
            self.images += [("Wandb", k, step, v.pixels) for k, v in images.items()]
            self.put("Wandb", {k: v for k, v in data.items() if k not in images}, step, Error)

        def init(project: str, name: str, config: dict, id: str | None, resume: str) -> Any:
            assert (project, resume) == ("d2ext", "allow")
            self.begun.append(("Wandb", id, name, config))
            finish = lambda exit_code: self.ended.append(("Wandb", exit_code != 0))  # noqa: E731
            return SimpleNamespace(id=id or "w1", log=log, finish=finish)

        image = lambda pixels: SimpleNamespace(pixels=pixels)  # noqa: E731
        return {"errors": SimpleNamespace(Error=Error), "init": init, "Image": image}

    def mlflow(self) -> dict[str, Any]:
        class MlflowException(Exception):
            pass

        def start_run(run_id: str | None, run_name: str) -> Any:
            self.begun.append(("MLflow", run_id, run_name, {}))
            return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "m1"))

        def log_image(image: np.ndarray, artifact_file: str) -> None:
            stem = Path(artifact_file).stem
            self.images.append(("MLflow", stem[:-8], int(stem[-7:]), image))

        return {
            "exceptions": SimpleNamespace(MlflowException=MlflowException),
            "start_run": start_run,
            "log_params": lambda parameters: self.begun[-1][3].update(parameters),
            "log_metrics": lambda x, step: self.put("MLflow", x, step, MlflowException),
            "log_image": log_image,
            "end_run": lambda status: self.ended.append(("MLflow", status != "FINISHED")),
        }

    def clearml(self) -> dict[str, Any]:
        def report(title: str, series: str, value: float, step: int) -> None:
            name = title if series == title else f"{title}/{series}"
            self.put("ClearML", {name: value}, step, ValueError)

        logger = SimpleNamespace(
            report_scalar=report,
            report_single_value=lambda name, value: self.single.update({name: value}),
            report_image=lambda _, name, step, image: self.images.append(
                ("ClearML", name, step, image)
            ),
        )
        failed = []
        task = SimpleNamespace(
            get_logger=lambda: logger,
            connect=lambda parameters, name: self.begun[-1][3].update(parameters),
            mark_failed=lambda: failed.append(1),
            close=lambda: self.ended.append(("ClearML", bool(failed))),
        )

        def init(task_name: str, reuse_last_task_id: Any, continue_last_task: Any, **_: Any) -> Any:
            if reuse_last_task_id:
                assert continue_last_task == 0 and continue_last_task is not False
            self.begun.append(("ClearML", reuse_last_task_id or None, task_name, {}))
            task.id = reuse_last_task_id or "c1"
            return task

        return {"Task": SimpleNamespace(init=init)}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    return Fakes(monkeypatch)


def trainer(build: Train, **more: object) -> Trainer:
    """On the toy data, with a score of 10 x the iteration and a picture in iteration 1."""
    made = build("mine", SOLVER__LOGGERS=str(NAMES), **{**OPTIONS, **more})
    made.test = lambda cfg, model: {"toy": {"score": 10.0 * made.iter, "AP-none": float("nan")}}
    step = made._trainer.run_step

    def run_step() -> None:
        if made.iter == 1:
            picture = torch.zeros(3, 4, 6)
            picture[0] = 0.5
            get_event_storage().put_image("Left: annotations", picture)
        step()

    made._trainer.run_step = run_step
    return made


def without_times(scalars: dict[tuple[str, int], float]) -> dict[tuple[str, int], float]:
    return {k: v for k, v in scalars.items() if "time" not in k[0] and "eta" not in k[0]}


def test_all_get_what_tensorboard_gets(build: Train, fakes: Fakes, tmp_path: Path) -> None:
    made = trainer(build)
    made.train()
    events = EventAccumulator(str(tmp_path / "mine"))
    events.Reload()
    expected = {
        (tag, x.step): x.value for tag in events.Tags()["scalars"] for x in events.Scalars(tag)
    }
    assert {("total_loss", 1), ("lr", 4), ("toy/score", 2), ("toy/score", 5)} <= set(expected)
    for name in NAMES:
        got = fakes.scalars[name]
        finite = {k: v for k, v in expected.items() if np.isfinite(v) or name != "ClearML"}
        assert got == pytest.approx(finite, rel=1e-6, nan_ok=True), name
    assert fakes.single["toy/score"] == 50.0 and "total_loss" not in fakes.single
    for (package, run_id, run, parameters), name in zip(fakes.begun, NAMES, strict=True):
        assert (package, run_id, run) == (name, None, "mine")
        assert parameters["SOLVER.BASE_LR"] == 0.05 and parameters["DATASETS.TRAIN"] == "('toy',)"
    assert fakes.ended == [(name, False) for name in NAMES]
    assert [x[0] for x in fakes.images] == list(NAMES)
    assert {x[2] for x in fakes.images} == {1}
    for _, tag, _, pixels in fakes.images:
        assert tag.startswith("Left") and tag.endswith("annotations")
        assert pixels.shape == (4, 6, 3) and pixels.dtype == np.uint8
        assert (pixels == [127, 0, 0]).all()
    ids = json.loads((tmp_path / "mine/experiments.json").read_text())
    assert ids == {"Wandb": "w1", "MLflow": "m1", "ClearML": "c1"}


def test_pictures_do_not_pile_up_without_tensorboard(
    build: Train, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *x: (name != "tensorboard" and real(name, *x)) or None,
    )
    made = trainer(build)
    made.train()
    assert len(fakes.images) == 3 and not made.storage._vis_data


def test_a_resumed_run_goes_on_in_its_experiments(build: Train, fakes: Fakes) -> None:
    trainer(build, SOLVER__MAX_ITER=2).train()
    fakes.scalars = {name: {} for name in NAMES}
    resumed = trainer(build)
    resumed.resume_or_load(resume=True)
    resumed.train()
    assert [x[:2] for x in fakes.begun[3:]] == [
        ("Wandb", "w1"),
        ("MLflow", "m1"),
        ("ClearML", "c1"),
    ]
    assert not fakes.begun[4][3], "MLflow's parameters cannot be written again"
    for name in NAMES:
        assert {x for key, x in fakes.scalars[name] if key == "total_loss"} == {3, 4}


def test_a_server_that_fails_does_not_end_the_training(
    build: Train, fakes: Fakes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer(build)
    fakes.down = True
    made.train()
    assert sorted(toy.losses(tmp_path / "mine")) == [1, 3, 4]
    said = [x.getMessage() for x in caplog.records if "no server" in x.getMessage()]
    assert len(said) == 3 and all("training goes on" in x for x in said)


def test_a_failed_training_is_marked(
    build: Train, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(build)
    monkeypatch.setattr(made, "run_step", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.train()
    assert fakes.ended == [(name, True) for name in NAMES]


def test_early_stopping_is_no_failure(build: Train, fakes: Fakes) -> None:
    made = trainer(
        build, SOLVER__MAX_ITER=20, TEST__BEST_METRIC="toy/score", TEST__EARLY_STOPPING=1
    )
    made.test = lambda cfg, model: {"toy": {"score": -made.iter}}
    made.train()
    assert made.iter < 19 and fakes.ended == [(name, False) for name in NAMES]


def test_what_is_missing_is_said_before_the_training(
    build: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        package = LOGGER_REGISTRY.get(name).package
        monkeypatch.setattr("d2ext.engine.experiments.find_spec", lambda _: None)
        with pytest.raises(ConfigError, match=f"{name}.*not installed: pip install {package}"):
            build(SOLVER__LOGGERS=f"('{name}',)")
    with pytest.raises(ConfigError, match=r"there is no 'wandb'; there is: ClearML, MLflow, Wandb"):
        build(SOLVER__LOGGERS="('wandb',)")


def test_no_experiment_can_begin(build: Train, fakes: Fakes) -> None:
    def init(**_: Any) -> Any:
        raise sys.modules["wandb"].errors.Error("not logged in")

    sys.modules["wandb"].init = init
    made = build(SOLVER__LOGGERS="('Wandb',)")
    with pytest.raises(ConfigError, match=r"Wandb cannot begin an experiment: not logged in"):
        made.train()
