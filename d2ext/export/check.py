"""Whether an exported file gives what its model gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.export.files import ExportedFile
from d2ext.export.graph import export_form, network_inputs, whole_sizes
from d2ext.modeling.export_form import ExportForm, Outputs
from d2ext.modeling.meta_arch import MetaArch

TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 0.05}
"""Largest |a - b| / (1 + max |b|), by the dtype of the network's arithmetic."""
# Numbers of a slot at most, by which slots are told apart.
_TELLING = 4096


class Difference(NamedTuple):
    """How much an output of a file differs from the model's."""

    output: str
    """Its name; behind "later.", of a frame after the key frame."""
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
    threshold may fall on either side. Of a model with memory the images are key frames, and moved a
    little they are the frames after these."""
    form = export_form(model)
    images = images.to(model.device).float()
    state = whole_sizes(images, form)
    expected = _outputs(model.eval(), form, images, *state)
    results = _differences(file(images, *state), expected, form, tolerance)
    if form.later is None:
        return results
    assert file.later is not None
    state += [expected[name] for name in form.later.memory]
    images = images.roll((2, 3), dims=(2, 3))
    expected = _outputs(model, form.later, images, *state)
    later = _differences(file.later(images, *state), expected, form.later, tolerance)
    return [*results, *(x._replace(output=f"later.{x.output}") for x in later)]


def _outputs(model: MetaArch, form: ExportForm, images: Tensor, *state: Tensor) -> Outputs:
    """The model's, of the form."""
    inference = form.network or model.inference_network
    inputs = network_inputs(model.normalize(images), form, *state)
    return form.pack(inference.decode(inference.network(*inputs)))


def _differences(
    actual: Outputs, expected: Outputs, form: ExportForm, tolerance: float
) -> list[Difference]:
    actual, expected = ({k: x.cpu() for k, x in outputs.items()} for outputs in (actual, expected))
    places: dict[str, tuple[Tensor, Tensor]] = {}
    maps = {
        *form.maps,
        *(form.later or form).memory,
    }  # may have as many channels as there are slots
    for prefix in ("", "panoptic_"):
        if f"{prefix}classes" not in expected:  # a landmark has its own slot
            continue
        shape = expected[f"{prefix}scores"].shape
        for outputs in (actual, expected):
            for name in form.rows:
                outputs[name] = _with_empty_slots(outputs[name], shape[1])
        slots = [
            name
            for name, x in expected.items()
            if x.shape[: len(shape)] == shape
            and name.startswith("panoptic_") == bool(prefix)
            and name not in maps
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
            a, b = a[order[keep]], b[keep]
            moved = int((order != torch.arange(len(order))).sum())
        results.append(Difference(name, _largest(a, b), moved, b.numel()))
    return results


def _with_empty_slots(rows: Tensor, slots: int) -> Tensor:
    """(1, n, ...) → (1, slots, ...), zeros in those that are not in use."""
    return F.pad(rows, (*(0, 0) * (rows.dim() - 2), 0, slots - rows.shape[1]))


def _largest(a: Tensor, b: Tensor) -> float:
    a, b = a.float(), b.float()
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
    telling = [name for name in slots if expected[name].numel() <= _TELLING * len(order)]
    a, b = (
        torch.cat([x[name].double().reshape(len(order), -1) for name in telling], dim=1)
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
