"""One optimizer step: gradient accumulation, mixed precision, losses that are not finite."""

import logging
import random
import time
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from d2ext.config import ConfigError
from d2ext.engine.training_state import check_count, check_like, load_optimizer

__all__ = ["StepTrainer", "seed_step"]

logger = logging.getLogger(__name__)


def seed_step(seed: int, iteration: int, rank: int) -> None:
    """Seed Python's, NumPy's and torch's generators as a function of the arguments only.

    Called before the forward pass of each iteration, so that what a model draws at random does
    not depend on what was drawn before, and a resumed run draws what an uninterrupted run draws.
    """
    words = np.random.SeedSequence([seed, iteration, rank]).generate_state(4)
    torch.manual_seed((int(words[0]) << 31) ^ int(words[1]))  # also the generators of all GPUs
    np.random.seed(words[2])
    random.seed(int(words[3]))


class StepTrainer(SimpleTrainer):
    """Runs optimizer steps; hooks, checkpoints and the schedule are the caller's.

    **Accumulation.** The data of a step are cut into ``accumulation_steps`` micro-batches of equal
    size, in order, and their gradients averaged. The result equals that of the whole batch, up to
    rounding, for a model whose loss is a mean over images. A loss divided by a count in the batch, such
    as the number of positive anchors, is divided by the count in each micro-batch: micro-batches then
    have equal weight, as processes do in Detectron2. Batch normalisation in training mode uses the
    statistics of micro-batches.

    **Several steps.** A model may have ``training_steps``, names of optimizer steps that follow each
    other in an iteration, each with a backward pass and an update of its own. ``model(inputs, name,
    carried)`` then gives the losses of one and what the next one takes as ``carried`` (None: nothing).
    Losses are logged as ``<name>/<loss>``; the schedule counts iterations.

    **Losses that are not finite.** A step counts as bad if any loss, or (without loss scaling) the
    norm of the gradient, is NaN or infinite in any process; all processes decide alike. Such a step
    changes neither weights nor optimizer state nor batch-normalisation statistics. A
    ``FloatingPointError`` that the model raises in its forward pass counts too, if there is only
    one process; with several it ends the training, since the others wait for this one's gradients.
    ``bad_step_limit`` bad steps in a row end the training. After a bad step the iteration is over.

    Args:
        model: returns a dict of scalar losses in training mode.
        data_loader: yields a list of inputs per step; may be set later, before the first step.
        optimizer: its ``step`` may clip gradients.
        seed: base of the per-step seeds, see `seed_step`.
        accumulation_steps: micro-batches per step; must divide the length of each list.
        amp_dtype: type of mixed precision, ``torch.float16`` or ``torch.bfloat16``; None: off.
        bad_step_limit: at least 1.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[list[dict[str, Any]]] | None,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        accumulation_steps: int = 1,
        amp_dtype: torch.dtype | None = None,
        bad_step_limit: int = 20,
    ) -> None:
        super().__init__(model, data_loader, optimizer)
        if accumulation_steps < 1:
            raise ConfigError(
                f"SOLVER.ACCUMULATION_STEPS is {accumulation_steps}; it must be >= 1."
            )
        self.seed = seed
        self.accumulation_steps = accumulation_steps
        self.amp_dtype = amp_dtype
        self.bad_step_limit = bad_step_limit
        self.device = next(model.parameters()).device
        # Gradients of float16 underflow without loss scaling; bfloat16 has float32's range.
        self.grad_scaler = torch.amp.GradScaler(
            self.device.type, enabled=amp_dtype == torch.float16
        )
        self.skipped = 0  # bad steps since the start of training
        self.skipped_in_a_row = 0
        self.updated = False  # whether the last iteration changed the weights
        self.asked_to_stop = False  # set by who wants the training to end; any process may
        # Whether one was asked before the last exchange of losses; all processes agree.
        self.interrupted = False
        module = model.module if isinstance(model, DistributedDataParallel) else model
        self.steps: tuple[str, ...] = tuple(getattr(module, "training_steps", ())) or ("",)
        self._statistics = _NormStatistics(model)

    def run_step(self) -> None:
        """Do one iteration: take its optimizer steps, or skip from the first whose loss is not finite.

        Raises:
            FloatingPointError: as many bad steps in a row as ``bad_step_limit``.
            ConfigError: the data cannot be cut into ``accumulation_steps`` equal parts.
        """
        if not self.model.training:
            raise RuntimeError("The model was switched to evaluation mode during training.")
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start

        seed_step(self.seed, self.iter, comm.get_rank())
        self.updated = False
        parts = [(part, None) for part in self._micro_batches(data)]
        total: list[dict[str, float]] = [{} for _ in range(comm.get_world_size())]
        for step in self.steps:
            self._statistics.save()
            self.optimizer.zero_grad(set_to_none=True)
            losses, finite, parts = self._forward_backward(parts, step)
            self.after_backward()
            gathered = comm.all_gather((losses, finite, data_time, self.asked_to_stop))
            self.interrupted = any(asked for *_, asked in gathered)
            if not all(ok for _, ok, *_ in gathered):
                self.optimizer.zero_grad(set_to_none=True)
                self._statistics.restore()
                self._handle_bad_step([x for x, *_ in gathered], step)
                return
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
            self.updated = True
            for known, (x, *_) in zip(total, gathered, strict=True):
                known.update(x)
        self.skipped_in_a_row = 0
        self._record(total, [t for _, _, t, _ in gathered])

    def _micro_batches(self, data: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """The data in ``accumulation_steps`` equal parts, in order."""
        size, rest = divmod(len(data), self.accumulation_steps)
        if rest or not size:
            raise ConfigError(
                f"A process got {len(data)} images per iteration, which cannot be cut into "
                f"{self.accumulation_steps} equal parts. Make SOLVER.IMS_PER_BATCH a multiple of "
                "(processes x SOLVER.ACCUMULATION_STEPS)."
            )
        return [data[k * size : (k + 1) * size] for k in range(self.accumulation_steps)]

    def forward(self, part: list[dict[str, Any]], step: str, state: Any) -> tuple[Any, Any]:
        """A micro-batch's losses in a step, and what is carried to the next step."""
        with torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
            return self.model(part, step, state) if step else (self.model(part), state)

    def _forward_backward(
        self, parts: list[tuple[list[dict[str, Any]], Any]], step: str
    ) -> tuple[dict[str, float], bool, list[tuple[list[dict[str, Any]], Any]]]:
        """One step on micro-batches and what they carry.

        Returns:
            losses of this process's images, whether these and the gradient are finite, and the
            micro-batches with what they carry to the next step.
        """
        total: dict[str, Tensor] = {}
        carried: list[tuple[list[dict[str, Any]], Any]] = []
        for part, state in parts:
            # DistributedDataParallel sums up the gradients of the processes once per step.
            wait = isinstance(self.model, DistributedDataParallel) and len(carried) < len(parts) - 1
            with self.model.no_sync() if wait else nullcontext():
                try:
                    losses, state = self.forward(part, step, state)
                except FloatingPointError as error:
                    if comm.get_world_size() > 1:
                        raise
                    logger.warning("The model reported a value that is not finite: %s", error)
                    return {}, False, []
                except (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError):
                    names = [x.get("file_name") for x in part]
                    logger.error("The model failed on the images %s", names)
                    raise
                if isinstance(losses, Tensor):
                    losses = {"total_loss": losses}
                loss = sum(losses.values()) / len(parts)
                self.grad_scaler.scale(loss).backward()
            carried.append((part, state))
            for name, value in losses.items():
                name = f"{step}/{name}" if step else name
                share = value.detach().float() / len(parts)
                total[name] = total[name] + share if name in total else share

        values = torch.stack([value.reshape(()) for value in total.values()])
        finite = torch.isfinite(values).all()
        if not self.grad_scaler.is_enabled():  # else it looks at the gradients itself
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            if gradients:
                finite = finite & torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all()
        # One transfer from the device for everything.
        *numbers, ok = torch.cat([values, finite.float()[None]]).tolist()
        return dict(zip(total, numbers, strict=True)), bool(ok), carried

    def _record(self, losses: list[dict[str, float]], data_times: list[float]) -> None:
        """Put the step's losses (means over the processes) into the event storage."""
        storage = get_event_storage()
        storage.put_scalar("rank_data_time", data_times[comm.get_rank()])
        if not comm.is_main_process():
            return
        storage.put_scalar("data_time", max(data_times))
        means = {k: float(np.mean([x[k] for x in losses])) for k in losses[0]}
        storage.put_scalar("total_loss", sum(means.values()))
        if len(means) > 1:
            storage.put_scalars(**means)

    def _handle_bad_step(self, losses: list[dict[str, float]], step: str) -> None:
        """Count the step, in which each process had these losses; too many in a row raise."""
        shown = losses[0] if len(losses) == 1 else losses
        what = f"Loss or gradient is not finite at iteration {self.iter}: {shown}."
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.bad_step_limit:
            raise FloatingPointError(
                f"{what} It was so in {self.skipped_in_a_row} iterations in a row "
                "(SOLVER.NON_FINITE_LOSS_LIMIT): the training has diverged. Resume from an earlier "
                "checkpoint or start again with a lower SOLVER.BASE_LR, a longer "
                "SOLVER.WARMUP_ITERS, SOLVER.CLIP_GRADIENTS.ENABLED True, or SOLVER.AMP.DTYPE "
                "'bfloat16'."
            )
        effect = "Iteration skipped, nothing was updated"
        if self.updated:
            effect = f"The iteration ends before its step {step!r}"
        logger.warning(
            "%s %s (%d skipped so far). If this happens often, lower SOLVER.BASE_LR or set "
            "SOLVER.CLIP_GRADIENTS.ENABLED True.",
            what,
            effect,
            self.skipped,
        )
        get_event_storage().put_scalar("skipped_iterations", self.skipped, smoothing_hint=False)

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, loss scaling, and counts of skipped steps."""
        state = super().state_dict()
        state["grad_scaler"] = self.grad_scaler.state_dict()
        state["skipped"] = [self.skipped, self.skipped_in_a_row]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`; loss scaling starts afresh if the checkpoint has none."""
        self.iter = check_count(state_dict["iteration"], "iteration")
        load_optimizer(self.optimizer, state_dict["optimizer"])
        scaler = state_dict.get("grad_scaler")
        if scaler and self.grad_scaler.is_enabled():
            check_like(scaler, self.grad_scaler.state_dict(), "grad_scaler")
            self.grad_scaler.load_state_dict(scaler)
        skipped = state_dict.get("skipped", (0, 0))
        check_like(skipped, (0, 0), "skipped")
        self.skipped, self.skipped_in_a_row = skipped


