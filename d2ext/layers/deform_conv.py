"""Deformable convolution: v1 (arXiv 1703.06211) and v2, which also weights the taps (DCNv2,
arXiv 1811.11168).

Shapes: B images, C channels, N output channels, H×W input cells, h×w output cells, K =
kernel_h·kernel_w taps, G groups of channels, O groups of offsets.

Ours (``csrc/deform_conv.h``), which takes a fraction of the time of torchvision's; that one where ours
does not fit: gradients on a CPU, groups of channels that 8 does not divide, float64, not compiled. Its
CUDA kernels have no bfloat16 and run on the default stream only (pytorch/vision, issue 9513): a CUDA
graph would not hold them, and compute with old samples. Off that stream PyTorch's own operators do it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from d2ext.layers._extension import compiled_for, has_extension, register_gradient
from d2ext.layers.exporting import is_exporting

__all__ = [
    "DeformConv",
    "ModulatedDeformConv",
    "deform_conv2d",
    "deform_conv2d_plain",
    "deform_conv2d_reference",
]

_HALF = (torch.float16, torch.bfloat16)
_COMPILED = (*_HALF, torch.float32)
# Channels that a thread of the compiled operator reads at once.
_CHANNELS = 8


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Tensor:
    """Convolution whose taps are moved, and weighted, at each output cell.

    Samples are bilinear, 0 outside of the image. Where an offset or a weight of a tap is NaN, so is the
    result. All arguments have one dtype, which the result has; in half precision samples are rounded to
    it and products added in float32. With ``torch.use_deterministic_algorithms`` the gradients of the
    compiled operator do not depend on the order of additions.

    Args:
        x: (B, C, H, W).
        offset: (B, O·2K, h, w) cells, (y, x) per tap in row-major order.
        weight: (N, C / G, kernel_h, kernel_w).
        bias: (N,).
        mask: (B, O·K, h, w) weights of the taps.
        stride, padding, dilation: in both directions.

    Returns:
        (B, N, h, w); from the compiled operator channels-last.

    Raises:
        ValueError, RuntimeError: shapes, dtypes or devices that do not fit together.
    """
    if _has_compiled(x, offset, weight, bias, mask) and not is_exporting():
        return torch.ops.d2ext.deform_conv2d(
            x, weight, offset, mask, bias, stride, padding, dilation
        )
    sizes = {"stride": stride, "padding": padding, "dilation": dilation}
    if x.is_cuda and not is_exporting() and _may_leave_the_default_stream(x.device):
        return deform_conv2d_plain(x, offset, weight, bias, mask, **sizes)
    return deform_conv2d_reference(x, offset, weight, bias, mask, **sizes)


def _has_compiled(x: Tensor, offset: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether the compiled operator takes these; on a CPU it has no gradients."""
    if x.is_cuda:
        fits = x.dtype in _COMPILED
    else:
        tensors = (x, offset, weight, *others)
        trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        fits = x.device.type == "cpu" and x.dtype == torch.float32 and not trains
    offset_groups = offset.shape[1] // max(2 * weight.shape[2] * weight.shape[3], 1)
    return (
        fits
        and weight.shape[1] % _CHANNELS == 0
        and x.shape[1] % (_CHANNELS * max(offset_groups, 1)) == 0
        and compiled_for(x.device)
    )


def _may_leave_the_default_stream(device: torch.device) -> bool:
    """Whether a CUDA graph is captured, or another stream works; compiled code may be captured."""
    if torch.compiler.is_compiling():
        return True
    if not torch.cuda.is_initialized():
        return False
    return torch.cuda.current_stream(device) != torch.cuda.default_stream(device)


def deform_conv2d_plain(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    **sizes: int,
) -> Tensor:
    """:func:`deform_conv2d`, of the same arguments, by indices and a matrix product, in float32 where x
    is of half precision; it holds K samples of every input channel for every output cell."""
    in_float32 = x.dtype in _HALF
    return _convolve(_gather_and_multiply, in_float32, x, offset, weight, bias, mask, **sizes)


def deform_conv2d_reference(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    **sizes: int,
) -> Tensor:
    """:func:`deform_conv2d`, of the same arguments, by torchvision's operator; in float32 where that has
    no kernels."""
    in_float32 = x.dtype == torch.bfloat16 or (x.dtype == torch.float16 and not x.is_cuda)
    operator = torchvision.ops.deform_conv2d
    return _convolve(operator, in_float32, x, offset, weight, bias, mask, **sizes)


