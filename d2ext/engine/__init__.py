"""Training: the Trainer, optimizers, hooks, and the start of processes."""

from d2ext.engine import config  # noqa: F401  (registers its keys)
from d2ext.engine.optimizer import build_optimizer
from d2ext.engine.processes import launch, set_cpu_threads
from d2ext.engine.trainer import Trainer
from d2ext.engine.video_predictor import VideoPredictor

__all__ = ["Trainer", "VideoPredictor", "build_optimizer", "launch", "set_cpu_threads"]
