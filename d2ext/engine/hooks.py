"""Hooks beside Detectron2's: checkpoints, the best checkpoint, logs that survive a resume."""

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from d2ext.checkpoint.checkpointer import CheckpointSaveError
from d2ext.checkpoint.io import load_untrusted
from d2ext.config import ConfigError
from d2ext.engine.processes import Interrupted
from d2ext.engine.training_state import check_count, check_like
from d2ext.files import atomic_write

__all__ = [
    "BestCheckpointer",
    "EarlyStopping",
    "EvalHook",
    "InterruptHook",
    "LogWriter",
    "MetricHistory",
    "PeriodicCheckpointer",
    "StopTraining",
    "drop_metrics_from",
]

logger = logging.getLogger(__name__)

# Scalars that say something about the machine rather than the training.
_TIMES = ("time", "data_time", "rank_data_time", "eta_seconds")
# Seconds in which a second SIGINT is the same press of Ctrl-C: of processes that others started (by
# torchrun, say), the terminal tells each, and who started them tells them again.
_SAME_PRESS = 1.0


class PeriodicCheckpointer(hooks.PeriodicCheckpointer):
    """Detectron2's; training goes on when a periodic checkpoint cannot be written (disk full), and
    after a resume those of before count among the ``max_to_keep``."""

    def before_train(self) -> None:
        """Learn the last iteration; remove what a killed run left unfinished."""
        super().before_train()
        self.checkpointer.remove_unfinished()
        earlier = self.checkpointer.numbered()
        done = sorted(number for number in earlier if number < self.trainer.start_iter)
        self.recent_checkpoints = [earlier[number] for number in done]

    def after_step(self) -> None:
        """Save every ``period`` iterations and after the last one, whose failure is an error."""
        try:
            super().after_step()
            while self.max_to_keep and len(self.recent_checkpoints) > self.max_to_keep:
                os.remove(self.recent_checkpoints.pop(0))  # a run that kept more was resumed
        except CheckpointSaveError as error:
            if self.trainer.iter >= self.max_iter - 1:
                raise
            logger.error(
                "%s Training goes on; the next attempt is in %d iterations.", error, self.period
            )


class EvalHook(hooks.EvalHook):
    """Detectron2's, which would evaluate after an error in the last iteration."""

    def after_train(self) -> None:
        """Evaluate, if the training has come to its end."""
        self._eval_after_train = self.trainer.iter >= self.trainer.max_iter
        super().after_train()


class BestCheckpointer(hooks.BestCheckpointer):
    """Detectron2's; after a resume it goes on from the value stored in the best checkpoint."""

    def before_train(self) -> None:
        """Read the best value so far, if this is a resumed run."""
        path = os.path.join(self._checkpointer.save_dir, f"{self._file_prefix}.pth")
        if self.trainer.start_iter == 0 or not os.path.isfile(path):
            return
        try:
            stored = load_untrusted(path)
            # Another metric in the file: the values do not compare.
            if stored.get("best_metric_name") == self._val_metric:
                check_like(stored["best_metric"], 0.0, "best_metric")
                self.best_iter = check_count(stored["iteration"], "iteration")
                self.best_metric = stored["best_metric"]
        except (AttributeError, KeyError, ValueError) as error:
            logger.warning("%s (%s) It will be replaced at the next evaluation.", path, error)

    def _best_checking(self) -> None:
        results = self.trainer.storage.latest()
        if self._val_metric not in results:
            logger.warning(
                "TEST.BEST_METRIC %r was not among the evaluation's results (%s): no best "
                "checkpoint is written.",
                self._val_metric,
                ", ".join(sorted(name for name in results if "/" in name)) or "there were none",
            )
            return
        value, iteration = results[self._val_metric]
        better = self.best_metric is None or self._compare(value, self.best_metric)
        if not better or not self._update_best(value, iteration):
            return
        extra = {"best_metric": float(value), "best_metric_name": self._val_metric}
        try:
            self._checkpointer.save(self._file_prefix, iteration=iteration, **extra)
            logger.info("Best %s so far: %.4f", self._val_metric, value)
        except CheckpointSaveError as error:
            logger.error("%s Training goes on.", error)


class InterruptHook(HookBase):
    """Ctrl-C ends a training after an iteration, with a checkpoint; pressed again it ends at once. Must
    be the last of the hooks.

    Processes end after the same iteration: ``StepTrainer`` tells all of them that one was asked.
    """

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._earlier: Any = None

    def before_train(self) -> None:
        """Listen; signals reach the main thread only."""
        if threading.current_thread() is threading.main_thread():
            self._earlier = signal.signal(signal.SIGINT, self._ask)

    def after_step(self) -> None:
        """Save and stop, if that was asked for; the last iteration saves anyway."""
        if self.trainer._trainer.interrupted and self.trainer.iter + 1 < self.trainer.max_iter:
            last = self.trainer.iter
            self.trainer.checkpointer.save(f"model_{last:07d}", iteration=last)
            raise Interrupted

    def after_train(self) -> None:
        """Listen no more."""
        if self._earlier is not None:
            signal.signal(signal.SIGINT, self._earlier)

    def _ask(self, *_: Any) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
            self.trainer._trainer.asked_to_stop = True
            if comm.is_main_process():  # print() and logging may be what the signal interrupts
                os.write(
                    2, b"interrupted: ending after this iteration; Ctrl-C again ends at once\n"
                )
        elif now - self._asked_at > _SAME_PRESS:
            raise KeyboardInterrupt


