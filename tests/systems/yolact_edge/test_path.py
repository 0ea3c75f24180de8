"""The way of a user: files, training in stages, evaluation, prediction, each by its command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.events import get_event_storage

from d2ext.checkpoint.io import load_untrusted
from d2ext.data import custom
from d2ext.data.shapes.__main__ import main as export
from d2ext.data.summary import forget
from d2ext.systems.yolact_edge.model import YolactEdge
from d2ext.testing import tiny_config
from d2ext.tools import predict, train
from d2ext.utils.video import VideoReader
from tests.engine import toy

NAME = "test_edge_path"
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of shapes in YouTube-VIS's form."""
    folder = tmp_path_factory.mktemp("clips")
    for split, num in (("train", "3"), ("val", "2")):
        arguments = ["--split", split, "--num", num, "--length", "7", "--size", "64"]
        assert export([str(folder), "--video", *arguments]) == 0
    return folder


@pytest.fixture(autouse=True)
def unregistered() -> Iterator[None]:
    yield
    custom._registered.pop(NAME, None)
    for name in (f"{NAME}_train", f"{NAME}_val"):
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
        forget(name)


def dataset(folder: Path, splits: tuple[str, ...] = ("train", "val")) -> list[str]:
    words: list[object] = ["--dataset", NAME]
    for split in splits:
        words += [f"--{split}-video-json", folder / f"annotations/video_{split}.json"]
        words += [f"--{split}-images", folder / f"video_{split}/frames"]
    return [str(word) for word in words]


def write_config(path: Path, num_classes: int | None = None) -> Path:
    cfg = tiny_config("YolactEdge")
    cfg.SEED = 3
    cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER, cfg.SOLVER.LOG_PERIOD = (), 4, 1
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS = 1e-3, 0
    cfg.DATASETS.TEST = ()
    if num_classes is not None:
        cfg.MODEL.YOLACT.NUM_CLASSES = num_classes
    path.write_text(cfg.dump())
    return path


@pytest.fixture
def run(files: Path, tmp_path: Path) -> Train:
    """``run(OUTPUT, KEY, value, ...)``: a training on the clips; the folder that it wrote."""
    config = write_config(tmp_path / "tiny.yaml")

    def start(
        output: str,
        *options: object,
        words: list[str] | None = None,
        extra: tuple[str, ...] = (),
        expected: int = 0,
    ) -> Path:
        words = dataset(files) if words is None else words
        arguments = ["--config-file", config, *words, *extra, "OUTPUT_DIR", tmp_path / output]
        assert train.run([str(x) for x in (*arguments, *options)]) == expected
        return tmp_path / output

    return start


IMAGE = ("MODEL.YOLACT_EDGE.STAGE", "image", "DATASETS.TEST", "()")
VIDEO = ("INPUT.MAPPER", "ClipMapper", "DATASETS.TEST", "()")
JOINT = (*VIDEO, "DATASETS.TRAIN_JOINT", "('shapes_train',)")


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_untrusted(str(output / "model_final.pth"))["model"]


