"""From the command line to a config."""

from __future__ import annotations

from pathlib import Path

import pytest

from d2ext.config import ConfigError, load_config


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("SOLVER.BASE_LEARNING_RATE", "SOLVER.BASE_LR"),
        ("SOLVER.BASE_LRR", "SOLVER.BASE_LR"),
        ("SOLVER.NUM_WORKERS", "DATALOADER.NUM_WORKERS"),
        ("MODEL.YOLACT.NUM_CLASES", "MODEL.YOLACT.NUM_CLASSES"),
        ("SLOVER.OPTIMIZER", "SOLVER.OPTIMIZER"),
    ],
)
def test_unknown_key_on_the_command_line(key: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"Unknown config key {key}.*command line.*{near}"):
        load_config("", [key, "1"])


def test_unknown_key_in_a_file_and_in_its_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("SOLVER: {ACUMULATION_STEPS: 2}\n")
    path = tmp_path / "c.yaml"
    path.write_text("_BASE_: base.yaml\nSEED: 3\nVERSION: 2\n")
    with pytest.raises(
        ConfigError,
        match=r"SOLVER\.ACUMULATION_STEPS in .*c\.yaml.*mean SOLVER\.ACCUMULATION_STEPS",
    ):
        load_config(str(path))


def test_values_of_file_and_command_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("VERSION: 2\nSEED: 3\nSOLVER: {BASE_LR: 0.5, OPTIMIZER: Adam}\n")
    cfg = load_config(str(path), ["SOLVER.BASE_LR", "0.25"])
    assert (cfg.SEED, cfg.SOLVER.BASE_LR, cfg.SOLVER.OPTIMIZER) == (3, 0.25, "Adam")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["SOLVER.BASE_LR"], "pairs KEY VALUE, but 1 words"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER"),
        (["SOLVER", "3"], "SOLVER"),
    ],
)
def test_wrong_options(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("", options)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config file .*absent\.yaml"):
        load_config(str(tmp_path / "absent.yaml"))


def test_broken_yaml(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("SOLVER: {BASE_LR: 0.5\n")
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load_config(str(path))
