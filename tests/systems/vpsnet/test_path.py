"""The way of a user: panoptic clips, training, evaluation, prediction, each by its command."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
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
from d2ext.data.video.panoptic_results import read_map
from d2ext.systems.vpsnet.model import VPSNet
from d2ext.systems.vpsnet.postprocess import ObjectMemory
from d2ext.testing import tiny_config
from d2ext.tools import benchmark, evaluate, predict, train
from tests.engine import toy

NAME = "test_vps_path"
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of shapes in the form of Cityscapes-VPS: two annotated frames of six."""
    folder = tmp_path_factory.mktemp("clips")
    for split, num in (("train", "3"), ("val", "2")):
        words = ["--split", split, "--num", num, "--length", "6", "--size", "64"]
        assert export([str(folder), "--video", "--format", "cityscapes_vps", *words]) == 0
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


def dataset(folder: Path) -> list[str]:
    words: list[object] = ["--dataset", NAME]
    for split in ("train", "val"):
        words += [f"--{split}-video-json", folder / f"annotations/video_{split}.json"]
        words += [f"--{split}-images", folder / f"video_{split}/frames"]
        words += [f"--{split}-panoptic-root", folder / f"video_{split}/panoptic"]
    return [str(word) for word in words]


def write_config(path: Path, architecture: str = "VPSNet") -> Path:
    cfg = tiny_config(architecture)
    cfg.SEED = 3
    cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER, cfg.SOLVER.LOG_PERIOD = (), 4, 1
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS = 1e-3, 0
    cfg.MODEL.UPSNET.TEST.SCORE_THRESH = 0.1
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    if architecture == "VPSNet":
        cfg.INPUT.MAPPER = "ClipMapper"
        cfg.INPUT.VIDEO.REFERENCES = "annotated"
    path.write_text(cfg.dump())
    return path


@pytest.fixture
def run(files: Path, tmp_path: Path) -> Train:
    """``run(OUTPUT, KEY, value, ...)``: a training on the clips; the folder that it wrote."""

    def start(
        output: str,
        *options: object,
        architecture: str = "VPSNet",
        extra: tuple[str, ...] = (),
        tool: Any = train,
        expected: int = 0,
    ) -> Path:
        config = write_config(tmp_path / f"{architecture}.yaml", architecture)
        words = ["--config-file", config, *dataset(files), *extra]
        if "DATASETS.TEST" not in options:
            options = (*options, "DATASETS.TEST", "()")
        arguments = [*words, "OUTPUT_DIR", tmp_path / output, *options]
        assert tool.run([str(x) for x in arguments]) == expected
        return tmp_path / output

    return start


TEST = ("DATASETS.TEST", f"('{NAME}_val',)")


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_untrusted(str(output / "model_final.pth"))["model"]


def check_files(folder: Path) -> set[int]:
    """Of an evaluation or prediction: PNGs and JSON agree; the ids of its objects."""
    content = json.loads((folder / "panoptic_video.json").read_text())
    tracks = set()
    for annotation in content["annotations"]:
        ids = read_map(folder / "panoptic_video" / annotation["file_name"])
        listed = {s["id"]: s["area"] for s in annotation["segments_info"]}
        values, counts = np.unique(ids[ids > 0], return_counts=True)
        assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == listed
        tracks |= {s["track_id"] for s in annotation["segments_info"] if "track_id" in s}
    return tracks


def test_files_to_quality(run: Train, files: Path, tmp_path: Path) -> None:
    """An image model, FuseTrack after it, evaluation and prediction."""
    image = run("image", "SOLVER.MAX_ITER", 1, architecture="UPSNet")
    start = ("MODEL.WEIGHTS", image / "model_final.pth", "MODEL.FLOW.NAME", "PyramidFlow")
    video = run("video", *start, *TEST)
    log = (video / "log.txt").read_text()
    for new in ("fusion.refine", "track_head.fc1", "flow."):
        assert new in log
    assert toy.losses(video).keys() == {0, 1, 2, 3}
    assert np.isfinite(list(toy.losses(video).values())).all()
    results = json.loads((video / "results.json").read_text())["video_panoptic_seg"]
    assert results.keys() >= {"VPQ", "VPQ_0", "VPQ_5", "VPQ_th", "VPQ_st", "STQ", "AQ"}
    assert (video / "inference/vpq.json").is_file()
    tracks = check_files(video / "inference")
    assert tracks and min(tracks) >= 1

    again = run(
        "again",
        "MODEL.WEIGHTS",
        video / "model_final.pth",
        *start[2:],
        *TEST,
        tool=evaluate,
    )
    first, second = (json.loads((x / "results.json").read_text()) for x in (video, again))
    np.testing.assert_equal(first, second)

    frames = sorted((files / "video_val/frames").iterdir())[:6]
    clip = tmp_path / "clip"
    clip.mkdir()
    for frame in frames:
        (clip / frame.name).write_bytes(frame.read_bytes())
    words = ["--config-file", video / "config.yaml", "--video-input", clip, "--video-results"]
    words += ["--output", tmp_path / "out", "--confidence-threshold", "0", "--opts"]
    words += ["MODEL.WEIGHTS", video / "model_final.pth"]
    assert predict.run([str(x) for x in words]) == 0
    written = sorted(x.name for x in (tmp_path / "out").rglob("*") if x.is_file())
    assert any(x.endswith(".mp4") for x in written) and any(x.endswith(".json") for x in written)
    assert sum(x.endswith(".png") for x in written) == 6, written


