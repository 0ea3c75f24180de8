"""Whether ``torch.export`` is reading the code: a file can hold fewer operators than a program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_to_onnx = [False]


def is_exporting() -> bool:
    """False in ``torch.compile``, whose tracer takes ``torch.compiler.is_exporting`` for True, and where
    PyTorch is too old to know (before 2.7)."""
    exporting = getattr(torch.compiler, "is_exporting", bool)
    return not torch.compiler.is_dynamo_compiling() and exporting()


@contextmanager
def exporting_to_onnx(whether: bool) -> Iterator[None]:
    """Within it, operators of d2ext that have an ONNX translation stay in the graph; files of PyTorch,
    which run without d2ext, hold PyTorch's instead."""
    _to_onnx.append(whether)
    try:
        yield
    finally:
        _to_onnx.pop()


def is_exporting_to_onnx() -> bool:
    """See :func:`exporting_to_onnx`."""
    return _to_onnx[-1]


def needs_fixed_shapes(x: Tensor) -> bool:
    """Whether code on ``x`` should not have shapes that depend on values: on a GPU the host waits for
    them, and a CUDA graph cannot. A CPU, and a file's runtime, rather does no more than needed."""
    return x.is_cuda and not is_exporting()
