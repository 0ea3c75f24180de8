"""`d2ext train` from outside: its command line, kills, several processes."""

from __future__ import annotations

import json
import os
import signal
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode

from d2ext.checkpoint.io import load_untrusted
from d2ext.config import load_config
from d2ext.engine import Trainer
from d2ext.engine.run_folder import run_folder
from d2ext.model_zoo import find_config_file
from d2ext.testing import tiny_config
from d2ext.tools import train
from tests.engine import toy


@pytest.fixture(scope="module")
def toy_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write_data(tmp_path_factory.mktemp("toy"))


def test_killed_and_resumed_run_equals_an_uninterrupted_one(toy_json: Path, tmp_path: Path) -> None:
    """SIGKILL in iteration 7; checkpoints are of iterations 2 and 5."""
    common = {
        "SOLVER__MAX_ITER": 12,
        "SOLVER__CHECKPOINT_PERIOD": 3,
        "MODEL__RESNETS__WIDTH_PER_GROUP": 64,  # dropout: depends on the generators' states
        "DATASETS__TEST": "('toy',)",
    }
    run = toy.options(tmp_path / "run", **common, DATALOADER__NUM_WORKERS=1)
    toy.wait(toy.start(toy_json, *run, TOY_KILL_AT="7"), -signal.SIGKILL)
    assert (tmp_path / "run/last_checkpoint").read_text() == "model_0000005.pth"
    assert sorted(toy.losses(tmp_path / "run")) == list(range(7))  # nothing logged was lost
    toy.register(toy_json)
    assert train.run(["--resume", *run]) == 0
    assert "Starting training from iteration 6" in (tmp_path / "run/log.txt").read_text()
    assert train.run(toy.options(tmp_path / "whole", **common)) == 0
    whole, parts = toy.losses(tmp_path / "whole"), toy.losses(tmp_path / "run")
    assert sorted(whole) == list(range(12))
    assert whole == parts
    assert toy.metrics(tmp_path / "whole") == toy.metrics(tmp_path / "run")
    weights = [load_untrusted(tmp_path / x / "model_final.pth")["model"] for x in ("whole", "run")]
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name]), name


def test_two_processes_give_what_one_gives(
    toy_json: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    train_ranks: Callable[..., int],
) -> None:
    # In iteration 4 one of the processes has an infinite loss; both must skip it.
    monkeypatch.setenv("TOY_INF_AT", "4")
    common = {
        "MODEL__RESNETS__NORM": "none",  # its statistics are those of a process
        "MODEL_EMA__ENABLED": True,
        "DATASETS__TEST": "('toy',)",
        "TEST__BEST_METRIC": "bbox/AP50",
        "SOLVER__MAX_ITER": 10,
    }
    assert train_ranks("--num-gpus", "2", *toy.options(tmp_path / "two", **common)) == 0
    assert "World size: 2" in (tmp_path / "two/log.txt").read_text()
    assert train.run(toy.options(tmp_path / "one", **common)) == 0
    one, both = toy.losses(tmp_path / "one"), toy.losses(tmp_path / "two")
    assert sorted(one) == sorted(both) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert [both[i] for i in both] == pytest.approx([one[i] for i in one], abs=1e-5)
    for file in ("model_final.pth", "model_best.pth"):
        a, b = (load_untrusted(tmp_path / x / file)["model"] for x in ("one", "two"))
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-5)
    results = [
        json.loads((tmp_path / x / "inference/coco_instances_results.json").read_text())
        for x in ("one", "two")
    ]
    by_image = [sorted(x, key=lambda r: r["image_id"]) for x in results]
    assert [r["image_id"] for r in by_image[1]] == list(range(1, 13))  # each image once
    for a, b in zip(*by_image, strict=True):
        assert b["bbox"] == pytest.approx(a["bbox"], abs=1e-3)


