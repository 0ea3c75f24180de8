"""Detectron2's DefaultTrainer with d2ext's loaders, optimizers, hooks and checkpoints."""

import importlib.util
import logging
import math
import os
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model, hooks
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.events import (
    CommonMetricPrinter,
    EventWriter,
    JSONWriter,
    TensorboardXWriter,
)
from detectron2.utils.logger import setup_logger
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from d2ext.checkpoint.checkpointer import Checkpointer, WeightsCheckpointer
from d2ext.checkpoint.io import CheckpointError
from d2ext.config import ConfigError
from d2ext.data import build_test_loader, build_train_loader
from d2ext.data.build import StreamDataset
from d2ext.engine.ema import EMAHook, TrainedWeights, build_ema
from d2ext.engine.experiments import build_loggers, check_loggers
from d2ext.engine.hooks import (
    BestCheckpointer,
    EarlyStopping,
    EvalHook,
    InterruptHook,
    LogWriter,
    MetricHistory,
    PeriodicCheckpointer,
    StopTraining,
    drop_metrics_from,
)
from d2ext.engine.optimizer import build_optimizer
from d2ext.engine.processes import set_cpu_threads
from d2ext.engine.tracking import build_tracked
from d2ext.engine.train_loop import StepTrainer, amp_dtype
from d2ext.engine.training_state import check_count, check_like
from d2ext.evaluation import build_evaluator
from d2ext.modeling.meta_arch import MetaArch
from d2ext.modeling.tta import build_tta

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)

# How optimizers, schedules and hooks fail on a state of another kind.
_BAD_STATE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