def test_resumed_training_is_the_same(run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("SOLVER.CHECKPOINT_PERIOD", 2, "MODEL.FLOW.NAME", "PyramidFlow")
    whole = run("whole", *options)
    forward = VPSNet.forward

    def interrupted(self: VPSNet, *args: Any) -> Any:
        if get_event_storage().iter == 3:
            raise toy.Killed
        return forward(self, *args)

    with monkeypatch.context() as patch, pytest.raises(toy.Killed):
        patch.setattr(VPSNet, "forward", interrupted)
        run("parts", *options)
    parts = run("parts", *options, extra=("--resume",))
    a, b = weights(whole), weights(parts)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any(k.startswith("flow.") for k in a)
    assert toy.metrics(whole) == toy.metrics(parts)


@pytest.mark.parametrize(("fusion", "track"), [(False, True), (True, False)], ids=["track", "fuse"])
def test_variants(run: Train, fusion: bool, track: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fuse gets its ids from a tracker. Those of Track begin late, so that bytes cannot hold them."""
    empty = ObjectMemory.empty

    def late(*args: Any) -> ObjectMemory:
        return replace(empty(*args), next_id=65_530)

    monkeypatch.setattr(ObjectMemory, "empty", late)
    options: tuple[object, ...] = ("MODEL.VPSNET.FUSION", fusion, "MODEL.VPSNET.TRACK", track)
    if not track:
        pytest.importorskip("norfair", reason="needs norfair-enough")
        options += ("TEST.TRACKER", "NorfairTracker", "TEST.TRACKER_MIN_SCORE", 0.0)
    output = run("out", *options, *TEST, "SOLVER.MAX_ITER", 2)
    results = json.loads((output / "results.json").read_text())["video_panoptic_seg"]
    assert "VPQ_5" in results and "STQ" in results
    tracks = check_files(output / "inference")
    assert tracks and (min(tracks) >= 65_530) == track


def test_one_lost_step_does_not_end_a_training(run: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the fused features of one iteration is named in the log."""
    from d2ext.systems.vpsnet.head import FusionNeck

    attend = FusionNeck.attend

    def broken(self: FusionNeck, *args: Any) -> torch.Tensor:
        nan = float("nan") if get_event_storage().iter == 1 else 1.0
        return attend(self, *args) * nan

    monkeypatch.setattr(FusionNeck, "attend", broken)
    log = (run("out") / "log.txt").read_text()
    assert "not finite" in log and "skipped" in log


@pytest.mark.parametrize("kind", ["missing", "another network"])
def test_wrong_flow_weights(
    run: Train, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "flow.pth"
    if kind == "another network":
        torch.save({"model": {"flow.network.x.weight": torch.zeros(1)}}, file)
    options = ("MODEL.FLOW.NAME", "PyramidFlow", "MODEL.FLOW.WEIGHTS", file)
    run("out", *options, expected=2)
    (error,) = re.findall("^error: .*", capsys.readouterr().err, re.MULTILINE | re.DOTALL)
    assert str(file) in error and len(error) < 800, error


def test_wrong_mapper(run: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run("out", "INPUT.MAPPER", "D2extDatasetMapper", expected=2)
    assert 'INPUT.MAPPER to "ClipMapper"' in capsys.readouterr().err


def test_built_in_clips(tmp_path: Path) -> None:
    """The shipped config on `shapes_train_video_panoptic`."""
    words: list[object] = ["--config-file", "vpsnet/vpsnet_shapes.yaml"]
    words += ["SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 1, "SOLVER.WARMUP_ITERS", 0]
    words += ["DATALOADER.NUM_WORKERS", 0, "DATASETS.TEST", "()", "OUTPUT_DIR", tmp_path]
    words += ["MODEL.DEVICE", "cpu", "SOLVER.LOG_PERIOD", 1, "INPUT.MIN_SIZE_TRAIN", "(64,)"]
    assert train.run([str(x) for x in words]) == 0
    assert np.isfinite(list(toy.losses(tmp_path).values())).all()


def test_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path / "tiny.yaml")
    words = ["model", "--config-file", config, "--image-size", 64, 96, "--iters", 1]
    words += ["--warmup", 1, "--batch-size", 1, 2, "--output", tmp_path / "report.json"]
    assert benchmark.run([str(x) for x in words]) == 0
    batches = json.loads((tmp_path / "report.json").read_text())["batches"]
    assert [x["batch_size"] for x in batches] == [1, 2]
    for batch in batches:
        assert batch["stages_ms"].keys() >= {"preprocess", "flow", "network", "choice", "tracking"}
    assert "tracking" in capsys.readouterr().out