@pytest.fixture(scope="module")
def trained(toy_json: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a finished run."""
    output = tmp_path_factory.mktemp("trained") / "run"
    toy.register(toy_json)
    assert train.run(toy.options(output, SOLVER__MAX_ITER=3, SOLVER__STEPS="(2,)")) == 0
    return output


@pytest.fixture
def registered(toy_json: Path) -> None:
    toy.register(toy_json)


@pytest.mark.usefixtures("registered")
def test_evaluation_only(trained: Path, tmp_path: Path) -> None:
    test = {"DATASETS__TEST": "('toy',)"}
    weights = {"MODEL__WEIGHTS": trained / "model_final.pth"}
    arguments = ["--eval-only", *toy.options(tmp_path / "evaluation", **test, **weights)]
    assert train.run(arguments) == 0
    assert not list((tmp_path / "evaluation").glob("model*"))  # nothing was trained
    a = tmp_path / "evaluation/inference/coco_instances_results.json"
    assert train.run(["--eval-only", "--resume", *toy.options(trained, **test)]) == 0
    b = trained / "inference/coco_instances_results.json"
    assert a.read_text() == b.read_text() and len(json.loads(a.read_text())) == 12
    files = [folder / "results.json" for folder in (tmp_path / "evaluation", trained)]
    results, resumed = (json.loads(file.read_text())["bbox"] for file in files)
    assert results["AP50"] == resumed["AP50"] >= results["AP"] >= 0


@pytest.mark.usefixtures("registered")
def test_expected_results_decide_the_exit_status(trained: Path, tmp_path: Path) -> None:
    options = toy.options(
        tmp_path,
        DATASETS__TEST="('toy',)",
        MODEL__WEIGHTS=trained / "model_final.pth",
        TEST__EXPECTED_RESULTS="[['bbox', 'AP', 100.0, 1.0]]",
    )
    with pytest.raises(SystemExit) as stopped:
        train.run(["--eval-only", *options])
    assert stopped.value.code == 1


def error_of(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """Exit status 2 and what follows ``error:``, the last thing printed."""
    assert train.run(list(arguments)) == 2
    _, _, text = capsys.readouterr().err.rpartition("error: ")
    assert "Traceback" not in text
    return text


@pytest.mark.usefixtures("registered")
def test_command_line_errors(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    for arguments, message in (
        (["--config-file", "yolact/yolact_R_51_550.yaml"], "no config file"),
        ([*toy.options(tmp_path), "SOLVER.BASE_LRR", "1"], "mean SOLVER.BASE_LR"),
        ([*toy.options(tmp_path), "SEED"], "pairs KEY VALUE"),
        (toy.options(tmp_path, DATASETS__TRAIN="('nothing',)"), "'nothing' is not registered"),
        (toy.options(tmp_path, SOLVER__IMS_PER_BATCH=0), "SOLVER.IMS_PER_BATCH is 0"),
        (["--eval-only", *toy.options(tmp_path)], "nothing to evaluate"),
        (toy.options(tmp_path, DATASETS__TRAIN="()"), "nothing to train on"),
        (["--num-gpus", "0", *toy.options(tmp_path)], "at least 1"),
        (["--num-gpus", "1000", *toy.options(tmp_path), "MODEL.DEVICE", "cuda"], "--num-gpus 1000"),
        (["--num-machines", "2", *toy.options(tmp_path)], "--dist-url tcp://"),
    ):
        assert message in error_of(capsys, *arguments), message


@pytest.mark.usefixtures("registered")
def test_checkpoint_errors(capsys: pytest.CaptureFixture, trained: Path, tmp_path: Path) -> None:
    weights = trained / "model_final.pth"
    wider = {"MODEL__RESNETS__STEM_OUT_CHANNELS": 6}
    cut = tmp_path / "cut.pth"
    cut.write_bytes(weights.read_bytes()[:1000])
    for changes, message in (
        ({"MODEL__WEIGHTS": weights, **wider}, "of the backbone"),
        ({"MODEL__WEIGHTS": cut}, "damaged or cut short"),
        ({"MODEL__WEIGHTS": tmp_path / "absent.pth"}, "does not exist"),
    ):
        options = toy.options(tmp_path / "out", **changes)
        assert message in error_of(capsys, *options)
    options = toy.options(tmp_path, MODEL__WEIGHTS=weights, DATASETS__TEST="('toy',)", **wider)
    text = error_of(capsys, "--eval-only", *options)
    assert "of another shape" in text and "backbone.0.weight: checkpoint (4, 3, 3, 3)" in text


@pytest.mark.usefixtures("registered")
def test_a_folder_belongs_to_one_training(
    capfd: pytest.CaptureFixture, tmp_path: Path, train_ranks: Callable[..., int]
) -> None:
    (tmp_path / "model_final.pth").write_bytes(b"another's")
    (tmp_path / "config.yaml").write_text("another's")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    options = toy.options(tmp_path, SOLVER__MAX_ITER=2, SOLVER__STEPS="()")
    with run_folder(tmp_path, resume=True):
        for arguments in ([], ["--resume"]):
            assert f"process {os.getpid()} on" in error_of(capfd, *arguments, *options)
        assert train_ranks("--resume", "--num-gpus", "2", *options) == 1
        assert f"process {os.getpid()} on" in capfd.readouterr().err
        assert {f.name: f.read_bytes() for f in tmp_path.iterdir() if f.name != ".lock"} == before
    assert train.run(options) == 0  # and one that has ended is kept
    assert sorted(toy.losses(tmp_path)) == [0, 1]
    assert {f.name: f.read_bytes() for f in (tmp_path / "earlier_1").iterdir()} == before
    (tmp_path / "last_checkpoint").unlink()
    assert train.run(["--resume", *options, "SOLVER.MAX_ITER", "3"]) == 0
    assert sorted(toy.losses(tmp_path)) == [0, 1, 2] and not (tmp_path / "earlier_2").exists()


def test_diverged_training_ends_with_advice(
    toy_json: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    toy.register(toy_json)
    options = toy.options(tmp_path, SOLVER__BASE_LR=1e20, SOLVER__NON_FINITE_LOSS_LIMIT=3)
    assert train.run(options) == 1
    error = capsys.readouterr().err
    assert "error: Loss or gradient is not finite" in error and "SOLVER.BASE_LR" in error


def test_own_data_from_the_command_line(toy_json: Path, tmp_path: Path) -> None:
    files = ["json", str(toy_json), "images", str(toy_json.parent)]
    data = [f"--{split}-{files[i]}={files[i + 1]}" for split in ("train", "val") for i in (0, 2)]
    options = toy.options(tmp_path, SOLVER__MAX_ITER=2, SOLVER__STEPS="()")
    start = options.index("DATASETS.TRAIN")
    del options[start : start + 4]  # --dataset sets DATASETS.TRAIN and TEST
    assert train.run(["--dataset", "own", *data, *options]) == 0
    assert sorted(toy.losses(tmp_path)) == [0, 1]
    assert (tmp_path / "inference/coco_instances_results.json").is_file()


def _own_setup(toy_json: Path, *options: str, config: str = "") -> CfgNode:
    """The config of a training on twelve own images."""
    name = f"own_{uuid.uuid4().hex}"
    data = ["--dataset", name, f"--train-json={toy_json}", f"--train-images={toy_json.parent}"]
    arguments = ["--config-file", config] if config else []
    return train.setup(train.build_parser().parse_args([*arguments, *data, *options]))


def test_schedule_fits_own_data(toy_json: Path, tmp_path: Path) -> None:
    published = "yolact/yolact_R_50_550.yaml"
    assert _own_setup(toy_json, config=published).SOLVER.MAX_ITER == 3000
    cfg = _own_setup(toy_json, "--epochs", "10", "SOLVER.IMS_PER_BATCH", "4", config=published)
    assert cfg.SOLVER.MAX_ITER == 30 and cfg.SOLVER.STEPS == (10, 22, 26, 28)
    cfg = _own_setup(toy_json, "SOLVER.MAX_ITER", "100", config=published)
    assert cfg.SOLVER.MAX_ITER == 100 and max(cfg.SOLVER.STEPS) < 100
    # A saved config keeps its own.
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = _own_setup(toy_json, "SOLVER.IMS_PER_BATCH", "1", config=str(tmp_path / "config.yaml"))
    assert again.SOLVER == cfg.SOLVER | {"IMS_PER_BATCH": 1}


def test_schedule_of_shapes() -> None:
    def iterations(config: str) -> int:
        words = ["--config-file", config, "--dataset", "shapes"]
        return train.setup(train.build_parser().parse_args(words)).SOLVER.MAX_ITER

    own = load_config(find_config_file("yolact/yolact_R_18_shapes.yaml")).SOLVER.MAX_ITER
    assert iterations("yolact/yolact_R_18_shapes.yaml") == own
    assert iterations("yolact/yolact_R_50_550.yaml") < 100_000


def test_what_a_training_says_first(toy_json: Path, tmp_path: Path) -> None:
    """The schedule, in one line, and where to get a backbone."""
    toy.register(toy_json)
    options = toy.options(tmp_path / "a", SOLVER__STEPS="()")
    start = options.index("SOLVER.MAX_ITER")
    del options[start : start + 2]
    assert train.run(["--epochs", "1", *options]) == 0
    output = (tmp_path / "a/log.txt").read_text()
    assert output.count("The schedule fits 12 images") == 1
    assert output.count("MODEL.WEIGHTS is empty: the backbone starts from random weights") == 1
    weights = str(tmp_path / "a/model_final.pth")
    again = toy.options(tmp_path / "b", SOLVER__MAX_ITER=1, SOLVER__STEPS="()")
    assert train.run([*again, "MODEL.WEIGHTS", weights]) == 0
    output = (tmp_path / "b/log.txt").read_text()
    assert "The schedule fits" not in output and "random weights" not in output


def test_what_a_training_says_last(
    toy_json: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best is that of iteration 3; two evaluations later the training ends."""
    toy.register(toy_json)
    scores = iter([3.0, 5.12345, 4.0, float("nan"), 4.0])
    monkeypatch.setattr(
        Trainer, "test", lambda self, cfg, model: {"toy": {"score": next(scores), "other": 1.0}}
    )
    run = tmp_path / "my run"
    options = toy.options(run, SOLVER__MAX_ITER=20, TEST__EVAL_PERIOD=2)
    options += ["TEST.BEST_METRIC", "toy/score", "TEST.EARLY_STOPPING", "2"]
    start = (
        f"The training in {run} has ended after 8 iterations. It would have had 20, but 2 evalua"
    )
    best = "Best toy/score: 5.123, after 4 iterations."
    end = f"Weights: {run}/model_best.pth\n  Predict: d2ext predict --run '{run}' --input IMAGES "
    assert train.run(options) == 0
    first = (run / "log.txt").read_text()
    assert all(first.count(x) == 1 for x in (start, best, end, "Last evaluation: toy/other 1."))
    assert train.run(["--resume", *options]) == 0  # over already
    again = (run / "log.txt").read_text()
    assert all(again.count(x) == 2 for x in (start, best, end))
    assert "Last evaluation: toy/score 4." in again
    complete = [*options, "SOLVER.MAX_ITER", "8"]
    scores = iter([4.0])
    assert train.run(["--resume", *complete]) == 0
    last = (run / "log.txt").read_text().removeprefix(again)
    assert "has ended after 8 iterations.\n" in last and best in last


def test_advice_fits_the_backbone(caplog: pytest.LogCaptureFixture) -> None:
    for architecture, text in (
        ("YOLACT", "torchvision.models.resnet18"),
        ("CornerNet", "d2ext conv"),
    ):
        cfg = tiny_config(architecture)
        cfg.DATASETS.TRAIN = ("own_train",)
        caplog.clear()
        Trainer(cfg).resume_or_load(resume=False)
        assert text in caplog.text
        cfg.DATASETS.TRAIN = ("shapes_train",)
        caplog.clear()
        Trainer(cfg).resume_or_load(resume=False)
        assert "random weights" not in caplog.text
