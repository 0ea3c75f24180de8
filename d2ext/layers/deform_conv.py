"""Deformable convolution on torchvision's operator: v1 (arXiv 1703.06211) and v2, which also weights
the taps (DCNv2, arXiv 1811.11168).

Shapes: B images, C channels, H×W input cells, h×w output cells, K = kernel_h·kernel_w taps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


def _supported(predicted: Tensor) -> torch.dtype:
    """The dtype to run the operator in.

    It needs one dtype for all its arguments, and has no kernels for bfloat16, nor for float16 on the
    CPU; there it runs in float32 and the caller casts the result back.
    """
    dtype = predicted.dtype
    if dtype == torch.bfloat16 or (dtype == torch.float16 and not predicted.is_cuda):
        return torch.float32
    return dtype


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

    def _convolve(self, x: Tensor, offsets: Tensor, logits: Tensor | None) -> Tensor:
        """The operator, in a dtype for which it has kernels. Where an offset is NaN it would read
        outside the image and may crash, so it gets 0 there; the caller makes the result NaN."""
        dtype = _supported(offsets)
        return deform_conv2d(
            x.to(dtype),
            offsets.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).to(dtype),
            self.weight.to(dtype),
            None if self.bias is None else self.bias.to(dtype),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            mask=None if logits is None else logits.to(dtype).sigmoid(),
        ).to(offsets.dtype)

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
        offsets = self.offset(x)
        broken = offsets.isnan().any(dim=1, keepdim=True)
        output = self._convolve(x, offsets, None).masked_fill(broken, torch.nan)
        return output if self.norm is None else self.norm(output)


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
        # Where an offset is NaN, so is the tap's weight, and with it the result.
        output = self._convolve(x, offsets, logits)
        return output if self.norm is None else self.norm(output)
