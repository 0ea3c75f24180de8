"""Export a trained model to a file that runs without its code.

    d2ext export --config-file retinaface/mobilenet025_wider.yaml --weights model_final.pth \\
        --size 480 640 --check faces.onnx
    d2ext export --run output/mine --dynamic-batch --dynamic-size mine.onnx
    d2ext export --config-file yolact/yolact_R_50_550.yaml --weights model_final.pth yolact.pt2
    d2ext predict --exported faces.onnx --input photo.jpg --output out/
    d2ext evaluate --exported faces.onnx --dataset ...

The file takes images (B, 3, H, W) in 0..255, in the config's order of channels, and gives named
tensors; docs/export.md lists them for each system. It carries classes, colours and the config.
Models with memory (YolactEdge on videos, VPSNet with fusion) get two files: edge.onnx for key frames or
the first ones, edge.later.onnx for others. --format onnx needs `pip install d2ext[export]`; torch is
PyTorch's own (torch.export.load), aoti is compiled by AOTInductor for this kind of CPU or, with
MODEL.DEVICE cuda, GPU.

--check runs the file and the model on noise and on a picture and prints how much each output differs.

Exit status: 0; 1 if an output differs by more than the tolerance, or the file cannot be written; 2 if
the model cannot be exported or the command is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor

from d2ext.checkpoint.checkpointer import Checkpointer
from d2ext.checkpoint.io import CheckpointError
from d2ext.config import ConfigError, add_options_argument, load_config, merge_options
from d2ext.data import DataError
from d2ext.data.image_io import read_image
from d2ext.data.shapes.scene import draw_image
from d2ext.engine.run_folder import load_run
from d2ext.export import (
    FORMATS,
    Difference,
    ExportedFile,
    NotExportable,
    check,
    export,
    exportable,
)
from d2ext.export.check import TOLERANCE
from d2ext.model_zoo import find_config_file
from d2ext.modeling.inference import DTYPES
from d2ext.modeling.tta import build_tta
from d2ext.tools.command_line import add_config_argument, make_parser, positive


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add_config_argument(parser, or_run=True)
    add = parser.add_argument
    add("--weights", metavar="FILE", help="checkpoint; default: the config's MODEL.WEIGHTS")
    add("--format", choices=sorted(FORMATS), help="default: by the name, onnx or torch")
    help_text = "of the input, in pixels (default: the model's usual one)"
    add("--size", nargs=2, type=positive, metavar=("H", "W"), help=help_text)
    add("--dynamic-batch", action="store_true", help="batches of any size, not one image")
    add("--dynamic-size", action="store_true", help="images of any size that the network takes")
    help_text = "of the network's arithmetic; decoding stays in float32 (default: %(default)s)"
    add("--dtype", choices=sorted(DTYPES), default="float32", help=help_text)
    add("--bytes", action="store_true", help="images are bytes (uint8), not float32")
    add("--check", action="store_true", help="compare the file with the model")
    help_text = "for --check (default: a drawn scene of the data set `shapes`)"
    add("--image", metavar="FILE", help=help_text)
    help_text = "largest |a - b| / (1 + max |b|) (default: 1e-4; float16 0.005, bfloat16 0.05)"
    add("--tolerance", type=float, metavar="X", help=help_text)
    add("output", metavar="OUT", help="a file, .onnx or .pt2")
    add_options_argument(parser)
    return parser


def load_model(args: argparse.Namespace) -> tuple[CfgNode, torch.nn.Module]:
    """Config and trained model of the command."""
    cfg = load_run(args.run) if args.run else load_config(find_config_file(args.config_file))
    merge_options(cfg, args.opts)
    cfg.MODEL.WEIGHTS = args.weights or cfg.MODEL.WEIGHTS
    model = build_model(cfg)
    Checkpointer(model, fit="exact").load(cfg.MODEL.WEIGHTS)
    if not cfg.MODEL.WEIGHTS:
        print("MODEL.WEIGHTS is empty: exporting random weights.", file=sys.stderr)
    return cfg, build_tta(cfg, model).eval()


def check_images(path: str | None, file: ExportedFile) -> dict[str, Tensor]:
    """Noise and a picture, (1, 3, H, W) in 0..255, of a size that the file takes."""
    expected = file.facts["input"]
    unit, less = expected["multiple"], expected["less"]
    height, width = (side or -(-480 // unit) * unit - less for side in expected["shape"][2:])
    image = read_image(path, "BGR") if path else draw_image(0, "val", 0, 480, 640).image
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    image = image[..., ::-1] if expected["channels"] == "RGB" else image
    noise = np.random.default_rng(0).integers(0, 256, image.shape)
    return {
        name: torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1)))[None].float()
        for name, x in (("noise", noise), ("picture", image))
    }


def print_differences(name: str, differences: list[Difference], tolerance: float) -> bool:
    """A line for each output; whether all are within the tolerance."""
    for x in differences:
        verdict = "" if x.largest <= tolerance else "  <- beyond the tolerance"
        moved = f"  ({x.moved} slots moved)" if x.moved else ""
        print(f"{name:8} {x.output:20} {x.largest:.2e} of {x.compared:8} numbers{moved}{verdict}")
    return all(x.largest <= tolerance for x in differences)


def run(arguments: list[str] | None = None) -> int:
    """Run the tool; its exit status."""
    args = build_parser().parse_args(arguments)
    file_format = args.format or ("torch" if args.output.endswith(".pt2") else "onnx")
    try:
        cfg, model = load_model(args)
        paths = export(
            model,
            cfg,
            args.output,
            file_format=file_format,
            size=tuple(args.size) if args.size else None,
            dtype=args.dtype,
            bytes_in=args.bytes,
            dynamic_batch=args.dynamic_batch,
            dynamic_size=args.dynamic_size,
        )
        for path in paths:
            print(f"Wrote {path}: {os.path.getsize(path) / 2**20:.1f} MiB")
        if not args.check:
            return 0
        file, model = ExportedFile(args.output), exportable(cfg, model)
        tolerance = args.tolerance if args.tolerance is not None else TOLERANCE[args.dtype]
        passed = [
            print_differences(name, check(model, file, images, tolerance), tolerance)
            for name, images in check_images(args.image, file).items()
        ]
    except OSError as error:
        print(f"error: cannot write '{args.output}': {error}", file=sys.stderr)
        return 1
    except (NotExportable, ConfigError, CheckpointError, DataError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if all(passed) else 1
