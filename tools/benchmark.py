#!/usr/bin/env python
"""Measure operators against their floor, and whole models stage by stage.

    python tools/benchmark.py operators --output operators.json
    python tools/benchmark.py model --config-file yolact/yolact_R_50_550.yaml \\
        --dtype bfloat16 --mode cudagraph --channels-last --batch-size 1 16 --output model.json

What "model" times. Total: from images as BGR bytes in the host's memory to the model's results at the
size of the images, on the device, the device having finished. Its parts:

- upload: images to the device, channel order;
- preprocess: resize to the network's input, normalisation;
- network: backbone and heads;
- choice: decoding of boxes, NMS, choice of the detections;
- results: masks assembled at the size of the image, Instances built.

Outside the total are "decode" (JPEG file to bytes, OpenCV, one thread) and "download" (results to the
host). Latency is the median over single calls, each waited for; throughput is that of calls back to
back, median of three rounds. A part that follows from a difference of two measurements is a difference
of medians. FLOPs are those of the network (multiply and add count as two), without what is elementwise.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from d2ext.checkpoint.io import CheckpointError
from d2ext.config import ConfigError, add_options_argument, load_config
from d2ext.data.errors import ImageReadError
from d2ext.data.image_io import read_image
from d2ext.engine.predictor import BatchPredictor
from d2ext.files import atomic_write
from d2ext.model_zoo import find_config_file
from d2ext.modeling.inference import InferenceNetwork

# Keys below MODEL that hold the score below which a system drops candidates.
_SCORE_KEYS = ("SCORE_THRESH", "SCORE_THRESH_TEST")
_ROUNDS = 3
_STAGES = ("upload", "preprocess", "network", "choice", "results", "total")


# Measuring


class Clock:
    """Times functions on a device.

    Args:
        device: waited for before and after each measurement.
        iterations: calls that are measured.
        warmup: calls before them, which also compile, capture and choose algorithms.
    """

    def __init__(self, device: torch.device, iterations: int, warmup: int) -> None:
        self.device, self.iterations, self.warmup = device, iterations, warmup

    def wait(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def latency(self, function: Callable[[], Any]) -> list[float]:
        """Milliseconds of single calls."""
        for _ in range(self.warmup):
            function()
        times = []
        for _ in range(self.iterations):
            self.wait()
            start = time.perf_counter()
            function()
            self.wait()
            times.append(1e3 * (time.perf_counter() - start))
        return times

    def median(self, function: Callable[[], Any]) -> float:
        """Median of :meth:`latency`."""
        return statistics.median(self.latency(function))

    def rate(self, function: Callable[[], Any]) -> float:
        """Calls a second, back to back."""
        rates = []
        for _ in range(_ROUNDS):
            self.wait()
            start = time.perf_counter()
            for _ in range(self.iterations):
                function()
            self.wait()
            rates.append(self.iterations / (time.perf_counter() - start))
        return statistics.median(rates)


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on, beside the model."""
    known: dict[str, Any] = {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    if device.type == "cuda":
        known["device"] = torch.cuda.get_device_name(device)
        known["cuda"] = torch.version.cuda
        known["cudnn"] = torch.backends.cudnn.version()
        known["cudnn_benchmark"] = torch.backends.cudnn.benchmark
        known["tf32"] = torch.backends.cudnn.allow_tf32
    return known


# The model and its input


def draw_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture with edges and texture (H×W×3, BGR, uint8): ellipses on smooth noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(30):
        center = (int(rng.integers(width)), int(rng.integers(height)))
        axes = tuple(int(x) for x in rng.integers(4, max(min(height, width) // 4, 5), 2))
        color = tuple(int(x) for x in rng.integers(0, 256, 3))
        cv2.ellipse(image, center, axes, float(rng.integers(180)), 0, 360, color, -1)
    noise = rng.normal(0, 8, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def lower_score_thresholds(cfg: CfgNode, value: float) -> list[str]:
    """Set every score threshold below ``cfg.MODEL``; the keys that were changed."""
    changed = []

    def visit(node: CfgNode, prefix: str) -> None:
        for key, entry in node.items():
            if isinstance(entry, CfgNode):
                visit(entry, f"{prefix}{key}.")
            elif key in _SCORE_KEYS:
                node[key] = value
                changed.append(f"{prefix}{key}")

    visit(cfg.MODEL, "MODEL.")
    return changed


@torch.no_grad()
def settle_norms(model: nn.Module, inputs: list[dict[str, Any]]) -> None:
    """Give batch norms of random weights the statistics of ``inputs``.

    Without this, activations of a random ResNet grow from block to block, and boxes without area or
    of infinite size make the work after the network unlike that of a trained model.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    faster = inference_network(model)
    if faster is not None:
        faster.network(model.preprocess(inputs))
    else:
        model(inputs)
    for norm, (momentum, training) in zip(norms, before, strict=True):
        norm.momentum, norm.training = momentum, training


def inference_network(model: nn.Module) -> InferenceNetwork | None:
    """The model's ``inference_network``, if it has the parts that can be timed one by one.

    These are ``preprocess(inputs) -> images``, ``inference_network(images)`` and
    ``inference(images, inputs)``; a model without them is timed as a whole.
    """
    found = getattr(model, "inference_network", None)
    parts = hasattr(model, "preprocess") and hasattr(model, "inference")
    return found if isinstance(found, InferenceNetwork) and parts else None


def network_only(faster: InferenceNetwork) -> InferenceNetwork:
    """The same network in the same mode, without the choice of detections."""

    def tensors(raw: Any) -> tuple[Tensor, ...]:
        if isinstance(raw, Tensor):
            return (raw,)
        values = raw.values() if isinstance(raw, dict) else raw
        nested = (tensors(x) for x in values if isinstance(x, (Tensor, dict, tuple, list)))
        return tuple(x for part in nested for x in part)

    name = str(faster.dtype).removeprefix("torch.")
    return InferenceNetwork(
        faster.network,
        tensors,
        mode=faster.mode,
        dtype=name,
        channels_last=faster.memory_format == torch.channels_last,
    )


def count_flops(model: nn.Module, inputs: list[dict[str, Any]]) -> int:
    """FLOPs of convolutions and matrix products, in float32 and eager mode; multiply-add = 2."""
    mapping = {torch.ops.torchvision.deform_conv2d: _deform_conv_flops}
    faster = inference_network(model)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        if faster is not None:
            faster.network(model.preprocess(inputs))
        else:
            model(inputs)
    return counter.get_total_flops()


def _deform_conv_flops(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *_: Any,
    out_shape: Any = None,
    **__: Any,
) -> int:
    """As for a convolution; the bilinear samples are not counted."""
    batch, out_channels, height, width = out_shape
    channels, kernel_height, kernel_width = weight_shape[1:]
    taps = channels * kernel_height * kernel_width
    return 2 * batch * out_channels * height * width * taps


# The benchmark of a model


class BoxPredictor(BatchPredictor):
    """Gives a model that looks into boxes the same number of drawn ones in each image."""

    def __init__(self, cfg: CfgNode, count: int) -> None:
        super().__init__(cfg)
        self.count = count

    def upload(
        self, images: Sequence[np.ndarray], boxes: Sequence[Instances] | None = None
    ) -> list[dict[str, Any]]:
        """As the base class; boxes of a quarter to three quarters of the image's sides."""
        rng = np.random.default_rng(0)
        drawn = []
        for image in images:
            sides = rng.uniform(0.25, 0.75, (self.count, 2))
            corners = rng.uniform(0, 1, (self.count, 2)) * (1 - sides)
            shares = np.concatenate([corners, corners + sides], axis=1)
            height, width = image.shape[:2]
            instances = Instances((height, width))
            pixels = shares * [width, height, width, height]
            instances.pred_boxes = Boxes(torch.from_numpy(pixels))
            drawn.append(instances)
        return super().upload(images, drawn)


def measure_batch(
    predictor: BatchPredictor, images: list[np.ndarray], clock: Clock
) -> dict[str, Any]:
    """Stages, latency, throughput and memory for one batch."""
    device = predictor.device
    result: dict[str, Any] = {"batch_size": len(images)}
    with torch.no_grad():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = clock.latency(lambda: predictor(images))
        result["latency_ms"] = _spread(times)
        result["images_per_second"] = len(images) * clock.rate(lambda: predictor(images))
        if device.type == "cuda":
            # Memory of CUDA graphs counts as reserved, not as allocated.
            result["peak_allocated_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
            result["peak_reserved_mib"] = torch.cuda.max_memory_reserved(device) / 2**20
        stages = stage_times(predictor, images, clock)
        stages["total"] = result["latency_ms"]["median"]
        outputs = predictor(images)
        result["output"] = describe_output(outputs)
        stages["download"] = clock.median(lambda: to_host(outputs))
        files = [cv2.imencode(".jpg", image)[1] for image in images]
        host = Clock(torch.device("cpu"), min(clock.iterations, 20), 2)
        stages["decode"] = host.median(lambda: [cv2.imdecode(f, cv2.IMREAD_COLOR) for f in files])
    result["stages_ms"] = stages
    return result


def stage_times(
    predictor: BatchPredictor, images: list[np.ndarray], clock: Clock
) -> dict[str, float]:
    """Milliseconds of the parts of the total."""
    model = predictor.model
    inputs = predictor.upload(images)
    stages = {"upload": clock.median(lambda: predictor.upload(images))}
    faster = inference_network(model)
    if faster is None:
        stages["model"] = clock.median(lambda: model(inputs))
        return stages
    batch = model.preprocess(inputs)
    alone = network_only(faster)
    stages["preprocess"] = clock.median(lambda: model.preprocess(inputs))
    stages["network"] = clock.median(lambda: alone(batch))
    chosen = clock.median(lambda: faster(batch))
    stages["choice"] = max(chosen - stages["network"], 0.0)
    finished = clock.median(lambda: model.inference(batch, inputs))
    stages["results"] = max(finished - chosen, 0.0)
    return stages


def to_host(outputs: list[dict[str, Any]]) -> list[Any]:
    """Everything that the model returned, on the CPU."""
    return [
        value.to("cpu") for output in outputs for value in output.values() if hasattr(value, "to")
    ]


def describe_output(outputs: list[dict[str, Any]]) -> dict[str, Any]:
    """How much there was to assemble: detections an image, their boxes' share of the image."""
    described: dict[str, Any] = {}
    found = [output["instances"] for output in outputs if "instances" in output]
    if found:
        described["detections_per_image"] = statistics.mean(len(x) for x in found)
        shares = [
            x.pred_boxes.area().float().mean().item() / (x.image_size[0] * x.image_size[1])
            for x in found
            if len(x) and x.has("pred_boxes")
        ]
        described["mean_box_share"] = statistics.mean(shares) if shares else 0.0
    return described


def _spread(times: Sequence[float]) -> dict[str, float]:
    low, high = np.percentile(times, [10, 90]).tolist()
    return {"median": statistics.median(times), "p10": low, "p90": high}


def profile(predictor: BatchPredictor, images: list[np.ndarray], clock: Clock, rows: int) -> str:
    """The operators and kernels that take most of the time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    on_gpu = clock.device.type == "cuda"
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    calls = min(clock.iterations, 10)
    for _ in range(clock.warmup):
        predictor(images)
    clock.wait()
    start = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(calls):
            predictor(images)
        clock.wait()
    wall = 1e6 * (time.perf_counter() - start)
    averages = profiler.key_averages()
    text = averages.table(
        sort_by="self_device_time_total" if on_gpu else "self_cpu_time_total",
        row_limit=rows,
        max_name_column_width=90,
    )
    if on_gpu:
        # Kernels and copies only: operators carry the time of the kernels that they start.
        events = [e for e in averages if e.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(e.self_device_time_total for e in events)
        text += (
            f"\n{calls} calls: the device is busy {busy / calls / 1e3:.3f} ms of "
            f"{wall / calls / 1e3:.3f} ms a call (with the profiler's own cost)."
        )
    return text


def model_config(chosen: argparse.Namespace) -> tuple[CfgNode, list[str]]:
    """The config to measure, and remarks on what was changed in it."""
    cfg = load_config(find_config_file(chosen.config_file), chosen.opts)
    cfg.MODEL.WEIGHTS = chosen.weights or cfg.MODEL.WEIGHTS
    if chosen.device:
        cfg.MODEL.DEVICE = chosen.device
    cfg.MODEL.INFERENCE.MODE = chosen.mode
    cfg.MODEL.INFERENCE.DTYPE = chosen.dtype
    cfg.MODEL.INFERENCE.CHANNELS_LAST = chosen.channels_last
    remarks = []
    threshold = chosen.score_thresh
    if threshold is None and not cfg.MODEL.WEIGHTS:
        threshold = 0.0
    if threshold is not None:
        changed = lower_score_thresholds(cfg, threshold)
        remarks.append(f"score threshold {threshold:g}, so that detections come out")
        if not changed:
            remarks[-1] = "the config has no score threshold to lower"
    if not cfg.MODEL.WEIGHTS:
        remarks.append("random weights, batch norms settled on the image")
    return cfg, remarks


def example_image(chosen: argparse.Namespace) -> tuple[np.ndarray, str]:
    """The image to measure on (H×W×3, BGR, uint8), and what it is."""
    if chosen.image is None:
        height, width = chosen.image_size or (480, 640)
        return draw_image(height, width), f"drawn image of {width}x{height}"
    image = read_image(chosen.image, "BGR")
    if chosen.image_size:
        height, width = chosen.image_size
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    height, width = image.shape[:2]
    return np.ascontiguousarray(image), f"'{Path(chosen.image).name}' at {width}x{height}"


def run_model(chosen: argparse.Namespace) -> dict[str, Any]:
    """Carry ``benchmark.py model`` out, printing as it goes."""
    cfg, remarks = model_config(chosen)
    device = torch.device(cfg.MODEL.DEVICE)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not chosen.no_cudnn_benchmark
    image, described = example_image(chosen)
    torch.manual_seed(0)
    predictor = BoxPredictor(cfg, chosen.boxes) if chosen.boxes else BatchPredictor(cfg)
    inputs = predictor.upload([image, np.ascontiguousarray(image[:, ::-1])])
    if not cfg.MODEL.WEIGHTS:
        settle_norms(predictor.model, inputs)
    iterations = chosen.iters or (100 if device.type == "cuda" else 10)
    clock = Clock(device, iterations, chosen.warmup)
    report: dict[str, Any] = {
        "config": chosen.config_file,
        "environment": environment(device),
        "mode": chosen.mode,
        "dtype": chosen.dtype,
        "channels_last": chosen.channels_last,
        "image": described,
        "remarks": remarks,
        "iterations": iterations,
        "parameters": sum(p.numel() for p in predictor.model.parameters()),
        "flops_per_image": count_flops(predictor.model, inputs[:1]),
        "batches": [],
    }
    print_head(report)
    for size in chosen.batch_size:
        report["batches"].append(measure_batch(predictor, [image] * size, clock))
    print_batches(report["batches"])
    if chosen.profile:
        for size in chosen.batch_size:
            print(f"\nProfile at batch size {size}:")
            print(profile(predictor, [image] * size, clock, chosen.profile))
    return report


def print_head(report: dict[str, Any]) -> None:
    env = report["environment"]
    print(f"{report['config']}: {report['mode']}, {report['dtype']}", end="")
    print(", channels last" if report["channels_last"] else "")
    print(", ".join(f"{key} {value}" for key, value in env.items()))
    print(f"Input: {report['image']}. " + "; ".join(report["remarks"]))
    print(
        f"{report['parameters'] / 1e6:.1f} M parameters, "
        f"{report['flops_per_image'] / 1e9:.1f} GFLOPs an image (multiply and add: two)\n"
    )


def print_batches(batches: list[dict[str, Any]]) -> None:
    names = [s for s in (*_STAGES, "model") if any(s in b["stages_ms"] for b in batches)]
    rows = []
    for batch in batches:
        stages, latency, output = batch["stages_ms"], batch["latency_ms"], batch["output"]
        memory = batch.get("peak_allocated_mib")
        rows.append(
            [
                batch["batch_size"],
                *(stages.get(name) for name in names),
                f"{latency['p10']:.2f}..{latency['p90']:.2f}",
                batch["images_per_second"],
                stages["decode"],
                stages["download"],
                "n/a" if memory is None else f"{memory:.0f} ({batch['peak_reserved_mib']:.0f})",
                output.get("detections_per_image", "n/a"),
                f"{output.get('mean_box_share', 0):.0%}",
            ]
        )
    headers = [
        "batch",
        *names,
        "total p10..p90",
        "images/s",
        "+ decode",
        "+ download",
        "peak MiB (reserved)",
        "detections",
        "box share",
    ]
    print(tabulate(rows, headers, floatfmt=".3f"))
    print("Times in ms for the whole batch, medians; images/s back to back.")


# Operators


def run_operators(chosen: argparse.Namespace) -> dict[str, Any]:
    """Carry ``benchmark.py operators`` out."""
    from d2ext.layers import benchmark

    device = torch.device(chosen.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtypes = [getattr(torch, name) for name in chosen.dtype]
    bandwidth = benchmark.copy_bandwidth(device)
    report: dict[str, Any] = {"environment": environment(device)}
    print(", ".join(f"{key} {value}" for key, value in report["environment"].items()))
    print(f"copy: {bandwidth / 1e9:.0f} GB/s (read + written); floor: bytes / copy")
    if "masks" in chosen.only:
        report["rows"] = benchmark.benchmark_masks(
            device,
            dtypes,
            detections=chosen.detections,
            sizes=[tuple(int(x) for x in size.lower().split("x")) for size in chosen.sizes],
            repeats=chosen.iters,
            bandwidth=bandwidth,
        )
        print("\nMask assembly")
        print(benchmark.format_rows(report["rows"], benchmark.MASK_COLUMNS))
    if "pooling" in chosen.only:
        batches = chosen.pool_batches or ([8, 1] if device.type == "cuda" else [1])
        report["pooling"] = benchmark.benchmark_pooling(
            device,
            dtypes,
            batches=batches,
            side=chosen.pool_side,
            channels_last=[False, True] if chosen.pool_channels_last else [False],
            repeats=chosen.iters,
            bandwidth=bandwidth,
        )
        print("\nCorner pooling (plain PyTorch: cummax with flips) and center pooling (amax)")
        print(benchmark.format_rows(report["pooling"], benchmark.POOL_COLUMNS))
    if not all(row["compiled"] for name in ("rows", "pooling") for row in report.get(name, [])):
        print("The compiled operators are not available: both columns are plain PyTorch.")
    return report


# Command line


def _size(text: str) -> str:
    height, cross, width = text.lower().partition("x")
    if not (cross and height.isdigit() and width.isdigit() and int(height) * int(width) > 0):
        raise argparse.ArgumentTypeError(f"'{text}' is no size like 550x550 (height x width)")
    return text


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no number from 1 on")
    return int(text)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="{operators,model}")
    dtypes = ("float32", "bfloat16", "float16")

    operators = commands.add_parser("operators", help="operators, plain PyTorch and the floor")
    operators.set_defaults(run=run_operators)
    operators.add_argument("--dtype", nargs="+", choices=dtypes, default=["float32", "bfloat16"])
    operators.add_argument("--detections", type=_positive, default=100, metavar="N")
    operators.add_argument(
        "--sizes",
        nargs="+",
        type=_size,
        default=["550x550", "1080x1920"],
        metavar="HxW",
        help="of the binary masks (default: 550x550 1080x1920)",
    )
    operators.add_argument(
        "--only",
        nargs="+",
        choices=("masks", "pooling"),
        default=["masks", "pooling"],
        help="operators to measure (default: all)",
    )
    operators.add_argument(
        "--pool-batches",
        nargs="+",
        type=_positive,
        metavar="B",
        help="of the maps that are pooled, B x 128 x side x side (default: GPU 8 1, CPU 1)",
    )
    operators.add_argument(
        "--pool-side", type=_positive, default=128, metavar="N", help="their side (default: 128)"
    )
    operators.add_argument(
        "--pool-channels-last", action="store_true", help="pool channels_last maps too"
    )
    operators.add_argument("--iters", type=_positive, default=20, help="samples (default: 20)")

    model = commands.add_parser("model", help="a whole model, stage by stage")
    model.set_defaults(run=run_model)
    model.add_argument(
        "--config-file", required=True, metavar="FILE", help="a path, or a name in the model zoo"
    )
    model.add_argument("--weights", metavar="FILE", help="checkpoint (default: random weights)")
    model.add_argument("--dtype", choices=dtypes, default="float32")
    model.add_argument(
        "--mode", choices=("eager", "cudagraph", "compile", "compile_cudagraph"), default="eager"
    )
    model.add_argument("--channels-last", action="store_true")
    model.add_argument("--batch-size", nargs="+", type=_positive, default=[1], metavar="N")
    model.add_argument(
        "--boxes",
        type=_positive,
        metavar="N",
        help="boxes in each image, for models that look into boxes (default: the whole image)",
    )
    model.add_argument("--image", metavar="FILE", help="image to measure on (default: drawn)")
    model.add_argument(
        "--image-size",
        nargs=2,
        type=_positive,
        metavar=("H", "W"),
        help="resize the image beforehand (default: its own size; drawn: 480 640)",
    )
    model.add_argument(
        "--iters", type=_positive, metavar="N", help="measured calls (default: GPU 100, CPU 10)"
    )
    model.add_argument(
        "--warmup", type=_positive, default=5, metavar="N", help="calls before (default: 5)"
    )
    model.add_argument(
        "--score-thresh",
        type=float,
        metavar="SCORE",
        help="score threshold (default: the config's with --weights, 0 with random weights)",
    )
    model.add_argument(
        "--no-cudnn-benchmark", action="store_true", help="let cuDNN not try its algorithms"
    )
    model.add_argument(
        "--profile",
        nargs="?",
        const=20,
        type=_positive,
        metavar="ROWS",
        help="also show the operators and kernels that take most of the time",
    )
    for command in (operators, model):
        command.add_argument("--device", help="for example cuda:1 (default: a GPU if there is one)")
        command.add_argument(
            "--output", type=Path, metavar="FILE", help="JSON file for the figures"
        )
    add_options_argument(model)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; its exit status: 0, or 2 if the command, config or a file is wrong."""
    chosen = parse_arguments(arguments)
    try:
        report = chosen.run(chosen)
    except (ConfigError, CheckpointError, ImageReadError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if chosen.output:
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(chosen.output, "w") as file:
            json.dump(report, file, indent=1)
        print(f"Figures in {chosen.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
