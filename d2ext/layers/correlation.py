"""Cost volume of two feature maps (correlation layer of FlowNet, arXiv 1504.06852, section 3).

Letters: B images, C channels, H×W cells, s the stride, r = max_displacement / s, n = 2r + 1
displacements in a direction, W' = ⌈W / s⌉.

For one vertical displacement, the volume of a row is a band of the product of two rows of features,
``a[y] @ b[y + dy].T``. Columns meet only those of the same remainder by s, so rows are split by it; and
rows are cut into blocks of columns, of which each meets a little more than itself (:class:`_Blocks`). So
all is n batched products, instead of n² element-wise ones. :func:`_functional` says the same without
views of one memory, for exported files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from d2ext.layers.exporting import is_exporting

__all__ = ["correlation"]

# Columns of a block, at least. Fewer make the products too small for matrix units, more make more of
# them for nothing: a block's column meets _BLOCK + 2r others, of which n count.
_BLOCK = 32


def correlation(a: Tensor, b: Tensor, max_displacement: int, stride: int = 1) -> Tensor:
    """Mean over the channels of a(x)·b(x + d) for each displacement d; 0 where x + d is outside.

    The dtype is that of the arguments, also under autocast; half precision is summed in float32. Beside
    arguments and result it takes the memory of the arguments once more, and that of one product, about
    B·H·W·(width of a block + 2r).

    Args:
        a, b: (B, C, H, W), same shape, dtype and device.
        max_displacement: largest displacement in each direction, cells.
        stride: step of the displacements, cells; divides ``max_displacement``.

    Returns:
        (B, n², H, W); channel ``(dy + r)·n + dx + r`` is the displacement ``stride·(dx, dy)``.
        Channels-last if ``a`` is.

    Raises:
        ValueError: arguments that do not belong together.
    """
    if a.dim() != 4 or a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        raise ValueError(
            "correlation needs two feature maps (B, C, H, W) of the same shape, dtype and device, not "
            f"{tuple(a.shape)} {a.dtype} on {a.device} and {tuple(b.shape)} {b.dtype} on {b.device}."
        )
    if stride < 1 or max_displacement < 0 or max_displacement % stride:
        raise ValueError(
            f"max_displacement is {max_displacement}, stride {stride}: the stride is at least 1, and "
            "the largest displacement a multiple of it."
        )
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _Correlation.apply(a, b, max_displacement // stride, stride)
    forward = _functional if is_exporting() else _forward
    return forward(a, b, max_displacement // stride, stride)


class _Correlation(torch.autograd.Function):
    """Keeps its arguments only: autograd would keep the band of every displacement."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, r: int, stride: int) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.r, ctx.stride = r, stride
        return _forward(a, b, r, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        a, b = ctx.saved_tensors
        return (*_backward(grad, a, b, ctx.r, ctx.stride), None, None)


def _forward(a: Tensor, b: Tensor, r: int, stride: int) -> Tensor:
    batch, channels, height, width = a.shape
    n = 2 * r + 1
    last = torch.channels_last
    layout = last if a.is_contiguous(memory_format=last) else torch.contiguous_format
    shape = batch, n * n, height, width
    volume = torch.empty(shape, dtype=a.dtype, device=a.device, memory_format=layout).zero_()
    # cuBLAS sums products of half precision in float32; not every kernel of the CPU does.
    dtype = a.dtype if a.is_cuda else torch.promote_types(a.dtype, torch.float32)
    blocks = _Blocks(a, r, stride)
    rows_a, rows_b = blocks.rows(a, dtype), blocks.rows(b, dtype)
    product, band = blocks.product(rows_a)
    with torch.autocast(a.device.type, enabled=False):
        for i, here, there in blocks.vertical():
            count = blocks.count(here)
            # The factor is applied before the sum is rounded, which may not fit float16.
            product[:count].baddbmm_(
                blocks.columns(rows_a, here),
                blocks.windows(rows_b, there).transpose(1, 2),
                beta=0,
                alpha=1 / max(channels, 1),
            )
            for phase in range(stride):
                target = volume[:, i * n : (i + 1) * n, here, phase::stride]
                source = band[: here.stop - here.start, phase, :, : target.shape[3]]
                target.copy_(source.permute(1, 3, 0, 2))
    return volume


def _functional(a: Tensor, b: Tensor, r: int, stride: int) -> Tensor:
    channels, height, width = a.shape[1:]
    n = 2 * r + 1
    dtype = torch.promote_types(a.dtype, torch.float32)
    side = max(_BLOCK, 2 * r)  # of a block; its window is a part of the next one longer
    count = -(-width // (stride * side))
    length = count * side  # W'', columns of one remainder

    def columns(x: Tensor, more: int) -> Tensor:
        """(B, C, h, w) with zeros to the right → (B, s, h, W'' + more, C)."""
        x = F.pad(x.to(dtype), (0, stride * (length + more) - x.shape[3]))
        return x.unflatten(3, (length + more, stride)).permute(0, 4, 2, 3, 1)

    blocks = columns(a, 0).unflatten(3, (count, side)) / max(channels, 1)
    reach = r * stride
    parts = columns(F.pad(b, (reach, 0, reach, reach)), side).unflatten(3, (count + 1, side))
    windows = torch.cat([parts[:, :, :, :-1], parts[:, :, :, 1:, : 2 * r]], dim=4).transpose(4, 5)
    products = torch.stack(
        [blocks @ windows[:, :, i * stride : i * stride + height] for i in range(n)], dim=1
    )  # (B, n, s, H, count, side, side + 2r), of which the band counts
    # Read as rows of one number more, the diagonals are columns.
    rows = F.pad(products.flatten(5), (0, side)).unflatten(5, (side, side + 2 * r + 1))
    band = rows[..., :n].flatten(4, 5)  # (B, n, s, H, W'', n)
    volume = band.permute(0, 1, 5, 3, 4, 2).flatten(4)[..., :width]
    return volume.flatten(1, 2).to(a.dtype)


def _backward(grad: Tensor, a: Tensor, b: Tensor, r: int, stride: int) -> tuple[Tensor, Tensor]:
    channels, n = a.shape[1], 2 * r + 1
    dtype = torch.promote_types(a.dtype, torch.float32)  # the sum over rows is one here
    blocks = _Blocks(a, r, stride)
    rows_a, rows_b = blocks.rows(a, dtype), blocks.rows(b, dtype)
    grad_a, grad_b = torch.zeros_like(rows_a), torch.zeros_like(rows_b)
    product, band = blocks.product(rows_a)
    scale = 1 / max(channels, 1)
    with torch.autocast(a.device.type, enabled=False):
        for i, here, there in blocks.vertical():
            for phase in range(stride):
                source = grad[:, i * n : (i + 1) * n, here, phase::stride]
                target = band[: here.stop - here.start, phase, :, : source.shape[3]]
                target.copy_(source.permute(2, 0, 3, 1))
            used = product[: blocks.count(here)]
            windows = blocks.windows(rows_b, there)
            blocks.columns(grad_a, here).baddbmm_(used, windows, alpha=scale)
            columns, windows = blocks.columns(rows_a, here), blocks.windows(grad_b, there)
            for k in (slice(0, None, 2), slice(1, None, 2)):  # neighbouring windows overlap
                windows[k].baddbmm_(used[k].transpose(1, 2), columns[k], alpha=scale)
    return blocks.map(grad_a, a), blocks.map(grad_b, b)


class _Blocks:
    """Feature maps in memory as rows cut into blocks of columns.

    A row is (W'', C), with W'' = ``per_row`` blocks of ``width`` columns, the map's W' and at least r
    that are 0. A block of ``a`` meets its window of ``b``: the same columns and r more on each side,
    which beyond the row's ends are 0. So all blocks and windows of consecutive rows have the same
    distance, and are one batch.
    """

    def __init__(self, x: Tensor, r: int, stride: int) -> None:
        self.batch, self.channels, self.height, width = x.shape
        self.r, self.stride = r, stride
        self.own = -(-width // stride)  # W'
        least = max(_BLOCK, 2 * r)  # so that only neighbouring windows overlap
        self.per_row = max(1, (self.own + r) // least)
        self.width = max(least, -(-(self.own + r) // self.per_row))

    def _view(self, rows: Tensor) -> Tensor:
        """Flat rows as (H, s, B, W'', C)."""
        length = self.per_row * self.width
        shape = self.height, self.stride, self.batch, length, self.channels
        start = self.r * self.channels
        return rows[start : start + math.prod(shape)].view(shape)

    def rows(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, C, H, W) → its rows, flat, with what the first and last window need."""
        rows = self.height * self.stride * self.batch * self.per_row * self.width
        rows = x.new_zeros((rows + 2 * self.r) * self.channels, dtype=dtype)
        for phase in range(self.stride):
            columns = x[..., phase :: self.stride].permute(2, 0, 3, 1)
            self._view(rows)[:, phase, :, : columns.shape[2]].copy_(columns)
        return rows

    def map(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`rows`."""
        x = torch.empty_like(like)
        for phase in range(self.stride):
            columns = x[..., phase :: self.stride]
            rows_ = self._view(rows)[:, phase, :, : columns.shape[3]]
            columns.copy_(rows_.permute(1, 3, 0, 2))
        return x

    def product(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Memory, all 0, for the products of all blocks with windows, and its bands.

        Returns:
            (blocks, width, width + 2r), and a view of it (H, s, B, W'', 2r + 1): of each column its
            products with those at -r to r.
        """
        length = self.width + 2 * self.r
        shape = self.height, self.stride, self.batch, self.per_row * self.width, length + 1
        memory = rows.new_zeros(shape)
        # A block lies there as rows of ``length``; read as rows of one more, the diagonals are columns.
        blocks = memory.view(-1, self.width * (length + 1))[:, : self.width * length]
        return blocks.unflatten(1, (self.width, length)), memory[..., : 2 * self.r + 1]

    def count(self, rows: slice) -> int:
        """How many blocks there are in some of the H rows."""
        return (rows.stop - rows.start) * self.stride * self.batch * self.per_row

    def columns(self, rows: Tensor, which: slice) -> Tensor:
        """(blocks, width, C) of some of the H rows, a view."""
        return self._view(rows)[which].reshape(self.count(which), self.width, self.channels)

    def windows(self, rows: Tensor, which: slice) -> Tensor:
        """(blocks, width + 2r, C) of some of the H rows, a view in which neighbours overlap."""
        step = self.width * self.channels
        start = self.count(slice(0, which.start)) * step
        shape = self.count(which), self.width + 2 * self.r, self.channels
        return rows.as_strided(shape, (step, self.channels, 1), start)

    def vertical(self) -> Iterator[tuple[int, slice, slice]]:
        """Number, rows of ``a``, rows of ``b`` of each vertical displacement where any meet."""
        for i in range(2 * self.r + 1):
            d = (i - self.r) * self.stride
            if abs(d) < self.height:
                here = slice(max(0, -d), self.height - max(0, d))
                yield i, here, slice(here.start + d, here.stop + d)
