"""Measure operators against their floor, whole models stage by stage, and training steps.

    d2ext benchmark operators --output operators.json
    d2ext benchmark model --config-file yolact/yolact_R_50_550.yaml \\
        --dtype bfloat16 --mode cudagraph --channels-last --batch-size 1 16 --output model.json
    d2ext benchmark model --exported mine.onnx
    d2ext benchmark training --config-file yolact/yolact_R_50_550.yaml \\
        --opts DATASETS.TRAIN "('shapes_train',)" SOLVER.AMP.ENABLED True SOLVER.AMP.DTYPE bfloat16

What "model" times. Total: from images as BGR bytes in the host's memory to the model's results at the
size of the images, on the device, the device having finished. Its parts:

- upload: images to the device, channel order;
- preprocess: resize to the network's input, normalisation;
- network: backbone and heads; of a model with memory that of a key frame, "between" that of the others,
  "cycle" their mean from key frame to key frame;
- flow: optical flow, heads: those on regions, tracking: ids, of models that say so themselves;
- choice: decoding of boxes, NMS, selection of the detections;
- file: of an exported file its graph, in place of network and choice;
- results: masks assembled at the size of the image, Instances built.

Latency is the median of single calls; throughput is measured on calls back to back, median of three
rounds. Parts that cannot be timed alone are differences of two medians. FLOPs are those of the network
(multiply and add count as two), without elementwise operations.

What "training" times, in one process with the config's batch: the loader alone, images a second; a step
with batches that are in memory, and its forward pass; both together, which is what a training gets.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from tabulate import tabulate

from d2ext.checkpoint.io import CheckpointError
from d2ext.config import ConfigError, add_options_argument, load_config
from d2ext.data.errors import DataError
from d2ext.data.image_io import read_image
from d2ext.data.shapes import draw_image
from d2ext.engine.predictor import BatchPredictor
from d2ext.export import ExportedFile
from d2ext.files import atomic_write
from d2ext.model_zoo import find_config_file
from d2ext.tools.command_line import add_config_argument, make_parser, positive
from d2ext.tools.model_benchmark import (
    BoxPredictor,
    Clock,
    StreamPredictor,
    count_flops,
    environment,
    lower_score_thresholds,
    measure_batch,
    run_network,
    settled_norms,
)
from d2ext.tools.training_benchmark import measure_training


def model_config(args: argparse.Namespace) -> tuple[CfgNode, list[str]]:
    """The config to measure, and remarks on what was changed in it."""
    cfg = load_config(find_config_file(args.config_file), args.opts)
    cfg.MODEL.WEIGHTS = args.weights or cfg.MODEL.WEIGHTS
    if args.device:
        cfg.MODEL.DEVICE = args.device
    cfg.MODEL.INFERENCE.MODE = args.mode
    cfg.MODEL.INFERENCE.DTYPE = args.dtype
    cfg.MODEL.INFERENCE.CHANNELS_LAST = args.channels_last
    remarks = []
    threshold = args.score_thresh
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


def example_image(args: argparse.Namespace) -> tuple[np.ndarray, str]:
    """The image to measure on (H×W×3, BGR, uint8), and what it is."""
    if args.image is None:
        height, width = args.image_size or (480, 640)
        image = draw_image(0, "benchmark", 0, height, width).image[:, :, ::-1]
        return np.ascontiguousarray(image), f"drawn image of {width}x{height}"
    image = read_image(args.image, "BGR")
    if args.image_size:
        height, width = args.image_size
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    height, width = image.shape[:2]
    return np.ascontiguousarray(image), f"'{Path(args.image).name}' at {width}x{height}"


def run_model(args: argparse.Namespace) -> dict[str, Any]:
    """Carry ``d2ext benchmark model`` out, printing as it goes."""
    file = ExportedFile(args.exported) if args.exported else None
    cfg, remarks = (file.cfg, []) if file else model_config(args)
    given = (args.weights, args.mode, args.dtype, args.channels_last, args.score_thresh, args.opts)
    if file and given != (None, "eager", "float32", False, None, []):
        raise ConfigError("An exported file has its weights and config: export again to change.")
    device = torch.device(cfg.MODEL.DEVICE)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    image, description = example_image(args)
    torch.manual_seed(0)
    model = file.model(cfg) if file else None
    predictor = BoxPredictor(cfg, args.boxes, model) if args.boxes else BatchPredictor(cfg, model)
    if getattr(predictor.model, "has_memory", False):
        predictor = StreamPredictor(cfg, predictor.model)
    inputs = predictor.upload([image, np.ascontiguousarray(image[:, ::-1])])
    if not (file or cfg.MODEL.WEIGHTS):
        with settled_norms(predictor.model):
            run_network(predictor.model, inputs)
    iterations = args.iters or (100 if device.type == "cuda" else 10)
    clock = Clock(device, iterations, args.warmup)
    report: dict[str, Any] = {
        "config": args.exported or args.config_file,
        "environment": environment(device),
        "image": description,
        "remarks": remarks,
        "iterations": iterations,
        "batches": [],
    }
    if not file:
        report |= {name: getattr(args, name) for name in ("mode", "dtype", "channels_last")}
        report["parameters"] = sum(p.numel() for p in predictor.model.parameters())
        report["flops_per_image"] = count_flops(predictor.model, inputs[:1])
    print_head(report)
    for size in args.batch_size:
        report["batches"].append(measure_batch(predictor, [image] * size, clock))
    print_batches(report["batches"])
    return report


def print_head(report: dict[str, Any]) -> None:
    env = report["environment"]
    how = [report[name] for name in ("mode", "dtype") if name in report] or ["exported"]
    how += ["channels last"] if report.get("channels_last") else []
    print(f"{report['config']}: {', '.join(how)}")
    print(", ".join(f"{key} {value}" for key, value in env.items()))
    print(f"Input: {report['image']}. " + "; ".join(report["remarks"]))
    if "parameters" in report:
        print(
            f"{report['parameters'] / 1e6:.1f} M parameters, "
            f"{report['flops_per_image'] / 1e9:.1f} GFLOPs an image (multiply and add: two)"
        )
    print()


def print_batches(batches: list[dict[str, Any]]) -> None:
    names = [*dict.fromkeys(name for batch in batches for name in batch["stages_ms"])]
    rows = []
    for batch in batches:
        stages, latency, output = batch["stages_ms"], batch["latency_ms"], batch["output"]
        memory = batch.get("peak_allocated_mib")
        row: dict[str, Any] = {"batch": batch["batch_size"]}
        row |= {name: stages.get(name) for name in names}
        row["total p10..p90"] = f"{latency['p10']:.2f}..{latency['p90']:.2f}"
        row["images/s"] = batch["images_per_second"]
        row["peak MiB (reserved)"] = (
            "n/a" if memory is None else f"{memory:.0f} ({batch['peak_reserved_mib']:.0f})"
        )
        row["detections"] = output.get("detections_per_image", "n/a")
        row["box share"] = f"{output.get('mean_box_share', 0):.0%}"
        rows.append(row)
    print(tabulate(rows, headers="keys", floatfmt=".3f"))
    print("Times in ms for the whole batch, medians; images/s back to back.")


def run_operators(args: argparse.Namespace) -> dict[str, Any]:
    """Carry ``d2ext benchmark operators`` out."""
    from d2ext.layers import benchmark

    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtypes = [getattr(torch, name) for name in args.dtype]
    bandwidth = benchmark.copy_bandwidth(device)
    report: dict[str, Any] = {"environment": environment(device)}
    print(", ".join(f"{key} {value}" for key, value in report["environment"].items()))
    print(f"copy: {bandwidth / 1e9:.0f} GB/s (read + written); floor: bytes / copy")
    if "masks" in args.only:
        report["rows"] = benchmark.benchmark_masks(
            device,
            dtypes,
            detections=args.detections,
            sizes=args.sizes,
            repeats=args.iters,
            bandwidth=bandwidth,
        )
        print("\nMask assembly")
        print(benchmark.format_rows(report["rows"], benchmark.MASK_COLUMNS))
    if "pooling" in args.only:
        batches = args.pool_batches or ([8, 1] if device.type == "cuda" else [1])
        report["pooling"] = benchmark.benchmark_pooling(
            device,
            dtypes,
            batches=batches,
            side=args.pool_side,
            channels_last=[False, True] if args.pool_channels_last else [False],
            repeats=args.iters,
            bandwidth=bandwidth,
        )
        print("\nCorner pooling (plain PyTorch: cummax with flips)")
        print(benchmark.format_rows(report["pooling"], benchmark.POOL_COLUMNS))
    if "deform" in args.only:
        report["deform"] = benchmark.benchmark_deform(
            device, dtypes, repeats=args.iters, bandwidth=bandwidth
        )
        print("\nDeformable convolution (plain: torchvision's operator)")
        print(benchmark.format_rows(report["deform"], benchmark.DEFORM_COLUMNS))
    tables = ("rows", "pooling", "deform")
    if not all(row["compiled"] for name in tables for row in report.get(name, [])):
        print("The compiled operators are not available: both columns are plain PyTorch.")
    return report


def run_training(args: argparse.Namespace) -> dict[str, Any]:
    """Carry ``d2ext benchmark training`` out."""
    cfg = load_config(find_config_file(args.config_file), args.opts)
    if args.device:
        cfg.MODEL.DEVICE = args.device
    device = torch.device(cfg.MODEL.DEVICE)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK  # as a training does
    clock = Clock(device, args.iters or (50 if device.type == "cuda" else 5), args.warmup)
    report = {"config": args.config_file, "environment": environment(device)}
    report |= measure_training(cfg, clock)
    print(", ".join(f"{key} {value}" for key, value in report["environment"].items()))
    names = {
        "batch_size": "batch",
        "workers": "workers",
        "loader_images_per_second": "loader images/s",
        "loader_images_per_second_per_worker": "per worker",
        "forward_ms": "forward ms",
        "step_ms": "step ms",
        "images_per_second": "training images/s",
        "peak_memory_mib": "peak MiB",
    }
    row = {shown: report[name] for name, shown in names.items()}
    print(tabulate([row], headers="keys", floatfmt=".1f", missingval="n/a"))
    return report


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    return positive(height), positive(width)


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar="{operators,model,training}")
    dtypes = ("float32", "bfloat16", "float16")

    operators = commands.add_parser("operators", help="operators, plain PyTorch and the floor")
    add = operators.add_argument
    operators.set_defaults(command=run_operators)
    add("--dtype", nargs="+", choices=dtypes, default=["float32", "bfloat16"])
    add("--detections", type=positive, default=100, metavar="N")
    add(
        "--sizes",
        nargs="+",
        type=_size,
        default=[(550, 550), (1080, 1920)],
        metavar="HxW",
        help="of the binary masks (default: 550x550 1080x1920)",
    )
    add(
        "--only",
        nargs="+",
        choices=("masks", "pooling", "deform"),
        default=["masks", "pooling"],
        help="operators to measure (default: masks pooling)",
    )
    add(
        "--pool-batches",
        nargs="+",
        type=positive,
        metavar="B",
        help="of the maps that are pooled, B x 128 x side x side (default: GPU 8 1, CPU 1)",
    )
    add("--pool-side", type=positive, default=128, metavar="N", help="their side (default: 128)")
    add("--pool-channels-last", action="store_true", help="pool channels_last maps too")
    add("--iters", type=positive, default=20, help="samples (default: 20)")

    model = commands.add_parser("model", help="a whole model, stage by stage")
    add = model.add_argument
    model.set_defaults(command=run_model)
    add_config_argument(model, or_exported=True)
    add("--weights", metavar="FILE", help="checkpoint (default: random weights)")
    add("--dtype", choices=dtypes, default="float32")
    add("--mode", choices=("eager", "cudagraph", "compile", "compile_cudagraph"), default="eager")
    add("--channels-last", action="store_true")
    add("--batch-size", nargs="+", type=positive, default=[1], metavar="N")
    add(
        "--boxes",
        type=positive,
        metavar="N",
        help="boxes in each image, for top-down models (default: the whole image)",
    )
    add("--image", metavar="FILE", help="image to measure on (default: drawn)")
    add(
        "--image-size",
        nargs=2,
        type=positive,
        metavar=("H", "W"),
        help="resize the image beforehand (default: its own size; drawn: 480 640)",
    )
    add("--iters", type=positive, metavar="N", help="measured calls (default: GPU 100, CPU 10)")
    add("--warmup", type=positive, default=5, metavar="N", help="calls before (default: 5)")
    add(
        "--score-thresh",
        type=float,
        metavar="SCORE",
        help="score threshold (default: the config's with --weights, 0 with random weights)",
    )

    training = commands.add_parser("training", help="training steps and what the loader gives")
    training.set_defaults(command=run_training)
    add_config_argument(training)
    training.add_argument("--iters", type=positive, metavar="N", help="(default: GPU 50, CPU 5)")
    training.add_argument("--warmup", type=positive, default=5, metavar="N", help="(default: 5)")

    for command in (operators, model, training):
        command.add_argument("--device", help="for example cuda:1 (default: a GPU if there is one)")
        command.add_argument(
            "--output", type=Path, metavar="FILE", help="JSON file for the figures"
        )
    add_options_argument(model)
    add_options_argument(training)
    return parser


def run(arguments: list[str] | None = None) -> int:
    """Run the tool; its exit status: 0, or 2 if the command, config or a file is wrong."""
    args = build_parser().parse_args(arguments)
    try:
        report = args.command(args)
    except (ConfigError, CheckpointError, DataError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(args.output, "w") as file:
            json.dump(report, file, indent=1)
        print(f"Figures in {args.output}")
    return 0