def _convolve(
    operator: Callable[..., Tensor],
    in_float32: bool,
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    **sizes: int,
) -> Tensor:
    """What ``operator`` gives, in the dtype of x; NaN where an offset is."""
    dtype = x.dtype
    if in_float32:
        x, offset, weight = x.float(), offset.float(), weight.float()
        bias = None if bias is None else bias.float()
        mask = None if mask is None else mask.float()
    # Where an offset is NaN torchvision's operator would read outside the image, and may crash.
    finite = offset.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    output = operator(x, finite, weight, bias, mask=mask, **sizes)
    broken = offset.isnan().any(dim=1, keepdim=True)
    return output.masked_fill(broken, torch.nan).to(dtype)


def _gather_and_multiply(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Tensor:
    """As torchvision's operator, for offsets that are not NaN."""
    batch, channels, *extent = x.shape
    outputs, in_group, *kernel = weight.shape
    taps, cells = kernel[0] * kernel[1], offset.shape[2:]
    groups = offset.shape[1] // (2 * taps)
    # For rows and columns (B·O, K·h·w): the cell before the place, and the fraction of a cell from
    # there. Beyond one cell outside of the image all is 0.
    moved = offset.view(batch * groups, taps, 2, *cells)
    lower, fraction = [], []
    for axis, views in enumerate(((-1, 1), (1, -1))):
        start = torch.arange(cells[axis], device=x.device).view(views) * stride - padding
        tap = torch.arange(kernel[axis], device=x.device).view(views).expand(kernel) * dilation
        place = (tap.reshape(taps, 1, 1) + start).to(x.dtype) + moved[:, :, axis]
        place = place.clamp(-2, extent[axis] + 1).flatten(1)
        lower.append(place.detach().floor())
        fraction.append(place - lower[-1])
    flat = x.reshape(batch * groups, channels // groups, -1)
    samples = flat.new_zeros(())
    for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
        rows, columns = (low + one for low, one in zip(lower, corner, strict=True))
        inside = (rows >= 0) & (rows < extent[0]) & (columns >= 0) & (columns < extent[1])
        share = inside * (fraction[0] if corner[0] else 1 - fraction[0])
        share = share * (fraction[1] if corner[1] else 1 - fraction[1])
        index = rows.clamp(0, extent[0] - 1) * extent[1] + columns.clamp(0, extent[1] - 1)
        index = index.long()[:, None].expand(-1, flat.shape[1], -1)
        samples = samples + flat.gather(2, index) * share[:, None]
    samples = samples.view(batch, groups, channels // groups, taps, cells.numel())
    if mask is not None:
        samples = samples * mask.reshape(batch, groups, 1, taps, cells.numel())
    samples = samples.reshape(batch, channels // in_group, in_group * taps, cells.numel())
    filters = weight.reshape(channels // in_group, -1, in_group * taps)
    output = (filters @ samples).view(batch, outputs, *cells)
    return output if bias is None else output + bias.view(-1, 1, 1)


class _Deformable(nn.Module):
    """Common part of both versions: the weights, and the inner convolution that predicts the taps,
    which starts at zero.

    Args:
        in_channels, out_channels: channels of the input and of the output.
        kernel_size, stride, padding, dilation: as in :class:`torch.nn.Conv2d`, square only.
        bias: adds one learnable value to each output channel.
        norm: module applied to the output, or None.
    """

    _inner: str
    """Name of the inner convolution in checkpoints."""
    _channels_per_tap: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: int = 1,
        dilation: int = 1,
        bias: bool = True,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride
        self.padding = padding
        self.dilation = dilation
        self.taps = kernel_size**2
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        predictor = nn.Conv2d(
            in_channels,
            self._channels_per_tap * self.taps,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
        )
        self.add_module(self._inner, predictor)
        self.norm = norm
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(predictor.weight)
        nn.init.zeros_(predictor.bias)

    def _convolve(self, x: Tensor, predicted: Tensor, mask: Tensor | None) -> Tensor:
        """The operator and the norm, in the dtype of what was predicted, which autocast sets."""
        dtype = predicted.dtype
        output = deform_conv2d(
            x.to(dtype),
            predicted,
            self.weight.to(dtype),
            None if self.bias is None else self.bias.to(dtype),
            mask,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
        )
        return output if self.norm is None else self.norm(output)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, taps={self.taps}, stride={self.stride}"


class DeformConv(_Deformable):
    """3x3-style convolution whose taps move by what an inner convolution predicts.

    The inner convolution ``offset`` has 2K output channels: offsets in cells, interleaved (y, x) per
    tap in row-major tap order. It starts at zero, so that a new layer is a plain convolution. Arguments
    as for :class:`ModulatedDeformConv`.
    """

    _inner, _channels_per_tap = "offset", 2

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) → (B, out_channels, h, w)."""
        return self._convolve(x, self.offset(x), None)


class ModulatedDeformConv(_Deformable):
    """3x3-style convolution whose taps move and are weighted by what an inner convolution predicts.

    The inner convolution ``offset_mask`` has 3K output channels. The first 2K are offsets in cells,
    interleaved (y, x) per tap in row-major tap order; the last K are logits of the tap weights, which
    pass a plain sigmoid. It starts at zero, so that a new layer samples the regular grid with all
    weights at 0.5 (yolact/NOTES.md §2 and §11).

    Args:
        in_channels, out_channels: channels of the input and of the output.
        kernel_size, stride, padding, dilation: as in :class:`torch.nn.Conv2d`, square only.
        bias: adds one learnable value to each output channel.
        norm: module applied to the output, or None.
    """

    _inner, _channels_per_tap = "offset_mask", 3

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) → (B, out_channels, h, w)."""
        offsets, logits = self.offset_mask(x).split([2 * self.taps, self.taps], dim=1)
        return self._convolve(x, offsets, logits.sigmoid())


if has_extension():

    @torch.library.register_fake("d2ext::deform_conv2d")
    def _deform_conv2d_fake(
        x: Tensor,
        weight: Tensor,
        offset: Tensor,
        mask: Tensor | None,
        bias: Tensor | None,
        stride: int,
        padding: int,
        dilation: int,
    ) -> Tensor:
        _check(x, weight, offset, mask, bias, stride, padding, dilation)
        return _empty(x, weight.shape[0], offset.shape[2:])

    @torch.library.register_fake("d2ext::deform_conv2d_backward")
    def _deform_conv2d_backward_fake(
        grad: Tensor,
        x: Tensor,
        weight: Tensor,
        offset: Tensor,
        mask: Tensor | None,
        stride: int,
        padding: int,
        dilation: int,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        _check(x, weight, offset, mask, None, stride, padding, dilation)
        return (
            _empty(x, x.shape[1], x.shape[2:]),
            _empty(weight, weight.shape[1], weight.shape[2:]),
            _empty(x, offset.shape[1], offset.shape[2:]),
            x.new_empty(0) if mask is None else _empty(x, mask.shape[1], mask.shape[2:]),
        )

    def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, offset, mask, bias, *ctx.sizes = inputs
        ctx.has_mask, ctx.has_bias = mask is not None, bias is not None
        ctx.save_for_backward(x, weight, offset, *([mask] if ctx.has_mask else []))

    def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight, offset, *rest = ctx.saved_tensors
        mask = rest[0] if ctx.has_mask else None
        *gradients, grad_mask = torch.ops.d2ext.deform_conv2d_backward(
            grad.to(x.dtype),
            x,
            weight,
            offset,
            mask,
            *ctx.sizes,
            torch.are_deterministic_algorithms_enabled(),
        )
        grad_bias = grad.sum((0, 2, 3)) if ctx.has_bias else None
        return *gradients, grad_mask if ctx.has_mask else None, grad_bias, None, None, None

    register_gradient("deform_conv2d", _backward, _save)


def _check(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
) -> None:
    """What the compiled operator refuses."""
    tensors = [t for t in (x, weight, offset, mask, bias) if t is not None]
    given = ", ".join(f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in tensors)

    def check(condition: bool) -> None:
        if not condition:
            raise ValueError(
                f"deform_conv2d: {given} do not belong together, with stride {stride}, padding "
                f"{padding} and dilation {dilation}."
            )

    check(x.dim() == weight.dim() == offset.dim() == 4 and x.dtype in _COMPILED)
    check(all(t.dtype == x.dtype and t.device == x.device for t in tensors))
    check(stride > 0 and dilation > 0 and padding >= 0)
    outputs, in_group, taps = weight.shape[0], weight.shape[1], weight.shape[2] * weight.shape[3]
    check(in_group > 0 and taps > 0 and x.shape[1] > 0)
    check(in_group % _CHANNELS == 0 and x.shape[1] % in_group == 0)
    check(outputs % max(x.shape[1] // in_group, 1) == 0)
    groups = offset.shape[1] // (2 * taps)
    check(groups > 0 and x.shape[1] % (_CHANNELS * groups) == 0)
    cells = [
        (x.shape[i] + 2 * padding - dilation * (weight.shape[i] - 1) - 1) // stride + 1
        for i in (2, 3)
    ]
    check(min(cells) > 0 and offset.shape == (x.shape[0], 2 * taps * groups, *cells))
    check(mask is None or mask.shape == (x.shape[0], taps * groups, *cells))
    check(bias is None or bias.shape == (outputs,))


def _empty(x: Tensor, channels: int, size: Any) -> Tensor:
    return x.new_empty((x.shape[0], channels, *size)).contiguous(memory_format=torch.channels_last)
