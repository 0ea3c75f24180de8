#!/usr/bin/env python3
"""Train every landmark head with the same budget on `shapes` and compare what they reach.

    tools/compare_landmark_heads.py
    tools/compare_landmark_heads.py --iterations 100 --heads heatmap_gaussian simcc
    tools/compare_landmark_heads.py --docs docs/landmark_heads.md

Same backbone, data, batch, optimizer, schedule and number of iterations; only the head differs. The
configs are configs/landmarks/<head>_shapes.yaml. It needs no data and no GPU; the default takes less
than 15 minutes on two CPU cores. Writes to --output-dir:

    results.json          everything measured
    curve.csv             error against training time
    occlusion.csv         error against the occluded share, natural and painted over
    table.md              the table
    time.png, occlusion.png, targets.png    the plots (they need matplotlib; or pass --no-plots)

Errors are NME: the mean distance of a thing's landmarks, in percent of the square root of its box's
area. Training time counts what one head's training takes, without its evaluations.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Threads that wait for each other sleep instead of spinning. Read when PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils.logger import setup_logger
from torch import nn

from d2ext import model_zoo
from d2ext.config import ConfigError, merge_options
from d2ext.data import DataError, build_train_loader
from d2ext.data.dataset_dicts import load_dataset
from d2ext.data.image_io import ImageCache
from d2ext.data.landmarks import TopDownMapper, TopDownTestMapper
from d2ext.engine import Trainer
from d2ext.evaluation import LandmarkEvaluator
from d2ext.files import atomic_write

logger = logging.getLogger("d2ext.tools.compare_landmark_heads")

# Head → its name in table and plots.
HEADS = {
    "heatmap_gaussian": "heat maps, Gaussian",
    "heatmap_cauchy": "heat maps, Cauchy",
    "integral": "integral (soft-argmax)",
    "simcc": "SimCC",
    "regression": "coordinate regression",
}
TARGETS = ("heatmap_gaussian", "heatmap_cauchy")
# Bins of the naturally occluded share of a thing.
OCCLUSION_BINS = ((0.0, 0.02), (0.02, 0.1), (0.1, 0.2), (0.2, 0.3), (0.3, 0.5))
# Shares of a thing's box that are painted over.
CUTOUTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)
# Memory for images, bytes; 2,000 of `shapes` take 0.4 GB.
_IMAGE_BYTES = 2 << 30
# Images that pass the model at once in an evaluation.
EVAL_BATCH = 25
START, END = "<!-- results -->", "<!-- end of results -->"


class Validation:
    """The validation images in memory, and the errors of a model on them."""

    def __init__(self, cfg: CfgNode, images: ImageCache, num: int) -> None:
        name = cfg.DATASETS.TEST[0]
        mapper = TopDownTestMapper(cfg, reader=images)
        self.evaluator = LandmarkEvaluator(name, ["nme"])
        records = load_dataset(name)
        self.inputs = [mapper(record) for record in records[:num]]
        known = {record["image_id"] for record in records[:num]}
        # The evaluator knows the whole set; only instances of these images count.
        order = [r["image_id"] for r in records for _ in mapper(r)["instances"].instance_ids]
        self.used = np.array([image_id in known for image_id in order])
        occlusion = [a["occlusion"] for a in self.evaluator.annotations]
        self.occlusion = np.array(occlusion)[self.used]

    def errors(self, model: nn.Module, cutout: float = 0.0) -> np.ndarray:
        """(N,) NME of each instance, in percent.

        Args:
            cutout: share of each instance's box that is painted over, at a random place that
                depends on the instance alone.
        """
        was_training = model.training
        model.eval()
        self.evaluator.reset()
        with torch.no_grad():
            for first in range(0, len(self.inputs), EVAL_BATCH):
                batch = self.inputs[first : first + EVAL_BATCH]
                if cutout > 0:
                    batch = [paint_over(one, cutout) for one in batch]
                self.evaluator.process(batch, model(batch))
        model.train(was_training)
        log = logging.getLogger("d2ext.evaluation.landmarks")
        level = log.level
        log.setLevel(logging.WARNING)  # the table of each evaluation would hide the rest
        try:
            self.evaluator.evaluate()
        finally:
            log.setLevel(level)
        assert self.evaluator.instance_nme is not None
        return 100 * self.evaluator.instance_nme[self.used]


def paint_over(one_input: dict[str, Any], share: float) -> dict[str, Any]:
    """A copy of a test input with a rectangle of one colour in each instance's box.

    Args:
        share: of the box's area.
    """
    image = one_input["image"].clone()
    height, width = image.shape[1:]
    instances = one_input["instances"]
    for box, key in zip(
        instances.gt_boxes.tensor.tolist(), instances.instance_ids.tolist(), strict=True
    ):
        rng = np.random.default_rng([one_input["image_id"], key])
        x0, y0, x1, y1 = box
        w, h = (x1 - x0) * math.sqrt(share), (y1 - y0) * math.sqrt(share)
        left, top = rng.uniform(0, 1, 2) * (x1 - x0 - w, y1 - y0 - h) + (x0, y0)
        color = torch.from_numpy(rng.integers(0, 256, 3).astype(np.uint8))
        columns = slice(*(min(max(round(v), 0), width) for v in (left, left + w)))
        rows = slice(*(min(max(round(v), 0), height) for v in (top, top + h)))
        image[:, rows, columns] = color[:, None, None]
    return {**one_input, "image": image}


class CurveHook(HookBase):
    """Evaluates now and then; notes the time that training took so far."""

    def __init__(self, validation: Validation, iterations: Sequence[int]) -> None:
        self.validation = validation
        self.iterations = set(iterations)
        self.points: list[dict[str, float]] = []
        self._seconds = 0.0
        self._since = 0.0

    def before_train(self) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def after_step(self) -> None:
        """Stop the clock, evaluate, go on."""
        done = self.trainer.iter + 1
        if done not in self.iterations:
            return
        self._seconds += time.perf_counter() - self._since
        errors = self.validation.errors(self.trainer.evaluated_model)
        point = {
            "iteration": done,
            "seconds": round(self._seconds, 3),
            "nme": float(np.mean(errors)),
            "median": float(np.median(errors)),
        }
        self.points.append(point)
        logger.info("Iteration %(iteration)d, %(seconds).1f s: NME %(nme).2f %%", point)
        self._since = time.perf_counter()


class HeadTrainer(Trainer):
    """The usual trainer, with images from memory."""

    # Scenes of `shapes` cost more to draw than to train on. All heads, and the loader's workers, share
    # what has been drawn before they start.
    images = ImageCache(_IMAGE_BYTES)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, *, start_iter: int = 0) -> Any:
        """See `Trainer`."""
        mapper = TopDownMapper(cfg, True, reader=cls.images)
        return build_train_loader(cfg, start_iter=start_iter, mapper=mapper)


def head_config(head: str, args: argparse.Namespace) -> CfgNode:
    """The head's config with the comparison's budget."""
    cfg = model_zoo.get_config(f"landmarks/{head}_shapes.yaml")
    cfg.MODEL.DEVICE = args.device
    cfg.OUTPUT_DIR = str(Path(args.output_dir) / head)
    cfg.SOLVER.MAX_ITER = args.iterations
    cfg.SOLVER.WARMUP_ITERS = min(cfg.SOLVER.WARMUP_ITERS, args.iterations // 10)
    cfg.SOLVER.CHECKPOINT_PERIOD = args.iterations
    cfg.SEED = args.seed
    cfg.TEST.EVAL_PERIOD = 0
    cfg.SOLVER.CPU_THREADS = args.threads
    merge_options(cfg, args.opts)
    return cfg


def evaluated_iterations(total: int, count: int) -> list[int]:
    """``count`` iterations up to ``total``, denser at the start, where errors fall fastest."""
    shares = np.linspace(0, 1, count + 1)[1:] ** 1.5
    return sorted({max(1, round(total * float(share))) for share in shares})


def train_head(head: str, args: argparse.Namespace, validation: Validation) -> dict[str, Any]:
    """Train one head; returns what ``results.json`` has about it."""
    cfg = head_config(head, args)
    test_sets = cfg.DATASETS.TEST
    cfg.DATASETS.TEST = ()  # the hook evaluates
    cfg.freeze()
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    trainer = HeadTrainer(cfg)
    trainer.resume_or_load(resume=False)
    hook = CurveHook(validation, evaluated_iterations(args.iterations, args.evaluations))
    trainer.register_hooks([hook])
    trainer.train()
    model = trainer.evaluated_model
    natural = validation.errors(model)
    occlusion = []
    for low, high in OCCLUSION_BINS:
        chosen = natural[(validation.occlusion >= low) & (validation.occlusion < high)]
        if len(chosen):
            occlusion.append(occlusion_row("natural", (low + high) / 2, chosen))
    occlusion += [occlusion_row("painted", s, validation.errors(model, s)) for s in CUTOUTS]
    return {
        "head": head,
        "config": f"landmarks/{head}_shapes.yaml",
        "test_sets": list(test_sets),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": hook.points[-1]["seconds"],
        "nme": float(np.mean(natural)),
        "median": float(np.median(natural)),
        "failures": float(100 * np.mean(natural > 10)),
        "visible_nme": float(np.mean(natural[validation.occlusion < OCCLUSION_BINS[0][1]])),
        "occluded_nme": float(np.mean(natural[validation.occlusion >= OCCLUSION_BINS[2][0]])),
        "curve": hook.points,
        "occlusion": occlusion,
        "errors": np.sort(natural).round(4).tolist(),
    }


def occlusion_row(kind: str, share: float, errors: np.ndarray) -> dict[str, Any]:
    """One point of the plot of errors against occlusion, with its standard error."""
    spread = float(np.std(errors) / math.sqrt(len(errors)))
    return {
        "kind": kind,
        "share": round(share, 3),
        "nme": float(np.mean(errors)),
        "standard_error": spread,
        "instances": len(errors),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown table, best head first."""
    lines = [
        "| head | NME % | median % | NME % visible | NME % occluded | NME > 10 % | parameters | "
        "training s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in sorted(results, key=lambda r: r["nme"]):
        lines.append(
            f"| {HEADS[r['head']]} | {r['nme']:.2f} | {r['median']:.2f} | {r['visible_nme']:.2f} | "
            f"{r['occluded_nme']:.2f} | {r['failures']:.1f} % | {r['parameters'] / 1000:.0f} k | "
            f"{r['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def write_results(folder: Path, report: dict[str, Any]) -> None:
    """``results.json``, ``curve.csv``, ``occlusion.csv``, ``table.md``."""
    with atomic_write(folder / "results.json", "w") as f:
        json.dump(report, f, indent=1)
    for name in ("curve", "occlusion"):
        rows = [{"head": r["head"], **row} for r in report["heads"] for row in r[name]]
        with atomic_write(folder / f"{name}.csv", "w") as f:
            writer = csv.DictWriter(f, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    with atomic_write(folder / "table.md", "w") as f:
        f.write(table(report["heads"]))


def draw_plots(folder: Path, results: Sequence[dict[str, Any]]) -> list[Path]:
    """The plots; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    colors = dict(zip(HEADS, plt.get_cmap("tab10").colors, strict=False))
    written = []

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / name, dpi=100)
        plt.close(figure)
        written.append(folder / name)

    def curve(axes: Any, result: dict[str, Any]) -> None:
        points = result["curve"]
        axes.plot(
            [p["seconds"] for p in points],
            [p["nme"] for p in points],
            marker="o",
            markersize=3,
            color=colors[result["head"]],
            label=HEADS[result["head"]],
        )

    def label(axes: Any, x: str, y: str = "NME, % of the box") -> None:
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if axes.get_yscale() == "log":
            plain = ticker.FormatStrFormatter("%g")
            axes.yaxis.set_major_formatter(plain)
            axes.yaxis.set_minor_formatter(plain)
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)

    figure, axes = plt.subplots(figsize=(7, 4.2))
    for result in results:
        curve(axes, result)
    axes.set_yscale("log")
    label(axes, "training time, s")
    save(figure, "time.png")

    figure, pair = plt.subplots(1, 2, figsize=(10, 4.2))
    for axes, kind, title in (
        (pair[0], "natural", "share hidden by other things or the image's border"),
        (pair[1], "painted", "share of the box painted over"),
    ):
        for result in results:
            rows = [row for row in result["occlusion"] if row["kind"] == kind]
            axes.errorbar(
                [100 * row["share"] for row in rows],
                [row["nme"] for row in rows],
                [row["standard_error"] for row in rows],
                marker="o",
                markersize=3,
                capsize=2,
                color=colors[result["head"]],
                label=HEADS[result["head"]],
            )
        axes.set_yscale("log")
        label(axes, f"{title}, %")
    save(figure, "occlusion.png")

    compared = [result for result in results if result["head"] in TARGETS]
    if compared:
        figure, pair = plt.subplots(1, 2, figsize=(10, 4.2))
        for result in compared:
            curve(pair[0], result)
            errors = result["errors"]
            share = [100 * (i + 1) / len(errors) for i in range(len(errors))]
            pair[1].plot(errors, share, color=colors[result["head"]], label=HEADS[result["head"]])
        pair[0].set_yscale("log")
        label(pair[0], "training time, s")
        pair[1].set_xlim(0, 10)
        label(pair[1], "NME of a thing, % of the box", "things at or below, %")
        save(figure, "targets.png")
    return written


def write_docs(page: Path, folder: Path, report: dict[str, Any], plots: Sequence[Path]) -> None:
    """Put table and plots between the markers of a page, which is made if it is not there."""
    images = page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    titles = {
        "time": "Error against training time",
        "occlusion": "Error against occlusion",
        "targets": "Gaussian against Cauchy targets",
    }
    parts = [table(report["heads"])]
    parts.append(
        f"{report['iterations']} iterations of {report['batch']} crops each, seed "
        f"{report['seed']}; {report['instances']} things of {report['images']} validation images; "
        f"PyTorch {report['torch']}, {report['device']}, threads: {report['threads']}; "
        f"{report['minutes']:.1f} minutes in all.\n"
    )
    for plot in plots:
        target = images / f"landmark_heads_{plot.name}"
        target.write_bytes(plot.read_bytes())
        parts.append(f"![{titles[plot.stem]}](images/{target.name})\n")
    text = page.read_text(encoding="utf-8") if page.exists() else f"# Heads\n\n{START}\n{END}\n"
    if START not in text or END not in text:
        raise ConfigError(
            f"'{page}' has no lines '{START}' and '{END}' to put the results between."
        )
    head, rest = text.split(START, 1)
    tail = rest.split(END, 1)[1]
    with atomic_write(page, "w") as f:
        f.write(head + START + "\n" + "\n".join(parts) + END + tail)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Train all heads; returns the report, written to ``--output-dir``."""
    started = time.perf_counter()
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    cfg = head_config(args.heads[0], args)
    images = HeadTrainer.images
    validation = Validation(cfg, images, args.images)
    logger.info("Drawing the training images.")
    for name in cfg.DATASETS.TRAIN:
        for record in load_dataset(name):
            images(record["file_name"], format=cfg.INPUT.FORMAT)
    report: dict[str, Any] = {
        "iterations": args.iterations,
        "batch": cfg.SOLVER.IMS_PER_BATCH,
        "seed": args.seed,
        "images": len(validation.inputs),
        "instances": len(validation.occlusion),
        "device": args.device,
        "threads": cfg.SOLVER.CPU_THREADS,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "heads": [],
    }
    for head in args.heads:
        logger.info("Training %s.", HEADS[head])
        report["heads"].append(train_head(head, args, validation))
        report["minutes"] = round((time.perf_counter() - started) / 60, 2)
        write_results(folder, report)  # what is done stays if the next head fails
    return report


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--iterations", type=int, default=900, help="of each head (900)")
    parser.add_argument("--evaluations", type=int, default=8, help="points of a curve (8)")
    parser.add_argument("--images", type=int, default=200, help="validation images (200)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--threads", type=int, default=1, help="of PyTorch on the CPU (1; the loader takes another)"
    )
    parser.add_argument("--output-dir", default="output/landmark_heads", metavar="DIR")
    parser.add_argument("--docs", metavar="FILE", help="page to put table and plots into")
    parser.add_argument("--no-plots", action="store_true", help="table only")
    parser.add_argument("--opts", nargs="*", default=[], metavar="KEY VALUE", help="config changes")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    setup_logger(name="d2ext")
    if min(args.iterations, args.evaluations, args.images, args.threads) < 1:
        logger.error("--iterations, --evaluations, --images and --threads must be at least 1.")
        return 2
    if not args.no_plots and importlib.util.find_spec("matplotlib") is None:
        logger.error("The plots need matplotlib: pip install matplotlib, or pass --no-plots.")
        return 2
    try:
        report = compare(args)
        folder = Path(args.output_dir)
        plots = [] if args.no_plots else draw_plots(folder, report["heads"])
        if args.docs:
            write_docs(Path(args.docs), folder, report, plots)
    except (ConfigError, DataError) as e:
        logger.error(str(e))
        return 1
    except OSError as e:
        logger.error(f"Cannot write to '{args.output_dir}': {e}")
        return 1
    print(table(report["heads"]))
    logger.info("Results are in %s, after %.1f minutes.", args.output_dir, report["minutes"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
