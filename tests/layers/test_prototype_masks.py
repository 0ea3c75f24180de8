"""Prototype mask assembly: each implementation against naive loops, and against each other."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.layers import (
    _extension,
    assemble_binary_masks,
    assemble_binary_masks_reference,
    assemble_masks,
    assemble_masks_reference,
    has_cuda_extension,
    has_extension,
    prototype_masks,
)

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

# Every kind of box: inside, corners swapped, partly and wholly outside, without area, on cell
# limits, the whole image, larger than it, not finite.
BOXES = [
    [0.21, 0.33, 0.64, 0.81],
    [0.72, 0.91, 0.35, 0.14],
    [-0.3, -0.2, 0.25, 0.3],
    [0.8, 0.7, 1.4, 1.2],
    [1.3, 1.3, 1.6, 1.7],
    [0.43, 0.47, 0.43, 0.47],
    [0.25, 0.5, 0.75, 0.75],
    [0.0, 0.0, 1.0, 1.0],
    [-5.0, -5.0, 5.0, 5.0],
    [math.nan, 0.1, 0.5, 0.6],
    [0.1, 0.1, math.inf, 0.6],
    [0.99, 0.99, 1.0, 1.0],
]


def masks_of(implementation: str, *args: object, **kwargs: object) -> Tensor:
    function = assemble_masks_reference if implementation == "reference" else assemble_masks
    return function(*_on(implementation, args), **kwargs).cpu()


def binary_masks_of(implementation: str, *args: object, **kwargs: object) -> Tensor:
    reference = implementation == "reference"
    function = assemble_binary_masks_reference if reference else assemble_binary_masks
    return function(*_on(implementation, args), **kwargs).cpu()


def _on(implementation: str, args: tuple[object, ...]) -> list[object]:
    device = "cuda" if implementation == "cuda" else "cpu"
    return [arg.to(device) if isinstance(arg, Tensor) else arg for arg in args]


def draw(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, boxes: int = len(BOXES)
) -> tuple[Tensor, Tensor, Tensor]:
    """Prototypes of ``shape`` ([B,] h, w, k), coefficients and the first ``boxes`` of BOXES."""
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(*shape, generator=generator, dtype=torch.float64)
    coefficients = torch.randn(boxes, shape[-1], generator=generator, dtype=torch.float64)
    rows = torch.tensor([BOXES[i % len(BOXES)] for i in range(boxes)])
    if dtype == torch.float64:
        rows = rows.double()
    return prototypes.to(dtype), (coefficients / 2).to(dtype), rows


# ---------------------------------------------------------------- naive loops


def naive_kept(low: float, high: float, size: int, padding: float, real: type) -> list[bool]:
    a, b = real(low) * real(size), real(high) * real(size)
    if np.isnan(a) or np.isnan(b):
        return [False] * size
    begin = min(max(min(a, b) - real(padding), real(0)), real(size))
    end = min(max(max(a, b) + real(padding), real(0)), real(size))
    return [begin <= cell < end for cell in range(size)]


def naive_masks(
    prototypes: Tensor,
    coefficients: Tensor,
    boxes: Tensor,
    batch_index: Tensor | None,
    padding: float,
    cropped: bool = True,
) -> np.ndarray:
    real = np.float64 if prototypes.dtype == torch.float64 else np.float32
    height, width, channels = prototypes.shape[-3:]
    values = prototypes.double().reshape(-1, height, width, channels).tolist()
    weights = coefficients.double().tolist()
    masks = np.zeros((len(weights), height, width))
    for n, row in enumerate(weights):
        image = values[0 if batch_index is None else int(batch_index[n])]
        x1, y1, x2, y2 = boxes[n].tolist()
        keep_x = naive_kept(x1, x2, width, padding, real)
        keep_y = naive_kept(y1, y2, height, padding, real)
        for y in range(height):
            for x in range(width):
                if not cropped or (keep_x[x] and keep_y[y]):
                    total = sum(p * c for p, c in zip(image[y][x], row, strict=True))
                    masks[n, y, x] = 1 / (1 + math.exp(-total))
    return masks


def naive_resize(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    def taps(index: int, cells: int, outputs: int) -> tuple[int, int, float]:
        source = max((index + 0.5) * cells / outputs - 0.5, 0.0)
        low = min(int(source), cells - 1)
        return low, min(low + 1, cells - 1), source - low

    resized = np.zeros(size)
    for y in range(size[0]):
        y0, y1, v = taps(y, mask.shape[0], size[0])
        for x in range(size[1]):
            x0, x1, u = taps(x, mask.shape[1], size[1])
            top = mask[y0, x0] * (1 - u) + mask[y0, x1] * u
            bottom = mask[y1, x0] * (1 - u) + mask[y1, x1] * u
            resized[y, x] = top * (1 - v) + bottom * v
    return resized


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3}.get(dtype, 8e-3)


# ---------------------------------------------------------------- probabilities


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 13, 32), (1, 1, 3), (20, 37, 5), (6, 40, 70), (33, 5, 40)])
def test_masks_equal_naive_loops(implementation, dtype, shape):
    prototypes, coefficients, boxes = draw(*shape, dtype=dtype)
    masks = masks_of(implementation, prototypes, coefficients, boxes)
    assert masks.dtype == dtype
    expected = naive_masks(prototypes, coefficients, boxes, None, padding=1.0)
    assert 0 < (expected > 0).mean() < 1 or min(shape[:2]) == 1
    np.testing.assert_allclose(masks.double(), expected, rtol=0, atol=tolerance(dtype))
    assert torch.equal(masks == 0, torch.from_numpy(expected == 0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("padding", [0.0, 0.5, 1.0, 3.0])
def test_crop_keeps_cells_from_low_up_to_but_not_high(implementation, padding):
    # 0.25 * 8 = 2 and 0.75 * 8 = 6 are cells themselves: 2 - padding is kept, 6 + padding is not.
    prototypes, coefficients = torch.zeros(8, 8, 4), torch.ones(1, 4)
    boxes = torch.tensor([[0.25, 0.25, 0.75, 0.75]])
    masks = masks_of(implementation, prototypes, coefficients, boxes, padding=padding)
    kept = [i for i in range(8) if 2 - padding <= i < 6 + padding]
    expected = torch.zeros(8)
    expected[kept] = 0.5
    assert torch.equal(masks[0].amax(0), expected)
    assert torch.equal(masks[0].amax(1), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("order", [[0, 0, 1, 1, 2, 2], [2, 0, 1, 0, 2, 1], [1, 1, 1, 1, 1, 1]])
def test_batch_index_chooses_the_image(implementation, order):
    prototypes, coefficients, boxes = draw(3, 10, 12, 32, boxes=6)
    index = torch.tensor(order)
    masks = masks_of(implementation, prototypes, coefficients, boxes, index)
    expected = naive_masks(prototypes, coefficients, boxes, index, padding=1.0)
    np.testing.assert_allclose(masks, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_any_strides(implementation):
    prototypes, coefficients, boxes = draw(2, 10, 12, 32)
    index = torch.arange(len(boxes)) % 2
    expected = naive_masks(prototypes, coefficients, boxes, index, padding=1.0)
    channels_first = prototypes.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    sliced = torch.randn(2, 20, 15, 33)[:, ::2, 2:14, :-1]
    sliced.copy_(prototypes)
    flipped_axes = prototypes.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.randn(len(boxes), 64)[:, ::2]
    wide.copy_(coefficients)
    every_other = torch.stack([index, index + 7], dim=1)[:, 0]
    for layout in (channels_first, sliced, flipped_axes):
        assert not layout.is_contiguous()
        masks = masks_of(implementation, layout, wide, boxes.T.contiguous().T, every_other)
        np.testing.assert_allclose(masks, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_detections(implementation):
    for shape, index in [((5, 6, 32), None), ((2, 5, 6, 32), torch.zeros(0, dtype=torch.int64))]:
        prototypes, coefficients, boxes = draw(*shape, boxes=0)
        boxes = boxes.reshape(0, 4)
        prototypes.requires_grad_()
        masks = masks_of(implementation, prototypes, coefficients, boxes, index)
        assert masks.shape == (0, 5, 6)
        masks.sum().backward()
        assert torch.equal(prototypes.grad, torch.zeros(shape))
        masks = binary_masks_of(implementation, prototypes, coefficients, boxes, (7, 9), index)
        assert masks.shape == (0, 7, 9) and masks.dtype == torch.bool


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_saturated_and_not_finite_values(implementation):
    prototypes = torch.zeros(4, 8, 1)
    prototypes[:, :5, 0] = torch.tensor([-1e4, 1e4, math.nan, math.inf, -math.inf])
    prototypes[:, 7] = math.nan  # outside the box: must not show
    boxes = torch.tensor([[0.0, 0.0, 0.6, 1.0]])
    masks = masks_of(implementation, prototypes, torch.ones(1, 1), boxes)
    expected = torch.tensor([0, 1, math.nan, 1, 0, 0.5, 0, 0]).expand(4, 8)
    torch.testing.assert_close(masks[0], expected, equal_nan=True, rtol=0, atol=1e-30)
    binary = binary_masks_of(implementation, prototypes, torch.ones(1, 1), boxes, (4, 8))
    # At the grid's own size nothing is interpolated: cell 1 must not see its NaN neighbour.
    assert torch.equal(binary[0, 0], torch.tensor([0, 1, 0, 1, 0, 0, 0, 0], dtype=torch.bool))


# ---------------------------------------------------------------- boolean masks


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("crop", ["before", "after"])
@pytest.mark.parametrize("size", [(31, 45), (9, 13), (4, 5), (1, 1), (70, 3), (18, 64)])
def test_binary_masks_equal_naive_loops(implementation, crop, size):
    prototypes, coefficients, boxes = draw(9, 13, 32, dtype=torch.float64)
    masks = binary_masks_of(implementation, prototypes, coefficients, boxes, size, crop=crop)
    small = naive_masks(prototypes, coefficients, boxes, None, 1.0, cropped=crop == "before")
    for n, mask in enumerate(masks):
        resized = naive_resize(small[n], size)
        expected = resized > 0.5
        if crop == "after":
            x1, y1, x2, y2 = boxes[n].tolist()
            expected &= np.outer(
                naive_kept(y1, y2, size[0], 1.0, np.float64),
                naive_kept(x1, x2, size[1], 1.0, np.float64),
            )
        decided = np.abs(resized - 0.5) > 1e-9
        assert decided.mean() > 0.9
        np.testing.assert_array_equal(mask.numpy()[decided], expected[decided])


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("crop", ["before", "after"])
@pytest.mark.parametrize(
    ("grid", "size"), [((138, 138), (550, 550)), ((69, 138), (107, 1921)), ((50, 40), (23, 17))]
)
def test_binary_masks_agree_with_the_unfused_path(implementation, dtype, crop, grid, size):
    prototypes, coefficients, boxes = draw(2, *grid, 32, dtype=dtype, boxes=17)
    index = torch.arange(17) % 2
    masks = binary_masks_of(
        implementation, prototypes, coefficients, boxes, size, index, crop=crop, threshold=0.4
    )
    # The same inputs at higher precision: what is nearer to the threshold than rounding may differ.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    args = (prototypes.to(wide), coefficients.to(wide), boxes)
    expected = assemble_binary_masks_reference(*args, size, index, crop=crop, threshold=0.4)
    padding = 1.0 if crop == "before" else 1e6
    small = assemble_masks_reference(*args, index, padding=padding)
    near = F.interpolate(small[:, None], size, mode="bilinear")[:, 0].sub(0.4).abs() < 1e-5
    assert near.float().mean() < 1e-3 and 0.02 < expected.float().mean() < 0.9
    assert not ((masks != expected) & ~near).any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_probability_equal_to_the_threshold_is_not_above_it(implementation, dtype):
    prototypes, coefficients, boxes = draw(9, 13, 32, dtype=dtype, boxes=8)
    # F.interpolate itself rounds 0.5 up here and there where it resizes; the compiled ones do not.
    size = (9, 13) if implementation == "reference" else (37, 53)
    args = (torch.zeros_like(prototypes), coefficients, boxes, size)
    for crop in ("before", "after"):
        assert not binary_masks_of(implementation, *args, crop=crop, threshold=0.5).any()
        below = binary_masks_of(implementation, *args, crop=crop, threshold=0.4999)
        assert below[7].all()  # the box is the image


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_negative_threshold_sets_what_is_cropped_before_but_not_after(implementation):
    prototypes, coefficients, boxes = draw(9, 13, 32, boxes=8)
    args = (prototypes, coefficients, boxes, (37, 53))
    assert binary_masks_of(implementation, *args, threshold=-0.1).all()
    after = binary_masks_of(implementation, *args, threshold=-0.1, crop="after")
    kept_x = naive_kept(boxes[0, 0], boxes[0, 2], 53, 1.0, np.float32)
    kept_y = naive_kept(boxes[0, 1], boxes[0, 3], 37, 1.0, np.float32)
    np.testing.assert_array_equal(after[0].numpy(), np.outer(kept_y, kept_x))


def test_reference_in_chunks_equals_reference_at_once(monkeypatch):
    prototypes, coefficients, boxes = draw(3, 9, 13, 32)
    index = torch.arange(len(boxes)) % 3
    args = (prototypes, coefficients, boxes, (37, 53), index)
    whole = assemble_binary_masks_reference(*args)
    monkeypatch.setattr(prototype_masks, "_CHUNK_PIXELS", 5 * 37 * 53)
    assert torch.equal(assemble_binary_masks_reference(*args), whole)


# ---------------------------------------------------------------- gradients


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("channels", [1, 5, 32, 70])
def test_gradcheck(implementation, channels):
    prototypes, coefficients, boxes = draw(2, 4, 5, channels, dtype=torch.float64, boxes=6)
    index = torch.tensor([1, 0, 0, 1, 0, 1])

    def function(prototypes: Tensor, coefficients: Tensor) -> Tensor:
        return masks_of(implementation, prototypes, coefficients, boxes, index)

    args = (prototypes.requires_grad_(), coefficients.requires_grad_())
    assert torch.autograd.gradcheck(function, args)


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 37, 45, 32), (19, 21, 40), (1, 16, 130, 70), (2, 9, 9, 5)])
def test_gradients_equal_the_reference(implementation, dtype, shape):
    prototypes, coefficients, boxes = draw(*shape, dtype=dtype, boxes=41)
    index = torch.arange(41) % shape[0] if len(shape) == 4 else None
    grad = torch.randn(41, *shape[-3:-1], generator=torch.Generator().manual_seed(1))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for name, kind in ((implementation, dtype), ("reference", wide)):
        leaves = [t.to(kind).requires_grad_() for t in (prototypes, coefficients)]
        masks = masks_of(name, *leaves, boxes, index)
        results.append(torch.autograd.grad(masks, leaves, grad.to(dtype).to(kind)))
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == dtype
        scale = expected.abs().max()
        assert scale > 0.1
        assert (actual.to(wide) - expected).abs().max() < 4 * tolerance(dtype) * scale


@pytest.mark.parametrize("implementation", COMPILED)
def test_gradients_with_other_layouts(implementation):
    prototypes, coefficients, boxes = draw(2, 10, 12, 32)
    index = torch.arange(len(boxes)) % 2
    leaf = prototypes.permute(0, 3, 1, 2).contiguous().requires_grad_()
    masks = masks_of(implementation, leaf.permute(0, 2, 3, 1), coefficients, boxes, index)
    masks.sum().backward()  # an expanded gradient: strides of 0
    other = prototypes.requires_grad_()
    assemble_masks_reference(other, coefficients, boxes, index).sum().backward()
    torch.testing.assert_close(leaf.grad.permute(0, 2, 3, 1), other.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", COMPILED)
def test_gradients_are_the_same_bits_every_time(implementation):
    prototypes, coefficients, boxes = draw(30, 40, 32, boxes=50)
    leaves = (prototypes.requires_grad_(), coefficients.requires_grad_())
    first, second = (
        torch.autograd.grad(masks_of(implementation, *leaves, boxes).square().sum(), leaves)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_extension
def test_gradients_do_not_depend_on_the_number_of_threads():
    prototypes, coefficients, boxes = draw(30, 40, 32, boxes=50)
    leaves = (prototypes.requires_grad_(), coefficients.requires_grad_())
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        masks = assemble_masks(*leaves, boxes)
        results.append(torch.autograd.grad(masks.square().sum(), leaves))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, results[0][i]) for r in results for i, a in enumerate(r))


@needs_extension
def test_second_derivatives_are_an_error_and_the_reference_has_them():
    prototypes, coefficients, boxes = draw(4, 5, 3, boxes=2)
    prototypes.requires_grad_()
    masks = assemble_masks(prototypes, coefficients, boxes)
    (grad,) = torch.autograd.grad(masks.sum(), prototypes, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()
    masks = assemble_masks_reference(prototypes, coefficients, boxes)
    (grad,) = torch.autograd.grad(masks.sum(), prototypes, create_graph=True)
    grad.sum().backward()
    assert prototypes.grad.abs().sum() > 0


# ---------------------------------------------------------------- torch.compile, export, autocast


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("shape", [(6, 7, 5), (2, 6, 7, 5)])
def test_opcheck(implementation, shape):
    prototypes, coefficients, boxes = _on(implementation, draw(*shape, boxes=4))
    index = torch.tensor([0, 1, 1, 0], device=boxes.device) if len(shape) == 4 else None
    args = (prototypes.requires_grad_(), coefficients.requires_grad_(), boxes, index)
    torch.library.opcheck(torch.ops.d2ext.assemble_masks.default, (*args, 1.0))
    detached = tuple(t if t is None else t.detach() for t in args)
    torch.library.opcheck(
        torch.ops.d2ext.assemble_masks_backward.default,
        (torch.ones(4, 6, 7, device=boxes.device), *detached, 1.0),
    )
    torch.library.opcheck(
        torch.ops.d2ext.assemble_binary_masks.default, (*detached, 11, 13, 0.5, True, 1.0)
    )


@pytest.mark.parametrize("implementation", COMPILED)
def test_compile(implementation):
    def step(prototypes: Tensor, coefficients: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        masks = assemble_masks(prototypes * 2, coefficients, boxes)
        binary = assemble_binary_masks(prototypes * 2, coefficients, boxes, (11, 13))
        return masks.square().sum(), binary

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for detections in (4, 7):
        prototypes, coefficients, boxes = _on(implementation, draw(6, 7, 5, boxes=detections))
        results = []
        for function in (step, compiled):
            leaf = prototypes.clone().requires_grad_()
            loss, binary = function(leaf, coefficients, boxes)
            loss.backward()
            results.append((loss, binary, leaf.grad))
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("implementation", COMPILED)
def test_export(implementation):
    class Assemble(torch.nn.Module):
        def forward(self, prototypes: Tensor, coefficients: Tensor, boxes: Tensor) -> Tensor:
            return assemble_binary_masks(prototypes, coefficients, boxes, (11, 13))

    detections = torch.export.Dim("detections")
    program = torch.export.export(
        Assemble(),
        tuple(_on(implementation, draw(6, 7, 5, boxes=4))),
        dynamic_shapes=(None, {0: detections}, {0: detections}),
    )
    assert any("assemble_binary_masks" in str(node.target) for node in program.graph.nodes)
    args = _on(implementation, draw(6, 7, 5, boxes=9, seed=1))
    assert torch.equal(program.module()(*args), assemble_binary_masks(*args, (11, 13)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_leaves_the_precision_of_the_inputs(implementation):
    prototypes, coefficients, boxes = draw(9, 13, 32)
    plain = masks_of(implementation, prototypes, coefficients, boxes)
    device_type = "cuda" if implementation == "cuda" else "cpu"
    with torch.autocast(device_type, dtype=torch.bfloat16):
        masks = masks_of(implementation, prototypes, coefficients, boxes)
        mixed = masks_of(implementation, prototypes.bfloat16(), coefficients, boxes)
    assert torch.equal(masks, plain)
    assert mixed.dtype == torch.float32
    rounded = masks_of(implementation, prototypes.bfloat16().float(), coefficients, boxes)
    assert torch.equal(mixed, rounded)


# ---------------------------------------------------------------- wrong arguments


def _wrong_arguments() -> dict[str, tuple[str, dict[str, object]]]:
    return {
        "rank of prototypes": ("prototypes must have shape", {"prototypes": torch.zeros(5, 4)}),
        "empty grid": ("h, w, k >= 1", {"prototypes": torch.zeros(0, 6, 4)}),
        "no prototypes": (
            "h, w, k >= 1",
            {"prototypes": torch.zeros(5, 6, 0), "coefficients": torch.zeros(3, 0)},
        ),
        "number of prototypes": ("coefficients must have", {"coefficients": torch.zeros(3, 5)}),
        "rank of coefficients": ("coefficients must have", {"coefficients": torch.zeros(4)}),
        "number of boxes": ("boxes must have shape", {"boxes": torch.zeros(2, 4)}),
        "box sides": ("boxes must have shape", {"boxes": torch.zeros(3, 5)}),
        "integer boxes": (
            "floating point",
            {"boxes": torch.zeros(3, 4, dtype=torch.int64)},
        ),
        "integer prototypes": (
            "prototypes",
            {
                "prototypes": torch.zeros(5, 6, 4, dtype=torch.int32),
                "coefficients": torch.zeros(3, 4, dtype=torch.int32),
            },
        ),
        "missing batch_index": ("batch_index is needed", {"prototypes": torch.zeros(2, 5, 6, 4)}),
        "no images": ("batch_index is needed|no image", {"prototypes": torch.zeros(0, 5, 6, 4)}),
        "batch_index without a batch": (
            "batch_index needs",
            {"batch_index": torch.zeros(3, dtype=torch.int64)},
        ),
        "length of batch_index": (
            "batch_index must",
            {
                "prototypes": torch.zeros(2, 5, 6, 4),
                "batch_index": torch.zeros(2, dtype=torch.int64),
            },
        ),
        "dtype of batch_index": (
            "batch_index must",
            {
                "prototypes": torch.zeros(2, 5, 6, 4),
                "batch_index": torch.zeros(3, dtype=torch.int32),
            },
        ),
        "negative padding": ("padding", {"padding": -1.0}),
        "endless padding": ("padding", {"padding": math.inf}),
    }


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", _wrong_arguments())
def test_wrong_arguments_are_named(implementation, case):
    message, changes = _wrong_arguments()[case]
    arguments: dict[str, object] = {
        "prototypes": torch.zeros(5, 6, 4),
        "coefficients": torch.zeros(3, 4),
        "boxes": torch.zeros(3, 4),
        "batch_index": None,
        "padding": 1.0,
    }
    arguments.update(changes)
    padding = arguments.pop("padding")
    prototypes, coefficients, boxes, batch_index = arguments.values()
    with pytest.raises(ValueError, match=message):
        masks_of(implementation, prototypes, coefficients, boxes, batch_index, padding=padding)
    with pytest.raises(ValueError, match=message):
        binary_masks_of(
            implementation, prototypes, coefficients, boxes, (5, 5), batch_index, padding=padding
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_wrong_size_and_crop_are_named(implementation):
    args = (torch.zeros(5, 6, 4), torch.zeros(3, 4), torch.zeros(3, 4))
    for size in [(0, 5), (5, -1)]:
        with pytest.raises(ValueError, match="size must be"):
            binary_masks_of(implementation, *args, size)
    with pytest.raises(ValueError, match="crop must be"):
        binary_masks_of(implementation, *args, (5, 5), crop="never")


@pytest.mark.parametrize("implementation", ["reference", COMPILED[0]])
@pytest.mark.parametrize("index", [[0, 2, 1], [0, -1, 1], [2**40, 0, 0]])
def test_batch_index_out_of_range_is_an_error_on_the_cpu(implementation, index):
    prototypes, coefficients, boxes = draw(2, 5, 6, 4, boxes=3)
    with pytest.raises(IndexError, match="batch_index"):
        masks_of(implementation, prototypes, coefficients, boxes, torch.tensor(index))
    with pytest.raises(IndexError, match="batch_index"):
        binary_masks_of(
            implementation, prototypes, coefficients, boxes, (9, 9), torch.tensor(index)
        )


@pytest.mark.gpu
@needs_cuda
def test_batch_index_out_of_range_reads_nothing_on_a_gpu():
    prototypes, coefficients, boxes = draw(2, 20, 30, 32, boxes=4)
    boxes[:] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    index = torch.tensor([0, 2, -1, 2**40])
    leaves = [t.cuda().requires_grad_() for t in (prototypes, coefficients)]
    masks = assemble_masks(*leaves, boxes.cuda(), index.cuda())
    assert masks[0].all() and not masks[1:].any()
    masks.sum().backward()
    assert leaves[1].grad[0].any() and not leaves[1].grad[1:].any()
    assert leaves[0].grad[0].any() and not leaves[0].grad[1].any()
    size = (40, 60)
    binary = assemble_binary_masks(*leaves, boxes.cuda(), size, index.cuda(), threshold=0.01)
    assert binary[0].any() and not binary[1:].any()


@pytest.mark.gpu
@needs_cuda
def test_tensors_on_several_devices_are_an_error():
    prototypes, coefficients, boxes = draw(5, 6, 4, boxes=3)
    with pytest.raises(ValueError, match="one device"):
        assemble_masks(prototypes.cuda(), coefficients.cuda(), boxes)
    with pytest.raises(ValueError, match="one device"):
        assemble_binary_masks(prototypes.cuda(), coefficients, boxes.cuda(), (5, 5))


# ---------------------------------------------------------------- GPU: agreement, size, memory


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_equals_cpu(dtype):
    if not has_extension():
        pytest.skip("d2ext_C is not compiled")
    prototypes, coefficients, boxes = draw(2, 138, 138, 32, dtype=dtype, boxes=60)
    index = torch.arange(60) % 2
    args = (prototypes, coefficients, boxes, index)
    difference = masks_of("cuda", *args).double() - masks_of("cpu", *args).double()
    assert difference.abs().max() <= tolerance(dtype)
    for size in [(550, 550), (333, 1111), (37, 35000)]:
        binary = [binary_masks_of(name, *args[:3], size, index) for name in ("cuda", "cpu")]
        assert (binary[0] != binary[1]).float().mean() < 1e-5


@pytest.mark.gpu
@needs_cuda
def test_more_than_2_to_the_31_output_pixels():
    detections, size = 300, (2700, 2700)
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * 2**30:
        pytest.skip("needs 4 GiB of GPU memory")
    prototypes, coefficients, boxes = _on("cuda", draw(60, 60, 32, boxes=detections))
    masks = assemble_binary_masks(prototypes, coefficients, boxes, size)
    assert masks.numel() > 2**31
    last = slice(detections - 13, None)
    expected = assemble_binary_masks(prototypes, coefficients[last], boxes[last], size)
    assert torch.equal(masks[last], expected) and expected.any()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_beyond_the_output_is_small(dtype):
    args = _on("cuda", draw(138, 138, 32, dtype=dtype, boxes=100))
    for size in [(550, 550), (1080, 1920)]:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        masks = assemble_binary_masks(*args, size)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before <= 1.3 * masks.numel()
        del masks


@pytest.mark.gpu
@needs_cuda
def test_runs_on_the_current_stream_and_in_a_graph():
    args = _on("cuda", draw(40, 50, 32))
    expected = assemble_binary_masks(*args, (99, 111))
    coefficients = args[1].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        masks = assemble_binary_masks(args[0], coefficients, args[2], (99, 111))
    for flip in (-1, 1):
        coefficients.copy_(args[1] * flip)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(masks, expected) == (flip == 1)


# ---------------------------------------------------------------- without the extension


def test_without_the_extension_the_reference_runs_and_warns_once(monkeypatch):
    prototypes, coefficients, boxes = draw(9, 13, 32)
    monkeypatch.setattr(_extension, "_info", _extension.ExtensionInfo())
    monkeypatch.setattr(_extension, "_warned", set())
    with pytest.warns(RuntimeWarning, match="assemble_masks, assemble_binary_masks") as caught:
        masks = assemble_masks(prototypes, coefficients, boxes)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        binary = assemble_binary_masks(prototypes, coefficients, boxes, (31, 45))
    assert torch.equal(masks, assemble_masks_reference(prototypes, coefficients, boxes))
    expected = assemble_binary_masks_reference(prototypes, coefficients, boxes, (31, 45))
    assert torch.equal(binary, expected)


def test_a_library_that_does_not_load_is_reported_not_fatal(tmp_path):
    from importlib.machinery import EXTENSION_SUFFIXES

    assert _extension._load(tmp_path) == _extension.ExtensionInfo()
    library = tmp_path / f"d2ext_C{EXTENSION_SUFFIXES[0]}"
    library.write_bytes(b"not a library")
    info = _extension._load(tmp_path)
    assert info.path == library and info.error and not info.usable


@needs_extension
def test_a_library_for_another_pytorch_is_not_used(monkeypatch):
    folder = _extension.extension_info().path.parent
    monkeypatch.setattr(torch, "__version__", "1.0.0+cu1")
    info = _extension._load(folder)
    assert not info.usable and "compiled against PyTorch" in info.error


@needs_extension
def test_a_library_of_an_older_version_is_not_used(monkeypatch):
    folder = _extension.extension_info().path.parent
    monkeypatch.setattr(_extension, "_OPERATORS", (*_extension._OPERATORS, "of_tomorrow"))
    kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    monkeypatch.setattr(
        torch._C,
        "_dispatch_has_kernel_for_dispatch_key",
        lambda name, device: name != "d2ext::corner_pool" and kernel(name, device),
    )
    info = _extension._load(folder)
    assert not info.usable and info.error.endswith("older csrc/, without corner_pool, of_tomorrow")


def test_importing_d2ext_layers_warns_of_nothing():
    code = "import warnings; warnings.simplefilter('error'); import d2ext.layers._extension"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "d2ext:" not in done.stderr, done.stderr


@pytest.mark.parametrize("implementation", COMPILED)
@pytest.mark.parametrize("padding", [0.0, 3e38, 1e300])
def test_infinite_boxes_with_any_padding(implementation, padding):
    """The padding is infinite in float32, where inf - inf must not become a cell's index."""
    sides = [-math.inf, math.inf, 0.2, math.nan, 3e38, -3e38]
    boxes = torch.tensor([[a, 0.1, b, 0.8] for a in sides for b in sides])
    boxes = torch.cat([boxes, boxes[:, [1, 0, 3, 2]]])
    prototypes, coefficients = torch.ones(6, 7, 1), torch.ones(len(boxes), 1)
    inputs = prototypes, coefficients, boxes
    expected = assemble_masks_reference(*inputs, padding=padding)
    masks = masks_of(implementation, *inputs, padding=padding)
    torch.testing.assert_close(masks, expected)
    for crop in ("before", "after"):
        for threshold in (0.5, math.nan, math.inf, -math.inf):
            options = {"padding": padding, "crop": crop, "threshold": threshold}
            expected = assemble_binary_masks_reference(*inputs, (9, 8), **options)
            assert torch.equal(
                binary_masks_of(implementation, *inputs, (9, 8), **options), expected
            )
