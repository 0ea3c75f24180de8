"""Train several models on the same data with the same budget, and compare what they reach.

Examples:
    d2ext compare detection --seconds 480 --seeds 1 2 3
    d2ext compare landmark-heads --arms heatmap_gaussian simcc --iterations 100
    d2ext compare panoptic --config panoptic_fpn=mine.yaml upsnet=upsnet/upsnet_R_50_coco.yaml \\
        --output output/coco --opts SOLVER.IMS_PER_BATCH 8
    d2ext compare panoptic --dataset streets --train-panoptic-json train.json --train-images train/ \\
        --val-panoptic-json val.json --val-images val/

Each arm is a config trained by `d2ext train`, in a process and a folder of its own. Options that are not
listed here, such as --dataset and --num-gpus, go there. What is finished is not done again, and what was
interrupted goes on: give the same command.

With --jobs, trainings run side by side, on one GPU after the other; what is measured on models comes
after all of them.

OUTPUT gets index.html: results, speed, parameters, FLOPs, plots, and the same validation images as each
arm sees them; and table.md, comparison.json with everything measured. To do it in parts, give other
--arms or --seeds each time, and at the end the whole command. Speed is measured after a training: let
nothing else run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.modeling import build_model

from d2ext.checkpoint.checkpointer import Checkpointer
from d2ext.checkpoint.io import CheckpointError
from d2ext.config import ConfigError, add_options_argument
from d2ext.data import DataError
from d2ext.files import atomic_write
from d2ext.tools import train
from d2ext.tools.command_line import CommandError, make_parser, positive
from d2ext.tools.compare.comparison import COMPARISONS, Comparison
from d2ext.tools.compare.report import draw_plots, format_table, write_page
from d2ext.tools.compare.validation_images import (
    draw_annotations,
    draw_predictions,
    measure_model,
    validation_inputs,
)
from d2ext.tools.model_benchmark import environment
from d2ext.utils.terminal import show_log

# What runs `train` and `evaluate`.
PROGRAM = [sys.executable, "-m", "d2ext"]
# Keys that must be equal for a comparison to be fair.
_BUDGET = ("DATASETS.TRAIN", "DATASETS.TEST", "SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH")
# Iterations that measure the speed, for --seconds.
_PILOT = 40


class Run(NamedTuple):
    """One arm with one seed; ``arguments`` are those of `d2ext train`, without OUTPUT_DIR."""

    arm: str
    seed: int
    folder: Path
    arguments: list[str]
    cfg: CfgNode


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(__doc__)
    add = parser.add_argument
    known = {name.replace("_", "-"): make() for name, make in COMPARISONS}
    summaries = [f"{name}: {c.summary} (arms: {', '.join(c.arms)})" for name, c in known.items()]
    add("comparison", choices=list(known), help="; ".join(summaries))
    add("--arms", nargs="+", metavar="ARM", help="only these (default: all)")
    add("--config", nargs="+", default=[], metavar="ARM=FILE", help="other config files for arms")
    add("--seeds", nargs="+", type=int, default=[1], metavar="N", help="(1)")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--iterations", type=positive, metavar="N", help="of each training (default: the config's)"
    )
    budget.add_argument(
        "--seconds", type=positive, metavar="S", help="of each training, about, from its speed"
    )
    add("--jobs", type=positive, default=1, metavar="N", help="trainings at a time (1)")
    add("--output", type=Path, metavar="DIR", help="(output/compare_<comparison>)")
    add_options_argument(parser)
    return parser


def config_files(args: argparse.Namespace) -> dict[str, str]:
    """Of --config: arm → file."""
    return dict(entry.partition("=")[::2] for entry in args.config)


def selected_arms(comparison: Comparison, args: argparse.Namespace) -> list[str]:
    """The arms that run, in order.

    Raises:
        CommandError: unknown arms, or one without the arm that trains it.
    """
    names = [name for name in comparison.arms if name in (args.arms or comparison.arms)]
    trained_by = {comparison.arms[name].trained_by for name in names} - {""}
    given = {*(args.arms or ()), *config_files(args)}
    if unknown := given - {*comparison.arms} or trained_by - {*names}:
        raise CommandError(
            f"Arms are missing or unknown: {', '.join(unknown)}. There are "
            f"{', '.join(comparison.arms)}."
        )
    return names


def plan_prepared(comparison: Comparison, args: argparse.Namespace) -> list[Run]:
    """The trainings that the selected arms begin with: on their own data sets, and as long as their
    configs say unless --iterations are fewer.

    Raises: as :func:`selected_arms`.
    """
    runs = []
    arms = [comparison.arms[name] for name in selected_arms(comparison, args)]
    overrides = "".join(x for arm in arms for x in arm.overrides)
    for name, arm in comparison.prepared.items():
        if f"{{{name}}}" not in overrides:
            continue
        options = [*arm.overrides, *args.opts, "SEED", str(args.seeds[0])]
        arguments = ["--config-file", arm.config, *options]
        if args.iterations:
            cfg = read_config(arguments)
            arguments += budget_options(cfg, min(args.iterations, cfg.SOLVER.MAX_ITER), 1)
        folder = weights_of(args, name).parent
        runs.append(Run(name, args.seeds[0], folder, arguments, read_config(arguments)))
    return runs


def weights_of(args: argparse.Namespace, prepared: str) -> Path:
    """Where the weights of a training lie that arms begin with."""
    return args.output / "prepared" / prepared / "model_final.pth"


def plan(comparison: Comparison, args: argparse.Namespace, passed_on: Sequence[str]) -> list[Run]:
    """The runs, in the order of the arms.

    Raises:
        CommandError: see :func:`selected_arms`.
        ConfigError: configs that do not exist, or budgets that differ.
    """
    files, names = config_files(args), selected_arms(comparison, args)
    runs = []
    weights = {name: str(weights_of(args, name)) for name in comparison.prepared}
    for name in names:
        arm = comparison.arms[name]
        file = files.get(name) or files.get(arm.trained_by) or arm.config
        overrides = [x.format(**weights) if weights else x for x in arm.overrides]
        common = ["--config-file", file, *passed_on, *comparison.overrides, *overrides]
        for seed in args.seeds:
            folder = args.output / name / f"seed_{seed}"
            arguments = [*common, *args.opts, "SEED", str(seed)]
            if not arm.trained_by:
                cfg = read_config(arguments)
                iterations = args.iterations or cfg.SOLVER.MAX_ITER
                if args.seconds:
                    iterations = max(round(args.seconds / pilot(arguments, args.output / name)), 1)
                arguments += budget_options(cfg, iterations, comparison.evaluations)
            runs.append(Run(name, seed, folder, arguments, read_config(arguments)))
    trained = [run.cfg for run in runs if not comparison.arms[run.arm].trained_by]
    check_budgets(trained, timed=bool(args.seconds))
    return runs


def read_config(arguments: Sequence[str]) -> CfgNode:
    """The config that `d2ext train` makes of its arguments; registers data sets, too."""
    return train.setup(train.build_parser().parse_args(list(arguments)))


def budget_options(cfg: CfgNode, iterations: int, evaluations: int) -> list[str]:
    """KEY VALUE pairs that fit a schedule to another number of iterations."""
    solver, factor = cfg.SOLVER, iterations / cfg.SOLVER.MAX_ITER
    values = {
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.STEPS": tuple(s for x in solver.STEPS if 0 < (s := round(x * factor)) < iterations),
        "SOLVER.WARMUP_ITERS": min(solver.WARMUP_ITERS, iterations // 10),
        "TEST.EVAL_PERIOD": iterations // evaluations if evaluations > 1 else 0,
    }
    return [str(word) for pair in values.items() for word in pair]


def pilot(arguments: Sequence[str], folder: Path) -> float:
    """Seconds of an iteration, measured at the end of a short training, once for all seeds."""
    file = folder / "pilot" / "metrics.json"
    if not (file.parent / "model_final.pth").is_file():
        values = ("SOLVER.MAX_ITER", str(_PILOT), "SOLVER.STEPS", "()", "DATASETS.TEST", "()")
        start("train", [*arguments, *values], file.parent)
    return [line["time"] for line in read_metrics(file) if "time" in line][-1]


def check_budgets(configs: Sequence[CfgNode], *, timed: bool) -> None:
    """Raise :class:`ConfigError` if configs train on other data or longer than each other."""
    for key in _BUDGET:
        section, leaf = key.split(".")
        values = {cfg[section][leaf] for cfg in configs}
        if len(values) > 1 and not (timed and leaf == "MAX_ITER"):
            raise ConfigError(
                f"The models cannot be compared: {key} is {' and '.join(map(str, values))}. Give one "
                f"value for all: --opts {key} VALUE."
            )
    if len(configs[0].DATASETS.TEST) != 1:
        raise ConfigError("A comparison needs one data set to evaluate on: set DATASETS.TEST.")


def begin(run: Run) -> dict[str, Any]:
    """What is known of a run, which has a report from now on: its settings, or, with ``ms``, everything.

    Raises:
        CommandError: the folder holds a run with other settings.
    """
    file = run.folder / "run.json"
    if not file.is_file():
        write_json(file, {"arm": run.arm, "seed": run.seed, "arguments": run.arguments})
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if report["arguments"] != run.arguments:
        raise CommandError(
            f"'{run.folder}' was made with other settings ({' '.join(report['arguments'])}): "
            "choose another --output, or delete it."
        )
    return report


def train_run(run: Run, **environment: str) -> None:
    """Train and evaluate, if that is not done."""
    if not all((run.folder / name).is_file() for name in ("model_final.pth", "results.json")):
        start("train", ["--resume", *run.arguments], run.folder, environment)


def train_side_by_side(runs: Sequence[Run], jobs: int) -> None:
    """Train ``jobs`` runs at a time, on one GPU after the other.

    Raises:
        CommandError: as :func:`carry_out`; the others end first.
    """
    for run in runs:
        begin(run)
    count = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    threads = str(max((os.cpu_count() or 1) // jobs, 1))
    with ThreadPoolExecutor(jobs) as pool:
        trainings = [
            pool.submit(
                train_run, run, CUDA_VISIBLE_DEVICES=given[i % len(given)], OMP_NUM_THREADS=threads
            )
            for i, run in enumerate(runs)
        ]
    for training in trainings:
        training.result()


def carry_out(run: Run, trained: Run, comparison: Comparison) -> dict[str, Any]:
    """Train or evaluate, and measure; what ``comparison.json`` holds of the run.

    Args:
        trained: the run whose weights are evaluated, often ``run`` itself.

    Raises:
        CommandError: the folder holds a run with other settings, or the training failed.
    """
    report = begin(run)
    if "ms" in report:
        return report
    weights = str(trained.folder / "model_final.pth")
    build = comparison.arms[run.arm].build
    if run is trained:
        train_run(run)
    elif build is None:
        start("evaluate", [*run.arguments, "MODEL.WEIGHTS", weights], run.folder)
    report["results"] = {}
    if build is None:
        results = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
        report["results"] = flatten_results_dict(results)
    lines = read_metrics(trained.folder / "metrics.json")
    seconds = training_seconds(lines)
    report["seconds"] = seconds[-1]
    metric = next(iter(comparison.columns))
    curve = [(s, x[metric], 0.0) for s, x in zip(seconds, lines, strict=True) if metric in x]
    report["series"] = {"time": curve if run is trained else []}
    for plot, keys in comparison.curves.items():
        points = {x: report["results"].get(key) for x, key in keys.items()}
        report["series"][plot] = [(x, y, 0.0) for x, y in points.items() if y is not None]
    solver = trained.cfg.SOLVER
    report["images"] = solver.MAX_ITER * solver.IMS_PER_BATCH
    examine(run, weights, comparison, report)
    write_json(run.folder / "run.json", report)
    return report


def examine(run: Run, weights: str, comparison: Comparison, report: dict[str, Any]) -> None:
    """Add to a run's report what is measured on its model; draw the pictures."""
    model = (comparison.arms[run.arm].build or build_model)(run.cfg).eval()
    Checkpointer(model, fit="exact").load(weights)
    inputs = validation_inputs(run.cfg)
    report |= measure_model(run.cfg, model, inputs)
    draw_predictions(run.cfg, model, inputs, run.folder / "pictures")
    if comparison.measure is not None:
        results, series = comparison.measure(run.cfg, model)
        report["results"] |= results
        report["series"] |= series


