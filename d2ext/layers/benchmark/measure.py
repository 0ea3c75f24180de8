"""Times an operator beside plain PyTorch and beside the floor that memory sets."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from d2ext.layers._extension import has_cuda_extension, has_extension


def measure(
    operator: str,
    fused: Callable[[], object],
    unfused: Callable[[], object],
    example: Tensor,
    output_bytes: int,
    moved: int,
    bandwidth: float,
    *,
    repeats: int,
) -> dict[str, Any]:
    """Figures of one case.

    Args:
        operator: its name.
        fused, unfused: ours and plain PyTorch.
        example: an input, for its device and dtype.
        output_bytes: size of the output.
        moved: bytes that must be moved: inputs read once, outputs written once.
        bandwidth: of a large copy on the same device in the same run, bytes per second.
        repeats: samples per figure; figures are medians. On a GPU a sample is 20 calls between two
            events, as Python issues them and as a CUDA graph replays them.

    Returns:
        ``operator``, ``device``, ``dtype``, ``compiled``, times in ms ``fused_ms``, ``unfused_ms``,
        ``floor_ms`` and on a GPU ``fused_graph_ms``, ``unfused_graph_ms`` (else None), ``speedup``
        (unfused / fused), ``times_floor`` (fused / floor), both of graph times on a GPU,
        ``output_bytes``, peak memory above the inputs ``fused_peak_bytes``, ``unfused_peak_bytes``
        (GPU, else None), ``copy_gb_per_s`` (read + written).
    """
    device = example.device
    on_gpu = device.type == "cuda"
    fused_ms, unfused_ms = _medians([fused, unfused], device, repeats)
    graphs = [_graph(fused), _graph(unfused)] if on_gpu else []
    graph_ms = _medians(graphs, device, repeats) if on_gpu else [None, None]
    floor_ms = moved / bandwidth * 1e3
    best = graph_ms[0] or fused_ms
    return {
        "operator": operator,
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "dtype": str(example.dtype).removeprefix("torch."),
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


def format_rows(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """The columns ``names`` of some figures as a table."""
    table = [tuple(names)] + [tuple(_cell(row[name]) for name in names) for row in rows]
    widths = [max(len(line[i]) for line in table) for i in range(len(names))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def bytes_of(tensor: Tensor) -> int:
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


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read + written, of a copy far larger than the caches."""
    count = 2**30 if device.type == "cuda" else 2**27
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    (milliseconds,) = _medians([lambda: target.copy_(source)], device, 10)
    return 2 * count / milliseconds * 1e3
