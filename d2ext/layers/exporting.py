"""Whether ``torch.export`` is reading the code: a file can hold fewer operators than a program."""

from __future__ import annotations

import torch
from torch import Tensor


def is_exporting() -> bool:
    """False in ``torch.compile``, whose tracer takes ``torch.compiler.is_exporting`` for True, and where
    PyTorch is too old to know (before 2.7)."""
    exporting = getattr(torch.compiler, "is_exporting", bool)
    return not torch.compiler.is_dynamo_compiling() and exporting()


def needs_fixed_shapes(x: Tensor) -> bool:
    """Whether code on ``x`` should not have shapes that depend on values: on a GPU the host waits for
    them, and a CUDA graph cannot. A CPU, and a file's runtime, rather does no more than needed."""
    return x.is_cuda and not is_exporting()
