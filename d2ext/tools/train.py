"""Train any model of d2ext or Detectron2, then evaluate it.

Examples:
    d2ext train --config-file yolact/yolact_R_50_550.yaml --num-gpus 8
    d2ext train --config-file yolact/yolact_R_18_shapes.yaml MODEL.DEVICE cpu
    d2ext train --config-file CONFIG --dataset fruits --train-json train.json \\
        --train-images train/ --val-json val.json --val-images val/
    d2ext train --config-file CONFIG --dataset streets --train-panoptic-json train.json \\
        --train-panoptic-root train_png/ --train-images train/
    d2ext train --config-file CONFIG --resume
    d2ext train --config-file CONFIG --eval-only --analyze MODEL.WEIGHTS model_final.pth

Options are those of Detectron2's train_net.py, and more; KEY VALUE pairs at the end change the config.
OUTPUT_DIR gets checkpoints, logs, and the last evaluation's results as results.json. It belongs to one
training at a time; what an earlier one left moves to a sub-folder, unless --resume goes on with it.
"""

import argparse
import json
import logging
import math
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data.catalog import Metadata
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from torch import nn

from d2ext.checkpoint.checkpointer import Checkpointer
from d2ext.checkpoint.io import CheckpointError
from d2ext.config import ConfigError, load_config, merge_options
from d2ext.data import DataError, DatasetError
from d2ext.data.custom import (
    add_dataset_arguments,
    apply_dataset_to_config,
    check_config_against_data,
    register_from_arguments,
    register_saved,
)
from d2ext.data.dataset_dicts import load_images
from d2ext.data.errors import shorten
from d2ext.data.saved_metadata import saved_metadata
from d2ext.data.summary import report
from d2ext.engine import Trainer, set_cpu_threads
from d2ext.engine.processes import RankError, launch
from d2ext.engine.run_folder import keep_files, load_run, run_folder, trained_weights
from d2ext.engine.schedule import fit_schedule
from d2ext.evaluation import check_analysis
from d2ext.export import ExportedFile
from d2ext.files import atomic_write
from d2ext.model_zoo import find_config_file
from d2ext.tools.command_line import positive
from d2ext.utils.terminal import start_logging

logger = logging.getLogger("d2ext.tools.train")


def build_parser(doc: str | None = __doc__) -> argparse.ArgumentParser:
    """Detectron2's arguments and those that register data sets; ``doc`` becomes the help's text."""
    summary, _, details = (doc or "").partition("\n\n")
    parser = default_argument_parser(epilog=details)
    parser.description = summary
    add_dataset_arguments(parser)
    parser.add_argument(
        "--epochs",
        type=positive,
        metavar="N",
        help="see each training image N times: iterations, steps, warm-up, and the periods of "
        "checkpoints and evaluations follow (default with own data: 24,000 images or 50 epochs, "
        "whichever is more, but no longer than the config says)",
    )
    parser.add_argument(
        "--analyze",
        action="store_true",
        help="also write where AP of boxes, masks and keypoints is lost (a page, numbers and pictures; "
        "needs hotcoco), or panoptic quality (OUTPUT_DIR/inference/analysis)",
    )
    # None: not given, see launch.
    parser.set_defaults(dist_url="auto", num_gpus=None, num_machines=None, machine_rank=None)
    for action in parser._actions:
        if action.dest == "num_gpus":
            action.help = "processes on this machine: one per GPU, or on the CPU (MODEL.DEVICE cpu)"
        elif action.dest == "config_file":
            action.help = "path of a config file, or its name in the model zoo"
        elif action.dest == "dist_url":
            action.help = "tcp://HOST:PORT of machine 0; not needed on a single machine"
    return parser


def setup(args: argparse.Namespace) -> CfgNode:
    """Config of the command line; registers the data sets that it names."""
    return _setup(args)[0]


