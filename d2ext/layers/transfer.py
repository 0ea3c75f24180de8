"""From the host's memory to the model's device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``, without waiting for the work queued there.

    A copy from ordinary memory waits until the GPU has finished all earlier work, so that the host
    cannot prepare the next batch meanwhile; one from pinned memory does not. Values that already are on
    a device, or pinned, are copied directly.
    """
    if device.type == "cuda" and values.device.type == "cpu" and not values.is_pinned():
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def upload_alike(values: Sequence[Tensor], device: torch.device) -> Tensor:
    """Tensors of one shape, type and device, stacked, on ``device``: one copy; see :func:`upload`."""
    first = values[0]
    if device.type != "cuda" or first.device.type != "cpu":
        return upload(torch.stack(list(values)), device)
    stacked = torch.empty((len(values), *first.shape), dtype=first.dtype, pin_memory=True)
    return upload(torch.stack(list(values), out=stacked), device)