def start(
    command: str,
    arguments: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run `d2ext train` or `d2ext evaluate` in a process of its own, with its results in a folder.

    Args:
        environment: further variables of the process.
    """
    words = [*PROGRAM, command, *arguments, "OUTPUT_DIR", str(folder)]
    variables = {**os.environ, **(environment or {})}
    status = subprocess.run(words, env=variables, preexec_fn=_end_with_parent).returncode
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
    """Seconds of training up to each line, without evaluations and without waiting for data.

    A line holds the median times of the iterations since the previous one.
    """
    elapsed, done, result = 0.0, 0, []
    latest = next((x["time"] - x.get("data_time", 0.0) for x in lines if "time" in x), 0.0)
    for line in lines:
        if "time" in line:
            latest = line["time"] - line.get("data_time", 0.0)
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
    show_log("d2ext")
    try:
        for one in plan_prepared(comparison, args):
            if not (one.folder / "model_final.pth").is_file():
                start("train", ["--resume", *one.arguments], one.folder)
        runs = {(r.arm, r.seed): r for r in plan(comparison, args, passed_on)}
        if args.jobs > 1:
            train_side_by_side(
                [r for r in runs.values() if not comparison.arms[r.arm].trained_by], args.jobs
            )
        reports = []
        # Arms that are trained come first; the others evaluate their weights.
        for one in sorted(runs.values(), key=lambda r: comparison.arms[r.arm].trained_by):
            trained = runs[comparison.arms[one.arm].trained_by or one.arm, one.seed]
            reports.append(carry_out(one, trained, comparison))
        cfg = next(iter(runs.values())).cfg
        report = {
            "comparison": args.comparison,
            "environment": environment(torch.device(cfg.MODEL.DEVICE)),
            "runs": reports,
        }
        write_json(args.output / "comparison.json", report)
        table = format_table(comparison, reports)
        with atomic_write(args.output / "table.md", "w") as file:
            file.write(table)
        plots = draw_plots(comparison, reports, args.output)
        draw_annotations(cfg, args.output / "annotations")
        page = write_page(comparison, report, plots, args.output)
    except (CommandError, ConfigError, CheckpointError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{table}\nThe page with pictures: {page}; table.md and comparison.json beside it.")
    return 0
