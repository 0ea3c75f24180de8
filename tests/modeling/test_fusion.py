"""Convolutions with their ReLU in other forms: the results stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.modeling.fusion import BlockedStem, conv_relu, fuse_activations
from d2ext.modeling.inference import InferenceNetwork


class _Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 7, stride=2, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        return conv_relu(self.conv, x)


@pytest.mark.parametrize(
    ("kernel", "stride", "size"),
    [(7, 1, (20, 64)), (7, 2, (37, 75)), (7, 2, (8, 55)), (3, 2, (9, 40)), (5, 4, (16, 3))],
)
def test_blocked_stem_equals_its_convolution(
    kernel: int, stride: int, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, kernel, stride=stride, padding=kernel // 2)
    assert BlockedStem.suits(conv)
    x = torch.randn(2, 3, *size).to(memory_format=torch.channels_last)
    expected = F.relu(conv(x))
    assert expected.count_nonzero() > expected.numel() / 4
    torch.testing.assert_close(BlockedStem(conv)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(3, 6, 3),
        nn.Conv2d(3, 6, 4, padding=2),
        nn.Conv2d(3, 6, 3, stride=3, padding=1),
        nn.Conv2d(3, 6, 3, padding=2, dilation=2),
        nn.Conv2d(3, 6, 3, padding=1, groups=3),
    ],
)
def test_other_convolutions_are_not_blocked(conv: nn.Conv2d) -> None:
    assert not BlockedStem.suits(conv)
    fuse_activations(conv, blocked_stems=True)
    assert not hasattr(conv, "blocked")


def test_blocks_have_their_relu_in_one_kernel() -> None:
    stem = _Stem()
    fuse_activations(stem, blocked_stems=True)
    assert stem.conv.blocked.conv.fuse_relu


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["eager", "cudagraph"])
def test_networks_in_low_precision_have_blocked_stems(cuda: torch.device, mode: str) -> None:
    torch.manual_seed(0)
    network = _Stem().to(cuda)
    x = torch.randn(2, 3, 37, 75, device=cuda)
    run = InferenceNetwork(
        network, lambda y: y.float(), mode=mode, dtype="bfloat16", channels_last=True
    )
    with torch.no_grad():
        for _ in range(2):  # new weights reach the copy
            network.conv.weight.mul_(1.5)
            expected = network(x)
            error = (run(x) - expected).norm() / expected.norm()
            assert error < 0.01
    assert run._prepared is not None and hasattr(run._prepared.conv, "blocked")