def changed(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    """First word of the names of the parameters that differ or are new."""
    return {k.split(".")[0] for k in b if k not in a or not torch.equal(a[k], b[k])}


def test_files_to_tracks(run: Train, files: Path, tmp_path: Path) -> None:
    """The three stages, evaluation with a tracker, prediction with ids."""
    pytest.importorskip("norfair", reason="needs norfair-enough")
    image = run("image", *IMAGE)
    start = ("MODEL.WEIGHTS", image / "model_final.pth")
    flow = run(
        "flow",
        *("MODEL.YOLACT_EDGE.STAGE", "flow", "INPUT.MAPPER", "FlowPairMapper", *start),
        *("DATASETS.TRAIN", "('shapes_train_flow',)", "DATASETS.TEST", "()"),
    )
    assert changed(weights(image), weights(flow)) == {"flow_net", "refinement"}
    start = ("MODEL.WEIGHTS", flow / "model_final.pth")
    tracker = ("TEST.TRACKER", "NorfairTracker", "TEST.TRACKER_MIN_SCORE", 0.0)
    video = run("video", *VIDEO, *start, *tracker, "DATASETS.TEST", f"('{NAME}_val',)")
    assert changed(weights(flow), weights(video)) >= {"flow_net", "refinement", "head"}
    steps = {name.split("/")[0] for name in toy.metrics(video)[0] if "/" in name}
    assert steps == {"full", "carried"}

    results = json.loads((video / "results.json").read_text())
    assert set(results) == {"bbox", "segm", "segm_track"}
    assert results["segm"].keys() >= {"AP", *(f"AP-d{i}" for i in range(5))}
    assert "AP" in results["segm_track"]
    tracks = json.loads((video / "inference/results.json").read_text())
    assert tracks and all(len(track["segmentations"]) == 7 for track in tracks)

    folder = sorted((files / "video_val/frames").iterdir())[0]
    arguments = ["--config-file", video / "config.yaml", "--video-input", folder, "--video-results"]
    arguments += ["--output", tmp_path / "out", "--tracker", "NorfairTracker"]
    arguments += ["--confidence-threshold", "0", "--opts", "MODEL.WEIGHTS"]
    assert predict.run([str(x) for x in (*arguments, video / "model_final.pth")]) == 0
    tracks = json.loads((tmp_path / f"out/{folder.name}_ytvis_results.json").read_text())
    assert tracks and {len(track["segmentations"]) for track in tracks} == {7}
    assert len([x.image for x in VideoReader(tmp_path / f"out/{folder.name}.mp4")]) == 7


@pytest.mark.parametrize(
    "options",
    [IMAGE, VIDEO, (*IMAGE, *JOINT[-2:]), JOINT],
    ids=["image", "video", "image-joint", "video-joint"],
)
def test_resumed_training_is_the_same(
    run: Train, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    period = ("SOLVER.CHECKPOINT_PERIOD", 2)
    whole = run("whole", *options, *period)
    train_step = YolactEdge.forward

    def interrupted(self: YolactEdge, *args: Any, **kwargs: Any) -> Any:
        if get_event_storage().iter == 3:
            raise KeyboardInterrupt
        return train_step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(YolactEdge, "forward", interrupted)
        run("parts", *options, *period)
    parts = run("parts", *options, *period, extra=("--resume",))
    assert not changed(weights(whole), weights(parts))
    assert toy.metrics(whole) == toy.metrics(parts)


def test_two_processes_train_and_evaluate_as_one(run: Train) -> None:
    """Each has one image of a step, as each micro-batch; FIND_UNUSED_PARAMETERS is not set."""
    one = run("one", *JOINT, "SOLVER.ACCUMULATION_STEPS", 2)
    # Evaluates in the middle of the training, too.
    test = ("DATASETS.TEST", f"('{NAME}_val',)", "TEST.EVAL_PERIOD", 2)
    two = run("two", *JOINT, *test, extra=("--num-gpus", "2"))
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=name)
    alone = run(
        "alone", *JOINT, *test, "MODEL.WEIGHTS", two / "model_final.pth", extra=("--eval-only",)
    )
    results = [json.loads((x / "results.json").read_text()) for x in (two, alone)]
    np.testing.assert_equal(*results)


def test_mixed_precision_and_accumulation(run: Train) -> None:
    amp = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16")
    start = ("MODEL.WEIGHTS", run("image", *IMAGE) / "model_final.pth")
    exact = toy.losses(run("exact", *JOINT, *start))
    rough = toy.losses(run("rough", *JOINT, *start, *amp, "SOLVER.ACCUMULATION_STEPS", 2))
    assert rough[0] == pytest.approx(exact[0], rel=0.2) and rough.keys() == exact.keys()


def test_weights_without_flow_net(run: Train, capsys: pytest.CaptureFixture[str]) -> None:
    image = run("image", *IMAGE)
    start = ("MODEL.WEIGHTS", image / "model_final.pth")
    run("video", *VIDEO, "SOLVER.MAX_ITER", 1, *start)
    assert "flow_net.reduce" in (image.parent / "video/log.txt").read_text()  # what is new
    run("evaluated", *start, extra=("--eval-only",), expected=2)
    assert "flow_net" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("DATASETS.TEST", "()"), 'set INPUT.MAPPER to "ClipMapper"'),
        ((*VIDEO, "MODEL.YOLACT_EDGE.STAGE", "flow"), "FlowPairMapper"),
        ((*VIDEO, "MODEL.YOLACT.NUM_CLASSES", 3), "NUM_CLASSES to 8"),
        ((*VIDEO, "DATASETS.TRAIN_JOINT", "('coco_2017_val',)"), "their classes differ"),
    ],
)
def test_errors_before_the_first_iteration(
    run: Train, options: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run("out", *options, expected=2)
    assert message in capsys.readouterr().err
    log = output / "log.txt"
    assert not log.exists() or "Starting training" not in log.read_text()
