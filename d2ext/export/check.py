"""Whether an exported file gives what its model gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from d2ext.export.files import ExportedFile
from d2ext.export.graph import export_form
from d2ext.modeling.meta_arch import MetaArch

TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}
"""Largest |a - b| / (1 + |b|), by the dtype of the network's arithmetic."""


class Difference(NamedTuple):
    """How much an output of a file differs from the model's."""

    output: str
    largest: float
    """max |a - b| / (1 + |b|), over slots of the same object."""
    moved: int
    """Slots whose object is in another slot: nearly equal scores."""


@torch.no_grad()
def check(
    model: MetaArch, file: ExportedFile, images: Tensor, tolerance: float
) -> list[Difference]:
    """Compare all outputs for images (B, 3, H, W) in 0..255."""
    form = export_form(model)
    images = images.to(model.device).float()
    pixels = model.normalize(images)
    pixels = torch.cat([pixels, pixels.flip(-1)]) if form.mirror else pixels
    expected = form.pack(model.eval().inference_network.decode(model.network(pixels)))
    actual = {name: x.cpu() for name, x in file(images).items()}
    expected = {name: x.cpu() for name, x in expected.items()}
    shape = expected["scores"].shape
    slots = [name for name, x in expected.items() if x.shape[: len(shape)] == shape]
    order = _slot_order([actual[x] for x in slots], [expected[x] for x in slots], shape, tolerance)
    moved = int((order != torch.arange(len(order))).sum())
    results = []
    for name, value in expected.items():
        own = actual[name]
        if name in slots:
            own = own.flatten(0, len(shape) - 1)[order].view_as(value)
        results.append(Difference(name, _difference(own, value), moved if name in slots else 0))
    return results


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float(((a - b).abs() / (1 + b.abs())).max()) if a.numel() else 0.0


def _slot_order(
    actual: Sequence[Tensor], expected: Sequence[Tensor], shape: torch.Size, tolerance: float
) -> Tensor:
    """(n,): which of the actual slots, all in a row, is each of the expected ones.

    Objects of nearly equal scores may change places: a slot that differs is the nearest of those slots
    of its image that differ.
    """
    order = torch.arange(shape.numel())
    rows = [
        torch.cat([x.flatten(0, len(shape) - 1).flatten(1).double() for x in tensors], dim=1)
        for tensors in (
            [x if x.dim() > len(shape) else x[..., None] for x in t] for t in (actual, expected)
        )
    ]
    scale = 1 + rows[1].abs()
    differs = ((rows[0] - rows[1]).abs() / scale).amax(dim=1) > tolerance
    for start in range(0, len(order), shape[-1]):
        index = start + differs[start : start + shape[-1]].nonzero()[:, 0]
        if len(index):
            distances = torch.cdist(
                rows[1][index] / scale[index], rows[0][index] / scale[index], p=torch.inf
            )
            order[index] = index[distances.argmin(dim=1)]
    return order
