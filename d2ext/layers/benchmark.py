"""Times of the operators compared with plain PyTorch and with the floor that memory sets.

The floor of a case is the bytes that it must move (inputs read once, outputs written once) over the
bandwidth of a large copy on the same device, measured in the same run. Times are medians in
milliseconds: of calls as Python issues them (``torch.utils.benchmark``), and on a GPU of calls in a
CUDA graph too (``triton.testing.do_bench_cudagraph``).

Shapes: B images, C = 128 channels, N detections, prototypes of 138 × 138 × 32.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from d2ext.layers._extension import compiled_for
from d2ext.layers.corner_pool import corner_pool, corner_pool_pair
from d2ext.layers.deform_conv import deform_conv2d, deform_conv2d_reference
from d2ext.layers.prototype_masks import assemble_binary_masks, assemble_masks

_TIMES = ("fused_ms", "fused_graph_ms", "unfused_ms", "unfused_graph_ms", "floor_ms")
_RATIOS = ("speedup", "times_floor")
MASK_COLUMNS = ("operator", "dtype", "boxes", "size", *_TIMES, *_RATIOS)
DEFORM_COLUMNS = ("operator", "passes", "dtype", "shape", *_TIMES, *_RATIOS)
POOL_COLUMNS = ("operator", "passes", "dtype", "shape", "layout", *_TIMES, *_RATIOS)

GRID = 138
"""Prototype grid of a 550 x 550 YOLACT."""
_AXES = {"top": (2, True), "bottom": (2, False), "left": (3, True), "right": (3, False)}
_CORNERS = {"top_left": ("top", "left"), "bottom_right": ("bottom", "right")}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read + written, of a copy far larger than the caches."""
    source = torch.zeros(
        2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    return 2 * len(source) / _call_ms(lambda: target.copy_(source), device, 10) * 1e3


def measure(
    fused: Callable[[], object],
    unfused: Callable[[], object],
    example: Tensor,
    moved: int,
    bandwidth: float,
    repeats: int,
    unfused_in_graph: bool = True,
) -> dict[str, Any]:
    """Times of our operator and of plain PyTorch.

    Args:
        example: an input; gives the device and dtype.
        moved: bytes that must be moved.
        bandwidth: of a copy, bytes per second.
        repeats: how often a call is timed.
        unfused_in_graph: whether a CUDA graph holds what plain PyTorch runs.

    Returns:
        ``dtype``, ``compiled``, times in ms (:data:`MASK_COLUMNS`; of graphs None on a CPU, and where a
        graph does not hold the call), ``speedup`` (unfused / fused; of graphs where there are both),
        ``times_floor`` (fused / floor, of a graph on a GPU) and ``copy_gb_per_s``.
    """
    device = example.device
    calls = [_call_ms(function, device, repeats) for function in (fused, unfused)]
    graphs: list[float | None] = [None, None]
    if device.type == "cuda":
        from triton.testing import do_bench_cudagraph

        graphs[0] = do_bench_cudagraph(fused, return_mode="median")
        if unfused_in_graph:
            graphs[1] = do_bench_cudagraph(unfused, return_mode="median")
    floor = moved / bandwidth * 1e3
    best = graphs[0] or calls[0]
    return {
        "dtype": str(example.dtype).removeprefix("torch."),
        "compiled": compiled_for(device),
        "fused_ms": calls[0],
        "fused_graph_ms": graphs[0],
        "unfused_ms": calls[1],
        "unfused_graph_ms": graphs[1],
        "floor_ms": floor,
        "speedup": graphs[1] / best if graphs[1] else calls[1] / calls[0],
        "times_floor": best / floor,
        "copy_gb_per_s": bandwidth / 1e9,
    }


def format_rows(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """The columns ``names`` of ``rows`` as a text table."""
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


def _call_ms(function: Callable[[], object], device: torch.device, repeats: int) -> float:
    timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
    number = 20 if device.type == "cuda" else 1
    timer.timeit(3)
    return statistics.median(timer.timeit(number).median for _ in range(repeats)) * 1e3


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


# ---------------------------------------------------------------- corner pooling


def benchmark_pooling(
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    *,
    batches: Sequence[int] = (8, 1),
    side: int = 128,
    channels_last: Sequence[bool] = (False,),
    repeats: int = 20,
    bandwidth: float,
) -> list[dict[str, Any]]:
    """:func:`measure` for all directions and corners against ``torch.cummax`` with flips, on maps
    (B, 128, side, side), forward and forward + backward."""
    rows = []
    cases = [(b, last, d) for b in batches for last in channels_last for d in dtypes]
    for batch, last, dtype in cases:
        generator = torch.Generator().manual_seed(0)
        # After a ReLU, as in the systems: half of the elements tie at 0.
        maps = [torch.randn(batch, 128, side, side, generator=generator).relu() for _ in range(3)]
        memory_format = torch.channels_last if last else torch.contiguous_format
        maps = [x.to(device, dtype).contiguous(memory_format=memory_format) for x in maps]
        for name in (*_AXES, *_CORNERS):
            for row in _pooling_rows(name, maps, bandwidth, repeats):
                layout = "channels_last" if last else "contiguous"
                shape = f"{batch}x128x{side}x{side}"
                rows.append({"operator": name, "shape": shape, "layout": layout, **row})
    return rows


def _pooling_rows(
    name: str, maps: Sequence[Tensor], bandwidth: float, repeats: int
) -> list[dict[str, Any]]:
    directions = _CORNERS.get(name, (name,))
    inputs, grad = maps[: len(directions)], maps[2]
    leaves = [x.detach().requires_grad_() for x in inputs]

    def ours(*maps: Tensor) -> Tensor:
        return (
            corner_pool(maps[0], name)
            if name in _AXES
            else corner_pool_pair(maps[0], maps[1], name)
        )

    def plain(*maps: Tensor) -> Tensor:
        pooled = [_cummax(x, direction) for x, direction in zip(maps, directions, strict=True)]
        return pooled[0] if len(pooled) == 1 else pooled[0] + pooled[1]

    def backward(function: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(*leaves), leaves, grad)

    # Inputs read, output written; then inputs and gradient read, gradients written.
    moved = _bytes(*inputs, grad)
    both = moved + _bytes(*inputs, *inputs, grad)
    times = (grad, moved, bandwidth, repeats)
    forward = measure(lambda: ours(*inputs), lambda: plain(*inputs), *times)
    training = measure(backward(ours), backward(plain), grad, both, bandwidth, repeats)
    return [{"passes": "forward", **forward}, {"passes": "forward+backward", **training}]


def _cummax(x: Tensor, direction: str) -> Tensor:
    axis, reverse = _AXES[direction]
    return x.flip(axis).cummax(axis).values.flip(axis) if reverse else x.cummax(axis).values


# ---------------------------------------------------------------- deformable convolution

DEFORM_SHAPES = (
    (16, 64, 128, 128, 64),
    (16, 128, 64, 64, 128),
    (16, 256, 32, 32, 256),
    (1, 64, 128, 128, 64),
    (1, 128, 100, 168, 128),
    (1, 256, 200, 336, 128),
    (1, 512, 25, 42, 512),
)
"""B, C, H, W and output channels: DLA-34 at 512 x 512, batches of 16 and 1; UPSNet's res3, first
semantic layer and res5 at 800 x 1333."""


def benchmark_deform(
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    *,
    shapes: Sequence[tuple[int, int, int, int, int]] = DEFORM_SHAPES,
    repeats: int = 20,
    bandwidth: float,
) -> list[dict[str, Any]]:
    """:func:`measure` for 3 x 3 kernels with weighted taps, channels-last, against torchvision's
    operator (in float32 where it has no kernel), forward and forward + backward. Offsets are normal, of
    one cell."""
    rows = []
    for shape, dtype in [(s, d) for s in shapes for d in dtypes]:
        batch, channels, height, width, outputs = shape
        generator = torch.Generator().manual_seed(0)
        sizes = [(batch, n, height, width) for n in (channels, 18, 9, outputs)]
        maps = [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]
        maps[2] = maps[2].sigmoid()
        x, offset, mask, grad = (m.contiguous(memory_format=torch.channels_last) for m in maps)
        weight = (torch.randn(outputs, channels, 3, 3, generator=generator) / 30).to(device, dtype)
        leaves = [t.detach().requires_grad_() for t in (x, offset, weight, mask)]
        text = f"{batch}x{channels}x{height}x{width} -> {outputs}"
        for row in _deform_rows(leaves, grad, bandwidth, repeats):
            rows.append({"operator": "deform_conv2d", "shape": text, **row})
    return rows


def _deform_rows(
    leaves: Sequence[Tensor], grad: Tensor, bandwidth: float, repeats: int
) -> list[dict[str, Any]]:
    def call(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
        x, offset, weight, mask = inputs
        return function(x, offset, weight, None, mask, padding=1)

    def forward(function: Callable[..., Tensor]) -> Callable[[], object]:
        inputs = [t.detach() for t in leaves]
        return lambda: call(function, inputs)

    def training(function: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(call(function, leaves), leaves, grad)

    rows = []
    moved = _bytes(*leaves, grad)
    both = moved + _bytes(*leaves, *leaves, grad)
    for passes, make, size in (("forward", forward, moved), ("forward+backward", training, both)):
        fused, plain = make(deform_conv2d), make(deform_conv2d_reference)
        # torchvision's kernels run outside of a graph that is captured.
        row = measure(fused, plain, grad, size, bandwidth, repeats, unfused_in_graph=False)
        rows.append({"passes": passes, **row})
    return rows


# ---------------------------------------------------------------- masks


def benchmark_masks(
    device: torch.device,
    dtypes: Sequence[torch.dtype],
    *,
    detections: int = 100,
    sizes: Sequence[tuple[int, int]] = ((550, 550), (1080, 1920)),
    repeats: int = 20,
    bandwidth: float,
) -> list[dict[str, Any]]:
    """:func:`measure` for ``assemble_binary_masks`` at ``sizes`` and for ``assemble_masks`` forward +
    backward. Boxes are "random" (sides 5 to 65 % of the image, anywhere) or "full" (every box is the
    whole image, the worst case)."""
    rows = []
    for dtype, kind in [(d, k) for d in dtypes for k in ("random", "full")]:
        inputs = _mask_inputs(device, dtype, detections, kind)
        cases = [_binary_case(inputs, size) for size in sizes]
        cases.append(_gradient_case(inputs))
        for name, size, fused, unfused, moved in cases:
            figures = measure(fused, unfused, inputs[0], moved, bandwidth, repeats)
            case = {"boxes": kind, "detections": detections, "size": f"{size[0]}x{size[1]}"}
            rows.append({"operator": name, **case, **figures})
    return rows


_Inputs = tuple[Tensor, Tensor, Tensor]  # prototypes, coefficients, boxes
_Case = tuple[str, tuple[int, int], Callable[[], object], Callable[[], object], int]


def _binary_case(inputs: _Inputs, size: tuple[int, int]) -> _Case:
    prototypes, coefficients, boxes = inputs
    return (
        "assemble_binary_masks",
        size,
        lambda: assemble_binary_masks(prototypes, coefficients, boxes, size),
        lambda: _plain_binary_masks(prototypes, coefficients, boxes, size),
        _bytes(*inputs) + len(boxes) * size[0] * size[1],
    )


def _gradient_case(inputs: _Inputs) -> _Case:
    leaves = [x.detach().requires_grad_() for x in inputs[:2]]
    grad = torch.rand(len(inputs[2]), GRID, GRID, device=inputs[0].device).to(inputs[0].dtype)

    def step(function: Callable[..., Tensor]) -> object:
        return torch.autograd.grad(function(*leaves, inputs[2]), leaves, grad)

    return (
        "assemble_masks forward+backward",
        (GRID, GRID),
        lambda: step(assemble_masks),
        lambda: step(_plain_masks),
        3 * _bytes(*leaves) + 2 * _bytes(grad),
    )


def _mask_inputs(device: torch.device, dtype: torch.dtype, detections: int, kind: str) -> _Inputs:
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(GRID, GRID, 32, generator=generator).relu()
    coefficients = torch.randn(detections, 32, generator=generator).tanh()
    half = 0.5 * (0.05 + 0.6 * torch.rand(detections, 2, generator=generator))
    centre = torch.rand(detections, 2, generator=generator)
    boxes = torch.cat([centre - half, centre + half], dim=1)
    if kind == "full":
        boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(detections, 1)
    return prototypes.to(device, dtype), coefficients.to(device, dtype), boxes.to(device)


def _plain_masks(prototypes: Tensor, coefficients: Tensor, boxes: Tensor) -> Tensor:
    """Probabilities by separate operations, in the inputs' dtype."""
    height, width, _ = prototypes.shape
    masks = (coefficients @ prototypes.flatten(0, 1).T).unflatten(1, (height, width)).sigmoid()
    columns = _keep(boxes[:, 0], boxes[:, 2], width)
    rows = _keep(boxes[:, 1], boxes[:, 3], height)
    return masks * (rows[:, :, None] & columns[:, None, :])


def _keep(low: Tensor, high: Tensor, size: int) -> Tensor:
    cells = torch.arange(size, device=low.device)
    return (cells >= low[:, None] * size - 1) & (cells < high[:, None] * size + 1)


def _plain_binary_masks(
    prototypes: Tensor, coefficients: Tensor, boxes: Tensor, size: tuple[int, int]
) -> Tensor:
    masks = _plain_masks(prototypes, coefficients, boxes)
    masks = F.interpolate(masks[:, None], size=size, mode="bilinear", align_corners=False)
    return masks[:, 0] > 0.5
