"""`d2ext benchmark` measures what it says."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from d2ext.data.shapes import draw_image
from d2ext.engine.predictor import BatchPredictor
from d2ext.layers.deform_conv import ModulatedDeformConv
from d2ext.testing import tiny_config
from d2ext.tools import benchmark, model_benchmark

STAGES = {"upload", "preprocess", "network", "between", "cycle", "choice", "results", "total"}
# Those of models with memory alone.
MEMORY_STAGES = {"between", "cycle"}


@pytest.fixture
def config(tmp_path: Path) -> str:
    cfg = tiny_config("YOLACT")
    cfg.MODEL.YOLACT.TEST.SCORE_THRESH = 0.99
    (tmp_path / "config.yaml").write_text(cfg.dump())
    return str(tmp_path / "config.yaml")


def test_model(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_file = tmp_path / "new" / "report.json"
    arguments = [
        *("model", "--config-file", config, "--batch-size", "1", "3", "--iters", "2"),
        *("--warmup", "1", "--image-size", "50", "70", "--output", str(report_file)),
        *("--device", "cpu"),
    ]
    assert benchmark.run(arguments) == 0
    out = capsys.readouterr().out
    report = json.loads(report_file.read_text())
    assert report["mode"] == "eager" and report["dtype"] == "float32"
    assert report["image"] == "drawn image of 70x50"
    # the config's own threshold would let nothing through
    assert "score threshold 0, so that detections come out" in report["remarks"]
    model = build_model(tiny_config("YOLACT"))
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert report["flops_per_image"] > 1e6
    for batch, size in zip(report["batches"], (1, 3), strict=True):
        assert batch["batch_size"] == size
        assert batch["output"]["detections_per_image"] == 10
        assert 0 < batch["output"]["mean_box_share"] <= 1
        assert batch["images_per_second"] > 0
        stages = batch["stages_ms"]
        assert set(stages) == STAGES - MEMORY_STAGES
        assert stages["total"] == batch["latency_ms"]["median"] > 0
        assert stages["network"] > 0
        assert batch["latency_ms"]["p10"] <= stages["total"] <= batch["latency_ms"]["p90"]
        assert "peak_allocated_mib" not in batch
    for text in ("images/s", "n/a"):
        assert text in out


def test_model_on_a_real_image_with_weights(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = tiny_config("YOLACT")
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "w.pth")
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((33, 44, 3), dtype=np.uint8))
    arguments = [
        *("model", "--config-file", config, "--weights", str(tmp_path / "w.pth")),
        *("--image", str(tmp_path / "a.png"), "--iters", "1", "--warmup", "1"),
        *("--dtype", "bfloat16", "--channels-last", "--device", "cpu"),
    ]
    assert benchmark.run(arguments) == 0
    out = capsys.readouterr().out
    assert "'a.png' at 44x33" in out and "bfloat16, channels last" in out
    assert "random weights" not in out and "score threshold" not in out
    assert benchmark.run([*arguments, "--weights", str(tmp_path / "none.pth")]) == 2
    assert "none.pth" in capsys.readouterr().err


def test_flops() -> None:
    """A convolution of k taps from i to o channels on n cells takes 2·k·i·o·n."""

    class Model(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, inputs: list[dict[str, torch.Tensor]]) -> torch.Tensor:
            return self.layer(inputs[0]["image"])

    inputs = [{"image": torch.randn(2, 5, 8, 9)}]
    plain = 2 * 9 * 5 * 7 * (2 * 8 * 9)
    assert model_benchmark.count_flops(Model(nn.Conv2d(5, 7, 3, padding=1)), inputs) == plain
    offsets = 2 * 9 * 5 * 27 * (2 * 8 * 9)
    assert model_benchmark.count_flops(Model(ModulatedDeformConv(5, 7)), inputs) == plain + offsets


class Watch:
    """Stands in for the module ``time``: it goes on only when a function under test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Time that another program on the machine can't stretch."""
    stand_in = Watch()
    monkeypatch.setattr(model_benchmark, "time", stand_in)
    return stand_in


def test_clock(watch: Watch) -> None:
    clock = model_benchmark.Clock(torch.device("cpu"), iterations=5, warmup=2)
    calls = []

    def work() -> None:
        calls.append(1)
        # what the warm-up costs is left out
        watch.sleep(9.0 if len(calls) <= 2 else 0.01 * len(calls))

    assert clock.latency(work) == pytest.approx([30, 40, 50, 60, 70])
    assert len(calls) == 7
    calls.clear()
    assert clock.median(work) == pytest.approx(50)
    assert clock.rate(lambda: watch.sleep(0.01)) == pytest.approx(100)


