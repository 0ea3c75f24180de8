"""Corner and center pooling: each implementation against naive loops, and against each other."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from d2ext.layers import (
    CornerPool,
    _extension,
    center_pool,
    corner_pool,
    corner_pool_pair,
    corner_pool_reference,
    has_cuda_extension,
    has_extension,
)
from tests.reference.fixture import Fixture, draw_tensor

REFERENCE = Path(__file__).parents[1] / "reference" / "cornernet"
needs_extension = pytest.mark.skipif(not has_extension(), reason="d2ext_C is not compiled")
needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_cuda_extension()),
    reason="no CUDA device, or d2ext_C is not compiled for CUDA",
)
IMPLEMENTATIONS = [
    "reference",
    pytest.param("cpu", marks=needs_extension),
    pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda]),
]
COMPILED = IMPLEMENTATIONS[1:]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
DIRECTIONS = ("top", "bottom", "left", "right")
CORNERS = {"top_left": ("top", "left"), "bottom_right": ("bottom", "right")}
COMPILED_OPERATORS = (*DIRECTIONS, *CORNERS)
OPERATORS = (*COMPILED_OPERATORS, "center")
# Whole vectors and none, lines shorter and longer than a vector, a warp and a thread block take at
# once, one cell, one line.
SHAPES = [
    (2, 3, 5, 7),
    (1, 2, 16, 32),
    (2, 1, 33, 50),
    (1, 2, 70, 128),
    (1, 1, 1, 1),
    (1, 2, 1, 40),
    (1, 2, 40, 1),
    (1, 1, 300, 24),
    (1, 1, 24, 300),
    (1, 1, 9, 1100),
    (1, 1, 1100, 9),
    (1, 1, 1100, 8),
]


def on(implementation: str, *tensors: Tensor) -> list[Tensor]:
    device = "cuda" if implementation == "cuda" else "cpu"
    return [tensor.to(device) for tensor in tensors]


def operator(implementation: str, name: str) -> Callable[..., Tensor]:
    """The operator by the name of its direction or corner, or "center"; of one or two maps."""
    reference = implementation == "reference"
    if name == "center":
        return center_pool
    if name in CORNERS:
        if not reference:
            return lambda vertical, horizontal: corner_pool_pair(vertical, horizontal, name)
        down, across = {"top_left": ("top", "left"), "bottom_right": ("bottom", "right")}[name]
        return lambda v, h: corner_pool_reference(v, down) + corner_pool_reference(h, across)
    single = corner_pool_reference if reference else corner_pool
    return lambda x: single(x, name)


def inputs_of(name: str) -> int:
    return 1 if name in DIRECTIONS else 2


def draw(shape: tuple[int, ...], seed: int = 0, tied: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # Multiples of 1/2 and 1/16: exact in every dtype.
    return (2 * x).round().div(2).relu() if tied else (16 * x).round() / 16


def gradients(implementation: str, name: str, maps: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in on(implementation, *maps)]
    output = operator(implementation, name)(*leaves)
    return [g.cpu() for g in torch.autograd.grad(output, leaves, *on(implementation, grad))]


# ---------------------------------------------------------------- naive loops


def naive_line(values: list[float], order: list[int]) -> dict[int, int]:
    """For each index of a line the index that holds the running maximum in scan order."""
    holders = {}
    best = order[0]
    for i in order:
        greater = values[i] > values[best]
        if greater or (math.isnan(values[i]) and not math.isnan(values[best])):
            best = i
        holders[i] = best
    return holders


def naive_holders(x: Tensor, direction: str) -> Tensor:
    """(B, C, H, W) int64: index along the scanned axis."""
    vertical = direction in ("top", "bottom")
    lines = x.transpose(2, 3) if vertical else x
    holders = torch.zeros(lines.shape, dtype=torch.int64)
    order = list(range(lines.shape[3]))
    if direction in ("top", "left"):
        order.reverse()
    for place in itertools.product(*map(range, lines.shape[:3])):
        for i, holder in naive_line(lines[place].tolist(), order).items():
            holders[(*place, i)] = holder
    return holders.transpose(2, 3) if vertical else holders


def naive_pool(x: Tensor, directions: tuple[str, ...], grad: Tensor) -> tuple[Tensor, Tensor]:
    """Poolings one after the other of a float64 map: the result, and the gradient of x."""
    steps = []
    for direction in directions:
        axis = 2 if direction in ("top", "bottom") else 3
        holders = naive_holders(x, direction)
        steps.append((axis, holders))
        x = x.gather(axis, holders)
    for axis, holders in reversed(steps):
        grad = torch.zeros_like(grad).scatter_add(axis, holders, grad)
    return x, grad


def naive(name: str, maps: list[Tensor], grad: Tensor) -> tuple[Tensor, list[Tensor]]:
    if name == "center":
        chains = [("top", "bottom"), ("left", "right")]
    else:
        chains = [(direction,) for direction in CORNERS.get(name, (name,))]
    parts = [naive_pool(x, chain, grad) for x, chain in zip(maps, chains, strict=True)]
    return sum(part[0] for part in parts), [part[1] for part in parts]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_naive_loops(implementation, name, shape):
    maps = [draw(shape, seed=1), draw(shape, seed=2)][: inputs_of(name)]
    grad = draw(shape, seed=3)
    expected, expected_grads = naive(name, maps, grad)
    for dtype in DTYPES:
        cast = [x.to(dtype) for x in maps]
        output = operator(implementation, name)(*on(implementation, *cast)).cpu()
        assert output.dtype == dtype
        assert torch.equal(output, expected.to(dtype))
        # Sums of float16 and bfloat16 gradients are formed in float32 and rounded once.
        tolerance = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 0.0)
        for actual, wanted in zip(
            gradients(implementation, name, cast, grad.to(dtype)), expected_grads, strict=True
        ):
            assert actual.dtype == dtype and actual.shape == shape
            torch.testing.assert_close(
                actual, wanted.to(dtype), rtol=tolerance, atol=100 * tolerance
            )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ties_go_to_the_first_met(implementation, name, shape):
    maps = [draw(shape, 4, tied=True), draw(shape, 5, tied=True)][: inputs_of(name)]
    grad = torch.ones(shape, dtype=torch.float64)
    expected, expected_grads = naive(name, maps, grad)
    for dtype in (torch.float32, torch.bfloat16):
        cast = [x.to(dtype) for x in maps]
        output = operator(implementation, name)(*on(implementation, *cast)).cpu()
        assert torch.equal(output, expected.to(dtype))
        found = gradients(implementation, name, cast, grad.to(dtype))
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(found, expected_grads, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ties_by_hand(implementation):
    x = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0]]).reshape(1, 1, 1, 5)
    ones = torch.ones_like(x)
    cases = {
        "right": [1, 4, 0, 0, 0],
        "left": [0, 0, 0, 0, 5],
        "top": [1, 1, 1, 1, 1],
    }
    for name, expected in cases.items():
        (found,) = gradients(implementation, name, [x], ones)
        assert found.flatten().tolist() == expected
    for maps, index in (([x, x], 1), ([x.transpose(2, 3), x.transpose(2, 3)], 0)):
        found = gradients(implementation, "center", maps, torch.ones_like(maps[0]))[index]
        assert found.flatten().tolist() == [0, 0, 0, 0, 5]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", [(1, 2, 16, 48), (1, 1, 7, 9), (1, 1, 150, 140)])
def test_nan_and_infinity(implementation, name, shape):
    values = torch.tensor([math.nan, -math.inf, math.inf, 0.0, 1.0], dtype=torch.float64)
    chance = torch.tensor([0.02, 0.5, 0.02, 0.3, 0.16])
    maps = []
    for seed in range(inputs_of(name)):
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(chance, math.prod(shape), True, generator=generator)
        maps.append(values[drawn].reshape(shape))
    maps[0][..., 0] = -math.inf
    grad = draw(shape, seed=3)
    expected, expected_grads = naive(name, maps, grad)
    for dtype in DTYPES:
        cast = [x.to(dtype) for x in maps]
        output = operator(implementation, name)(*on(implementation, *cast)).cpu()
        torch.testing.assert_close(output, expected.to(dtype), equal_nan=True, rtol=0, atol=0)
        found = gradients(implementation, name, cast, grad.to(dtype))
        for actual, wanted in zip(found, expected_grads, strict=True):
            assert not actual.isnan().any()
            torch.testing.assert_close(actual, wanted.to(dtype), rtol=1e-6, atol=1e-5)


# ---------------------------------------------------------------- the published operator


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("suffix", ["", "_tied"])
def test_published_fixture(implementation, direction, suffix):
    fixture = Fixture(REFERENCE / "corner_pooling")
    shape = (2, 6, 13, 17)
    x = torch.from_numpy(draw_tensor("corner_pool_input", shape, seed=1))
    grad = torch.from_numpy(draw_tensor("corner_pool_grad", shape, seed=1))
    if suffix:
        x = ((2 * x).round() / 2).clamp(min=0)
    output = operator(implementation, direction)(*on(implementation, x)).cpu()
    assert fixture.compare(direction + suffix, output) == 0
    (found,) = gradients(implementation, direction, [x], grad)
    assert fixture.compare(f"{direction}{suffix}_grad", found) < 1e-6


# ---------------------------------------------------------------- layout, empty maps


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", [(2, 8, 20, 24), (2, 3, 5, 7)])
def test_any_strides(implementation, name, shape):
    count = inputs_of(name)
    maps = [draw(shape, seed=1).float(), draw(shape, seed=2).float()][:count]
    grad = draw(shape, seed=3).float()
    expected = operator("reference", name)(*maps)
    expected_grads = gradients("reference", name, maps, grad)
    b, c, h, w = shape
    sliced = [torch.full((b, 2 * c, h + 3, w + 5), 9.0)[:, ::2, 1:-2, 2:-3] for _ in maps]
    for target, x in zip(sliced, maps, strict=True):
        target.copy_(x)
    offset = [torch.full((x.numel() + 1,), 9.0)[1:].view(shape).copy_(x) for x in maps]
    layouts = {
        "channels_last": [x.contiguous(memory_format=torch.channels_last) for x in maps],
        "sliced": sliced,
        "transposed": [x.transpose(2, 3).contiguous().transpose(2, 3) for x in maps],
        "unaligned": offset,
        "expanded": [x[:1, :1].expand(shape) for x in maps],
    }
    other_grad = grad.contiguous(memory_format=torch.channels_last)
    function = operator(implementation, name)
    for layout, laid in layouts.items():
        output = function(*on(implementation, *laid))
        if layout == "expanded":
            assert torch.equal(output.cpu(), operator("reference", name)(*laid))
            continue
        assert torch.equal(output.cpu(), expected), layout
        if implementation != "reference" and name != "center":
            assert output.is_contiguous() != (layout == "channels_last")
        for incoming in (grad, other_grad):
            found = gradients(implementation, name, laid, incoming)
            for actual, wanted in zip(found, expected_grads, strict=True):
                torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
    mixed = [layouts["channels_last"][0], *maps[1:]]
    assert torch.equal(function(*on(implementation, *mixed)).cpu(), expected)
    for actual, wanted in zip(
        gradients(implementation, name, mixed, grad), expected_grads, strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-5)
    leaves = [x.requires_grad_() for x in on(implementation, *(x.clone() for x in maps))]
    function(*leaves).sum().backward()  # an expanded gradient: strides of 0
    (wanted, *_) = gradients("reference", name, maps, torch.ones(shape))
    torch.testing.assert_close(leaves[0].grad.cpu(), wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty_maps(implementation, name, shape):
    maps = [torch.zeros(shape) for _ in range(inputs_of(name))]
    assert operator(implementation, name)(*on(implementation, *maps)).shape == shape
    for grad in gradients(implementation, name, maps, torch.zeros(shape)):
        assert grad.shape == shape


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", OPERATORS)
def test_gradcheck(implementation, name):
    generator = torch.Generator().manual_seed(0)
    # Distinct values: finite differences must not change the order.
    maps = [
        torch.randperm(60, generator=generator).double().view(1, 2, 5, 6).requires_grad_()
        for _ in range(inputs_of(name))
    ]
    assert torch.autograd.gradcheck(operator(implementation, name), on(implementation, *maps))


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_are_the_same_bits_every_time(implementation, name):
    maps = [draw((2, 3, 40, 50), seed).float() / 3 for seed in range(inputs_of(name))]
    grad = draw((2, 3, 40, 50), seed=3).float() / 3
    threads = torch.get_num_threads()
    first = gradients(implementation, name, maps, grad)
    torch.set_num_threads(threads + 2)
    again = gradients(implementation, name, maps, grad)
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@needs_extension
@pytest.mark.parametrize("name", COMPILED_OPERATORS)
def test_second_derivatives_are_an_error_and_the_reference_has_them(name):
    maps = [draw((1, 1, 4, 5), seed).requires_grad_() for seed in range(inputs_of(name))]
    output = operator("cpu", name)(*maps).square().sum()
    (grad, *_) = torch.autograd.grad(output, maps, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"second derivatives.*_reference"):
        grad.sum().backward()
    output = operator("reference", name)(*maps).square().sum()
    (grad, *_) = torch.autograd.grad(output, maps, create_graph=True)
    grad.square().sum().backward()
    assert maps[0].grad.abs().sum() > 0


@needs_extension
def test_without_gradients_nothing_is_kept():
    x = torch.rand(1, 2, 4, 5)
    assert corner_pool(x, "top").grad_fn is None
    with torch.no_grad():
        assert corner_pool(x.requires_grad_(), "top").grad_fn is None
    assert corner_pool(x, "top").grad_fn is not None


# ---------------------------------------------------------------- torch.compile, export, autocast


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(implementation, memory_format):
    shape = (2, 3, 4, 5)
    x, y, grad = on(implementation, *(torch.rand(shape) for _ in range(3)))
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    y.requires_grad_()
    operators = torch.ops.d2ext
    torch.library.opcheck(operators.corner_pool.default, (x, 2, True))
    x, y = x.detach(), y.detach()
    torch.library.opcheck(operators.corner_pool_backward.default, (grad, x, 3, False))


@pytest.mark.parametrize("implementation", COMPILED)
def test_compile(implementation):
    def step(x: Tensor, y: Tensor) -> Tensor:
        pooled = corner_pool(x * 2, "left") + corner_pool_pair(x, y * 2, "top_left")
        return (pooled * center_pool(x, y)).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for height in (6, 9):
        maps = on(implementation, *(draw((1, 2, height, 7), seed).float() for seed in (0, 1)))
        results = []
        for function in (step, compiled):
            leaves = [x.clone().requires_grad_() for x in maps]
            loss = function(*leaves)
            loss.backward()
            results.append((loss, *(x.grad for x in leaves)))
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("implementation", COMPILED)
def test_export(implementation):
    height = torch.export.Dim("height", min=2)
    (x,) = on(implementation, draw((1, 2, 6, 7)).float())
    program = torch.export.export(CornerPool("top"), (x,), dynamic_shapes=({2: height},))
    # A file is of plain operators: ONNX has no other, and a .pt2 runs without d2ext.
    assert not any("d2ext" in str(node.target) for node in program.graph.nodes)
    (x,) = on(implementation, draw((1, 2, 9, 7), seed=1).float())
    assert torch.equal(program.module()(x), corner_pool(x, "top"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_leaves_the_precision_of_the_inputs(implementation):
    x, y = on(implementation, draw((1, 2, 6, 7)).float() / 3, draw((1, 2, 6, 7), 1).float() / 3)
    device_type = "cuda" if implementation == "cuda" else "cpu"
    for name in OPERATORS:
        maps = [x, y][: inputs_of(name)]
        plain = operator(implementation, name)(*maps)
        with torch.autocast(device_type, dtype=torch.bfloat16):
            assert torch.equal(operator(implementation, name)(*maps), plain)
        if len(maps) == 2:
            mixed = operator(implementation, name)(x.bfloat16(), y)
            assert mixed.dtype == torch.float32
            assert torch.equal(mixed, operator(implementation, name)(x.bfloat16().float(), y))


# ---------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_wrong_arguments_are_named(implementation):
    (x,) = on(implementation, torch.zeros(1, 2, 3, 4))
    for name in OPERATORS:
        function = operator(implementation, name)
        for wrong, message in (
            (x[0], r"must have shape \(B, C, H, W\)"),
            (x.int(), "floating point"),
            (x.bool(), "floating point"),
        ):
            with pytest.raises(ValueError, match=message):
                function(*[wrong] * inputs_of(name))
        if inputs_of(name) == 2 and (implementation != "reference" or name == "center"):
            with pytest.raises(ValueError, match="one shape"):
                function(x, x[:, :1])
    single = corner_pool_reference if implementation == "reference" else corner_pool
    with pytest.raises(ValueError, match=r"direction must be one of top.*got 'up'"):
        single(x, "up")
    with pytest.raises(ValueError, match=r"corner must be one of top_left.*got 'top'"):
        corner_pool_pair(x, x, "top")
    with pytest.raises(ValueError, match="direction"):
        CornerPool("up")


@pytest.mark.gpu
@needs_cuda
def test_maps_on_several_devices_are_an_error():
    x = torch.zeros(1, 2, 3, 4)
    for function in (center_pool, lambda v, h: corner_pool_pair(v, h, "top_left")):
        with pytest.raises(ValueError, match="one device"):
            function(x.cuda(), x)


def test_layer_is_the_function():
    x = draw((1, 2, 6, 7))
    layer = CornerPool("left")
    assert torch.equal(layer(x), corner_pool(x, "left")) and "left" in repr(layer)


def test_without_the_extension_the_reference_runs_and_warns(monkeypatch):
    monkeypatch.setattr(_extension, "_info", _extension.ExtensionInfo())
    monkeypatch.setattr(_extension, "_warned", set())
    x, y = draw((1, 2, 6, 7)), draw((1, 2, 6, 7), 1)
    with pytest.warns(RuntimeWarning, match="corner_pool"):
        assert torch.equal(corner_pool(x, "top"), corner_pool_reference(x, "top"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pooled = corner_pool_reference(x, "top") + corner_pool_reference(y, "left")
        assert torch.equal(corner_pool_pair(x, y, "top_left"), pooled)


# ---------------------------------------------------------------- GPU


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 5, 128, 128),
        (1, 3, 64, 64),
        (260, 1, 128, 128),
        (300, 1, 128, 192),
        (1, 2, 513, 255),
        (3, 90, 160, 96),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gpu_equals_cpu(name, dtype, shape, memory_format):
    maps = [draw(shape, seed, tied=seed == 1) for seed in range(inputs_of(name))]
    maps = [x.to(dtype).contiguous(memory_format=memory_format) for x in maps]
    grad = draw(shape, seed=3).to(dtype)
    output = operator("cuda", name)(*on("cuda", *maps))
    assert torch.equal(output.cpu(), operator("cpu", name)(*maps))
    pairs = zip(
        gradients("cuda", name, maps, grad), gradients("cpu", name, maps, grad), strict=True
    )
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 0.0)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("shape", [(1, 1, 20000, 8), (1, 1, 8, 20000), (1, 1, 3001, 3001)])
def test_lines_longer_than_any_block(name, shape):
    maps = [draw(shape, seed).float() for seed in range(inputs_of(name))]
    grad = draw(shape, seed=3).float()
    output = operator("cuda", name)(*on("cuda", *maps))
    assert torch.equal(output.cpu(), operator("cpu", name)(*maps))
    pairs = zip(
        gradients("cuda", name, maps, grad), gradients("cpu", name, maps, grad), strict=True
    )
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-2)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", OPERATORS)
def test_more_than_2_to_the_31_elements(name):
    count = inputs_of(name)
    free, _ = torch.cuda.mem_get_info()
    if free < (2 * count + 4) * 2**32:
        pytest.skip("needs more GPU memory")
    shape = (5, 1700, 512, 512)
    assert math.prod(shape) > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    maps = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)
        for _ in range(count)
    ]
    output = operator("cuda", name)(*maps)
    last = [x[-1:, -3:].cpu() for x in maps]
    assert torch.equal(output[-1:, -3:].cpu(), operator("cpu", name)(*last))


@pytest.mark.gpu
@needs_cuda
def test_memory_is_that_of_the_outputs():
    x = torch.rand(4, 64, 128, 128, device="cuda")
    size = x.numel() * x.element_size()
    for name in COMPILED_OPERATORS:
        maps = [x, x.flip(3)][: inputs_of(name)]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = operator("cuda", name)(*maps)
        # A pair's second pooling is added to the first.
        assert torch.cuda.max_memory_allocated() - before == size * len(maps)
        del output
        leaves = [m.detach().requires_grad_() for m in maps]
        before = torch.cuda.memory_allocated()
        output = operator("cuda", name)(*leaves)
        assert output.requires_grad
        assert torch.cuda.memory_allocated() - before == size  # no index is kept


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("name", OPERATORS)
def test_runs_on_the_current_stream_and_in_a_graph(name):
    maps = [draw((2, 4, 40, 48), seed).float().cuda() for seed in range(inputs_of(name))]
    function = operator("cuda", name)
    expected = function(*maps)
    inputs = [x.clone() for x in maps]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(*inputs)
    for factor in (-1, 1):
        for target, x in zip(inputs, maps, strict=True):
            target.copy_(x * factor)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, expected) == (factor == 1)
