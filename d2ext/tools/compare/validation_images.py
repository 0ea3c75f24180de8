"""What each arm makes of the same validation images: how long it takes, and what it looks like."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import cv2
import torch
from detectron2.config import CfgNode
from torch import nn

from d2ext.data import build_test_loader
from d2ext.data.image_io import read_image
from d2ext.data.saved_metadata import class_metadata
from d2ext.evaluation.panoptic_pictures import picture_scale
from d2ext.tools import predict
from d2ext.tools.face_files import mesh_triangles
from d2ext.tools.model_benchmark import Clock, count_flops
from d2ext.tools.visualize_data import Samples, draw, metadata_of
from d2ext.utils.drawing import PictureDrawer, select, write_picture

# The first images, or frames: of two key intervals of YolactEdge; those that are drawn; the rounds
# that are timed.
MEASURED, DRAWN, ROUNDS = 10, 6, 5
# Instances that are drawn: from this score on, unless their boxes were given, and how many.
SCORE, MOST = 0.3, 30


def validation_inputs(cfg: CfgNode) -> list[dict[str, Any]]:
    """The first images of ``DATASETS.TEST`` as models get them in an evaluation."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    batches = itertools.islice(build_test_loader(cfg, cfg.DATASETS.TEST[0]), MEASURED)
    return [x for batch in batches for x in batch]


@torch.no_grad()
def measure_model(cfg: CfgNode, model: nn.Module, inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """``parameters``; ``flops`` of the network for the first image; ``ms`` an image, one after the
    other, from the loader's bytes to results at the size of the image: the median of some rounds."""

    def run() -> None:
        for x in inputs:
            model([x])

    clock = Clock(torch.device(cfg.MODEL.DEVICE), ROUNDS, warmup=1)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops": count_flops(model, inputs[:1]),
        "ms": clock.median(run) / len(inputs),
    }


@torch.no_grad()
def draw_predictions(
    cfg: CfgNode, model: nn.Module, inputs: list[dict[str, Any]], folder: Path
) -> None:
    """Write ``00.png``, ... with what `d2ext predict` draws."""
    metadata = class_metadata(cfg)
    words = ["--config-file", "", "--input", "", "--output", str(folder)]
    args = predict.build_parser().parse_args(words)
    predict.complete(args, cfg, metadata)
    drawer = PictureDrawer(metadata, MOST, args.triangles, args.surface_drawer)
    for i, x in enumerate(inputs[:DRAWN]):
        image = read_image(x["file_name"], "BGR")
        scale = picture_scale(max(image.shape[:2]))
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        (output,) = model([x | {"height": image.shape[0], "width": image.shape[1]}])
        if "instances" in output:
            score = 0.0 if "instances" in x else SCORE
            output.update(args.surfaces(output["instances"], score))
            output["instances"] = select(output["instances"], score)
        write_picture(folder / f"{i:02d}.png", drawer(image, output))


def draw_annotations(cfg: CfgNode, folder: Path) -> None:
    """Write ``00.png``, ... with what is annotated in the same images."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST
    metadata = metadata_of(cfg, "annotation")
    triangles = mesh_triangles(cfg, metadata)
    for i, sample in enumerate(Samples(cfg, "annotation", DRAWN)):
        picture = draw(sample, metadata, cfg.INPUT.FORMAT, triangles)
        write_picture(folder / f"{i:02d}.png", picture[:, :, ::-1])