class Trainer(DefaultTrainer):
    """Trains a model as a config says, evaluates it and keeps checkpoints.

    Use as Detectron2's ``DefaultTrainer``::

        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=True)
        trainer.train()

    A run that is killed and resumed gives the losses of an uninterrupted one: data and all random
    draws are functions of (``SEED``, iteration, process). With ``SEED`` < 0 a seed is drawn at the
    start and kept in the checkpoints.

    Attributes:
        model: the model being trained (wrapped by DistributedDataParallel with several processes).
        evaluated_model: what is evaluated and stored under "model" in checkpoints: the moving
            average with ``MODEL_EMA.ENABLED``, else the model.
        cfg: with the seed filled in.
        best: knows the best value of ``TEST.BEST_METRIC``; None without it, and in other processes than
            the main one.
        early_stopping: None without ``TEST.EARLY_STOPPING``.
    """

    def __init__(self, cfg: CfgNode) -> None:
        TrainerBase.__init__(self)  # DefaultTrainer's own would build everything its way
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
            setup_logger(name="d2ext")
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        _check_solver(cfg)
        _check_channels(cfg)
        check_loggers(cfg)
        set_cpu_threads(cfg)
        self._seed_given = cfg.SEED >= 0
        self.cfg = cfg if self._seed_given else _with_seed(cfg, comm.shared_random_seed())

        model = self.build_model(cfg)
        model.train()  # may freeze parameters, which optimizer and wrapper must know
        if cfg.DATASETS.TRAIN_JOINT and "images" not in getattr(model, "training_steps", ()):
            raise ConfigError(
                f"DATASETS.TRAIN_JOINT is {cfg.DATASETS.TRAIN_JOINT}, but no step of this training of "
                f"{cfg.MODEL.META_ARCHITECTURE} takes joint images: set DATASETS.TRAIN_JOINT to ()."
            )
        optimizer = self.build_optimizer(cfg, model)
        device = next(model.parameters()).device
        wrapped = create_ddp_model(
            model,
            # Not by rank: srun may show each process only its own GPU.
            device_ids=None if device.type == "cpu" else [device],
            broadcast_buffers=False,  # as in Detectron2
            gradient_as_bucket_view=True,
            fp16_compression=cfg.SOLVER.COMPRESS_GRADIENTS,
            # Of several steps, each may train a part of the network.
            find_unused_parameters=cfg.SOLVER.FIND_UNUSED_PARAMETERS
            or bool(getattr(model, "training_steps", ())),
        )
        self._trainer = StepTrainer(
            wrapped,
            None,
            optimizer,
            seed=self.cfg.SEED,
            accumulation_steps=cfg.SOLVER.ACCUMULATION_STEPS,
            amp_dtype=amp_dtype(cfg),
            bad_step_limit=cfg.SOLVER.NON_FINITE_LOSS_LIMIT,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER

        self._ema = None
        self.evaluated_model: nn.Module = model
        extra: dict[str, Any] = {"trainer": weakref.proxy(self)}
        if cfg.MODEL_EMA.ENABLED:
            # After DistributedDataParallel made the weights of all processes equal.
            self._ema = build_ema(model, cfg.MODEL_EMA.DECAY, cfg.MODEL_EMA.WARMUP)
            self.evaluated_model = self._ema.module
            extra["trained_weights"] = self._trained_weights = TrainedWeights(self._ema, model)
        self.checkpointer = Checkpointer(self.evaluated_model, cfg.OUTPUT_DIR, **extra)
        self.register_hooks(self.build_hooks())

    def resume_or_load(self, resume: bool = True) -> None:
        """Load weights, or continue a run.

        Args:
            resume: continue from the last checkpoint in ``OUTPUT_DIR``, if there is one: weights,
                optimizer, schedule, average, iteration. Otherwise, and with False, load
                ``MODEL.WEIGHTS`` into the model and start at iteration 0.

        Raises:
            CheckpointError: unreadable file, or weights that do not fit: when resuming, everything
                must fit; for ``MODEL.WEIGHTS``, heads may differ (see ``Checkpointer``).
        """
        if resume and self.checkpointer.has_checkpoint():
            self._resume()
            return
        if not self.cfg.MODEL.WEIGHTS:
            self._warn_of_random_weights()
        self.checkpointer.fit = "any" if self.cfg.MODEL.WEIGHTS_ALLOW_PARTIAL else "finetune"
        self.checkpointer.load(self.cfg.MODEL.WEIGHTS, checkpointables=[])
        if self._ema is not None:
            self._trained_weights.start_from_average()

    def _warn_of_random_weights(self) -> None:
        """Say where to get a pretrained backbone; the configs for ``shapes`` need none."""
        data = self.cfg.DATASETS.TRAIN
        if all(name.startswith("shapes_") for name in data):
            return
        advice = "Take a checkpoint of this system, trained or published (d2ext convert)."
        if any("res3." in name for name in self.evaluated_model.state_dict()):
            depth = self.cfg.MODEL.RESNETS.DEPTH
            advice = (
                "Take torchvision's of ImageNet (python -c \"import torchvision; torchvision.models."
                f"resnet{depth}(weights='DEFAULT')\" downloads them and says where to)"
            )
            if depth in (50, 101):
                advice += f" or Detectron2's detectron2://ImageNetPretrained/MSRA/R-{depth}.pkl"
            advice += ", or a checkpoint of this system."
        logger.warning(
            "MODEL.WEIGHTS is empty: the backbone starts from random weights, with which few images "
            "teach little. %s Name the file at the end of the command line: MODEL.WEIGHTS FILE.",
            advice,
        )

    def _resume(self) -> None:
        self.checkpointer.fit = "exact"
        path = self.checkpointer.get_checkpoint_file()
        self.iter = -1
        try:
            rest = self.checkpointer.load(path)
            if self.iter < 0:
                raise ValueError("there is none")
        except (CheckpointError, torch.cuda.OutOfMemoryError):
            raise
        except _BAD_STATE as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(
                f"Cannot resume from {path!r}: its training state does not fit ({reason}). Resume "
                "with the config that the run was started with, or choose another OUTPUT_DIR and "
                "pass the file as MODEL.WEIGHTS."
            ) from error
        self.start_iter = self.iter + 1
        if self._ema is not None and not self._trained_weights.loaded:
            self._trained_weights.start_from_average()  # the run had no average so far
        if "trained_weights" in rest:
            logger.warning(
                "%s comes from a run with MODEL_EMA.ENABLED; training goes on from its average.",
                path,
            )

    def build_hooks(self) -> list[HookBase | None]:
        """Timing, schedule, precise BN, average, checkpoints, evaluation, logs, interrupts; in order."""
        cfg = self.cfg
        solver, test = cfg.SOLVER, cfg.TEST
        main = comm.is_main_process()
        result: list[HookBase | None] = [hooks.IterationTimer(), hooks.LRScheduler()]
        if test.PRECISE_BN.ENABLED and get_bn_modules(self.model):
            in_process = cfg.clone()
            in_process.defrost()
            in_process.DATALOADER.NUM_WORKERS = 0
            loader = self.build_train_loader(in_process)
            result.append(
                hooks.PreciseBN(test.EVAL_PERIOD, self.model, loader, test.PRECISE_BN.NUM_ITER)
            )
        if self._ema is not None:
            result.append(EMAHook(self._ema, self._trained_weights.model))
        result.append(MetricHistory(solver.LOG_PERIOD))
        if main:
            newest = solver.CHECKPOINT_MAX_TO_KEEP or None
            result.append(
                PeriodicCheckpointer(
                    self.checkpointer, solver.CHECKPOINT_PERIOD, max_to_keep=newest
                )
            )

        def evaluate() -> dict[str, Any]:
            self._last_eval_results = self.test(cfg, self.evaluated_model)
            return self._last_eval_results

        result.append(EvalHook(test.EVAL_PERIOD, evaluate))
        self.best = self.early_stopping = None
        if main and test.BEST_METRIC:
            saver = WeightsCheckpointer(self.evaluated_model, cfg.OUTPUT_DIR)
            self.best = BestCheckpointer(test.EVAL_PERIOD, saver, test.BEST_METRIC, test.BEST_MODE)
            result.append(self.best)
        if test.EARLY_STOPPING:
            self.early_stopping = EarlyStopping(test.EVAL_PERIOD, test.EARLY_STOPPING, self.best)
            result.append(self.early_stopping)
        if main:
            result.append(LogWriter(self.build_writers, solver.LOG_PERIOD))
        return [*result, InterruptHook()]

    def build_writers(self) -> list[EventWriter]:
        """Terminal, ``metrics.json``, those of ``SOLVER.LOGGERS``, TensorBoard's where it is installed.

        Called when training begins. What a killed run logged beyond ``start_iter`` is dropped.
        """
        folder = self.cfg.OUTPUT_DIR
        os.makedirs(folder, exist_ok=True)
        window = self.cfg.SOLVER.LOG_PERIOD
        metrics = os.path.join(folder, "metrics.json")
        drop_metrics_from(metrics, self.start_iter)
        writers = [
            CommonMetricPrinter(self.max_iter, window),
            JSONWriter(metrics, window),
            *build_loggers(self.cfg, resume=self.start_iter > 0),
        ]
        if importlib.util.find_spec("tensorboard") is None:
            logger.info("TensorBoard is not installed; its log is not written.")
            return writers
        return [*writers, TensorboardXWriter(folder, window, purge_step=self.start_iter)]

    def train(self) -> OrderedDict[str, Any] | None:
        """Run from ``start_iter`` to ``SOLVER.MAX_ITER`` or ``TEST.EARLY_STOPPING``, then evaluate.

        Returns:
            The last evaluation's results, in the main process; None elsewhere and without test
            sets.

        Raises:
            FloatingPointError: see ``SOLVER.NON_FINITE_LOSS_LIMIT``.
            CheckpointSaveError: the final checkpoint could not be written.
        """
        if self.start_iter >= self.max_iter:
            logger.info(
                "The training in %s is complete after %d iterations; it is evaluated again. Raise "
                "SOLVER.MAX_ITER to go on, or choose another OUTPUT_DIR to start anew.",
                self.cfg.OUTPUT_DIR,
                self.max_iter,
            )
            if self.best is not None:
                self.best.before_train()  # reads the best value so far
            self._finish()
        else:
            self._trainer.data_loader = self.data_loader  # an error in the data is raised here
            self._check_first_sample()
            try:
                super().train()  # returns results only if the config names expected ones
            except StopTraining:
                self._finish()
        return getattr(self, "_last_eval_results", None) or None

    def _check_first_sample(self) -> None:
        """Let a model that has ``check_training_inputs`` see whether the mapper gives what it needs."""
        check = getattr(self.evaluated_model, "check_training_inputs", None)
        dataset = getattr(self.data_loader, "dataset", None)
        if check is not None and isinstance(dataset, StreamDataset):
            sample, _ = dataset[0, 0]
            check([sample])

    def _finish(self) -> None:
        """Evaluate, unless the last iteration did, for a training that does not run to its end."""
        if not hasattr(self, "_last_eval_results"):
            self._last_eval_results = self.test(self.cfg, self.evaluated_model)
        if comm.is_main_process():
            verify_results(self.cfg, self._last_eval_results)

    @property
    def data_loader(self) -> Iterable[list[dict[str, Any]]]:
        """The training loader; made on first use, when ``start_iter`` is known."""
        if self._trainer.data_loader is None:
            start = self.start_iter
            self._trainer.data_loader = self.build_train_loader(self.cfg, start_iter=start)
        return self._trainer.data_loader

    @data_loader.setter
    def data_loader(self, loader: Iterable[list[dict[str, Any]]]) -> None:
        self._trainer.data_loader = loader

    def state_dict(self) -> dict[str, Any]:
        """Iteration, hooks, optimizer, seed."""
        state = super().state_dict()
        state["seed"] = self.cfg.SEED
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`. A seed given in the config wins over the stored one."""
        check_count(state_dict["iteration"], "iteration")
        schedule = state_dict.get("hooks", {}).get("LRScheduler")
        if schedule is not None:
            check_like(schedule, self.scheduler.state_dict(), "the schedule")
            check_count(schedule.get("last_epoch", 0), "the schedule's last_epoch")
        super().load_state_dict(state_dict)
        seed = check_count(state_dict.get("seed", self.cfg.SEED), "seed", most=(1 << 63) - 1)
        if self._seed_given and seed != self.cfg.SEED:
            logger.warning("SEED is %d, but the run was started with %d.", self.cfg.SEED, seed)
        elif not self._seed_given:
            self.cfg = _with_seed(self.cfg, seed)
            self._trainer.seed = seed

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The model on ``MODEL.DEVICE``, channels-last if ``MODEL.CHANNELS_LAST``."""
        model = build_model(cfg)
        if cfg.MODEL.CHANNELS_LAST:
            model = model.to(memory_format=torch.channels_last)
        if cfg.SOLVER.COMPILE:
            compile_for_training(model)
        if cfg.SOLVER.CUDA_GRAPH:
            _graph_for_training(model, cfg)
        logger.info("Model:\n%s", model)
        return model

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | list[DatasetEvaluator] | None = None,
    ) -> dict[str, Any]:
        """As Detectron2's, with the test-time augmentation and the tracker that the config asks for.

        A model may have ``evaluation_passes()``, an iterator that prepares it for each of several
        evaluations; the results are then their means, the files those of the last one.
        """
        passes = getattr(model, "evaluation_passes", None)
        tested = build_tracked(cfg, build_tta(cfg, model))
        results = [
            super(Trainer, cls).test(cfg, tested, evaluators) for _ in (passes() if passes else [0])
        ]
        return results[0] if len(results) == 1 else _mean(results)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See `d2ext.engine.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        """Detectron2's schedules; ``SOLVER.STEPS`` etc. count optimizer steps."""
        try:
            return build_lr_scheduler(cfg, optimizer)
        except ValueError as error:
            raise ConfigError(
                f"The schedule cannot be built ({error}). SOLVER.STEPS {tuple(cfg.SOLVER.STEPS)} "
                f"must lie below SOLVER.MAX_ITER {cfg.SOLVER.MAX_ITER}; SOLVER.LR_SCHEDULER_NAME "
                f"is {cfg.SOLVER.LR_SCHEDULER_NAME!r}."
            ) from error

    @classmethod
    def build_train_loader(
        cls, cfg: CfgNode, *, start_iter: int = 0
    ) -> Iterable[list[dict[str, Any]]]:
        """See `d2ext.data.build_train_loader`."""
        return build_train_loader(cfg, start_iter=start_iter)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict[str, Any]]]:
        """See `d2ext.data.build_test_loader`."""
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """See `d2ext.evaluation.build_evaluator`; results go to ``OUTPUT_DIR/inference``, with
        several test sets to a folder per set in it."""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        if len(cfg.DATASETS.TEST) > 1:
            folder = os.path.join(folder, dataset_name)
        return build_evaluator(cfg, dataset_name, folder)


