"""Values that are not finite, and arguments that do not fit together: compiled operators, plain PyTorch
and operators on tensors without values do the same."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2ext.layers import _extension
from d2ext.layers.panoptic_fusion import (
    fuse_panoptic,
    fuse_panoptic_reference,
    prune_masks,
    prune_masks_reference,
)
from d2ext.layers.prototype_masks import (
    assemble_binary_masks,
    assemble_binary_masks_reference,
    assemble_masks,
    assemble_masks_reference,
)
from d2ext.layers.soft_nms import soft_nms_merge, soft_nms_rows

pytestmark = pytest.mark.skipif(not _extension.has_extension(), reason="needs compiled operators")
ODD = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0])


class Draw:
    """Random tensors of which some values are odd."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.share = (0.02, 0.1)[seed % 2]

    def __call__(self, *shape: int, uniform: bool = False) -> Tensor:
        values = (torch.rand if uniform else torch.randn)(shape, generator=self.generator)
        odd = ODD[torch.randint(len(ODD), shape, generator=self.generator)]
        spoilt = torch.rand(shape, generator=self.generator) < self.share
        return torch.where(spoilt, odd, values)

    def boxes(self, count: int, side: float) -> Tensor:
        low = torch.rand(count, 2, generator=self.generator) * side
        high = low + torch.rand(count, 2, generator=self.generator) * side
        odd = self(count, 4)
        return torch.where(odd.abs() < 5, torch.cat([low, high], dim=1), odd)


SEEDS = range(40)


@pytest.mark.parametrize("threshold", [0.5, 0.0, -1.0, 1.0, math.nan, math.inf, -math.inf])
def test_masks_of_odd_values(threshold: float) -> None:
    for seed in SEEDS:
        draw = Draw(seed)
        inputs = draw(6, 7, 3), draw(4, 3), draw.boxes(4, 0.8)
        actual, expected = assemble_masks(*inputs), assemble_masks_reference(*inputs)
        torch.testing.assert_close(actual, expected, equal_nan=True)
        for crop in ("before", "after"):
            options = {"threshold": threshold, "crop": crop}
            actual = assemble_binary_masks(*inputs, (9, 8), **options)
            expected = assemble_binary_masks_reference(*inputs, (9, 8), **options)
            assert torch.equal(actual, expected), (seed, crop)


def test_panoptic_maps_of_odd_values() -> None:
    for seed in SEEDS:
        draw = Draw(seed)
        boxes, masks, score = draw.boxes(4, 8), draw(4, 4, 4), draw(5, 5, 6)
        classes = torch.tensor([0, 1, -1, 0])
        instances = masks, boxes, classes, draw(4, uniform=True)
        actual = prune_masks(*instances, (11, 13))
        assert actual.tolist() == prune_masks_reference(*instances, (11, 13)).tolist(), seed
        for unknown in (True, False):
            options: dict[str, Any] = {"num_stuff": 3, "unknown": unknown}
            actual = fuse_panoptic(score, boxes, classes, masks, (11, 13), **options)
            expected = fuse_panoptic_reference(score, boxes, classes, masks, (11, 13), **options)
            assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True)), seed


