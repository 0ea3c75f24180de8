"""Convolutions with norm, addition and ReLU, for inference on NVIDIA GPUs in one cuDNN kernel.

PyTorch runs a convolution's bias, a residual addition and a ReLU as separate kernels, each of which
reads and writes the activations again. In low precision they take as long as the convolutions.
"""

from __future__ import annotations

import torch
from detectron2.layers import Conv2d, get_norm
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from torch import Tensor, nn
from torch.nn import functional as F


def conv_norm(
    in_channels: int,
    out_channels: int,
    kernel: int,
    *,
    norm: str,
    stride: int = 1,
    groups: int = 1,
) -> Conv2d:
    """k×k convolution without bias, padded to keep the size at stride 1, and its norm.

    PyTorch's initial weights: the published models were trained from these.
    """
    return Conv2d(
        in_channels,
        out_channels,
        kernel,
        stride=stride,
        padding=(kernel - 1) // 2,
        groups=groups,
        bias=not norm,
        norm=get_norm(norm, out_channels),
    )


def conv_relu(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """relu(conv(x)), in one kernel if :func:`fuse_activations` marked the convolution."""
    if getattr(conv, "fuse_relu", False):
        if hasattr(conv, "blocked"):
            return conv.blocked(x)
        return torch.cudnn_convolution_relu(
            x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )
    return F.relu(conv(x))


def _conv_add_relu(conv: nn.Conv2d, x: Tensor, other: Tensor) -> Tensor:
    """relu(conv(x) + other) in one kernel."""
    return torch.cudnn_convolution_add_relu(
        x, conv.weight, other, 1.0, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )


def conv_add_relu(conv: nn.Conv2d, x: Tensor, other: Tensor) -> Tensor:
    """relu(conv(x) + other), in one kernel if :func:`fuse_activations` marked the convolution."""
    if getattr(conv, "fuse_relu", False):
        return _conv_add_relu(conv, x, other)
    return F.relu(conv(x) + other)


def take_bias(conv: nn.Conv2d) -> Tensor:
    """Remove the bias (out,) of a convolution and return it; 0 for one that has none."""
    bias, conv.bias = conv.bias, None
    return conv.weight.new_zeros(len(conv.weight)) if bias is None else bias.data


# Pixels of a row in a block of :class:`BlockedStem`: with 3 colours 24 channels, a multiple of 8, as
# tensor cores want them.
_BLOCK = 8


class BlockedStem(nn.Module):
    """A convolution of an image and a ReLU, in blocks: 8 pixels of a row are one of 24 channels, and so
    are their results.

    The numbers are the same, and come from tensor cores, which do not take 3 channels. In channels-last
    memory blocks are views.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        assert conv.bias is not None
        out, colours, rows, taps = conv.weight.shape
        self.step, margin = conv.stride[1], conv.padding[1]
        results = _BLOCK // self.step
        # For each result of a block: the pixels of the block before, this one and the one after it.
        weight = conv.weight.new_zeros(results, out, 3 * _BLOCK, colours, rows)
        for i in range(results):
            start = _BLOCK + i * self.step - margin
            weight[i, :, start : start + taps] = conv.weight.permute(0, 3, 1, 2)
        weight = weight.view(results * out, 3, _BLOCK * colours, rows).permute(0, 2, 3, 1)
        self.conv = nn.utils.skip_init(
            nn.Conv2d,
            _BLOCK * colours,
            results * out,
            (rows, 3),
            stride=(conv.stride[0], 1),
            padding=(conv.padding[0], 1),
        )
        self.conv.weight = nn.Parameter(weight, requires_grad=False)
        self.conv.bias = nn.Parameter(conv.bias.data.repeat(results), requires_grad=False)

    @staticmethod
    def suits(conv: nn.Conv2d) -> bool:
        """Whether this convolution can run so."""
        step, padding, taps = conv.stride[1], conv.padding[1], conv.kernel_size[1]
        return (
            conv.in_channels == 3
            and conv.groups == 1
            and conv.dilation == (1, 1)
            and _BLOCK % step == 0
            and padding == (taps - 1) / 2 <= _BLOCK
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, out, H', W'), what the convolution's would be."""
        batch, colours, height, width = x.shape
        x = F.pad(x, (0, -width % _BLOCK)).permute(0, 2, 3, 1)
        x = x.reshape(batch, height, -1, _BLOCK * colours).permute(0, 3, 1, 2)
        x = conv_relu(self.conv, x).permute(0, 2, 3, 1)
        x = x.reshape(batch, x.shape[1], -1, self.conv.out_channels * self.step // _BLOCK)
        return x[:, :, : (width - 1) // self.step + 1].permute(0, 3, 1, 2)


class _FusedStem(nn.Module):
    """Detectron2's ``BasicStem``."""

    def __init__(self, stem: BasicStem) -> None:
        super().__init__()
        self.conv1 = stem.conv1

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(conv_relu(self.conv1, x), kernel_size=3, stride=2, padding=1)


class _FusedResidual(nn.Module):
    """Detectron2's ``BasicBlock`` and ``BottleneckBlock``: the last convolution adds the shortcut."""

    def __init__(self, block: BasicBlock | BottleneckBlock) -> None:
        super().__init__()
        names = ["conv1", "conv2", "conv3"] if hasattr(block, "conv3") else ["conv1", "conv2"]
        self.convs = nn.ModuleList(getattr(block, name) for name in names)
        self.shortcut = block.shortcut

    def forward(self, x: Tensor) -> Tensor:
        other = x if self.shortcut is None else self.shortcut(x)
        *first, last = self.convs
        for conv in first:
            x = conv_relu(conv, x)
        return _conv_add_relu(last, x, other)


_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    BasicStem: _FusedStem,
    BasicBlock: _FusedResidual,
    BottleneckBlock: _FusedResidual,
}


def _is_plain(conv: nn.Module) -> bool:
    """Whether this is a convolution with a bias, without norm or activation."""
    if not isinstance(conv, nn.Conv2d) or conv.bias is None or isinstance(conv.padding, str):
        return False
    return not isinstance(conv, Conv2d) or (conv.norm is None and conv.activation is None)


def fuse_activations(module: nn.Module, *, blocked_stems: bool = False) -> None:
    """Prepare a module whose norms are folded, in place, for inference on an NVIDIA GPU.

    Detectron2's residual blocks and stem are replaced by fused ones, and convolutions that are
    followed by a ReLU through :func:`conv_relu` or :func:`conv_add_relu` are marked. Other modules stay
    as they are.

    Args:
        blocked_stems: convolutions of images with ReLU become :class:`BlockedStem`, which is worth it in
            low precision and channels-last memory.
    """
    if blocked_stems:
        for child in list(module.modules()):
            if _is_plain(child) and BlockedStem.suits(child):
                child.blocked = BlockedStem(child)
    for child in module.modules():
        if _is_plain(child):
            child.fuse_relu = True
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            fused = _FUSED.get(type(child))
            if fused is None:
                continue
            convs = [c for c in child.children() if isinstance(c, nn.Conv2d)]
            if all(_is_plain(conv) for conv in convs):
                setattr(parent, name, fused(child))
