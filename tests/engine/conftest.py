"""A toy data set, registered for each test, and trainings on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from d2ext.config import load_config
from d2ext.engine import Trainer
from d2ext.tools import train as tool
from tests.engine import toy

Train = Callable[..., Trainer]


@pytest.fixture(autouse=True)
def _logging() -> None:
    """Set the loggers up before Trainer does, and let pytest see their records."""
    for name in ("detectron2", "d2ext"):
        setup_logger(name=name).propagate = True


@pytest.fixture(scope="session")
def toy_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO JSON of the toy data set, beside its images."""
    return toy.write_data(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def build(toy_json: Path, tmp_path: Path) -> Train:
    """``build(OUTPUT, KEY__KEY=value, ...)``: a trainer on the toy data, seeded as by train_net."""
    toy.register(toy_json)

    def make(output: Path | str = "run", **more: object) -> Trainer:
        cfg = load_config("", toy.options(tmp_path / output, **more))
        cfg.freeze()
        seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)
        return Trainer(cfg)

    return make


@pytest.fixture
def train(build: Train) -> Train:
    """As ``build``, and train to the end."""

    def run(output: Path | str = "run", **more: object) -> Trainer:
        trainer = build(output, **more)
        trainer.resume_or_load(resume=True)
        trainer.train()
        return trainer

    return run


@pytest.fixture
def train_ranks(toy_json: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``train_ranks("--num-gpus", "2", ...)``: `d2ext train` from the test's own process, which need not
    import everything first; its exit status."""
    toy.register(toy_json)

    def run(*arguments: str) -> int:
        with monkeypatch.context() as patch:
            patch.setenv("TOY_DATA", str(toy_json))
            patch.setattr(tool, "main", toy.train_rank)
            return tool.run(list(arguments))

    return run
