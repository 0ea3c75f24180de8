"""Exponential moving average of the weights."""

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.engine import HookBase
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from d2ext.config import ConfigError
from d2ext.engine.training_state import check_count

__all__ = ["EMAHook", "TrainedWeights", "build_ema"]


def build_ema(model: nn.Module, decay: float, warmup: bool = True) -> AveragedModel:
    """An averaged copy of ``model``; ``.module`` is a model like it.

    Parameters follow ``a <- d a + (1 - d) p`` in each ``update_parameters(model)``, with d = decay
    or, during warm-up, min(decay, (1 + n) / (10 + n)) after n updates. The first update copies.
    Buffers are copied, not averaged: batch-normalisation statistics are averages already.

    Args:
        model: not wrapped by DistributedDataParallel.
        decay: 0 <= decay < 1.
    """
    if not 0.0 <= decay < 1.0:
        raise ConfigError(f"MODEL_EMA.DECAY is {decay}; it must be in [0, 1).")

    @torch.no_grad()
    def average(averaged: Sequence[Tensor], current: Sequence[Tensor], _: Tensor | int) -> None:
        n = int(ema.n_averaged)  # on the CPU, unlike the argument: does not wait for a GPU
        share = min(decay, (1 + n) / (10 + n)) if warmup else decay
        torch._foreach_lerp_(list(averaged), list(current), 1.0 - share)

    ema = AveragedModel(model, multi_avg_fn=average)
    ema.requires_grad_(False)
    return ema


class EMAHook(HookBase):
    """Updates the average after each step that changed the weights."""

    def __init__(self, ema: AveragedModel, model: nn.Module) -> None:
        """``model``: the trained model, not wrapped."""
        self._ema = ema
        self._model = model

    def after_step(self) -> None:
        """Take the weights of this iteration into the average."""
        if self.trainer._trainer.updated:
            self._ema.update_parameters(self._model)


class TrainedWeights:
    """What a checkpoint holds beside the average: the weights that the optimizer changes, and how
    many steps went into the average."""

    def __init__(self, ema: AveragedModel, model: nn.Module) -> None:
        self._ema = ema
        self.model = model
        self.loaded = False  # whether load_state_dict was called

    def state_dict(self) -> dict[str, Any]:
        """``{"weights": state dict of the trained model, "updates": int}``."""
        return {"weights": self.model.state_dict(), "updates": int(self._ema.n_averaged)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.model.load_state_dict(state["weights"])
        self._ema.n_averaged.fill_(check_count(state["updates"], "updates of the average"))
        self.loaded = True

    def start_from_average(self) -> None:
        """Copy the average into the trained model, as when weights were just loaded into it."""
        self.model.load_state_dict(self._ema.module.state_dict())
        self._ema.n_averaged.zero_()
