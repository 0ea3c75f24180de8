"""Corner pooling beside ``torch.cummax`` with flips, center pooling beside ``torch.amax``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from d2ext.layers.benchmark.measure import bytes_of, copy_bandwidth, measure
from d2ext.layers.corner_pool import center_pool, corner_pool, corner_pool_pair

CHANNELS = 128
SIDE = 128
"""Channels and side of the maps that a CornerNet of 511 x 511 pixels pools."""
_AXES = {"top": (2, True), "bottom": (2, False), "left": (3, True), "right": (3, False)}
_CORNERS = {"top_left": ("top", "left"), "bottom_right": ("bottom", "right")}
POOLINGS = (*_AXES, *_CORNERS, "center")
POOL_COLUMNS = (
    "operator",
    "passes",
    "dtype",
    "shape",
    "layout",
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


def benchmark_pooling(
    device: str | torch.device = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    *,
    batches: Sequence[int] = (8, 1),
    side: int = SIDE,
    poolings: Sequence[str] = POOLINGS,
    channels_last: Sequence[bool] = (False,),
    repeats: int = 20,
    bandwidth: float | None = None,
) -> list[dict[str, Any]]:
    """Time every pooling, forward and forward + backward.

    Args:
        device: CPU or CUDA device.
        dtypes: of the maps.
        batches: B of the maps (B, 128, side, side).
        side: H and W.
        poolings: directions, corners and "center".
        channels_last: layouts of the maps.
        repeats: samples per figure (:func:`measure`).
        bandwidth: of a copy, bytes per second; None: measured.

    Returns:
        One dict per case: ``passes``, ``shape``, ``layout`` and what :func:`measure` returns; "fused"
        is ours, "unfused" plain PyTorch.
    """
    device = torch.device(device)
    bandwidth = bandwidth or copy_bandwidth(device)
    rows = []
    for batch in batches:
        for last in channels_last:
            for dtype in dtypes:
                generator = torch.Generator().manual_seed(0)
                shape = (batch, CHANNELS, side, side)
                # After a ReLU, as in the systems: half of the elements tie at 0.
                maps = [torch.randn(shape, generator=generator).relu() for _ in range(3)]
                maps = [x.to(device=device, dtype=dtype) for x in maps]
                if last:
                    maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
                for name in poolings:
                    rows += _cases(name, maps, bandwidth, repeats)
    return rows


def _cases(
    name: str, maps: Sequence[Tensor], bandwidth: float, repeats: int
) -> list[dict[str, Any]]:
    grad = maps[2]
    count = 1 if name in _AXES else 2
    inputs = [x.detach() for x in maps[:count]]
    leaves = [x.detach().requires_grad_() for x in maps[:count]]
    ours, plain = _ours(name), _plain(name)
    size = bytes_of(grad)
    # Forward: inputs read, output written. Backward: inputs and gradient read, gradients written.
    passes: dict[str, tuple[Callable[[], object], Callable[[], object], int]] = {
        "forward": (lambda: ours(*inputs), lambda: plain(*inputs), count + 1),
        "forward+backward": (
            lambda: torch.autograd.grad(ours(*leaves), leaves, grad),
            lambda: torch.autograd.grad(plain(*leaves), leaves, grad),
            count + 1 + 2 * count + 1,
        ),
    }
    layout = "contiguous" if grad.is_contiguous() else "channels_last"
    return [
        {
            **measure(name, fused, unfused, grad, size, moved * size, bandwidth, repeats=repeats),
            "passes": kind,
            "shape": "x".join(str(n) for n in grad.shape),
            "layout": layout,
        }
        for kind, (fused, unfused, moved) in passes.items()
    ]


def _ours(name: str) -> Callable[..., Tensor]:
    if name == "center":
        return center_pool
    if name in _CORNERS:
        return lambda vertical, horizontal: corner_pool_pair(vertical, horizontal, name)
    return lambda x: corner_pool(x, name)


def _plain(name: str) -> Callable[..., Tensor]:
    if name == "center":
        return lambda v, h: v.amax(2, keepdim=True) + h.amax(3, keepdim=True)
    if name in _CORNERS:
        first, second = _CORNERS[name]
        return lambda v, h: _cummax(v, first) + _cummax(h, second)
    return lambda x: _cummax(x, name)


def _cummax(x: Tensor, direction: str) -> Tensor:
    axis, reverse = _AXES[direction]
    if not reverse:
        return x.cummax(axis).values
    return x.flip(axis).cummax(axis).values.flip(axis)
