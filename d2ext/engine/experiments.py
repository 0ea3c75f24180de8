"""Experiments in W&B, MLflow and ClearML: writers of Detectron2's kind, beside TensorBoard's.

``SOLVER.LOGGERS`` names them. Server, login and project are the packages' own matter: ``wandb login``,
``WANDB_PROJECT``; ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``; ``clearml-init``,
``CLEARML_PROJECT``.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections import defaultdict
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from detectron2.config import CfgNode
from detectron2.utils.events import EventWriter, get_event_storage
from fvcore.common.registry import Registry
from torch import Tensor

from d2ext.config import ConfigError
from d2ext.engine.hooks import StopTraining
from d2ext.files import atomic_write

__all__ = ["LOGGER_REGISTRY", "ExperimentWriter", "build_loggers", "check_loggers"]

LOGGER_REGISTRY = Registry("LOGGER")
LOGGER_REGISTRY.__doc__ = (
    "Subclasses of :class:`ExperimentWriter`, by the names in ``SOLVER.LOGGERS``."
)

# In OUTPUT_DIR: ids of the experiments by the writers' names.
IDS_FILE = "experiments.json"
# Where the package's own environment variable says nothing.
_PROJECT = "d2ext"


def check_loggers(cfg: CfgNode) -> None:
    """Raise :class:`ConfigError` unless the writers of ``SOLVER.LOGGERS`` exist, with their packages."""
    for name in cfg.SOLVER.LOGGERS:
        if name not in LOGGER_REGISTRY:
            known = ", ".join(sorted(key for key, _ in LOGGER_REGISTRY))
            raise ConfigError(f"SOLVER.LOGGERS: there is no {name!r}; there is: {known}.")
        package = LOGGER_REGISTRY.get(name).package
        if find_spec(package) is None:
            raise ConfigError(
                f"SOLVER.LOGGERS has {name}, whose package is not installed: pip install {package}"
            )


def build_loggers(cfg: CfgNode, *, resume: bool) -> list[EventWriter]:
    """The writers that ``SOLVER.LOGGERS`` names; with ``resume`` they go on in their experiments."""
    if not cfg.SOLVER.LOGGERS:
        return []
    file = Path(cfg.OUTPUT_DIR) / IDS_FILE
    known = json.loads(file.read_text(encoding="utf-8")) if resume and file.is_file() else {}
    writers = [LOGGER_REGISTRY.get(name)(cfg, known.get(name)) for name in cfg.SOLVER.LOGGERS]
    ids = {name: x.run_id for name, x in zip(cfg.SOLVER.LOGGERS, writers, strict=True)}
    with atomic_write(file, "w") as target:
        json.dump({**known, **ids}, target)
    return writers


class ExperimentWriter(EventWriter):
    """Writes what TensorBoard gets into an experiment: scalars and pictures; besides, the config.

    A failing server does not end a training: errors come out as OSError, which ``LogWriter`` reports.

    Args:
        cfg: becomes the experiment's parameters, ``SOLVER.BASE_LR`` etc.; its name is the last part of
            ``OUTPUT_DIR``.
        run_id: of the experiment to go on with; None: begin one.

    Attributes:
        package: what is imported.
        run_id: what the package calls the experiment.
    """

    package: ClassVar[str]
    run_id: str

    def __init__(self, cfg: CfgNode, run_id: str | None) -> None:
        self.module: Any = import_module(self.package)
        self._window = cfg.SOLVER.LOG_PERIOD
        self._last_write = -1
        try:
            self.run_id = self.start(Path(cfg.OUTPUT_DIR).resolve().name, _flat(cfg), run_id)
        except self.errors() as error:
            raise ConfigError(
                f"SOLVER.LOGGERS: {type(self).__name__} cannot begin an experiment: {error}"
            ) from error

    def errors(self) -> tuple[type[Exception], ...]:
        """How the package fails without fault of d2ext: no login, no server."""
        return (OSError,)

    def start(self, name: str, parameters: dict[str, Any], run_id: str | None) -> str:
        """Begin an experiment, or go on with one; gives its id."""
        raise NotImplementedError

    def log(self, step: int, scalars: dict[str, float], images: dict[str, np.ndarray]) -> None:
        """Write what an iteration gave; steps ascend. Images: H×W×3 uint8 RGB."""
        raise NotImplementedError

    def end(self, *, failed: bool) -> None:
        """End the experiment."""
        raise NotImplementedError

    def write(self) -> None:
        """Write what is new since the last call, losses as medians over ``SOLVER.LOG_PERIOD``."""
        storage = get_event_storage()
        scalars: dict[int, dict[str, float]] = defaultdict(dict)
        images: dict[int, dict[str, np.ndarray]] = defaultdict(dict)
        for name, (value, step) in storage.latest_with_smoothing_hint(self._window).items():
            if step > self._last_write:
                scalars[step][name] = value
        for name, image, step in storage._vis_data:  # as Detectron2's TensorboardXWriter
            images[step][name] = _to_uint8(image)
        self._last_write = max(scalars, default=self._last_write)
        try:
            for step in sorted({*scalars, *images}):
                self.log(step, scalars.get(step, {}), images.get(step, {}))
        except self.errors() as error:
            raise OSError(str(error)) from error

    def close(self) -> None:
        """End the experiment, as failed where an error ends the training."""
        error = sys.exc_info()[1]
        try:
            self.end(failed=not (error is None or isinstance(error, StopTraining)))
        except self.errors() as e:
            raise OSError(str(e)) from e


@LOGGER_REGISTRY.register()
class Wandb(ExperimentWriter):
    """Weights & Biases."""

    package = "wandb"

    def errors(self) -> tuple[type[Exception], ...]:
        """W&B has a class for all of its own."""
        return (OSError, self.module.errors.Error)

    def start(self, name: str, parameters: dict[str, Any], run_id: str | None) -> str:
        """Also where there is no connection: ``WANDB_MODE=offline``."""
        project = os.environ.get("WANDB_PROJECT", _PROJECT)
        self._run = self.module.init(
            project=project, name=name, config=parameters, id=run_id, resume="allow"
        )
        return self._run.id

    def log(self, step: int, scalars: dict[str, float], images: dict[str, np.ndarray]) -> None:
        """What a resumed run does again, W&B has already and leaves out."""
        pictures = {name: self.module.Image(image) for name, image in images.items()}
        self._run.log({**scalars, **pictures}, step=step)

    def end(self, *, failed: bool) -> None:
        """Wait until all is sent."""
        self._run.finish(exit_code=int(failed))


@LOGGER_REGISTRY.register()
class MLflow(ExperimentWriter):
    """MLflow."""

    package = "mlflow"

    def errors(self) -> tuple[type[Exception], ...]:
        """MLflow has a class for all of its own."""
        return (OSError, self.module.exceptions.MlflowException)

    def start(self, name: str, parameters: dict[str, Any], run_id: str | None) -> str:
        """In the experiment ``MLFLOW_EXPERIMENT_NAME``, else MLflow's default."""
        run = self.module.start_run(run_id=run_id, run_name=name)
        if run_id is None:  # parameters cannot change
            self.module.log_params(parameters)
        return run.info.run_id

    def log(self, step: int, scalars: dict[str, float], images: dict[str, np.ndarray]) -> None:
        """Names may have letters, digits and few signs; images are files."""
        self.module.log_metrics({_plain(key): x for key, x in scalars.items()}, step=step)
        for name, image in images.items():
            self.module.log_image(image, f"images/{_plain(name)}_{step:07d}.png")

    def end(self, *, failed: bool) -> None:
        """FINISHED or FAILED."""
        self.module.end_run("FAILED" if failed else "FINISHED")