def _mean(results: list[Any]) -> Any:
    """Of (nested) dicts; numbers that some lack or that are NaN in some are means of the others."""
    if isinstance(results[0], dict):
        keys = dict.fromkeys(key for x in results for key in x)
        return type(results[0])((key, _mean([x[key] for x in results if key in x])) for key in keys)
    if not isinstance(results[0], float):
        return results[0]
    known = [x for x in results if not math.isnan(x)]
    return sum(known) / len(known) if known else math.nan


def _check_solver(cfg: CfgNode) -> None:
    solver = cfg.SOLVER
    parts = comm.get_world_size() * max(solver.ACCUMULATION_STEPS, 1)
    if solver.IMS_PER_BATCH < 1 or solver.IMS_PER_BATCH % parts:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}; it must be a positive multiple of "
            f"{parts} = {comm.get_world_size()} processes x SOLVER.ACCUMULATION_STEPS "
            f"{solver.ACCUMULATION_STEPS}."
        )
    test = cfg.TEST
    if test.EARLY_STOPPING and not (test.BEST_METRIC and test.EVAL_PERIOD > 0):
        raise ConfigError(
            f"TEST.EARLY_STOPPING is {test.EARLY_STOPPING}: it needs TEST.EVAL_PERIOD, and "
            'TEST.BEST_METRIC to say what is better (for example "bbox/AP").'
        )
    for key in ("MAX_ITER", "CHECKPOINT_PERIOD"):
        if solver[key] < 1:
            raise ConfigError(f"SOLVER.{key} is {solver[key]}; it must be at least 1.")


