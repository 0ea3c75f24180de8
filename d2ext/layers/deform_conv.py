"""Deformable convolution on torchvision's operator: v1 (arXiv 1703.06211) and, with weights for its
taps, v2 (DCNv2, arXiv 1811.11168).

Shapes: B images, C channels, H×W input cells, h×w output cells, K = kernel_h·kernel_w taps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


def _supported(predicted: Tensor) -> torch.dtype:
    """The dtype to run the operator in.

    It wants one dtype for all its arguments, and has no kernels for bfloat16, nor for float16 on the
    CPU; it runs in float32 there and the caller casts the result back.
    """
    dtype = predicted.dtype
    if dtype == torch.bfloat16 or (dtype == torch.float16 and not predicted.is_cuda):
        return torch.float32
    return dtype


class _Deformable(nn.Module):
    """What both versions are made of: the weights, and the inner convolution under the name it has in
    checkpoints. It starts at zero."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        inner: str,
        channels_per_tap: int,
        stride: int,
        padding: int,
        dilation: int,
        bias: bool,
        norm: nn.Module | None,
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
            channels_per_tap * self.taps,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
        )
        self.add_module(inner, predictor)
        self.norm = norm
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(predictor.weight)
        nn.init.zeros_(predictor.bias)

    def _convolve(self, x: Tensor, offsets: Tensor, logits: Tensor | None) -> Tensor:
        """The operator, in a dtype that it has; it reads outside the image where an offset is NaN (and
        may crash), and gets a finite one there. The caller sees to it that the result is NaN."""
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
    tap in row-major tap order. It starts at zero, so that a new layer is a plain convolution.

    Args:
        in_channels, out_channels: channels of the input and of the output.
        kernel_size, stride, padding: as in :class:`torch.nn.Conv2d`, square only.
        bias: adds one learnable value to each output channel.
        norm: module applied to the output, or None.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        stride: int = 1,
        padding: int = 1,
        bias: bool = True,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            inner="offset",
            channels_per_tap=2,
            stride=stride,
            padding=padding,
            dilation=1,
            bias=bias,
            norm=norm,
        )

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
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            inner="offset_mask",
            channels_per_tap=3,
            stride=stride,
            padding=padding,
            dilation=dilation,
            bias=bias,
            norm=norm,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) → (B, out_channels, h, w)."""
        offsets, logits = self.offset_mask(x).split([2 * self.taps, self.taps], dim=1)
        # Where an offset is NaN, so are the tap weights of the same place, and with them the result.
        output = self._convolve(x, offsets, logits)
        return output if self.norm is None else self.norm(output)