def test_stages_are_told_apart(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part of the work takes a time of its own; the stages must show just that."""
    predictor = BatchPredictor(tiny_config("YOLACT"))

    def slow(owner: object, name: str, seconds: float) -> None:
        work = getattr(owner, name)

        def wrapped(*args: object, **kwargs: object) -> object:
            watch.sleep(seconds)
            return work(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    model = predictor.model
    slow(predictor, "upload", 0.001)
    slow(model, "preprocess", 0.002)
    slow(model.backbone, "forward", 0.004)
    slow(model, "postprocess", 0.016)
    clock = model_benchmark.Clock(torch.device("cpu"), iterations=3, warmup=1)
    stages = model_benchmark.stage_times(predictor, [np.zeros((40, 50, 3), dtype=np.uint8)], clock)
    expected = {"upload": 1.0, "preprocess": 2.0, "network": 4.0, "choice": 0.0, "results": 16.0}
    assert stages == pytest.approx(expected)


def test_norms_of_random_weights_are_settled() -> None:
    cfg = tiny_config("YOLACT")
    torch.manual_seed(0)
    predictor = BatchPredictor(cfg)
    model = predictor.model
    image = np.ascontiguousarray(draw_image(0, "test", 0, 64, 64).image)
    inputs = predictor.upload([image, np.ascontiguousarray(image[:, ::-1])])
    with model_benchmark.settled_norms(model):
        model_benchmark.run_network(model, inputs)
    assert not any(module.training for module in model.modules())
    features = {}
    norm = model.backbone.bottom_up.stem.conv1.norm
    norm.register_forward_hook(lambda m, i, o: features.update(out=o.clone()))
    with torch.no_grad():
        model(inputs)
    # statistics of exactly this batch: the normalised features have mean 0 and variance 1
    out = features["out"]
    torch.testing.assert_close(out.mean(dim=(0, 2, 3)), torch.zeros(64), atol=1e-3, rtol=0)
    torch.testing.assert_close(out.var(dim=(0, 2, 3)), torch.ones(64), atol=1e-2, rtol=0)
    assert norm.momentum == 0.1


def test_frozen_norms_are_settled_by_all_their_calls() -> None:
    norm = FrozenBatchNorm2d(1)
    first, second = torch.full((1, 1, 2, 2), 3.0), torch.tensor([[[[4.0, 6.0], [4.0, 6.0]]]])
    with model_benchmark.settled_norms(nn.Sequential(norm)):
        norm(first), norm(second)
    norm(torch.zeros(1, 1, 2, 2))
    assert norm.running_mean.tolist() == [4.0] and norm.running_var.tolist() == [0.5]


def test_operators(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        *("operators", "--device", "cpu", "--dtype", "float32", "--detections", "2"),
        *("--sizes", "20x30", "--iters", "1", "--output", str(tmp_path / "o.json")),
        *("--pool-batches", "2", "--pool-side", "8", "--pool-channels-last"),
    ]
    assert benchmark.run(arguments) == 0
    assert "floor" in capsys.readouterr().out
    report = json.loads((tmp_path / "o.json").read_text())
    pooling, rows = report["pooling"], report["rows"]
    # 6 poolings, forward and with backward, in two layouts
    assert len(pooling) == 24 and {row["shape"] for row in pooling} == {"2x128x8x8"}
    assert {row["layout"] for row in pooling} == {"contiguous", "channels_last"}
    assert all(row["fused_ms"] > 0 and row["unfused_ms"] > 0 for row in pooling)
    copy = report["rows"][0]["copy_gb_per_s"] * 1e9
    one = next(row for row in pooling if row["passes"] == "forward" and row["operator"] == "top")
    assert one["floor_ms"] == pytest.approx(2 * (2 * 128 * 64) * 4 / copy * 1e3)
    arguments += ["--only", "masks"]
    assert benchmark.run(arguments) == 0
    assert "pooling" not in json.loads((tmp_path / "o.json").read_text())
    assert {row["size"] for row in rows if "binary" in row["operator"]} == {"20x30"}
    assert all(row["detections"] == 2 and row["fused_ms"] > 0 for row in rows)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["model"],
        ["model", "--config-file", "x", "--batch-size", "0"],
        ["operators", "--sizes", "550"],
    ],
)
def test_wrong_commands(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.run(arguments)
    assert stopped.value.code == 2


def test_wrong_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.run(["model", "--config-file", "no/such.yaml"]) == 2
    assert "no/such.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["CenterNet", "CornerNet", "YolactEdge"])
def test_others_have_the_same_stages(
    architecture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(tiny_config(architecture).dump())
    report_file = tmp_path / "report.json"
    arguments = ["model", "--config-file", str(tmp_path / "config.yaml"), "--iters", "1"]
    arguments += ["--warmup", "1", "--device", "cpu", "--output", str(report_file)]
    assert benchmark.run([*arguments, "--batch-size", "2", "--image-size", "64", "90"]) == 0
    capsys.readouterr()
    (batch,) = json.loads(report_file.read_text())["batches"]
    stages = batch["stages_ms"]
    assert stages["network"] > 0 and batch["images_per_second"] > 0
    if architecture == "YolactEdge":
        assert set(stages) == STAGES
        assert stages["cycle"] == pytest.approx((stages["network"] + 4 * stages["between"]) / 5)
    else:
        assert set(stages) == STAGES - MEMORY_STAGES


def test_models_that_look_into_boxes(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(tiny_config("LandmarkNet").dump())
    arguments = [
        *("model", "--config-file", str(tmp_path / "config.yaml"), "--batch-size", "2"),
        *("--iters", "2", "--warmup", "1", "--image-size", "50", "70", "--device", "cpu"),
        *("--output", str(tmp_path / "report.json")),
    ]
    found = {}
    for boxes in ((), ("--boxes", "3")):
        assert benchmark.run([*arguments, *boxes]) == 0
        batch = json.loads((tmp_path / "report.json").read_text())["batches"][0]
        assert set(batch["stages_ms"]) >= {"upload", "preprocess", "network", "choice", "results"}
        found[len(boxes)] = batch["output"]
    assert found[0]["detections_per_image"] == 1 and found[0]["mean_box_share"] == 1
    assert found[2]["detections_per_image"] == 3
    # between a quarter and three quarters of the sides
    assert 0.06 < found[2]["mean_box_share"] < 0.57


def test_network_alone_keeps_nested_outputs() -> None:
    """CornerNet's network gives tuples of tuples; without them nothing would be left to compute."""
    model = build_model(tiny_config("CenterNetTriplets")).eval()
    alone = model_benchmark.network_only(model.inference_network)
    with torch.no_grad():
        outputs = alone(torch.zeros(1, 3, 63, 63))
    # Heat map and offset of three kinds of points, embeddings of two.
    assert sorted(x.shape[1] for x in outputs) == [1, 1, 2, 2, 2, 3, 3, 3]


def test_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cfg = tiny_config("YOLACT")
    cfg.DATASETS.TRAIN, cfg.MODEL.YOLACT.NUM_CLASSES = ("shapes_val",), 8
    cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 2, 0
    (tmp_path / "config.yaml").write_text(cfg.dump())
    report_file = tmp_path / "report.json"
    arguments = [
        *("training", "--config-file", str(tmp_path / "config.yaml"), "--iters", "2"),
        *("--warmup", "1", "--output", str(report_file), "--device", "cpu"),
    ]
    assert benchmark.run(arguments) == 0
    assert "training images/s" in capsys.readouterr().out
    report = json.loads(report_file.read_text())
    assert 0 < report["forward_ms"] < report["step_ms"]
    assert report["batch_size"] == 2 and report["peak_memory_mib"] is None
    slowest = min(report["loader_images_per_second"], 2e3 / report["step_ms"])
    assert 0 < report["images_per_second"] < 3 * slowest  # loader and step take turns


def test_training_steps_are_those_of_the_trainer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the solver does to the model is measured, too: a graph, which the CPU refuses."""
    cfg = tiny_config("YOLACT")
    cfg.DATASETS.TRAIN, cfg.SOLVER.CUDA_GRAPH = ("shapes_val",), True
    (tmp_path / "config.yaml").write_text(cfg.dump())
    arguments = ["training", "--config-file", str(tmp_path / "config.yaml"), "--device", "cpu"]
    assert benchmark.run(arguments) != 0
    assert "SOLVER.CUDA_GRAPH must be False" in capsys.readouterr().err