def _check_channels(cfg: CfgNode) -> None:
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    if cfg.INPUT.FORMAT not in ("RGB", "BGR", "YUV-BT.601") or not len(mean) == len(std) == 3:
        raise ConfigError(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}, with {len(mean)} values in MODEL.PIXEL_MEAN and "
            f"{len(std)} in PIXEL_STD. Models take three channels: INPUT.FORMAT RGB or BGR, with three "
            "values each. Grey images are read as three equal channels."
        )


def compile_for_training(model: nn.Module, **options: Any) -> None:
    """Let a model train with what ``torch.compile`` makes of its network, in place: names of parameters
    stay, and inference of d2ext's models runs what it ran before.

    Args:
        options: of :meth:`torch.nn.Module.compile`.
    """
    several = bool(getattr(model, "training_steps", ()))
    whole = isinstance(model, MetaArch) and not several
    (model.network if whole else model.backbone).compile(**options)


def _graph_for_training(model: nn.Module, cfg: CfgNode) -> None:
    reason = ""
    if not isinstance(model, MetaArch) or type(model).forward is not MetaArch.forward:
        reason = f"{cfg.MODEL.META_ARCHITECTURE} runs more than one network in a step"
    elif cfg.SOLVER.ACCUMULATION_STEPS > 1:
        reason = "gradients of several micro-batches would overwrite each other"
    elif model.device.type != "cuda":
        reason = f"the model is on {model.device}, not on an NVIDIA GPU"
    if reason:
        raise ConfigError(f"SOLVER.CUDA_GRAPH must be False: {reason}.")
    model.use_training_graphs()


def _with_seed(cfg: CfgNode, seed: int) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = int(seed)
    cfg.freeze()
    return cfg
