"""Measures training steps: what `d2ext benchmark training` times."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from d2ext.data import build_train_loader
from d2ext.engine import Trainer, build_optimizer
from d2ext.engine.train_loop import StepTrainer, amp_dtype
from d2ext.tools.model_benchmark import Clock, settled_norms

# How many batches are in memory for the measurement of steps alone.
_BATCHES = 4


def measure_training(cfg: CfgNode, clock: Clock) -> dict[str, Any]:
    """Times of a config's training in one process, on the images of ``DATASETS.TRAIN``.

    Returns:
        ``loader_images_per_second``, of the loader alone, and ``..._per_worker``; ``step_ms``, median
        with batches that are in memory, and of it ``forward_ms``; ``images_per_second`` of both
        together; ``peak_memory_mib`` of a GPU, or None; ``batch_size`` and ``workers``.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.BASE_LR *= 1e-3  # without warm-up, random weights would diverge
    model = Trainer.build_model(cfg)
    model.train()
    torch.manual_seed(0)
    size, workers = cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS
    loader = iter(build_train_loader(cfg))
    batches = list(itertools.islice(loader, _BATCHES))
    loader_rate = size * _rate(loader, clock)

    def steps(data: Iterable[Any], of: nn.Module = model) -> _Steps:
        optimizer = build_optimizer(cfg, of)
        return _Steps(StepTrainer(of, data, optimizer, seed=0, amp_dtype=amp_dtype(cfg)))

    # Of the model itself, not of its graph.
    plain = build_model(cfg).train()
    with settled_norms(plain), torch.no_grad():
        steps(batches, plain).forward(batches[0])
    model.load_state_dict(plain.state_dict())
    del plain
    if clock.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(clock.device)
    in_memory = steps(itertools.cycle(batches))
    step = clock.median(in_memory.__next__)
    forward = clock.median(lambda: in_memory.forward(batches[0]))
    memory = None
    if clock.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(clock.device) / 2**20
    whole = size * _rate(steps(loader), clock)
    return {
        "batch_size": size,
        "workers": workers,
        "loader_images_per_second": loader_rate,
        "loader_images_per_second_per_worker": loader_rate / max(workers, 1),
        "step_ms": step,
        "forward_ms": forward,
        "images_per_second": whole,
        "peak_memory_mib": memory,
    }


def _rate(iterator: Iterator[Any], clock: Clock) -> float:
    """Items a second, one after the other."""
    for _ in range(clock.warmup):
        next(iterator)
    clock.wait()
    start = time.perf_counter()
    for _ in range(clock.iterations):
        next(iterator)
    clock.wait()
    return clock.iterations / (time.perf_counter() - start)


class _Steps:
    """Each ``next`` is a training step."""

    def __init__(self, trainer: StepTrainer) -> None:
        self.trainer = trainer
        self.trainer.iter = 0

    def __iter__(self) -> _Steps:
        return self

    def __next__(self) -> None:
        with EventStorage(self.trainer.iter):
            self.trainer.run_step()
        self.trainer.iter += 1

    def forward(self, batch: list[dict[str, Any]]) -> None:
        """The losses of the first of the model's steps, without their gradients."""
        with EventStorage(0):
            self.trainer.forward(batch, self.trainer.steps[0], None)
