"""The deformable layer against plain loops."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from d2ext.layers import has_cuda_extension, has_extension
from d2ext.layers.deform_conv import (
    DeformConv,
    ModulatedDeformConv,
    deform_conv2d,
    deform_conv2d_plain,
    deform_conv2d_reference,
)

needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_cuda_extension()),
    reason="no CUDA device, or d2ext_C is not compiled for CUDA",
)
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def _bilinear(plane: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """plane (C, H, W) at a real position, zeros outside."""
    height, width = plane.shape[1:]
    y0, x0 = int(y // 1), int(x // 1)
    total = torch.zeros(len(plane), dtype=plane.dtype)
    for row, wy in ((y0, 1 - (y - y0)), (y0 + 1, y - y0)):
        for column, wx in ((x0, 1 - (x - x0)), (x0 + 1, x - x0)):
            if 0 <= row < height and 0 <= column < width:
                total += plane[:, row, column] * wy * wx
    return total


def test_starts_as_half_a_convolution() -> None:
    layer = ModulatedDeformConv(4, 6, stride=2)
    x = torch.rand(2, 4, 9, 11)
    expected = F.conv2d(x, layer.weight / 2, layer.bias, stride=2, padding=1)
    torch.testing.assert_close(layer(x), expected)


def test_equals_loops_over_taps() -> None:
    torch.manual_seed(0)
    layer = ModulatedDeformConv(2, 3).double()
    nn.init.normal_(layer.offset_mask.weight, std=0.5)
    nn.init.normal_(layer.bias)
    x = torch.rand(1, 2, 5, 6, dtype=torch.float64)
    predicted = layer.offset_mask(x)[0].detach()
    expected = torch.zeros(3, 5, 6, dtype=torch.float64)
    for i in range(5):
        for j in range(6):
            total = layer.bias.detach().clone()
            for tap in range(9):
                dy, dx = predicted[2 * tap, i, j], predicted[2 * tap + 1, i, j]
                weight = torch.sigmoid(predicted[18 + tap, i, j])
                value = _bilinear(x[0], float(i - 1 + tap // 3 + dy), float(j - 1 + tap % 3 + dx))
                total += layer.weight[:, :, tap // 3, tap % 3].detach() @ value * weight
            expected[:, i, j] = total
    torch.testing.assert_close(layer(x)[0].detach(), expected)


def test_norm_is_applied_and_gradients_flow() -> None:
    layer = ModulatedDeformConv(2, 3, norm=nn.BatchNorm2d(3))
    output = layer(torch.rand(4, 2, 6, 6))
    torch.testing.assert_close(output.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    output.square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_runs_under_autocast() -> None:
    layer = ModulatedDeformConv(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(torch.rand(1, 2, 6, 6))
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_infinite_offsets_do_not_crash(value: float) -> None:
    """torchvision's kernel reads outside the image where an offset is NaN."""
    conv = ModulatedDeformConv(3, 4)
    with torch.no_grad():
        conv.offset_mask.bias[:] = value
    output = conv(torch.rand(1, 3, 40, 50))
    assert output.shape == (1, 4, 40, 50)
    if value != value:
        assert output.isnan().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_infinite_offsets_of_one_place_stay_there(value: float) -> None:
    """Without tap weights too, and what is far from a broken place of the input stays finite."""
    conv = DeformConv(2, 3)
    conv.offset.weight.data[:] = 0.01
    x = torch.rand(1, 2, 12, 14)
    x[0, 0, 5, 6] = value
    output = conv(x)
    assert output.shape == (1, 3, 12, 14)
    near, far = torch.zeros(12, 14, dtype=torch.bool), torch.ones(12, 14, dtype=torch.bool)
    near[4:7, 5:8] = True
    # Taps lie between cells: they interpolate with the next but one neighbour.
    far[3:8, 4:9] = False
    if value != value:
        assert output[0, :, near].isnan().all()
    assert output[0, :, far].isfinite().all()


