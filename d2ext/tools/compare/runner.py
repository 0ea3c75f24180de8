"""Train several models on the same data with the same budget, and compare what they reach.

Examples:
    d2ext compare panoptic
    d2ext compare landmark-heads --arms heatmap_gaussian simcc --iterations 100
    d2ext compare landmark-heads --seeds 1 2 3 --seconds 120
    d2ext compare panoptic --config panoptic_fpn=mine.yaml upsnet=upsnet/upsnet_R_50_coco.yaml \\
        --output output/coco --opts SOLVER.IMS_PER_BATCH 8
    d2ext compare panoptic --dataset streets --train-panoptic-json train.json --train-images train/ \\
        --val-panoptic-json val.json --val-images val/

Each arm is a config trained by `d2ext train`, in a process and a folder of its own; options that are
not listed here, such as --dataset and --num-gpus, go there. What is finished is not done again, and
what was interrupted goes on: give the same command.

OUTPUT gets table.md, comparison.json with everything measured, and plots.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import platform
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import build_model
from detectron2.utils.logger import setup_logger

from d2ext.checkpoint.checkpointer import Checkpointer
from d2ext.checkpoint.io import CheckpointError
from d2ext.config import ConfigError
from d2ext.data import DataError
from d2ext.files import atomic_write
from d2ext.tools import train
from d2ext.tools.command_line import CommandError, make_parser, positive
from d2ext.tools.compare.comparison import COMPARISONS, Comparison, Series
from d2ext.tools.compare.report import draw_plots, format_table

logger = logging.getLogger("d2ext.tools.compare")

# What runs `train` and `evaluate`.
PROGRAM = [sys.executable, "-m", "d2ext"]
# What must be the same for a comparison to say something.
_BUDGET = ("DATASETS.TRAIN", "DATASETS.TEST", "SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH")
# Iterations that tell the speed, for --seconds.
_PILOT = 40


class Run(NamedTuple):
    """One arm with one seed."""

    arm: str
    seed: int
    folder: Path
    arguments: list[str]
    """For `d2ext train`, without OUTPUT_DIR."""
    cfg: CfgNode
    trained_by: str


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    names = [name.replace("_", "-") for name, _ in COMPARISONS]
    summaries = [f"{n}: {c().summary}" for n, (_, c) in zip(names, COMPARISONS, strict=True)]
    parser.add_argument("comparison", choices=names, help="; ".join(summaries))
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these (default: all)")
    parser.add_argument(
        "--config", nargs="+", default=[], metavar="ARM=FILE", help="other config files for arms"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1], metavar="N", help="(1)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--iterations", type=positive, metavar="N", help="of each training (default: the config's)"
    )
    budget.add_argument(
        "--seconds", type=positive, metavar="S", help="of each training, about, from its speed"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="(output/compare_<comparison>)")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="changes to all configs; must come last",
    )
    return parser


# Planning


def plan(comparison: Comparison, args: argparse.Namespace, passed_on: Sequence[str]) -> list[Run]:
    """The runs, those that others need first.

    Raises:
        CommandError: unknown arms.
        ConfigError: configs that do not exist, or budgets that differ.
    """
    files = dict(entry.partition("=")[::2] for entry in args.config)
    names = list(args.arms or comparison.arms)
    unknown = sorted({*names, *files} - set(comparison.arms))
    if unknown:
        raise CommandError(f"No such arms: {unknown}. There are {', '.join(comparison.arms)}.")
    needed = {comparison.arms[name].trained_by for name in names} | set(names)
    runs = []
    for name, arm in comparison.arms.items():
        if name not in needed:
            continue
        file = files.get(name) or files.get(arm.trained_by) or arm.config
        common = ["--config-file", file, *passed_on]
        options = [*comparison.overrides, *arm.overrides, *args.opts]
        for seed in args.seeds:
            folder = args.output / name / f"seed_{seed}"
            arguments = [*common, *options, "SEED", str(seed)]
            if not arm.trained_by:
                cfg = read_config(arguments)
                iterations = args.iterations or cfg.SOLVER.MAX_ITER
                if args.seconds:
                    iterations = max(round(args.seconds / pilot(arguments, folder)), 1)
                arguments += budget_options(cfg, iterations, comparison.evaluations)
            runs.append(Run(name, seed, folder, arguments, read_config(arguments), arm.trained_by))
    check_budgets([run for run in runs if not run.trained_by], timed=bool(args.seconds))
    return sorted(runs, key=lambda run: bool(run.trained_by))


def read_config(arguments: Sequence[str]) -> CfgNode:
    """The config that `d2ext train` makes of its arguments; registers data sets, too."""
    return train.setup(train.build_parser().parse_args(list(arguments)))


def budget_options(cfg: CfgNode, iterations: int, evaluations: int) -> list[str]:
    """KEY VALUE pairs that fit a schedule to another number of iterations."""
    solver, factor = cfg.SOLVER, iterations / cfg.SOLVER.MAX_ITER
    steps = tuple(step for s in solver.STEPS if 0 < (step := round(s * factor)) < iterations)
    period = iterations // evaluations if evaluations > 1 else 0
    values = {
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.STEPS": steps,
        "SOLVER.WARMUP_ITERS": min(solver.WARMUP_ITERS, iterations // 10),
        "TEST.EVAL_PERIOD": period,
    }
    return [str(word) for pair in values.items() for word in pair]


def pilot(arguments: Sequence[str], folder: Path) -> float:
    """Seconds of an iteration, measured by a short training."""
    file = folder / "pilot" / "metrics.json"
    if not file.is_file():
        short = {"SOLVER.MAX_ITER": _PILOT, "SOLVER.STEPS": "()", "DATASETS.TEST": "()"}
        words = [str(word) for pair in short.items() for word in pair]
        start("train", [*arguments, *words], file.parent)
    return training_seconds(read_metrics(file))[-1] / _PILOT


def check_budgets(runs: Sequence[Run], *, timed: bool) -> None:
    """Raise :class:`ConfigError` if runs train on other data or longer than each other."""
    for key in _BUDGET:
        section, leaf = key.split(".")
        values = {run.arm: run.cfg[section][leaf] for run in runs}
        if len(set(values.values())) > 1 and not (timed and leaf == "MAX_ITER"):
            listed = ", ".join(f"{value} for {arm}" for arm, value in values.items())
            raise ConfigError(
                f"The models cannot be compared: {key} is {listed}. Give one value for all: "
                f"--opts {key} VALUE."
            )
    if any(len(run.cfg.DATASETS.TEST) != 1 for run in runs):
        raise ConfigError("A comparison needs one data set to evaluate on: set DATASETS.TEST.")


# Running


def carry_out(
    run: Run, comparison: Comparison, finished: Mapping[tuple[str, int], Run]
) -> dict[str, Any]:
    """Train or evaluate, and measure; what ``comparison.json`` holds of the run.

    Raises:
        CommandError: the folder holds a run with other settings, or the training failed.
    """
    file = run.folder / "run.json"
    report: dict[str, Any] = {"arm": run.arm, "seed": run.seed, "arguments": run.arguments}
    if file.is_file():
        known = json.loads(file.read_text(encoding="utf-8"))
        if known["arguments"] != run.arguments:
            raise CommandError(
                f"'{run.folder}' was made with other settings ({' '.join(known['arguments'])}): "
                "choose another --output, or delete it."
            )
        if "results" in known:
            return known
    write_json(file, report)
    trained = finished[run.trained_by, run.seed] if run.trained_by else run
    weights = trained.folder / "model_final.pth"
    logger.info("%s, seed %d: see %s", run.arm, run.seed, run.folder / "log.txt")
    if run.trained_by:
        start("evaluate", [*run.arguments, "MODEL.WEIGHTS", str(weights)], run.folder)
    else:
        start("train", ["--resume", *run.arguments], run.folder)
    results = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
    report["results"] = flatten_results_dict(results)
    lines = read_metrics(trained.folder / "metrics.json")
    seconds = training_seconds(lines)
    report["seconds"] = seconds[-1] if seconds else None
    series: Series = {}
    if not run.trained_by:
        metric = next(iter(comparison.columns))
        series["time"] = [
            (s, line[metric], 0.0) for s, line in zip(seconds, lines, strict=True) if metric in line
        ]
    model = build_model(run.cfg).eval()
    report["parameters"] = sum(p.numel() for p in model.parameters())
    if comparison.measure is not None:
        Checkpointer(model, fit="exact").load(str(weights))
        results, measured = comparison.measure(run.cfg, model)
        report["results"] |= results
        series |= measured
    report["series"] = series
    write_json(file, report)
    return report


def start(command: str, arguments: Sequence[str], folder: Path) -> None:
    """Run `d2ext train` or `d2ext evaluate` in a process of its own, with its results in a folder."""
    words = [*PROGRAM, command, *arguments, "OUTPUT_DIR", str(folder)]
    status = subprocess.run(words, preexec_fn=_end_with_parent).returncode
    if status:
        raise CommandError(f"`{' '.join(words)}` ended with status {status}; see above.")


def _end_with_parent() -> None:
    """A killed comparison leaves no training behind that writes where the next one goes on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The lines of a training's ``metrics.json``."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def training_seconds(lines: Sequence[Mapping[str, float]]) -> list[float]:
    """Seconds of training up to each line, without evaluations.

    A line tells the median time of an iteration since the one before it.
    """
    times = [line["time"] for line in lines if "time" in line]
    elapsed, done, result = 0.0, 0, []
    latest = times[0] if times else 0.0
    for line in lines:
        latest = line.get("time", latest)
        elapsed += latest * max(int(line["iteration"]) + 1 - done, 0)
        done = max(int(line["iteration"]) + 1, done)
        result.append(round(elapsed, 3))
    return result


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "w") as file:
        json.dump(content, file, indent=1)


def run(arguments: list[str] | None = None) -> int:
    """Run the tool; its exit status."""
    args, passed_on = build_parser().parse_known_args(arguments)
    name = args.comparison.replace("-", "_")
    comparison: Comparison = COMPARISONS.get(name)()
    args.output = args.output or Path("output") / f"compare_{name}"
    setup_logger(name="d2ext")
    reports: list[dict[str, Any]] = []
    try:
        finished: dict[tuple[str, int], Run] = {}
        for planned in plan(comparison, args, passed_on):
            reports.append(carry_out(planned, comparison, finished))
            finished[planned.arm, planned.seed] = planned
        content = {
            "comparison": args.comparison,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": planned.cfg.MODEL.DEVICE,
            "runs": reports,
        }
        write_json(args.output / "comparison.json", content)
        table = format_table(comparison, reports)
        with atomic_write(args.output / "table.md", "w") as file:
            file.write(table)
        plots = draw_plots(comparison, reports, args.output)
    except (CommandError, ConfigError, CheckpointError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{table}")
    print("Written:", *(args.output / n for n in ("table.md", "comparison.json")), *plots)
    return 0