def _setup(args: argparse.Namespace) -> tuple[CfgNode, str]:
    """The same, and what :func:`~d2ext.engine.schedule.fit_schedule` says."""
    cfg = _base_config(args)
    name = register_from_arguments(args)
    learned, length = saved_metadata(cfg), cfg.SOLVER.MAX_ITER
    if name is not None:
        apply_dataset_to_config(cfg, name)
        if args.eval_only and learned is not None:
            _check_learned(learned, cfg, name)
    merge_options(cfg, args.opts)  # they win over what --dataset sets
    register_saved(cfg, train=not args.eval_only)
    check_config_against_data(cfg, train=not args.eval_only)
    schedule = ""
    if not args.eval_only and (args.epochs or (learned is None and _is_other_data(args, name))):
        images = sum(len(load_images(x)) for x in cfg.DATASETS.TRAIN)
        keys = args.opts[::2]
        schedule = fit_schedule(cfg, length, images, epochs=args.epochs, keep=keys)
    if args.analyze:
        cfg.TEST.ANALYZE = True
    if cfg.TEST.ANALYZE:
        for dataset in cfg.DATASETS.TEST:
            check_analysis(dataset)
    cfg.freeze()
    return cfg, schedule


def _check_files(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Raise for what would otherwise come to nothing only after the network is built."""
    if not args.eval_only and not cfg.DATASETS.TRAIN:
        raise ConfigError("There is nothing to train on: set DATASETS.TRAIN or pass --dataset.")
    if args.eval_only and not cfg.DATASETS.TEST:
        raise ConfigError("There is nothing to evaluate: set DATASETS.TEST or pass --dataset.")
    weights = cfg.MODEL.WEIGHTS
    resumes = args.resume and Checkpointer(nn.Identity(), cfg.OUTPUT_DIR).has_checkpoint()
    if weights and not resumes and "://" not in weights and not Path(weights).is_file():
        raise FileNotFoundError(
            f"MODEL.WEIGHTS {weights!r} does not exist; an empty value trains from random weights."
        )


def _base_config(args: argparse.Namespace) -> CfgNode:
    """The config of ``--config-file``, of ``--run``, whose results go to a folder of their own, or of
    ``--exported``."""
    if getattr(args, "exported", None):
        if args.config_file or args.resume or args.run:
            raise ConfigError(
                "--exported takes config and weights from its file: leave out the others."
            )
        return ExportedFile(args.exported).cfg
    if not getattr(args, "run", None):
        args.config_file = find_config_file(args.config_file)
        return load_config(args.config_file)
    if args.config_file or args.resume:
        raise ConfigError("--run takes config and weights from its folder: leave out the others.")
    cfg = load_run(args.run)
    cfg.OUTPUT_DIR = str(Path(args.run) / "evaluation")
    return cfg


def _is_other_data(args: argparse.Namespace, name: str | None) -> bool:
    """Whether ``--dataset`` names data that the config's schedule is not made for: one's own, or, for
    configs that are not named after them, the built-in shapes."""
    own = args.dataset_yaml or any(
        getattr(args, f"train_{key}") for key in ("json", "panoptic_json", "sem_seg", "video_json")
    )
    for_shapes = (name or "").startswith("shapes") and "shapes" not in Path(args.config_file).name
    return bool(own or for_shapes)


def _check_learned(learned: Metadata, cfg: CfgNode, name: str) -> None:
    """Raise DatasetError where a model is evaluated on data of other classes than it has learned."""
    data = saved_metadata(cfg)
    for kind in ("thing_classes", "stuff_classes", "keypoint_names"):
        own, given = learned.get(kind), None if data is None else data.get(kind)
        if own and given and own != given:
            raise DatasetError(
                f"The model has learned the {kind} {shorten(own)}, but data set '{name}' has "
                f"{shorten(given)}: they cannot be compared."
            )


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """What each process does. Returns the results of the evaluation."""
    cfg, schedule = _setup(args)
    _check_files(cfg, args)
    with ExitStack() as stack:
        if not args.eval_only:
            comm.synchronize()  # all have read the config, which may be one that moves aside
            if comm.is_main_process():
                stack.enter_context(
                    run_folder(cfg.OUTPUT_DIR, resume=args.resume, weights=cfg.MODEL.WEIGHTS)
                )
                keep_files(cfg)
            comm.synchronize()  # where the folder is refused, the others write nothing and end
        start_logging(cfg.OUTPUT_DIR)
        default_setup(cfg, args)
        if comm.is_main_process():
            if schedule:
                logger.info(schedule)
            report((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST), cfg.OUTPUT_DIR)
        results: dict[str, Any] | None
        if getattr(args, "exported", None):
            results = _evaluate(cfg, ExportedFile(args.exported).model(cfg))
        elif args.eval_only:
            results = evaluate(cfg, resume=args.resume)
        else:
            trainer = Trainer(cfg)
            trainer.resume_or_load(resume=args.resume)
            results = trainer.train()
        if comm.is_main_process() and results:
            with atomic_write(Path(cfg.OUTPUT_DIR) / "results.json", "w") as file:
                json.dump(results, file, indent=1, default=float)
        if comm.is_main_process() and not args.eval_only:
            logger.info(summary(trainer, results or {}))
    return results


def summary(trainer: Trainer, results: dict[str, Any]) -> str:
    """What came of a training that has ended, and the command that predicts with it.

    Args:
        results: of its last evaluation
    """
    cfg, stopped, best = trainer.cfg, trainer.early_stopping, trainer.best
    done = (stopped and stopped.ended_after) or trainer.max_iter
    lines = [f"The training in {cfg.OUTPUT_DIR} has ended after {done} iterations."]
    if done < trainer.max_iter:
        lines[0] += (
            f" It would have had {trainer.max_iter}, but {cfg.TEST.EARLY_STOPPING} evaluations gave no "
            f"better {cfg.TEST.BEST_METRIC} (TEST.EARLY_STOPPING)."
        )
    if best is not None and best.best_iter is not None:
        name, after = cfg.TEST.BEST_METRIC, best.best_iter + 1
        lines.append(f"Best {name}: {best.best_metric:.4g}, after {after} iterations.")
    # The first metric of each kind is the one that it is known by.
    headline: dict[str, str] = {}
    for name, value in flatten_results_dict(results).items():
        if isinstance(value, float) and math.isfinite(value):
            headline.setdefault(name.rpartition("/")[0], f"{name} {value:.4g}")
    if headline:
        lines.append(f"Last evaluation: {', '.join(headline.values())}.")
    lines.append(f"Weights: {trained_weights(Path(cfg.OUTPUT_DIR), cfg.TEST.BEST_METRIC)}")
    video = getattr(trainer.evaluated_model, "has_memory", False)
    source = "--video-input VIDEO" if video else "--input IMAGES"
    folder = shlex.quote(cfg.OUTPUT_DIR)
    lines.append(f"Predict: d2ext predict --run {folder} {source} --output predictions")
    return "\n  ".join(lines)


def evaluate(cfg: CfgNode, *, resume: bool) -> dict[str, Any]:
    """Evaluate ``MODEL.WEIGHTS``, or with ``resume`` the last checkpoint in ``OUTPUT_DIR``."""
    set_cpu_threads(cfg)
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, fit="exact")
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return _evaluate(cfg, model)


def _evaluate(cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
    if not cfg.DATASETS.TEST:
        raise ConfigError("There is nothing to evaluate: set DATASETS.TEST or pass --dataset.")
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def run(arguments: list[str] | None = None, parser: argparse.ArgumentParser | None = None) -> int:
    """Parse, start the processes, wait. Returns the exit status."""
    args = (parser or build_parser()).parse_args(arguments)
    folder = ""
    try:
        cfg = setup(args)
        device, folder = cfg.MODEL.DEVICE, cfg.OUTPUT_DIR
        launch(
            main,
            args.num_gpus,
            args.num_machines,
            args.machine_rank,
            args.dist_url,
            device=device,
            args=(args,),
        )
    except KeyboardInterrupt:
        end = "" if args.eval_only else _how_to_go_on(folder) or ": nothing was saved yet."
        print(f"interrupted{end}", file=sys.stderr)
        return 130
    except (ConfigError, CheckpointError, DataError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RankError as error:
        print(f"error: {error}{'' if args.eval_only else _how_to_go_on(folder)}", file=sys.stderr)
        return 1
    except (OSError, FloatingPointError) as error:  # the log has the traceback
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _how_to_go_on(folder: str) -> str:
    """What was saved; empty, if nothing was."""
    saved = folder and Checkpointer(nn.Identity(), folder).get_checkpoint_file()
    return saved and f": {saved} is saved; the same command with --resume goes on from it."