class Case:
    """Random arguments of the operators."""

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        groups: int = 1,
        offset_groups: int = 1,
        weighted: bool = True,
        size: tuple[int, int] = (13, 10),
        device: str = "cuda",
        **sizes: int,
    ) -> None:
        generator = torch.Generator().manual_seed(groups + 2 * offset_groups)
        self.sizes = {"stride": 1, "padding": 1, "dilation": 1, **sizes}
        height, width = (
            (n + 2 * self.sizes["padding"] - 2 * self.sizes["dilation"] - 1) // self.sizes["stride"]
            + 1
            for n in size
        )
        channels, outputs, taps = 32, 24, 9

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.x = draw(3, channels, *size)
        # Some taps are far outside, some in the half cell around the image.
        self.offset = 2 * draw(3, 2 * taps * offset_groups, height, width)
        self.weight = draw(outputs, channels // groups, 3, 3) / 16
        self.bias = draw(outputs)
        self.mask = draw(3, taps * offset_groups, height, width).sigmoid() if weighted else None
        self.grad = draw(3, outputs, height, width)

    def leaves(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """x, offset, weight, bias, mask."""
        given = (self.x, self.offset, self.weight, self.bias, self.mask)
        return [t.detach().to(dtype).requires_grad_() for t in given if t is not None]

    def run(self, function, dtype: torch.dtype) -> list[torch.Tensor]:
        """The result and the gradients of the leaves."""
        leaves = self.leaves(dtype)
        output = function(*leaves, **self.sizes)
        return [output.detach(), *torch.autograd.grad(output, leaves, self.grad.to(dtype))]


CASES = [
    {},
    {"weighted": False},
    {"groups": 4},
    {"offset_groups": 2},
    {"groups": 2, "offset_groups": 4, "weighted": False},
    {"stride": 2, "padding": 3, "dilation": 2},
    {"size": (3, 3), "padding": 0},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_plain_pytorch_equals_torchvision(options: dict) -> None:
    case = Case(torch.float64, device="cpu", **options)
    case.offset[0, :4] = -1.0  # where a slope is that of one side
    results = [case.run(f, torch.float64) for f in (deform_conv2d_plain, deform_conv2d_reference)]
    for plain, expected in zip(*results, strict=True):
        torch.testing.assert_close(plain, expected, rtol=1e-9, atol=1e-9)
    case.offset[0, :2] = torch.tensor([float("inf"), -float("inf")]).view(2, 1, 1)
    case.offset[1, 4, 0, 0] = float("nan")
    plain, expected = (
        f(*case.leaves(torch.float32), **case.sizes)
        for f in (deform_conv2d_plain, deform_conv2d_reference)
    )
    assert plain[1, :, 0, 0].isnan().all() and int(plain.isnan().sum()) == plain.shape[1]
    torch.testing.assert_close(plain, expected, equal_nan=True, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not has_extension(), reason="d2ext_C is not compiled")
@pytest.mark.parametrize("options", CASES, ids=str)
def test_on_a_cpu_without_gradients(options: dict) -> None:
    case = Case(torch.float32, device="cpu", **options)
    case.offset[0, :4] = -1.0
    case.offset[1, :2] = torch.tensor([float("inf"), -float("inf")]).view(2, 1, 1)
    case.offset[2, 4, 0, 0] = float("nan")
    leaves = case.leaves(torch.float32)
    with torch.no_grad(), torch.profiler.profile() as profile:
        actual = deform_conv2d(*leaves, **case.sizes)
    assert any("d2ext::deform_conv2d" in event.key for event in profile.key_averages())
    expected = deform_conv2d_reference(*leaves, **case.sizes)
    # Of several groups, those alone that have channels with this offset.
    broken = actual.isnan()
    reached = 12 if {"groups", "offset_groups"} <= options.keys() else 24
    assert int(broken.sum()) == int(broken[2, :, 0, 0].sum()) == reached
    torch.testing.assert_close(
        actual[~expected.isnan()], expected[~expected.isnan()], rtol=1e-4, atol=1e-4
    )
    given = (
        leaves[0],
        leaves[2],
        leaves[1],
        leaves[4] if case.mask is not None else None,
        leaves[3],
    )
    arguments = [None if t is None else t.detach() for t in given]
    torch.library.opcheck(
        torch.ops.d2ext.deform_conv2d.default,
        (*arguments, *case.sizes.values()),
        test_utils=("test_schema", "test_faketensor"),
    )
    assert deform_conv2d(*leaves, **case.sizes).requires_grad  # torchvision's


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_samples_anew(cuda: torch.device, dtype: torch.dtype) -> None:
    """torchvision's kernels are no part of it."""
    case = Case(dtype)
    x, offset, weight, bias, mask = (t.detach() for t in case.leaves(dtype))
    run = lambda: deform_conv2d(x, offset, weight, bias, mask, **case.sizes)  # noqa: E731
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        offset.copy_(2 * torch.randn_like(offset))
        graph.replay()
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
        torch.testing.assert_close(output, run(), **tolerance)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_compiled_equals_torchvision_in_float32(
    dtype: torch.dtype, options: dict, deterministic: bool
) -> None:
    case = Case(dtype, **options)
    expected = case.run(deform_conv2d_reference, torch.float32)
    torch.use_deterministic_algorithms(deterministic)
    try:
        given = case.run(deform_conv2d, dtype)
    finally:
        torch.use_deterministic_algorithms(False)
    tolerance = max(4 * torch.finfo(dtype).eps, 1e-5)
    for ours, theirs in zip(given, expected, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        error = (ours.float() - theirs).abs().max()
        assert error <= tolerance * theirs.abs().max().clamp(min=1), error


@pytest.mark.gpu
@needs_cuda
def test_deterministic_gradients_are_the_same_every_time() -> None:
    """Of one cell that hundreds of taps read."""
    case = Case(torch.bfloat16, size=(40, 40))
    cells = torch.arange(40, device="cuda", dtype=torch.bfloat16)
    case.offset[:, 0::2] = 20 - cells[:, None]
    case.offset[:, 1::2] = 20 - cells
    torch.use_deterministic_algorithms(True)
    try:
        runs = [case.run(deform_conv2d, torch.bfloat16)[1] for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(run, runs[0]) for run in runs[1:])
    expected = case.run(deform_conv2d_reference, torch.float32)[1]
    torch.testing.assert_close(
        runs[0].float(), expected, rtol=0.02, atol=0.02 * float(expected.max())
    )


@pytest.mark.gpu
@needs_cuda
def test_compiled_operator_keeps_what_pytorch_asks() -> None:
    case = Case(torch.float16, offset_groups=2)
    x, offset, weight, bias, mask = case.leaves(torch.float16)
    arguments = (x, weight, offset, mask, bias, *case.sizes.values())
    torch.library.opcheck(torch.ops.d2ext.deform_conv2d.default, arguments, atol=1e-2, rtol=1e-2)
    backward = (case.grad.half(), *arguments[:4], *case.sizes.values(), False)
    checks = ("test_schema", "test_faketensor")  # strides, too, which the compiler relies on
    torch.library.opcheck(
        torch.ops.d2ext.deform_conv2d_backward.default,
        tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in backward),
        test_utils=checks,
    )
    for broken in (
        (x.float(), *arguments[1:]),
        (x[:, :24], *arguments[1:]),
        (x, weight, offset[:, :17], *arguments[3:]),
        (x, weight, offset, mask[..., :-1], *arguments[4:]),
        (x, weight, offset, mask, bias[1:], 1, 1, 1),
        (*arguments[:5], 0, 1, 1),
    ):
        with pytest.raises(ValueError, match="deform_conv2d"):
            torch.ops.d2ext.deform_conv2d(*broken)
        with torch._subclasses.FakeTensorMode() as mode, pytest.raises(ValueError):
            fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in broken]
            torch.ops.d2ext.deform_conv2d(*fake)
    empty = deform_conv2d(x[:0], offset[:0], weight, bias, mask[:0], **case.sizes)
    empty.sum().backward()
    assert empty.shape == (0, *case.grad.shape[1:]) and not weight.grad.any()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_operator_passes_nan_on(dtype: torch.dtype) -> None:
    case = Case(dtype)
    case.offset[0, 3, 5, 6] = torch.nan
    case.mask[1, 2, 7, 8] = torch.nan
    case.offset[2, 4, 1, 1] = torch.inf
    output, *gradients = case.run(deform_conv2d, dtype)
    broken = output.isnan()
    assert broken[0, :, 5, 6].all() and broken[1, :, 7, 8].all()
    assert broken.sum() == 2 * output.shape[1]
    assert gradients[1][0, 3, 5, 6].isnan() and gradients[2].isnan().any()


@pytest.mark.gpu
@needs_cuda
def test_layer_in_bfloat16_takes_the_compiled_operator() -> None:
    torch.manual_seed(0)
    layer = ModulatedDeformConv(16, 8).cuda()
    nn.init.normal_(layer.offset_mask.weight, std=0.2)
    x = torch.rand(2, 16, 9, 11, device="cuda")
    expected = layer(x)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        with torch.profiler.profile() as profile:
            output = layer(x)
        assert any("d2ext::deform_conv2d" in event.key for event in profile.key_averages())
        output.sum().backward()
    assert output.dtype == torch.bfloat16 and output.is_contiguous(
        memory_format=torch.channels_last
    )
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
