"""Train a small YOLACT on the built-in ``shapes`` on the CPU, evaluate it and draw what it sees.

`make demo` runs this. An interrupted run goes on where it stopped when started again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Threads that wait for each other sleep instead of spinning: where another process wants a core too,
# a training step on two cores then takes 0.6 s instead of 9. Read when PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import read_image
from detectron2.utils.file_io import PathManager
from gallery import montage, write_gallery
from tabulate import tabulate

from d2ext import model_zoo
from d2ext.data.shapes import FaceSet
from d2ext.engine import Trainer
from d2ext.tools.main import main as d2ext
from d2ext.utils.drawing import write_picture
from d2ext.utils.terminal import start_logging

ROOT = Path(__file__).resolve().parent.parent
# A second task: a RetinaFace that was trained beforehand, kept in half precision. Made by
# d2ext train --config-file retinaface/mobilenet025_shapes.yaml OUTPUT_DIR output/faces \
#   MODEL.DEVICE cpu MODEL.PIXEL_STD "[58.0,58.0,58.0]" MODEL.RETINAFACE.MESH.MAX_MESHES 4 \
#   SOLVER.IMS_PER_BATCH 8 SOLVER.BASE_LR 0.014 SOLVER.MAX_ITER 4800 \
#   INPUT.AUGMENTATION.PHOTOMETRIC_PROB 0.2
# python scripts/halve_checkpoint.py output/faces/model_final.pth scripts/demo_faces.pth
FACES_CONFIG, FACES_WEIGHTS = "retinaface/mobilenet025_shapes.yaml", ROOT / "scripts/demo_faces.pth"
FACES_OPTIONS = ["MODEL.PIXEL_STD", "[58.0,58.0,58.0]", "MODEL.DEVICE", "cpu"]
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
# COCO mask AP in percent on images that were never trained on; less means that something is broken.
EXPECTED_MASK_AP = 35.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="yolact/yolact_R_18_shapes.yaml", help="in configs/")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "demo")
    parser.add_argument("--pictures", type=int, default=12, help="images to draw")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="changes to the config")
    return parser.parse_args()


def build_config(args: argparse.Namespace) -> CfgNode:
    cfg = model_zoo.get_config(args.config)
    cfg.MODEL.DEVICE = "cpu"  # the demo shows what needs no GPU
    cfg.OUTPUT_DIR = str(args.output)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    return cfg


def train_and_evaluate(cfg: CfgNode) -> dict[str, Any]:
    """Train to the end, from the last checkpoint if there is one; returns the evaluation."""
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    if trainer.start_iter:
        say(f"going on after iteration {trainer.start_iter} of {trainer.max_iter}")
    results = trainer.train()
    if not results:
        raise RuntimeError("the config names no test set: DATASETS.TEST is empty")
    return results


def draw(cfg: CfgNode, output: Path, count: int) -> None:
    say("drawing predictions beside ground truth")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = str(output / "model_final.pth")
    write_gallery(cfg, cfg.DATASETS.TEST[0], output, count=count)


def draw_faces(output: Path, count: int = 6) -> Path:
    """What `d2ext predict` gives for images of heads: boxes, points and meshes. The montage's file."""
    say("drawing faces with their points and meshes, by a RetinaFace trained beforehand")
    shapes = FaceSet("val", 200)
    images = [f"{shapes.root}/images/{shapes.stem(i)}.bmp" for i in range(count)]
    local = [PathManager.get_local_path(image) for image in images]
    arguments = ["predict", "--config-file", FACES_CONFIG, "--output", str(output)]
    options = ["--opts", "MODEL.WEIGHTS", str(FACES_WEIGHTS), *FACES_OPTIONS]
    if d2ext([*arguments, "--input", *local, *options]):
        raise RuntimeError("d2ext predict failed; its message is above")
    pictures = [read_image(str(path), "RGB") for path in sorted(output.glob("*.png"))]
    file = output / "montage.jpg"
    write_picture(file, montage(pictures)[:, :, ::-1])
    return file


def say(message: str) -> None:
    print(f"[demo] {message}", flush=True)


def ap_table(results: dict[str, Any]) -> str:
    names = {"bbox": "box", "segm": "mask"}
    rows = [
        [names[task], *(results[task][metric] for metric in METRICS)]
        for task in names
        if task in results
    ]
    return tabulate(rows, headers=["", *METRICS], floatfmt=".1f", tablefmt="github")


def describe(summary: dict[str, Any], output: Path) -> str:
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    return (
        f"\nCOCO average precision on {summary['dataset']}: {summary['images']} images, none "
        f"of them trained on\n\n{ap_table(summary['results'])}\n\n"
        f"pictures    {output / 'montage.png'}, one by one in {output / 'pictures'}\n"
        f"faces       {output / 'faces' / 'montage.jpg'}\n"
        f"results     {output / 'inference' / 'coco_instances_results.json'}\n"
        f"checkpoint  {output / 'model_final.pth'}\n"
        f"curves      tensorboard --logdir {output}\n"
        f"time        {minutes} min {seconds} s for what the last run did\n"
    )


def verdict(summary: dict[str, Any]) -> int:
    """0 if the model is as good as it should be; otherwise says so and gives 1."""
    reached = summary["results"]["segm"]["AP"]
    if reached >= EXPECTED_MASK_AP:
        return 0
    print(
        f"Mask AP is {reached:.1f}, it should be at least {EXPECTED_MASK_AP:.0f}: training, "
        "inference or evaluation is broken, or the config was changed.",
        file=sys.stderr,
    )
    return 1


def main() -> int:
    started = time.monotonic()
    args = parse_arguments()
    output: Path = args.output
    summary_file = output / "summary.json"
    if summary_file.exists():
        summary = json.loads(summary_file.read_text(encoding="utf-8"))
        print(describe(summary, output))
        print(f"This run is finished. To run it again: rm -r {output}")
        return verdict(summary)

    cfg = build_config(args)
    output.mkdir(parents=True, exist_ok=True)
    start_logging(str(output))
    (output / "config.yaml").write_text(cfg.dump(), encoding="utf-8")
    threads, steps = torch.get_num_threads(), cfg.SOLVER.MAX_ITER
    say(f"training {args.config} on the CPU ({threads} threads), {steps} iterations")
    results = train_and_evaluate(cfg)
    draw(cfg, output, args.pictures)
    draw_faces(output / "faces")
    dataset = cfg.DATASETS.TEST[0]
    summary = {
        "dataset": dataset,
        "images": len(DatasetCatalog.get(dataset)),
        "results": {task: dict(values) for task, values in results.items()},
        "seconds": time.monotonic() - started,
    }
    partial = summary_file.with_suffix(".part")
    partial.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    partial.replace(summary_file)
    print(describe(summary, output))
    return verdict(summary)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("interrupted: the same command goes on from the last checkpoint")
        sys.exit(130)
