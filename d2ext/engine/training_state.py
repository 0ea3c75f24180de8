"""Whether the training state in a checkpoint is one: optimizers and schedules take what they are given,
and fail, or crash, in the first step.

All functions raise ``ValueError``, with what is wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# What each optimizer keeps of a parameter; all but "step" have its shape.
_OPTIMIZERS = {
    torch.optim.SGD: {"momentum_buffer"},
    torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"},
    torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
}
_MOST_ITERATIONS = 1 << 31
_MOST = 2.0**63  # of numbers: larger integers fail in optimizers


def check_count(value: Any, name: str, most: int = _MOST_ITERATIONS) -> int:
    """``value``, an integer from 0 to ``most``."""
    if type(value) is not int or not 0 <= value <= most:
        raise ValueError(f"{name} is {_shown(value)}, not an integer from 0 to {most}")
    return value


def check_like(value: Any, own: Any, name: str, *, finite: bool = True) -> None:
    """``value`` has the types, keys and lengths of ``own``; its numbers are
    finite and below 2^63."""
    if isinstance(own, dict):
        _expect(isinstance(value, dict) and value.keys() == own.keys(), value, name, own)
        for key, item in own.items():
            check_like(value[key], item, f"{name}.{key}", finite=finite)
    elif isinstance(own, list | tuple):
        _expect(isinstance(value, list | tuple) and len(value) == len(own), value, name, own)
        for index, item in enumerate(own):
            check_like(value[index], item, f"{name}[{index}]", finite=finite)
    elif isinstance(own, int | float) and not isinstance(own, bool):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        _expect(number and (not finite or abs(value) < _MOST), value, name, own)
    else:
        _expect(type(value) is type(own), value, name, own)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """``optimizer.load_state_dict(state)``, where that gives a state with which it can go on.

    For SGD, Adam and AdamW: the tensors have the parameters' shapes. Settings have their types; those
    that are switches stay as they are.
    """
    if not isinstance(state, dict):
        raise ValueError(f"the optimizer's state is {_shown(state)}")
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    known = next((v for k, v in _OPTIMIZERS.items() if isinstance(optimizer, k)), None)
    if known is not None:
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        parameter_of = dict(zip(numbers, parameters, strict=False))  # other lengths: torch's error
        for number, entry in state["state"].items():
            fits = isinstance(entry, dict) and entry.keys() in (known, set())
            if number not in parameter_of or not fits:
                raise ValueError("the optimizer's state is that of another one")
            for key, value in entry.items():
                if key != "momentum_buffer" or value is not None:
                    _check_tensor(value, key, parameter_of[number])
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        for key, value in settings.items():
            if isinstance(value, bool | None):
                # Switches are this run's: with others, the state would lack parts.
                group[key] = value
                continue
            check_like(group.get(key), value, f"the optimizer's {key}")


def _check_tensor(value: Any, key: str, parameter: Tensor) -> None:
    shape = () if key == "step" else parameter.shape
    if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
        what = tuple(value.shape) if isinstance(value, Tensor) else _shown(value)
        raise ValueError(
            f"the optimizer's {key} of a parameter of shape {tuple(parameter.shape)} is {what}"
        )


def _expect(right: bool, value: Any, name: str, own: Any) -> None:
    if not right:
        raise ValueError(f"{name} is {_shown(value)}, where this run has {_shown(own)}")


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."
