#!/usr/bin/env python3
"""Train UPSNet and Detectron2's Panoptic FPN on the same data and budget, and compare them.

    tools/compare_panoptic.py
    tools/compare_panoptic.py --output output/coco --upsnet upsnet/upsnet_R_50_coco.yaml \\
        --baseline my_panoptic_fpn_R_50.yaml --opts SOLVER.IMS_PER_BATCH 8

Prints panoptic, segmentation and recognition quality (PQ, SQ, RQ) of all classes, things and stuff,
side by side for

- Panoptic FPN, which merges its heads' results by rules (arXiv 1901.02446);
- UPSNet's heads, merged by the same rules;
- the same heads, merged by UPSNet's panoptic head (arXiv 1901.03784),

and writes the same to comparison.json. The default configs learn the built-in `shapes` on a CPU. A run
that was interrupted goes on where it stopped, and what is finished is not done again: --output DIR
chooses where.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Threads that wait for each other sleep instead of spinning. Read when PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from detectron2.config import CfgNode
from detectron2.utils.logger import setup_logger
from tabulate import tabulate

from d2ext.checkpoint.checkpointer import Checkpointer
from d2ext.checkpoint.io import CheckpointError
from d2ext.config import ConfigError, add_options_argument, load_config
from d2ext.data import DataError
from d2ext.data.custom import check_config_against_data
from d2ext.engine import Trainer
from d2ext.files import atomic_write
from d2ext.model_zoo import find_config_file

METRICS = tuple(m + group for group in ("", "_th", "_st") for m in ("PQ", "SQ", "RQ"))
# Which of UPSNet's ways to merge is evaluated, see d2ext/systems/upsnet/config.py.
MERGE = "MODEL__UPSNET__TEST__PANOPTIC"
RULES_AREA_LIMIT = "MODEL__PANOPTIC_FPN__COMBINE__STUFF_AREA_LIMIT"
# What must be the same for a comparison to say something.
BUDGET = ("DATASETS.TRAIN", "DATASETS.TEST", "SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--upsnet",
        metavar="FILE",
        default="upsnet/upsnet_shapes.yaml",
        help="config of UPSNet, path or model-zoo name (%(default)s)",
    )
    parser.add_argument(
        "--baseline",
        metavar="FILE",
        default="baselines/panoptic_fpn_shapes.yaml",
        help="config of what it is compared with (%(default)s)",
    )
    parser.add_argument("--output", type=Path, default=Path("output/compare_panoptic"))
    add_options_argument(parser)
    return parser


def build_config(config_file: str, output: Path, options: Sequence[str]) -> CfgNode:
    cfg = load_config(find_config_file(config_file), options)
    cfg.OUTPUT_DIR = str(output)
    check_config_against_data(cfg)
    if not cfg.DATASETS.TEST:
        raise ConfigError(f"There is nothing to compare on: {config_file} has no DATASETS.TEST.")
    cfg.freeze()
    return cfg


def check_budgets(one: CfgNode, other: CfgNode) -> None:
    """Raise :class:`ConfigError` if two configs train on other data or longer than each other."""
    for key in BUDGET:
        section, leaf = key.split(".")
        a, b = one[section][leaf], other[section][leaf]
        if a != b:
            raise ConfigError(
                f"The models cannot be compared: {key} is {a} for one and {b} for the other. Give "
                f"one value for both: --opts {key} VALUE."
            )


def changed(cfg: CfgNode, **values: Any) -> CfgNode:
    """A copy with other values; the keys have ``__`` for the dot."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list([x for k, v in values.items() for x in (k.replace("__", "."), v)])
    cfg.freeze()
    return cfg


def train(cfg: CfgNode) -> float | None:
    """Train to the end; returns the seconds that it took, None if part of it was done before."""
    started = time.monotonic()
    trainer = Trainer(changed(cfg, DATASETS__TEST="()"))
    trainer.resume_or_load(resume=True)
    if trainer.start_iter >= trainer.max_iter:
        return None
    fresh = trainer.start_iter == 0
    trainer.train()
    return time.monotonic() - started if fresh else None


