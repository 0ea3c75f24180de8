"""Whether an exported file gives what its model gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from d2ext.export.files import ExportedFile
from d2ext.export.graph import export_form, network_inputs
from d2ext.modeling.export_form import Outputs
from d2ext.modeling.meta_arch import MetaArch

TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 0.05}
"""Largest |a - b| / (1 + max |b|), by the dtype of the network's arithmetic."""


class Difference(NamedTuple):
    """How much an output of a file differs from the model's."""

    output: str
    largest: float
    """max |a - b| / (1 + max |b|), over slots of the same object."""
    moved: int
    """Slots whose object is in another slot or cut off: nearly equal scores."""
    compared: int
    """Numbers, without those of empty slots."""


@torch.no_grad()
def check(
    model: MetaArch, file: ExportedFile, images: Tensor, tolerance: float
) -> list[Difference]:
    """Compare the outputs for images (B, 3, H, W) in 0..255, without ``count``: a score that lies on the
    threshold may fall on either side."""
    form = export_form(model)
    images = images.to(model.device).float()
    pixels = network_inputs(model.normalize(images), form)
    expected = form.pack(model.eval().inference_network.decode(model.network(*pixels)))
    actual = {name: x.cpu() for name, x in file(images).items()}
    expected = {name: x.cpu() for name, x in expected.items()}
    places: dict[str, tuple[Tensor, Tensor]] = {}
    for prefix in ("", "panoptic_"):
        if f"{prefix}classes" not in expected:  # a landmark has its own slot
            continue
        shape = expected[f"{prefix}scores"].shape
        slots = [
            name
            for name, x in expected.items()
            if x.shape[: len(shape)] == shape and name.startswith("panoptic_") == bool(prefix)
        ]
        places |= dict.fromkeys(slots, _slot_order(actual, expected, slots, prefix, tolerance))
    results = []
    for name, b in expected.items():
        if name.endswith("count"):
            continue
        a, moved = actual[name], 0
        if name in places:
            order, keep = places[name]
            a, b = (x.reshape(len(order), *x.shape[len(shape) :]) for x in (a, b))
            a, b = a[order][keep], b[keep]
            moved = int((order != torch.arange(len(order))).sum())
        results.append(Difference(name, _largest(a, b), moved, b.numel()))
    return results


def _largest(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return float((a - b).abs().max() / (1 + b.abs().max())) if b.numel() else 0.0


def _slot_order(
    actual: Outputs, expected: Outputs, slots: Sequence[str], prefix: str, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Of all slots in a row: (n,) which of the actual ones is each of the expected ones, and (n,) bool,
    which are compared.

    Objects of nearly equal scores may change places: a slot that differs is the nearest of those of its
    image that differ. Slots with a negative score are empty, and what ties with the last one may have
    been cut off.
    """
    scores = expected[f"{prefix}scores"]
    order = torch.arange(scores.numel())
    a, b = (
        torch.cat([x[name].double().reshape(len(order), -1) for name in slots], dim=1)
        for x in (actual, expected)
    )
    scale = 1 + b.abs().amax(dim=0)

    def differs() -> Tensor:
        return ((a[order] - b).abs() / scale).amax(dim=1) > tolerance

    beyond = differs()
    for image in order.clone().split(scores.shape[-1]):
        own = image[beyond[image]]
        if len(own):
            order[own] = own[torch.cdist(b[own] / scale, a[own] / scale, p=torch.inf).argmin(dim=1)]
    last = (scores - scores[..., -1:] <= tolerance / 10).flatten()
    return order, (scores.flatten() >= 0) & ~(differs() & last)
