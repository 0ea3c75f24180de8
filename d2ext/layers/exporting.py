"""Whether ``torch.export`` is reading the code: a file can hold fewer operators than a program."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """False in ``torch.compile``, whose tracer takes ``torch.compiler.is_exporting`` for True, and where
    PyTorch is too old to know (before 2.7)."""
    exporting = getattr(torch.compiler, "is_exporting", bool)
    return not torch.compiler.is_dynamo_compiling() and exporting()
