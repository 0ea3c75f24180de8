"""Samples on their way from a loader's workers to the main process.

PyTorch sends every tensor as shared memory of its own: a file is opened, sized, mapped and handed over.
For a batch of many small tensors (crops, boxes, landmarks) that takes longer than making them, so
small ones travel in one message, as bytes.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Packed", "pack", "unpack"]

# Tensors above this many bytes stay in shared memory: copying them into the message and out of it
# would take longer.
_SMALL = 1 << 18


class Packed(NamedTuple):
    """A pickled object, and the tensors that are not in its bytes."""

    data: bytes
    tensors: list[Tensor]


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file, protocol=5)
        self._tensors = tensors

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor) or _is_small(obj):
            return None
        self._tensors.append(obj)
        return len(self._tensors) - 1

    def reducer_override(self, obj: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if isinstance(obj, Tensor):
            return torch.from_numpy, (obj.contiguous().numpy(),)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, packed: Packed) -> None:
        super().__init__(io.BytesIO(packed.data))
        self._tensors = packed.tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]


def _is_small(tensor: Tensor) -> bool:
    """Whether it can be sent as an array, and is worth it."""
    return (
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not tensor.requires_grad
        and not tensor.is_quantized
        and tensor.dtype != torch.bfloat16
        and tensor.numel() * tensor.element_size() <= _SMALL
    )


def pack(batch: Any) -> Packed:
    """A batch as a message. Small tensors are copied; those that share memory no longer do."""
    tensors: list[Tensor] = []
    file = io.BytesIO()
    _Pickler(file, tensors).dump(batch)
    return Packed(file.getvalue(), tensors)


def unpack(packed: Packed) -> Any:
    """What :func:`pack` was given."""
    return _Unpickler(packed).load()