class _NormStatistics:
    """Copies of the running statistics of batch normalisation, which the forward pass changes."""

    def __init__(self, model: nn.Module) -> None:
        buffers = [
            buffer
            for module in model.modules()
            if isinstance(module, _BatchNorm)
            for buffer in module.buffers(recurse=False)
        ]
        # One list per type, for which _foreach_copy_ needs one kernel.
        by_type = [[b for b in buffers if b.is_floating_point() == x] for x in (True, False)]
        self._pairs = [(b, [torch.empty_like(x) for x in b]) for b in by_type if b]

    def save(self) -> None:
        for buffers, copies in self._pairs:
            torch._foreach_copy_(copies, buffers)

    def restore(self) -> None:
        for buffers, copies in self._pairs:
            torch._foreach_copy_(buffers, copies)


def amp_dtype(cfg: CfgNode) -> torch.dtype | None:
    """The type of mixed precision that ``SOLVER.AMP`` asks for; None: off.

    Raises:
        ConfigError: it is neither "float16" nor "bfloat16".
    """
    if not cfg.SOLVER.AMP.ENABLED:
        return None
    name = cfg.SOLVER.AMP.DTYPE
    if name not in ("float16", "bfloat16"):
        raise ConfigError(f"SOLVER.AMP.DTYPE is {name!r}; it must be 'float16' or 'bfloat16'.")
    if name == "float16" and torch.device(cfg.MODEL.DEVICE).type == "cpu":
        logger.warning("SOLVER.AMP.DTYPE float16 needs a GPU; bfloat16 is used on the CPU.")
        return torch.bfloat16
    return torch.float16 if name == "float16" else torch.bfloat16
