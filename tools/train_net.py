#!/usr/bin/env python3
"""Train and evaluate any d2ext or Detectron2 model, with Detectron2's command line.

Examples:
    tools/train_net.py --config-file yolact/yolact_R_50_550.yaml --num-gpus 8
    tools/train_net.py --config-file configs/yolact/yolact_R_18_shapes.yaml MODEL.DEVICE cpu
    tools/train_net.py --config-file CONFIG --dataset fruits --train-json train.json \\
        --train-images train/ --val-json val.json --val-images val/
    tools/train_net.py --config-file CONFIG --dataset streets --train-panoptic-json train.json \\
        --train-panoptic-root train_png/ --train-images train/
    tools/train_net.py --config-file CONFIG --resume
    tools/train_net.py --config-file CONFIG --eval-only MODEL.WEIGHTS output/model_final.pth
    tools/train_net.py --config-file CONFIG --eval-only --analyze MODEL.WEIGHTS model_final.pth
"""

import argparse
import os
import sys
from typing import Any

# Threads that wait for each other sleep instead of spinning: on a CPU, data loading wants the cores
# too. Read when PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch.multiprocessing as mp
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

import d2ext  # noqa: F401  (registers models and data sets)
from d2ext.checkpoint.checkpointer import Checkpointer
from d2ext.checkpoint.io import CheckpointError
from d2ext.config import ConfigError, load_config, merge_options
from d2ext.data import DataError
from d2ext.data.custom import (
    add_dataset_arguments,
    apply_dataset_to_config,
    check_config_against_data,
    register_from_arguments,
)
from d2ext.engine import Trainer, launch, set_cpu_threads
from d2ext.evaluation import check_analysis
from d2ext.model_zoo import find_config_file


def build_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments and those that register data sets."""
    parser = default_argument_parser(epilog=__doc__)
    add_dataset_arguments(parser)
    parser.add_argument(
        "--analyze",
        action="store_true",
        help="also write where panoptic quality is lost: per class, per image, between classes, as "
        "tables and pictures (in OUTPUT_DIR/inference/analysis)",
    )
    parser.set_defaults(dist_url="auto")
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
    args.config_file = find_config_file(args.config_file)
    name = register_from_arguments(args)
    cfg = load_config(args.config_file)
    if name is not None:
        apply_dataset_to_config(cfg, name)
    merge_options(cfg, args.opts)  # they win over what --dataset sets
    check_config_against_data(cfg, train=not args.eval_only)
    if args.analyze:
        cfg.TEST.ANALYZE = True
    if cfg.TEST.ANALYZE:
        for dataset in cfg.DATASETS.TEST:
            check_analysis(dataset)
    cfg.freeze()
    return cfg


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """What each process does. Returns the results of the evaluation."""
    cfg = setup(args)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="d2ext")
    if args.eval_only:
        return evaluate(cfg, resume=args.resume)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def evaluate(cfg: CfgNode, *, resume: bool) -> dict[str, Any]:
    """Evaluate ``MODEL.WEIGHTS``, or with ``resume`` the last checkpoint in ``OUTPUT_DIR``."""
    if not cfg.DATASETS.TEST:
        raise ConfigError("There is nothing to evaluate: set DATASETS.TEST or pass --dataset.")
    set_cpu_threads(cfg)
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, fit="exact")
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = Trainer.test(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def run(arguments: list[str] | None = None) -> int:
    """Parse, start the processes, wait. Returns the exit status."""
    args = build_parser().parse_args(arguments)
    try:
        device = setup(args).MODEL.DEVICE
        launch(
            main,
            args.num_gpus,
            args.num_machines,
            args.machine_rank,
            args.dist_url,
            device=device,
            args=(args,),
        )
    except (ConfigError, CheckpointError, DataError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, FloatingPointError) as error:  # disk full, ...; the log has the traceback
        print(f"error: {error}", file=sys.stderr)
        return 1
    except mp.ProcessRaisedException as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run())
