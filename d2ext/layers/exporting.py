"""Whether ``torch.export`` is reading the code: a file can hold fewer operators than a program."""

from __future__ import annotations

import torch


def is_exporting() -> bool:
    """Also where PyTorch is too old to export (``torch.compiler.is_exporting`` is of 2.7)."""
    return getattr(torch.compiler, "is_exporting", bool)()