@pytest.mark.parametrize("method", ["hard", "linear", "gaussian"])
def test_soft_nms_of_odd_values(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def both(seed: int) -> list[Tensor]:
        draw = Draw(seed)
        boxes, scores = draw.boxes(12, 20), draw(12, uniform=True)
        rows = soft_nms_rows(boxes, scores, method=method)
        return [*rows, *soft_nms_merge(boxes, scores, draw(12, 2, uniform=True), method=method)]

    compiled = [both(seed) for seed in SEEDS]
    monkeypatch.setattr(_extension, "_info", _extension.ExtensionInfo())
    for seed, actual in zip(SEEDS, compiled, strict=True):
        for a, b in zip(actual, both(seed), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- arguments

# Operator -> names of its arguments and valid ones.
VALID: dict[str, tuple[str, Callable[[], list[Any]]]] = {
    "assemble_masks": (
        "prototypes coefficients boxes batch_index padding",
        lambda: [torch.randn(2, 5, 6, 3), torch.randn(4, 3), torch.rand(4, 4), torch.arange(4) % 2, 1.0],
    ),
    "assemble_masks_backward": (
        "grad prototypes coefficients boxes batch_index padding",
        lambda: [torch.ones(4, 5, 6), *VALID["assemble_masks"][1]()],
    ),
    "assemble_binary_masks": (
        "prototypes coefficients boxes batch_index height width threshold crop_after padding",
        lambda: [*VALID["assemble_masks"][1]()[:4], 9, 8, 0.5, False, 1.0],
    ),
    "corner_pool": ("x axis reverse", lambda: [torch.randn(2, 3, 4, 5), 2, True]),
    "corner_pool_backward": (
        "grad x axis reverse",
        lambda: [torch.ones(2, 3, 4, 5), torch.randn(2, 3, 4, 5), 3, False],
    ),
    "deform_conv2d": (
        "x weight offset mask bias stride padding dilation",
        lambda: [
            *(torch.randn(1, 8, 4, 5), torch.randn(3, 8, 3, 3), torch.randn(1, 18, 4, 5)),
            *(torch.rand(1, 9, 4, 5), torch.randn(3), 1, 1, 1),
        ],
    ),
    "nms": (
        "boxes valid threshold",
        lambda: [torch.rand(2, 5, 4), torch.rand(2, 5) < 0.5, 0.5],
    ),
    "soft_nms": (
        "boxes scores corner_scores sizes method sigma iou score_threshold weight_exp",
        lambda: [
            *(torch.rand(5, 4), torch.rand(5), torch.rand(5, 2), torch.tensor([2, 3])),
            *(1, 0.5, 0.5, 0.001, 10.0),
        ],
    ),
    "prune_masks": (
        "masks boxes classes scores height width overlap_fraction",
        lambda: [
            *(torch.randn(3, 4, 4), torch.rand(3, 4) * 9, torch.arange(3) % 2, torch.rand(3)),
            *(9, 8, 0.3),
        ],
    ),
    "fuse_panoptic": (
        "score boxes classes masks height width num_stuff unknown",
        lambda: [
            *(torch.randn(5, 4, 3), torch.rand(3, 4) * 9, torch.arange(3) % 2),
            *(torch.randn(3, 4, 4), 9, 8, 3, True),
        ],
    ),
}  # fmt: skip


def test_every_operator_has_a_row() -> None:
    source = Path(__file__).resolve().parents[2] / "csrc" / "library.cpp"
    schemas = re.findall(r'"(\w+)\(', source.read_text())
    # CUDA kernels alone: tests/layers/test_deform_conv.py, tests/layers/test_nms.py.
    others = {"_build_info", "deform_conv2d_backward", "overlapped"}
    assert sorted(VALID) == sorted(set(schemas) - others)


def hostile(value: Any) -> Iterator[Any]:
    """What may come in place of an argument."""
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        yield from (-1, 0, 1, 4, 2**31)
    elif isinstance(value, float):
        yield from (-1.0, 0.0, math.nan, math.inf)
    else:
        yield None
        yield from (value[0], value[None], value[:0], value[:1], torch.cat([value, value]))
        yield from (value.flatten(), value[..., :0], value[..., :1], torch.zeros(()))
        if value.dim() == 4:
            yield value[:, :0]
        kinds = (
            torch.float16,
            torch.float64,
            torch.int32,
            torch.int64,
            torch.bool,
            torch.complex64,
        )
        yield from (value.to(kind) for kind in kinds)


def outcome(run: Callable[[], Any]) -> Any:
    """Shapes and dtypes of the results, or the error."""
    try:
        results = run()
    except (
        AttributeError,
        IndexError,
        NotImplementedError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        return error
    results = results if isinstance(results, tuple) else (results,)
    return [(tuple(x.shape), x.dtype) for x in results]


# What only values show.
BY_VALUE = "add up|batch_index\\[|classes must be in"


@pytest.mark.parametrize("name", sorted(VALID))
def test_without_values_the_same_is_refused(name: str) -> None:
    operator = getattr(torch.ops.d2ext, name).default
    arguments, draw = VALID[name]
    refused = 0
    for place, argument in enumerate(arguments.split()):
        for value in hostile(draw()[place]):
            given = draw()
            given[place] = value
            what = f"{argument} = {getattr(value, 'shape', value)} {getattr(value, 'dtype', '')}"
            real = outcome(lambda given=given: operator(*given))
            without = [x.to("meta") if isinstance(x, Tensor) else x for x in given]
            fake = outcome(lambda given=without: operator(*given))
            if isinstance(real, Exception) and re.search(BY_VALUE, str(real)):
                continue
            if isinstance(real, Exception):
                refused += 1
                assert isinstance(fake, Exception), f"{what}: {real}"
            else:
                assert fake == real, what
    assert refused > 10
