"""Published state dict → d2ext state dict.

A system describes its published parameter names by rules (:class:`Rule`) and registers a converter.
Names that no rule matches are an error, so that nothing is lost silently.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

StateDict = Mapping[str, Tensor]
Converter = Callable[[StateDict], dict[str, Tensor]]

_CONVERTERS: dict[str, Converter] = {}


class ConversionError(ValueError):
    """A state dict does not look like the system's published checkpoints."""


class Rule(NamedTuple):
    """How a published name becomes ours."""

    pattern: str
    """Regular expression that must match the whole published name."""
    replacement: str | Callable[[re.Match[str]], str] | None
    """As in :func:`re.sub`; None leaves the parameter out (it has no use in our model)."""


def apply_rules(state_dict: StateDict, rules: Iterable[Rule]) -> dict[str, Tensor]:
    """Rename every parameter by the first rule that matches its whole name.

    Raises:
        ConversionError: a name that no rule matches, or two names that become one.
    """
    compiled = [(re.compile(rule.pattern), rule.replacement) for rule in rules]
    converted: dict[str, Tensor] = {}
    unknown = []
    for name, value in state_dict.items():
        for pattern, replacement in compiled:
            match = pattern.fullmatch(name)
            if match is None:
                continue
            if replacement is not None:
                new = (
                    match.expand(replacement)
                    if isinstance(replacement, str)
                    else replacement(match)
                )
                if new in converted:
                    raise ConversionError(
                        f'Two published parameters become "{new}" ("{name}" is one).'
                    )
                converted[new] = value
            break
        else:
            unknown.append(name)
    if unknown:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        raise ConversionError(
            f"{len(unknown)} of {len(state_dict)} parameters are not known to this system: {shown}. "
            "Is this a checkpoint of another system, or already converted?"
        )
    return converted


def background_last(
    state_dict: StateDict, class_rows: Mapping[str, int], keep: str
) -> dict[str, Tensor]:
    """Published class layers have the background first; Detectron2 has it last, and only in one.

    Args:
        state_dict: published names.
        class_rows: name of a layer whose rows are classes → rows of each class.
        keep: the layer that has the background in Detectron2, too; it is dropped from the others.
    """
    reordered = dict(state_dict)
    for name, rows in class_rows.items():
        for leaf in ("weight", "bias"):
            value = reordered.get(f"{name}.{leaf}")
            if value is not None:
                background = [value[:rows]] if name == keep else []
                reordered[f"{name}.{leaf}"] = torch.cat([value[rows:], *background])
    return reordered


def register_converter(system: str) -> Callable[[Converter], Converter]:
    """Decorator: make a function the converter of ``system``."""

    def register(converter: Converter) -> Converter:
        _CONVERTERS[system] = converter
        return converter

    return register


def available_converters() -> list[str]:
    """Names that :func:`convert_state_dict` takes."""
    return sorted(_CONVERTERS)


def unwrap(checkpoint: object) -> dict[str, Tensor]:
    """The state dict in a checkpoint file's content.

    It may be plain or under ``state_dict`` or ``model``; the ``module.`` prefix of data-parallel
    training is dropped.

    Raises:
        ConversionError: there is none.
    """
    state = checkpoint
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, Mapping) or not state:
        raise ConversionError(
            f"The checkpoint holds a {type(checkpoint).__name__} without a state dict "
            "(a mapping from parameter names to tensors)."
        )
    others = [str(k) for k, v in state.items() if not isinstance(v, Tensor)]
    if others:
        raise ConversionError(
            f"The checkpoint's state dict holds entries that are no tensors: {others[:5]}."
        )
    state_dict = {str(k): v for k, v in state.items()}
    if all(name.startswith("module.") for name in state_dict):
        state_dict = {name.removeprefix("module."): v for name, v in state_dict.items()}
    return state_dict


def convert_state_dict(system: str, state_dict: StateDict) -> dict[str, Tensor]:
    """Convert a published state dict to ours.

    Args:
        system: one of :func:`available_converters`, for example "yolact".
        state_dict: name → tensor as published, or a checkpoint that :func:`unwrap` understands.

    Returns:
        A state dict that the system's model loads with ``strict=True``, given the config of the same
        backbone and class count.

    Raises:
        ConversionError: unknown system, or parameters that are not this system's.
    """
    if system not in _CONVERTERS:
        raise ConversionError(
            f'There is no converter for "{system}", only for {available_converters()}.'
        )
    return _CONVERTERS[system](unwrap(state_dict))
