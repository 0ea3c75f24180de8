"""Times the operators beside plain PyTorch and beside the floor that memory sets.

    python -m d2ext.layers.benchmark [--device cuda] [--dtypes float32,bfloat16] [--out FILE.json]

The floor of a case is the bytes that it must move (inputs read once, outputs written once) over the
bandwidth of a large copy on the same device, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.layers._extension import has_cuda_extension, has_extension
from d2ext.layers.prototype_masks import assemble_binary_masks, assemble_masks

GRID = 138
"""Prototype grid of a 550 x 550 YOLACT."""
PROTOTYPES = 32
SIZES = ((550, 550), (1080, 1920))
BOXES = ("random", "full")
"""random: sides 5 to 65 % of the image, anywhere; full: every box is the image, the worst case."""


def benchmark_operators(
    device: str | torch.device = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    *,
    detections: int = 100,
    sizes: Sequence[tuple[int, int]] = SIZES,
    repeats: int = 20,
) -> list[dict[str, Any]]:
    """Time ``assemble_binary_masks`` and ``assemble_masks`` (forward + backward).

    Args:
        device: CPU or CUDA device.
        dtypes: of prototypes and coefficients.
        detections: N.
        sizes: (H, W) of the binary masks.
        repeats: samples per figure; figures are medians. On a GPU a sample is 20 calls between two
            events, as Python issues them and as a CUDA graph replays them.

    Returns:
        One dict per case: ``operator``, ``device``, ``dtype``, ``boxes``, ``detections``, ``size``,
        ``compiled``, times in ms ``fused_ms``, ``unfused_ms``, ``floor_ms`` and on a GPU
        ``fused_graph_ms``, ``unfused_graph_ms`` (else None), ``speedup`` (unfused / fused),
        ``times_floor`` (fused / floor), both of graph times on a GPU where there are any,
        ``output_bytes``, peak memory above the inputs ``fused_peak_bytes``, ``unfused_peak_bytes``
        (GPU, else None), ``copy_gb_per_s`` (read + written).
    """
    device = torch.device(device)
    bandwidth = _copy_bandwidth(device)
    rows = []
    for dtype in dtypes:
        for kind in BOXES:
            inputs = _inputs(device, dtype, detections, kind)
            for size in sizes:
                rows.append(_binary_case(inputs, kind, size, bandwidth, repeats))
            rows.append(_gradient_case(inputs, kind, bandwidth, repeats))
    return rows


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
    """The figures of :func:`benchmark_operators` as a table."""
    names = (
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
    table = [names] + [tuple(_cell(row[name]) for name in names) for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(names))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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
        sum(_bytes(tensor) for tensor in inputs) + output_bytes,
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

    output_bytes = _bytes(grad)
    # Forward: inputs read, masks written. Backward: inputs and gradient read, gradients written.
    moved = 3 * (_bytes(prototypes) + _bytes(coefficients)) + 2 * output_bytes
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
    device = inputs[0].device
    on_gpu = device.type == "cuda"
    fused_ms, unfused_ms = _medians([fused, unfused], device, repeats)
    graphs = [_graph(fused), _graph(unfused)] if on_gpu else []
    graph_ms = _medians(graphs, device, repeats) if on_gpu else [None, None]
    floor_ms = moved / bandwidth * 1e3
    best = graph_ms[0] or fused_ms
    return {
        "operator": operator,
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "dtype": str(inputs[0].dtype).removeprefix("torch."),
        "boxes": kind,
        "detections": inputs[1].shape[0],
        "size": f"{size[0]}x{size[1]}",
        "compiled": has_cuda_extension() if on_gpu else has_extension(),
        "fused_ms": fused_ms,
        "fused_graph_ms": graph_ms[0],
        "unfused_ms": unfused_ms,
        "unfused_graph_ms": graph_ms[1],
        "floor_ms": floor_ms,
        "speedup": (graph_ms[1] or unfused_ms) / best,
        "times_floor": best / floor_ms,
        "output_bytes": output_bytes,
        "fused_peak_bytes": _peak_memory(fused, device) if on_gpu else None,
        "unfused_peak_bytes": _peak_memory(unfused, device) if on_gpu else None,
        "copy_gb_per_s": bandwidth / 1e9,
    }


# ---------------------------------------------------------------- measuring


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _processor() -> str:
    return f"CPU, {torch.get_num_threads()} threads"


def _time(function: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3
    calls = 20
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / calls


def _medians(
    functions: Sequence[Callable[[], object]], device: torch.device, repeats: int
) -> list[float]:
    """Median milliseconds of each; samples are interleaved, so that a busy machine hits all."""
    for function in functions:
        for _ in range(3):
            function()
    samples: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for sample, function in zip(samples, functions, strict=True):
            sample.append(_time(function, device))
    return [statistics.median(sample) for sample in samples]


def _graph(function: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def _peak_memory(function: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read + written, of a copy far larger than the caches."""
    count = 2**30 if device.type == "cuda" else 2**27
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (milliseconds,) = _medians([lambda: target.copy_(source)], device, 10)
    return 2 * count / milliseconds * 1e3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m d2ext.layers.benchmark")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--detections", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args(arguments)
    rows = benchmark_operators(
        args.device,
        [getattr(torch, name) for name in args.dtypes.split(",")],
        detections=args.detections,
        repeats=args.repeats,
    )
    print(f"{rows[0]['device']}, torch {torch.__version__}, ", end="")
    print(f"copy {rows[0]['copy_gb_per_s']:.0f} GB/s (read + written)")
    print(format_rows(rows))
    if args.out:
        temporary = args.out.with_name(f"{args.out.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        temporary.replace(args.out)


if __name__ == "__main__":
    main()
