"""The cost volume: against naive loops and the published operator, its gradients, its memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from d2ext.layers import correlation
from tests.reference.fixture import Fixture, draw_tensor

OPERATORS = Path(__file__).parents[1] / "reference/vpsnet/operators"


def naive(a: Tensor, b: Tensor, max_displacement: int, stride: int) -> Tensor:
    batch, _, height, width = a.shape
    steps = range(-max_displacement, max_displacement + 1, stride)
    volume = torch.zeros(batch, len(steps) ** 2, height, width, dtype=torch.float64)
    for i, dy in enumerate(steps):
        for j, dx in enumerate(steps):
            for y in range(height):
                for x in range(width):
                    if 0 <= y + dy < height and 0 <= x + dx < width:
                        products = a[:, :, y, x].double() * b[:, :, y + dy, x + dx].double()
                        volume[:, i * len(steps) + j, y, x] = products.mean(dim=1)
    return volume


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return tuple(torch.from_numpy(draw_tensor(name, shape)).to(dtype) for name in "ab")


@pytest.mark.parametrize(("max_displacement", "stride"), [(20, 2), (4, 1)])
def test_equals_the_published_operator(max_displacement: int, stride: int) -> None:
    fixture = Fixture(OPERATORS)
    volume = correlation(*drawn(1, 16, 20, 28), max_displacement, stride)
    assert fixture.compare(f"correlation_d{max_displacement}_s{stride}", volume) < 1e-6


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("shape", "max_displacement", "stride"),
    [
        ((2, 3, 5, 7), 2, 1),
        ((2, 3, 5, 7), 4, 2),  # an odd width
        ((2, 3, 4, 6), 6, 3),  # farther than the map is high
        ((1, 5, 1, 1), 0, 1),
    ],
)
def test_equals_naive_loops(
    shape: tuple[int, ...], max_displacement: int, stride: int, channels_last: bool
) -> None:
    a, b = drawn(*shape)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    a, b = a.to(memory_format=layout), b.to(memory_format=layout)
    volume = correlation(a, b, max_displacement, stride)
    torch.testing.assert_close(volume.double(), naive(a, b, max_displacement, stride))
    assert volume.is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    ("shape", "max_displacement", "stride"),
    [((2, 3, 5, 70), 2, 1), ((1, 3, 5, 71), 4, 2), ((1, 3, 4, 45), 36, 2), ((1, 5, 1, 1), 0, 1)],
)
def test_exported_equals_naive_loops(
    shape: tuple[int, ...], max_displacement: int, stride: int
) -> None:
    class Volume(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return correlation(a, b, max_displacement, stride)

    program = torch.export.export(Volume(), drawn(*shape), strict=False)
    volume = program.module()(*drawn(*shape))
    torch.testing.assert_close(volume.double(), naive(*drawn(*shape), max_displacement, stride))
    assert "as_strided" not in str(program.graph), "ONNX has no views of memory"


def test_any_strides() -> None:
    a, b = drawn(2, 4, 10, 12)
    a, b = a[:, ::2, ::2, 1::2], b.flip(3)[:, ::2, ::2, 1::2]
    torch.testing.assert_close(correlation(a, b, 2).double(), naive(a, b, 2, 1))


@pytest.mark.parametrize(("max_displacement", "stride"), [(2, 1), (2, 2)])
def test_gradients(max_displacement: int, stride: int) -> None:
    a, b = (x.requires_grad_() for x in drawn(2, 2, 3, 5, dtype=torch.float64))
    assert torch.autograd.gradcheck(
        lambda a, b: correlation(a, b, max_displacement, stride), (a, b)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    """Sums of 4096 ones lie beyond bfloat16's integers, sums of squares of 64 beyond float16."""
    a = torch.full((1, 4096, 2, 3), 8.0, dtype=dtype, requires_grad=True)
    volume = correlation(a, a, 1)
    assert volume.dtype == dtype
    assert (volume[:, 4] == 64).all()
    volume[:, 4].sum().backward()
    assert a.grad is not None
    assert a.grad.dtype == dtype


def test_autocast_does_not_change_it() -> None:
    a, b = drawn(1, 16, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(correlation(a, b, 2), correlation(a, b, 2).float())
        volume = correlation(a, b, 2)
    assert torch.equal(volume, correlation(a, b, 2))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_nothing(shape: tuple[int, ...]) -> None:
    a = torch.zeros(shape, requires_grad=True)
    volume = correlation(a, a, 2)
    assert volume.shape == (shape[0], 25, *shape[2:])
    assert not volume.any()
    volume.sum().backward()


def test_wrong_arguments_are_refused() -> None:
    a = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match="same shape"):
        correlation(a, a[:, :1], 2)
    with pytest.raises(ValueError, match="multiple"):
        correlation(a, a, 3, 2)


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that operators return and that live at the same time, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        import weakref

        known = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            storage = x.untyped_storage() if isinstance(x, Tensor) else None
            if storage is not None and storage.data_ptr() not in known | self.live.keys():
                self.live[storage.data_ptr()] = storage.nbytes()
                weakref.finalize(x, self.live.pop, storage.data_ptr(), None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


@pytest.mark.parametrize("channels_last", [False, True])
def test_memory(channels_last: bool) -> None:
    """FlowNetC's, a quarter of its rows: beside arguments and result at most 1.5 times the result."""
    a, b = drawn(1, 256, 26, 208)
    if channels_last:
        a, b = (x.to(memory_format=torch.channels_last) for x in (a, b))
    with PeakMemory() as memory:
        volume = correlation(a, b, 20, 2)
    size = volume.untyped_storage().nbytes()
    assert size <= memory.peak <= 2.5 * size


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_equals_cpu(cuda: torch.device, dtype: torch.dtype) -> None:
    a, b = drawn(2, 64, 20, 31, dtype=dtype)
    expected = correlation(a.float(), b.float(), 20, 2)
    volume = correlation(a.to(cuda), b.to(cuda), 20, 2).cpu().float()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(volume, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
def test_cuda_memory(cuda: torch.device) -> None:
    """FlowNetC's at 832 x 1664: beside arguments and result at most 1.5 times the result."""
    a, b = torch.randn(2, 1, 256, 104, 208, device=cuda).unbind()
    correlation(a, b, 20, 2)  # cuBLAS keeps memory of its own from the first product on
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    volume = correlation(a, b, 20, 2)
    size = volume.untyped_storage().nbytes()
    assert torch.cuda.max_memory_allocated() - before <= 2.5 * size