@LOGGER_REGISTRY.register()
class ClearML(ExperimentWriter):
    """ClearML. Its own reading of TensorBoard's files and of the command line is off."""

    package = "clearml"

    def errors(self) -> tuple[type[Exception], ...]:
        """ClearML raises ValueError without credentials."""
        return (OSError, ValueError)

    def start(self, name: str, parameters: dict[str, Any], run_id: str | None) -> str:
        """In the project ``CLEARML_PROJECT``."""
        self._last: dict[str, float] = {}
        # 0: iterations as they are, not moved on.
        offset = False if run_id is None else 0
        self._task = self.module.Task.init(
            project_name=os.environ.get("CLEARML_PROJECT", _PROJECT),
            task_name=name,
            reuse_last_task_id=run_id or False,
            continue_last_task=offset,
            auto_connect_arg_parser=False,
            auto_connect_frameworks=False,
        )
        self._task.connect(parameters, name="config")
        return self._task.id

    def log(self, step: int, scalars: dict[str, float], images: dict[str, np.ndarray]) -> None:
        """``bbox/AP`` is the series AP of the plot bbox. NaN, for ClearML a 0, is left out."""
        logger = self._task.get_logger()
        for name, value in scalars.items():
            if math.isfinite(value):
                self._last[name] = value
                title, _, series = name.partition("/")
                logger.report_scalar(title, series or title, value, step)
        for name, image in images.items():
            logger.report_image("images", name, step, image=image)

    def end(self, *, failed: bool) -> None:
        """The last value of each metric also goes to the table of single values."""
        for name, value in self._last.items():
            if "/" in name:
                self._task.get_logger().report_single_value(name, value)
        if failed:
            self._task.mark_failed()
        self._task.close()


def _flat(node: CfgNode, prefix: str = "") -> dict[str, Any]:
    """``{"SOLVER.BASE_LR": 0.01, ...}``; tuples, which the packages do not all take, as text."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, CfgNode):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (bool, int, float)) else str(value)
    return flat


def _to_uint8(image: np.ndarray | Tensor) -> np.ndarray:
    """Of an event storage, 3×H×W uint8 or float in [0, 1] → H×W×3 uint8."""
    pixels = image.detach().cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if pixels.dtype != np.uint8:
        pixels = np.clip(pixels * 255, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def _plain(name: str) -> str:
    return re.sub(r"[^\w\-. /]", "_", name)