class StopTraining(BaseException):
    """Ends the loop of a training early; no error, which the loop would log."""


class EarlyStopping(HookBase):
    """Ends a training when evaluations no longer give a better value.

    How many there were since the best follows from ``model_best.pth``, so a resumed run goes on
    counting. The weights are saved as ``model_final.pth``.

    Args:
        period: iterations between evaluations.
        patience: evaluations without a better value.
        best: knows the best; None in other processes than the main one. Must come before in the hooks.

    Attributes:
        ended_after: iterations; 0 while the training goes on.
    """

    def __init__(self, period: int, patience: int, best: BestCheckpointer | None) -> None:
        self._period, self._patience, self._best = period, patience, best
        self.ended_after = 0

    def before_train(self) -> None:
        """Stop at once, if the run that is resumed was stopped."""
        if self._is_over(self.trainer.start_iter):
            raise StopTraining

    def after_step(self) -> None:
        """After an evaluation: save and stop, if it was the last."""
        done = self.trainer.iter + 1
        if done % self._period == 0 and done < self.trainer.max_iter and self._is_over(done):
            self.trainer.checkpointer.save("model_final", iteration=self.trainer.iter)
            raise StopTraining

    def _is_over(self, done: int) -> bool:
        """Whether to stop after ``done`` iterations; the same in all processes."""
        best = comm.all_gather(self._best.best_iter if self._best else None)[0]
        since = done if best is None else done - 1 - best
        if since // self._period < self._patience:
            return False
        self.ended_after = done
        logger.info(
            "The training ends after %d iterations: %d evaluations gave no better value than iteration "
            "%s (TEST.EARLY_STOPPING %d).",
            done,
            since // self._period,
            best,
            self._patience,
        )
        return True


class MetricHistory(HookBase):
    """Keeps the last values of smoothed scalars in the checkpoint.

    Logged losses are medians over a window of iterations; with their history a resumed run logs
    what an uninterrupted run logs, also in its first window.
    """

    def __init__(self, window: int) -> None:
        """``window``: iterations to keep."""
        self._window = window
        self._loaded: dict[str, list[list[float]]] = {}

    def before_train(self) -> None:
        """Put the loaded values into the fresh event storage."""
        for name, values in self._loaded.items():
            for value, iteration in values:
                self.trainer.storage.put_scalar(name, value, cur_iter=int(iteration))
        self._loaded = {}

    def state_dict(self) -> dict[str, Any]:
        """``{name: [[value, iteration], ...]}``, oldest first."""
        storage = self.trainer.storage
        hints = storage.smoothing_hints()
        state = {}
        for name, history in storage.histories().items():
            values = history.values()[-self._window :]
            # A scalar that is not put in every iteration would be logged again as if it were new.
            current = values and values[-1][1] == storage.iter
            if hints[name] and current and name not in _TIMES:
                state[name] = [[float(v), float(i)] for v, i in values]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep ``state`` until training begins."""
        for name, values in state.items():
            check_like(values, [[0.0, 0.0]] * len(values), f"the history of {name}", finite=False)
            for _, iteration in values:
                check_count(int(iteration), f"an iteration in the history of {name}")
        self._loaded = state


class LogWriter(HookBase):
    """Writes scalars every ``period`` iterations and after the last one.

    In contrast to Detectron2's ``PeriodicWriter`` it makes its writers when training begins, when
    it is known where it resumes, and a full disk does not end the training.
    """

    def __init__(self, build_writers: Callable[[], list[EventWriter]], period: int) -> None:
        if period < 1:
            raise ConfigError(f"SOLVER.LOG_PERIOD is {period}; it must be >= 1.")
        self._build = build_writers
        self._period = period
        self._writers: list[EventWriter] = []
        self._failed: set[str] = set()

    def before_train(self) -> None:
        """Make the writers."""
        self._writers = self._build()

    def after_step(self) -> None:
        """Write in the last iteration of each period."""
        done = self.trainer.iter + 1
        if done % self._period == 0 or done == self.trainer.max_iter:
            self._call("write")

    def after_train(self) -> None:
        """Write what the other hooks added, then close."""
        self._call("write")
        self._call("close")

    def _call(self, method: str) -> None:
        for writer in self._writers:
            try:
                getattr(writer, method)()
            except OSError as error:
                name = type(writer).__name__
                if name not in self._failed:  # once is enough
                    logger.error("%s could not write (%s); training goes on.", name, error)
                    self._failed.add(name)
        # TensorBoard's writer does it, too, but not where it is not installed.
        self.trainer.storage.clear_images()
        self.trainer.storage.clear_histograms()


def drop_metrics_from(path: str, start_iter: int) -> None:
    """Remove from a ``metrics.json`` the lines of iterations >= start_iter.

    A killed run may have logged iterations after its last checkpoint; the resumed run does them
    again. A last line that the kill cut short goes too.
    """
    if not os.path.isfile(path):
        return
    lines = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                kept = json.loads(line).get("iteration", -1) < start_iter
            except (AttributeError, TypeError, ValueError):  # not a line of JSONWriter
                continue
            if kept:
                lines.append(line)
    with atomic_write(path, "w") as file:
        file.writelines(lines)
