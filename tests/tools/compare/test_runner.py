"""`d2ext compare`: arms are trained in processes of their own, and what is finished stays."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from d2ext.checkpoint.io import load_untrusted
from d2ext.tools import compare
from d2ext.tools.compare import runner
from d2ext.tools.compare.comparison import COMPARISONS, Arm, Comparison, Plot
from tests.engine import toy

WIDTH = "MODEL.RESNETS.STEM_OUT_CHANNELS"
SAME = ("INPUT.MIN_SIZE_TEST", str(toy.SIDE))


def measure(cfg, model):
    weight = model.backbone[0].weight
    return {"channels": float(len(weight))}, {"sums": [(0.0, float(weight.detach().sum()), 0.1)]}


@COMPARISONS.register()
def toy_widths() -> Comparison:
    return Comparison(
        summary="two widths of a toy",
        arms={
            "again": Arm("wide, evaluated again", "", SAME, trained_by="wide"),
            "wide": Arm("wide", ""),
            "narrow": Arm("narrow", "", (WIDTH, "6")),
        },
        columns={"bbox/AP50": "AP50", "channels": "width"},
        evaluations=2,
        measure=measure,
        plots={"sums": Plot("x", "sum"), "nothing": Plot("x", "y", log=True)},
    )


@pytest.fixture(scope="module")
def toy_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_data(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def run(toy_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the comparison of toys into ``tmp_path``."""
    # The import registers the toys.
    code = "import sys, tests.engine.toy; from d2ext.tools.main import main; sys.exit(main())"
    monkeypatch.setattr(runner, "PROGRAM", [sys.executable, "-c", code])
    monkeypatch.setenv("TOY_DATA", str(toy_json))
    path = os.pathsep.join([str(toy.ROOT), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    toy.register(toy_json)
    # The wide one would diverge at the usual rate.
    more = {"DATASETS__TEST": "('toy',)", "SOLVER__CHECKPOINT_PERIOD": 2, "SOLVER__BASE_LR": 0.001}
    options = toy.options(tmp_path, **more)
    pairs = list(zip(options[::2], options[1::2], strict=True))
    # The comparison sets the first two, its arms the last.
    opts = [x for pair in pairs if pair[0] not in ("OUTPUT_DIR", "SEED", WIDTH) for x in pair]

    def run(*arguments: str, more: tuple[str, ...] = ()) -> int:
        words = ["toy-widths", "--output", str(tmp_path), *arguments]
        return compare.run([*words, "--opts", *opts, *more])

    return run


def test_arms_seeds_and_resume(
    run,
    processes: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    processes(2)  # the one that is killed, and the one that goes on
    budget = ("--iterations", "8", "--seeds", "1", "2", "--arms", "wide", "again")
    # The first training is killed: the comparison says so, and goes on where it was.
    monkeypatch.setenv("TOY_KILL_AT", "5")
    assert run("--iterations", "8", "--arms", "wide") == 2
    assert f"ended with status {-signal.SIGKILL}" in capfd.readouterr().err
    monkeypatch.delenv("TOY_KILL_AT")
    assert run(*budget) == 0
    assert "Starting training from iteration 4" in capfd.readouterr().out

    report = json.loads((tmp_path / "comparison.json").read_text())
    runs = {(r["arm"], r["seed"]): r for r in report["runs"]}
    assert set(runs) == {(arm, seed) for arm in ("again", "wide") for seed in (1, 2)}
    for (arm, seed), one in runs.items():
        own = load_untrusted(tmp_path / f"wide/seed_{seed}/model_final.pth")
        weight = own["model"]["backbone.0.weight"]
        assert one["results"]["channels"] == len(weight) == 64
        assert one["series"]["sums"][0][1] == pytest.approx(float(weight.sum()))
        assert one["seconds"] > 0 and one["ms"] > 0 and one["images"] == 32
        # 64 filters of 27 weights on 7 x 7 places, and 4 boxes' numbers of all features
        assert one["flops"] == 2 * 7 * 7 * 64 * (27 + 4)
        assert one["parameters"] == 64 * (27 + 1 + 2) + 7 * 7 * 64 * 4 + 4
        if arm == "again":
            assert one["results"] == runs["wide", seed]["results"]
            assert one["series"]["time"] == []
        else:
            times = [point[0] for point in one["series"]["time"]]
            assert len(times) == 2 and 0 < times[0] < times[1] == one["seconds"]
            assert one["series"]["time"][1][1] == one["results"]["bbox/AP50"]
    assert runs["wide", 1]["series"]["sums"] != runs["wide", 2]["series"]["sums"]
    table = (tmp_path / "table.md").read_text()
    assert table.count("\n") == 4 and "± 0.00" in table  # of the widths
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["sums.png", "time.png"]
    page = (tmp_path / "index.html").read_text()
    pictures = re.findall(r'src="([^"]+)"', page)
    assert pictures[2:] == [
        "annotations/00.png",
        "again/seed_1/pictures/00.png",
        "wide/seed_1/pictures/00.png",
    ]
    assert all((tmp_path / name).stat().st_size > 0 for name in pictures)
    assert "means and standard deviations of 2 seeds" in page and re.search(
        "<td[^>]*>32 *</td>", page
    )

    def stamps() -> list[int]:
        return [p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("results.json"))]

    before = stamps()
    assert run(*budget) == 0 and stamps() == before and len(before) == 4
    # The same folder with other settings is refused.
    assert run(*budget, more=("SOLVER.BASE_LR", "0.1")) == 2
    assert "made with other settings" in capfd.readouterr().err


def test_side_by_side(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All trainings have begun before the first one ends, and are done once."""
    barrier, started = threading.Barrier(2, timeout=60), []
    start = runner.start

    def start_with_another(
        command: str, arguments: list[str], folder: Path, environment: dict
    ) -> None:
        started.append((command, folder.parent.name, environment["CUDA_VISIBLE_DEVICES"]))
        barrier.wait()
        start(command, arguments, folder, environment)

    monkeypatch.setattr(runner, "start", start_with_another)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    budget = ("--iterations", "2", "--arms", "wide", "narrow", "--jobs", "2")
    assert run(*budget, more=("MODEL.DEVICE", "cpu")) == 0
    assert sorted(started) == [("train", "narrow", "7"), ("train", "wide", "5")]
    report = json.loads((tmp_path / "comparison.json").read_text())
    assert [r["arm"] for r in report["runs"]] == ["wide", "narrow"]
    # In the folder of another run nothing begins.
    (tmp_path / "wide/seed_1/model_final.pth").unlink()
    assert run(*budget, more=("MODEL.DEVICE", "cpu", "SOLVER.BASE_LR", "0.1")) == 2
    assert len(started) == 2


def test_budget_in_seconds(
    run, processes: Callable[[int], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes(0)
    monkeypatch.setattr(runner, "_PILOT", 6)
    monkeypatch.setattr(runner, "read_metrics", lambda file: [{"iteration": 5, "time": 0.25}])
    assert run("--seconds", "2", "--arms", "narrow") == 0
    arguments = json.loads((tmp_path / "narrow/seed_1/run.json").read_text())["arguments"]
    assert "SOLVER.MAX_ITER 8 SOLVER.STEPS (6,)" in " ".join(arguments)
    assert sorted(toy.losses(tmp_path / "narrow/pilot")) == list(range(6))
    assert not (tmp_path / "narrow/seed_1/pilot").exists()  # one for all seeds


def test_what_cannot_be_compared(run, capfd: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert run("--arms", "wide", "broad") == 2
    assert "Arms are missing or unknown: broad" in capfd.readouterr().err
    assert run("--arms", "again") == 2
    assert "Arms are missing or unknown: wide" in capfd.readouterr().err
    assert run("--config", "narrow=nowhere.yaml") == 2
    assert "no config file" in capfd.readouterr().err
    assert run(more=("DATASETS.TEST", "()")) == 2
    assert "set DATASETS.TEST" in capfd.readouterr().err
    assert not list(tmp_path.rglob("run.json"))


def test_budgets_must_agree() -> None:
    parse = runner.read_config
    one, other = (parse(["--config-file", "", "SOLVER.MAX_ITER", n]) for n in ("10", "20"))
    with pytest.raises(runner.ConfigError, match=r"SOLVER.MAX_ITER is (10 and 20|20 and 10)"):
        runner.check_budgets([one, other], timed=False)
    with pytest.raises(runner.ConfigError, match=r"set DATASETS.TEST"):
        runner.check_budgets([one, other], timed=True)


def test_schedule_follows_the_budget() -> None:
    steps = ["SOLVER.STEPS", "(60, 80)", "SOLVER.MAX_ITER", "100", "SOLVER.WARMUP_ITERS", "50"]
    cfg = runner.read_config(["--config-file", "", *steps])
    options = runner.budget_options(cfg, 10, evaluations=2)
    assert dict(zip(options[::2], options[1::2], strict=True)) == {
        "SOLVER.MAX_ITER": "10",
        "SOLVER.STEPS": "(6, 8)",
        "SOLVER.WARMUP_ITERS": "1",
        "TEST.EVAL_PERIOD": "5",
    }
    assert runner.budget_options(cfg, 1, evaluations=1)[3] == "()"


def test_training_time_leaves_out_evaluations_and_waiting() -> None:
    lines = [
        {"iteration": 1, "loss": 1.0},  # before the timer knows anything
        {"iteration": 3, "time": 2.0, "data_time": 0.5},
        {"iteration": 5, "time": 1.0},
        {"iteration": 6, "bbox/AP": 3.0},  # after the last
        {"iteration": 6, "bbox/AP50": 3.0},
    ]
    assert runner.training_seconds(lines) == [3.0, 6.0, 8.0, 9.0, 9.0]
