"""Prototype mask assembly beside plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.layers.benchmark.measure import bytes_of, copy_bandwidth, measure
from d2ext.layers.prototype_masks import assemble_binary_masks, assemble_masks

GRID = 138
"""Prototype grid of a 550 x 550 YOLACT."""
PROTOTYPES = 32
SIZES = ((550, 550), (1080, 1920))
BOXES = ("random", "full")
"""random: sides 5 to 65 % of the image, anywhere; full: every box is the image, the worst case."""

MASK_COLUMNS = (
    "operator",
    "dtype",
    "boxes",
    "size",
    "fused_ms",
    "fused_graph_ms",
    "unfused_ms",
    "unfused_graph_ms",
    "floor_ms",
    "speedup",
    "times_floor",
    "fused_peak_bytes",
    "unfused_peak_bytes",
    "output_bytes",
)


def benchmark_masks(
    device: str | torch.device = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    *,
    detections: int = 100,
    sizes: Sequence[tuple[int, int]] = SIZES,
    repeats: int = 20,
    bandwidth: float | None = None,
) -> list[dict[str, Any]]:
    """Time ``assemble_binary_masks`` and ``assemble_masks`` (forward + backward).

    Args:
        device: CPU or CUDA device.
        dtypes: of prototypes and coefficients.
        detections: N.
        sizes: (H, W) of the binary masks.
        repeats: samples per figure (:func:`measure`).
        bandwidth: of a copy, bytes per second; None: measured.

    Returns:
        One dict per case: ``boxes``, ``detections``, ``size`` and what :func:`measure` returns.
    """
    device = torch.device(device)
    bandwidth = bandwidth or copy_bandwidth(device)
    rows = []
    for dtype in dtypes:
        for kind in BOXES:
            inputs = _inputs(device, dtype, detections, kind)
            for size in sizes:
                rows.append(_binary_case(inputs, kind, size, bandwidth, repeats))
            rows.append(_gradient_case(inputs, kind, bandwidth, repeats))
    return rows


# ---------------------------------------------------------------- cases


def _inputs(
    device: torch.device, dtype: torch.dtype, detections: int, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(GRID, GRID, PROTOTYPES, generator=generator).relu()
    coefficients = torch.randn(detections, PROTOTYPES, generator=generator).tanh()
    if kind == "full":
        boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(detections, 1)
    else:
        half = 0.5 * (0.05 + 0.6 * torch.rand(detections, 2, generator=generator))
        centre = torch.rand(detections, 2, generator=generator)
        boxes = torch.cat([centre - half, centre + half], dim=1)
    return (
        prototypes.to(device=device, dtype=dtype),
        coefficients.to(device=device, dtype=dtype),
        boxes.to(device),
    )


def _unfused_masks(prototypes: Tensor, coefficients: Tensor, boxes: Tensor) -> Tensor:
    """Probabilities as separate PyTorch operations, in the inputs' dtype."""
    height, width, _ = prototypes.shape
    masks = (coefficients @ prototypes.flatten(0, 1).T).unflatten(1, (height, width)).sigmoid()
    rows = torch.arange(height, device=boxes.device)
    columns = torch.arange(width, device=boxes.device)
    x_low, x_high = _limits(boxes[:, 0], boxes[:, 2], width)
    y_low, y_high = _limits(boxes[:, 1], boxes[:, 3], height)
    keep_x = (columns >= x_low[:, None]) & (columns < x_high[:, None])
    keep_y = (rows >= y_low[:, None]) & (rows < y_high[:, None])
    return masks * (keep_y[:, :, None] & keep_x[:, None, :])


def _limits(side_a: Tensor, side_b: Tensor, size: int) -> tuple[Tensor, Tensor]:
    low = torch.minimum(side_a, side_b) * size - 1
    high = torch.maximum(side_a, side_b) * size + 1
    return low.clamp(0, size), high.clamp(0, size)


def _unfused_binary_masks(
    prototypes: Tensor, coefficients: Tensor, boxes: Tensor, size: tuple[int, int]
) -> Tensor:
    masks = _unfused_masks(prototypes, coefficients, boxes)
    masks = F.interpolate(masks[:, None], size=size, mode="bilinear", align_corners=False)
    return masks[:, 0] > 0.5


def _binary_case(
    inputs: tuple[Tensor, Tensor, Tensor],
    kind: str,
    size: tuple[int, int],
    bandwidth: float,
    repeats: int,
) -> dict[str, Any]:
    prototypes, coefficients, boxes = inputs
    output_bytes = coefficients.shape[0] * size[0] * size[1]
    return _case(
        "assemble_binary_masks",
        lambda: assemble_binary_masks(prototypes, coefficients, boxes, size),
        lambda: _unfused_binary_masks(prototypes, coefficients, boxes, size),
        inputs,
        kind,
        size,
        output_bytes,
        sum(bytes_of(tensor) for tensor in inputs) + output_bytes,
        bandwidth,
        repeats,
    )


def _gradient_case(
    inputs: tuple[Tensor, Tensor, Tensor], kind: str, bandwidth: float, repeats: int
) -> dict[str, Any]:
    prototypes, coefficients, boxes = inputs
    leaves = (prototypes.detach().requires_grad_(), coefficients.detach().requires_grad_())
    shape = (coefficients.shape[0], *prototypes.shape[:2])
    grad = torch.rand(shape, device=prototypes.device).to(prototypes.dtype)

    def step(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*leaves, boxes), leaves, grad)

    output_bytes = bytes_of(grad)
    # Forward: inputs read, masks written. Backward: inputs and gradient read, gradients written.
    moved = 3 * (bytes_of(prototypes) + bytes_of(coefficients)) + 2 * output_bytes
    return _case(
        "assemble_masks forward+backward",
        lambda: step(assemble_masks),
        lambda: step(_unfused_masks),
        inputs,
        kind,
        (GRID, GRID),
        output_bytes,
        moved,
        bandwidth,
        repeats,
    )


def _case(
    operator: str,
    fused: Callable[[], object],
    unfused: Callable[[], object],
    inputs: tuple[Tensor, Tensor, Tensor],
    kind: str,
    size: tuple[int, int],
    output_bytes: int,
    moved: int,
    bandwidth: float,
    repeats: int,
) -> dict[str, Any]:
    figures = measure(
        operator, fused, unfused, inputs[0], output_bytes, moved, bandwidth, repeats=repeats
    )
    return {
        **figures,
        "boxes": kind,
        "detections": inputs[1].shape[0],
        "size": f"{size[0]}x{size[1]}",
    }
