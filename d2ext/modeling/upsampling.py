"""Layers for up-sampling paths: transposed and deformable convolutions."""

from __future__ import annotations

import torch
from detectron2.layers import get_norm
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.layers.deform_conv import ModulatedDeformConv


def bilinear_kernel(size: int) -> Tensor:
    """(size, size) weights that make a transposed convolution of stride size / 2 interpolate."""
    factor = (size + 1) // 2
    center = (2 * factor - 1 - factor % 2) / (2 * factor)
    line = 1 - (torch.arange(size) / factor - center).abs()
    return line[:, None] * line[None, :]


class DepthwiseUpsampling(nn.ConvTranspose2d):
    """Transposed convolution of each channel alone.

    On GPUs in low precision it runs as one of all channels, with zeros between different ones: the same
    numbers, up to 40 times as fast, backward too, since cuDNN has kernels for tensor cores for dense
    convolutions alone.
    """

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(B, C, h, w) → (B, C, h * stride, w * stride)."""
        if not x.is_cuda or x.dtype == torch.float32 or output_size is not None:
            return super().forward(x, output_size)
        kernels = self.weight[:, 0].to(x.dtype).permute(1, 2, 0)
        weight = torch.diag_embed(kernels).permute(2, 3, 0, 1)
        return F.conv_transpose2d(x, weight, None, self.stride, self.padding)


def upsampling(channels: int, factor: int, *, depthwise: bool) -> nn.ConvTranspose2d:
    """Transposed convolution that enlarges by ``factor`` (even) and starts as bilinear interpolation.

    Kernel 2 * factor, padding factor / 2, no bias.

    Args:
        depthwise: one group for each channel. Otherwise channels mix: the bilinear kernel maps each
            channel to itself, and the other weights start as PyTorch's random ones.
    """
    make = DepthwiseUpsampling if depthwise else nn.ConvTranspose2d
    conv = make(
        channels,
        channels,
        2 * factor,
        stride=factor,
        padding=factor // 2,
        groups=channels if depthwise else 1,
        bias=False,
    )
    kernel = bilinear_kernel(2 * factor)
    with torch.no_grad():
        if depthwise:
            conv.weight[:, 0] = kernel
        else:
            diagonal = torch.arange(channels)
            conv.weight[diagonal, diagonal] = kernel
    return conv


class DeformConvNormReLU(nn.Module):
    """3x3 modulated deformable convolution with bias, norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, norm: str) -> None:
        super().__init__()
        self.conv = ModulatedDeformConv(
            in_channels, out_channels, norm=get_norm(norm, out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, h, w) → (B, out, h, w), not negative."""
        return F.relu(self.conv(x))