def evaluate(cfg: CfgNode, folder: str) -> dict[str, Any]:
    """Evaluate ``OUTPUT_DIR/model_final.pth`` on the first test set; results go to a folder there."""
    model = Trainer.build_model(cfg)
    weights = os.path.join(cfg.OUTPUT_DIR, "model_final.pth")
    Checkpointer(model, cfg.OUTPUT_DIR, fit="exact").load(weights)
    output = os.path.join(cfg.OUTPUT_DIR, folder)
    dataset = f"('{cfg.DATASETS.TEST[0]}',)"
    return Trainer.test(changed(cfg, DATASETS__TEST=dataset, OUTPUT_DIR=output), model)


def summarize(results: dict[str, Any], seconds: float | None) -> dict[str, Any]:
    """The numbers of one row: panoptic quality, and the heads' own measures."""
    if "panoptic_seg" not in results:
        raise ConfigError("The model predicts no panoptic_seg: both configs must be panoptic.")
    row: dict[str, Any] = {m: float(results["panoptic_seg"][m]) for m in METRICS}
    row["mask_AP"] = float(results.get("segm", {}).get("AP", float("nan")))
    row["mIoU"] = float(results.get("sem_seg", {}).get("mIoU", float("nan")))
    row["training_seconds"] = seconds
    return row


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        [name, *(row[m] for m in METRICS), row["mask_AP"], row["mIoU"]]
        for name, row in rows.items()
    ]
    groups = {"": "", "_th": " things", "_st": " stuff"}
    headers = [m[:2] + groups[m[2:]] for m in METRICS]
    return tabulate(
        lines, headers=["", *headers, "mask AP", "mIoU"], floatfmt=".1f", tablefmt="github"
    )


def compare(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    output: Path = args.output
    configs = {
        "panoptic_fpn": build_config(args.baseline, output / "panoptic_fpn", args.opts),
        "upsnet": build_config(args.upsnet, output / "upsnet", args.opts),
    }
    check_budgets(*configs.values())
    # Title of the row: which model, and how its heads' results are merged.
    evaluations = {
        "Panoptic FPN": ("panoptic_fpn", None),
        "UPSNet, merged by rules": ("upsnet", "heuristic"),
        "UPSNet, panoptic head": ("upsnet", "head"),
    }
    seconds: dict[str, float | None] = {}
    for name, cfg in configs.items():
        file = output / name / "seconds.json"
        seconds[name] = train(cfg)
        if seconds[name] is not None:
            with atomic_write(file, "w") as f:
                json.dump(seconds[name], f)
        elif file.is_file():
            seconds[name] = json.loads(file.read_text(encoding="utf-8"))
    rows = {}
    for title, (name, merge) in evaluations.items():
        cfg = configs[name]
        if merge is not None:
            # Small stuff is dropped alike.
            limit = cfg.MODEL.UPSNET.TEST.STUFF_AREA_LIMIT
            cfg = changed(cfg, **{MERGE: merge, RULES_AREA_LIMIT: limit})
        rows[title] = summarize(evaluate(cfg, merge or "rules"), seconds[name])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        for name in ("fvcore", "detectron2", "d2ext"):
            setup_logger(str(args.output), name=name)
        rows = compare(args)
    except (ConfigError, CheckpointError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with atomic_write(args.output / "comparison.json", "w") as file:
        json.dump(rows, file, indent=1)
    print(f"\n{table(rows)}\n")
    for name, row in rows.items():
        if row["training_seconds"] is not None:
            print(f"{name}: trained in {row['training_seconds'] / 60:.1f} minutes")
    gain = rows["UPSNet, panoptic head"]["PQ"] - rows["UPSNet, merged by rules"]["PQ"]
    print(f"The panoptic head gains {gain:+.1f} PQ over the rules on the same heads' results.")
    print(f"The same numbers: {args.output / 'comparison.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
