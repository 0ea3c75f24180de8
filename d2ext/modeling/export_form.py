"""What a model says of itself to be exported into a file; :mod:`d2ext.export` does the rest.

A file holds what :class:`~d2ext.modeling.inference.InferenceNetwork` runs, network and decoding, and
before it the normalisation. What comes after, a model's ``postprocess``, is code. A model with memory
has two files: of key frames, which leave a memory, and of the frames after them, which take it and may
leave one, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from fvcore.common.registry import Registry
from torch import Tensor, nn

from d2ext.modeling.inference import InferenceNetwork

Outputs = dict[str, Tensor]
"""Named tensors of fixed slots, (B, ...)."""

EXPORT_REGISTRY = Registry("EXPORT")
EXPORT_REGISTRY.__doc__ = """
What stands for a model of Detectron2's when it is exported, called ``Exportable<ROI heads>``:
``cls(cfg, model)`` is a :class:`~d2ext.modeling.meta_arch.MetaArch` that predicts as the model does, in
fixed slots.
"""


class NotExportable(ValueError):
    """The model, or this configuration of it, cannot be exported. The message says why."""


def refuse_tracing(model: nn.Module) -> None:
    """Raise RuntimeError under ``torch.jit.trace``."""
    if torch.jit.is_tracing():
        raise RuntimeError(
            f"{type(model).__name__} cannot be traced: the trace would give as many detections as the "
            "example has. Use `d2ext export` or d2ext.export.export."
        )


@dataclass(frozen=True)
class ExportForm:
    """A model's network and decoding as one graph: images (B, 3, H, W) → :data:`Outputs`."""

    pack: Callable[[Any], Outputs]
    """Part of the graph: what the model's decoding gives → named tensors."""
    unpack: Callable[[Outputs], Any]
    """The inverse of ``pack``: what the model's post-processing takes."""
    size: tuple[int, int]
    """(height, width) of the input, if nothing else is said."""
    multiple: int = 0
    """Inputs of other sizes have sides that are multiples of this, less ``less``; 0: there are none."""
    less: int = 0
    mirror: bool = False
    """The network also gets the mirror images, behind the images."""
    sizes: bool = False
    """The graph and the network also take ``sizes`` (B, 2), height and width of images that lie in the
    input's upper left corner; one image a batch, of one input size."""
    rows: tuple[str, ...] = ()
    """Outputs (1, count, ...) that have a row for each slot in use, none for the others."""
    maps: tuple[str, ...] = ()
    """Outputs (B, ...) of the image as a whole, not of slots."""
    network: InferenceNetwork | None = None
    """What the graph runs; None: the model's."""
    later: ExportForm | None = None
    """Of the frames after one of this form: a second file."""
    memory: tuple[str, ...] = ()
    """Outputs of the earlier frame's graph that this one takes behind the images and their sizes. Where
    it has such outputs itself, the inputs' names in ONNX begin with ``last_``."""
    results: str = ""
    """The function of ``d2ext/export/numpy_results.py`` that makes results of the outputs."""
    options: dict[str, Any] = field(default_factory=dict)
    """Its keyword arguments that come from the config; for JSON."""
