"""Corner pooling (CornerNet, https://arxiv.org/abs/1808.01244, section 3.3) and center pooling
(CenterNet with triplets, https://arxiv.org/abs/1904.08189, section 3.2).

Shapes: B images, C channels, H x W cells.

- :func:`corner_pool`: running maximum towards one side of the map.
- :func:`corner_pool_pair`: sum of the two poolings of a corner, each of its own map.
- :func:`center_pool`: maximum of the whole column of one map plus maximum of the whole row of another.

**Gradient.** It goes to the element that holds the maximum. Of equal elements that is the first in the
published operator's scan (only a strictly greater one replaces it): the one nearest to the side where
the scan begins; for :func:`center_pool` the lowest of a column and the rightmost of a row.
(``torch.cummax`` takes the last in the scan, ``torch.amax`` divides the gradient among all.)

**NaN** counts as greater than every number, as in ``torch.cummax``: from the first NaN on, the running
maximum is NaN, and that first NaN gets the gradient.

**Memory.** Forward saves only its input, which a preceding ReLU saves anyway; backward recomputes the
maxima. In float32 that moves 8 bytes an element forward and 12 backward; saving an index of one byte
would move 9 and 9, and take one byte more for each element.

**Precision.** Maxima are exact in every dtype. Gradients are summed in float32 (float64 for float64)
and rounded once. Autocast does not change the operators' dtype; two inputs of different dtypes are
promoted to their common one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.layers._extension import compiled_for, has_extension, register_gradient
from d2ext.layers.exporting import is_exporting

__all__ = [
    "CornerPool",
    "center_pool",
    "corner_pool",
    "corner_pool_pair",
    "corner_pool_reference",
]

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_SCANS = {"top": (2, True), "bottom": (2, False), "left": (3, True), "right": (3, False)}
"""Direction -> (axis of the scan, whether it begins at the axis' end)."""
LONGEST_SIDE = 1024
"""Cells of a map's side, at most, where a file is exported for images of any size."""
_CORNERS = {"top_left": ("top", "left"), "bottom_right": ("bottom", "right")}


def corner_pool(x: Tensor, direction: str) -> Tensor:
    """Running maximum towards the side ``direction``.

    Args:
        x: (B, C, H, W), floating point, any strides.
        direction: "top": from the bottom row up, so that a cell gets the maximum of itself and all
            cells below; "bottom": from the top row down; "left": from the right column to the left;
            "right": from the left column to the right.

    Returns:
        (B, C, H, W) in x's dtype; channels_last if x is, else contiguous.

    Raises:
        ValueError: a wrong direction, shape or dtype.
    """
    if is_exporting():
        return _doubling_maximum(x, *_scan_of(direction))
    if not compiled_for(x.device):
        return corner_pool_reference(x, direction)
    axis, reverse = _scan_of(direction)
    return torch.ops.d2ext.corner_pool.default(x, axis, reverse)


def corner_pool_pair(vertical: Tensor, horizontal: Tensor, corner: str) -> Tensor:
    """The sum of the two poolings that detect a corner.

    Args:
        vertical: (B, C, H, W), floating point, any strides; pooled to the top or bottom.
        horizontal: the same shape; pooled to the left or right.
        corner: "top_left": ``corner_pool(vertical, "top") + corner_pool(horizontal, "left")``;
            "bottom_right": ``corner_pool(vertical, "bottom") + corner_pool(horizontal, "right")``.

    Returns:
        (B, C, H, W); channels_last if ``vertical`` is, else contiguous.

    Raises:
        ValueError: a wrong corner, shapes, dtypes or devices that do not fit together.
    """
    if corner not in _CORNERS:
        raise ValueError(f"corner must be one of {', '.join(_CORNERS)}, got {corner!r}")
    vertical, horizontal = _promote(vertical, horizontal)
    _check_pair("corner_pool_pair", vertical, horizontal)
    down, across = _CORNERS[corner]
    return corner_pool(vertical, down).add_(corner_pool(horizontal, across))


def _doubling_maximum(x: Tensor, axis: int, reverse: bool) -> Tensor:
    """:func:`corner_pool` of operators that every exported file has: after step i, a cell holds the
    maximum of 2^i cells. Exact, NaN included. A side of unknown length has up to LONGEST_SIDE cells."""
    length = x.shape[axis]
    steps = ((length if isinstance(length, int) else LONGEST_SIDE) - 1).bit_length()
    for shift in (1 << i for i in range(steps)):
        ends = (0, shift) if reverse else (shift, 0)
        padded = F.pad(x, (0, 0, *ends) if axis == 2 else ends, value=-torch.inf)
        x = torch.maximum(x, padded.narrow(axis, shift if reverse else 0, length))
    return x


def center_pool(vertical: Tensor, horizontal: Tensor) -> Tensor:
    """Maximum of the cell's column of ``vertical`` plus maximum of its row of ``horizontal``.

    Equal to ``corner_pool(corner_pool(vertical, "top"), "bottom") +
    corner_pool(corner_pool(horizontal, "left"), "right")``, gradient included. Plain PyTorch: it takes
    too little of CenterNet's time for a kernel to pay.

    Args:
        vertical, horizontal: (B, C, H, W), floating point, any strides.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: shapes or devices that do not fit together.
    """
    vertical, horizontal = _promote(vertical, horizontal)
    _check_pair("center_pool", vertical, horizontal)
    if vertical.numel() == 0:
        return vertical + horizontal
    return _last_maximum(vertical, 2) + _last_maximum(horizontal, 3)


def _last_maximum(x: Tensor, axis: int) -> Tensor:
    """Maximum along ``axis``, which becomes 1 long; the gradient goes to the last of equal ones."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x.amax(axis, keepdim=True)
    flipped = x.flip(axis)  # argmax gives the first of equal ones
    return flipped.gather(axis, flipped.argmax(axis, keepdim=True))


class CornerPool(nn.Module):
    """:func:`corner_pool` as a layer."""

    def __init__(self, direction: str) -> None:
        super().__init__()
        _scan_of(direction)
        self.direction = direction

    def forward(self, x: Tensor) -> Tensor:
        return corner_pool(x, self.direction)

    def extra_repr(self) -> str:
        return self.direction


# ---------------------------------------------------------------- plain PyTorch


def corner_pool_reference(x: Tensor, direction: str) -> Tensor:
    """:func:`corner_pool` in plain PyTorch; differentiable to any order."""
    axis, reverse = _scan_of(direction)
    _check_map("corner_pool", x)
    if x.numel() == 0:
        return x.clone()
    scanned = x.flip(axis) if reverse else x
    pooled = scanned.gather(axis, _holders(scanned, axis))
    return pooled.flip(axis) if reverse else pooled


@torch.no_grad()
def _holders(x: Tensor, axis: int) -> Tensor:
    """int64, x's shape: where along ``axis`` the running maximum of each element comes from."""
    # float32 holds every float16 and bfloat16, for which some devices lack cummax.
    values = x.double() if x.dtype == torch.float64 else x.float()
    running = values.cummax(axis).values
    earlier = running.narrow(axis, 0, x.shape[axis] - 1)
    later = running.narrow(axis, 1, x.shape[axis] - 1)
    replaced = (later > earlier) | (later.isnan() & ~earlier.isnan())
    shape = [1] * x.dim()
    shape[axis] = -1
    index = torch.arange(1, x.shape[axis], device=x.device).view(shape)
    first = torch.zeros_like(running.narrow(axis, 0, 1), dtype=torch.int64)
    return torch.cat([first, index * replaced], dim=axis).cummax(axis).values


# ---------------------------------------------------------------- arguments


def _scan_of(direction: str) -> tuple[int, bool]:
    if direction not in _SCANS:
        raise ValueError(f"direction must be one of {', '.join(_SCANS)}, got {direction!r}")
    return _SCANS[direction]


def _promote(vertical: Tensor, horizontal: Tensor) -> tuple[Tensor, Tensor]:
    if vertical.dtype == horizontal.dtype:
        return vertical, horizontal
    dtype = torch.promote_types(vertical.dtype, horizontal.dtype)
    return vertical.to(dtype), horizontal.to(dtype)


def _check_map(name: str, x: Tensor) -> None:
    """The checks of the compiled operators (csrc/corner_pool.h), for the plain PyTorch path and for
    tensors without values."""
    if x.dim() != 4:
        raise ValueError(f"{name}: input must have shape (B, C, H, W), got {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name}: input must be floating point, got {x.dtype}")


def _check_pair(name: str, vertical: Tensor, horizontal: Tensor) -> None:
    _check_map(name, vertical)
    _check_map(name, horizontal)
    if vertical.shape != horizontal.shape:
        raise ValueError(
            f"{name}: vertical and horizontal must have one shape, "
            f"got {tuple(vertical.shape)} and {tuple(horizontal.shape)}"
        )
    if vertical.device != horizontal.device:
        raise ValueError(
            f"{name}: vertical and horizontal must be on one device, "
            f"got {vertical.device} and {horizontal.device}"
        )


# ---------------------------------------------------------------- compiled: shapes, gradients


def _empty_map(x: Tensor) -> Tensor:
    """As csrc/corner_pool.h: channels_last if x is, else contiguous."""
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(x, memory_format=memory_format)


if has_extension():

    @torch.library.register_fake("d2ext::corner_pool")
    def _corner_pool_fake(x: Tensor, axis: int, reverse: bool) -> Tensor:
        _check_map("corner_pool", x)
        if axis not in (2, 3):
            raise ValueError(f"corner_pool: axis must be 2 (H) or 3 (W), got {axis}")
        return _empty_map(x)

    @torch.library.register_fake("d2ext::corner_pool_backward")
    def _corner_pool_backward_fake(grad: Tensor, x: Tensor, axis: int, reverse: bool) -> Tensor:
        if (grad.shape, grad.dtype, grad.device) != (x.shape, x.dtype, x.device):
            raise ValueError(
                f"corner_pool_backward: grad must be {x.dtype} on {x.device} of shape "
                f"{tuple(x.shape)}, got {grad.dtype} on {grad.device} of shape {tuple(grad.shape)}"
            )
        return _corner_pool_fake(x, axis, reverse)

    # Only the input is saved: backward recomputes the maxima.

    def _save(ctx: Any, inputs: tuple[Tensor, int, bool], output: Tensor) -> None:
        x, ctx.axis, ctx.reverse = inputs
        ctx.save_for_backward(x)

    def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        backward = torch.ops.d2ext.corner_pool_backward.default
        return backward(grad, *ctx.saved_tensors, ctx.axis, ctx.reverse), None, None

    register_gradient("corner_pool", _backward, _save)
