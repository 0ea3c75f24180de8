"""Soft-NMS: the published results, and the compiled rounds against the plain ones."""

from __future__ import annotations

import importlib
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.ops import nms

from d2ext.layers import (
    SoftNMSRows,
    _extension,
    has_cuda_extension,
    has_extension,
    soft_nms,
    soft_nms_merge,
    soft_nms_rows,
    soft_nms_slots,
)
from tests.reference.fixture import Fixture, draw_tensor

REFERENCE = Path(__file__).parents[1] / "reference" / "cornernet" / "soft_nms"
needs_extension = pytest.mark.skipif(not has_extension(), reason="d2ext_C is not compiled")
METHODS = ("hard", "linear", "gaussian")


@pytest.fixture(params=["plain", pytest.param("compiled", marks=needs_extension)])
def implementation(request, monkeypatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(_extension, "_info", _extension.ExtensionInfo())
        monkeypatch.setattr(_extension, "_warned", {"cpu", "cuda"})
    return request.param


def fixture_rows(seed: int, spread: float, count: int = 40) -> Tensor:
    """(count, 7) float32: box, score, scores of the corners, as the manifest says."""
    b = draw_tensor("nms_boxes", (count, 4), seed).astype(np.float64)
    s = 1 / (1 + np.exp(-draw_tensor("nms_scores", (count, 3), seed).astype(np.float64)))
    x, y = 60 * spread * b[:, 0] + 200, 40 * spread * b[:, 1] + 150
    w, h = 40 + 24 * abs(b[:, 2]), 50 + 30 * abs(b[:, 3])
    rows = [x - w / 2, y - h / 2, x + w / 2, y + h / 2, (s[:, 1] + s[:, 2]) / 2, s[:, 1], s[:, 2]]
    return torch.from_numpy(np.stack(rows, axis=1).astype(np.float32))


def draw_boxes(count: int, seed: int = 0, size: float = 100.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * size
    sides = 5 + 40 * torch.rand(count, 2, generator=generator)
    return torch.cat([corner, corner + sides], dim=1), torch.rand(count, generator=generator)


@pytest.mark.parametrize(("seed", "spread"), [(1, 1.0), (2, 0.12)])
@pytest.mark.parametrize("method", [*METHODS, "merge"])
def test_published_rows(implementation, method, seed, spread):
    fixture = Fixture(REFERENCE)
    rows = fixture_rows(seed, spread)
    if method == "merge":
        found = soft_nms_merge(rows[:, :4], rows[:, 4], rows[:, 5:])
    else:
        found = soft_nms_rows(rows[:, :4], rows[:, 4], method=method)
        assert torch.equal(found.boxes, rows[found.indices, :4])
    expected = fixture.expected[f"soft_nms_{method}_seed{seed}"]
    count = int(fixture.expected[f"soft_nms_{method}_seed{seed}_kept"])
    assert found.keep.tolist() == [True] * count + [False] * (40 - count)
    np.testing.assert_allclose(found.boxes, expected[:, :4], rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(found.scores, expected[:, 4], rtol=1e-5, atol=1e-6)


def test_the_rows_kept_come_out_best_first(implementation):
    boxes, scores = draw_boxes(60)
    classes = torch.arange(60) % 3
    indices, weighed = soft_nms(boxes, scores, classes, score_threshold=0.05)
    rows = soft_nms_rows(boxes, scores, classes, score_threshold=0.05)
    assert 0 < len(indices) == int(rows.keep.sum()) < 60
    assert (weighed.diff() <= 0).all() and len(set(indices.tolist())) == len(indices)
    expected = dict(zip(rows.indices[rows.keep].tolist(), rows.scores[rows.keep], strict=True))
    assert all(expected[i] == s for i, s in zip(indices.tolist(), weighed, strict=True))


def naive_rounds(boxes: Tensor, scores: Tensor, method: str) -> dict[int, float]:
    """Index -> weighed score of the boxes kept, by the definition: no array, nothing moves."""
    rows, left = boxes.tolist(), dict(enumerate(scores.tolist()))
    kept = {}
    while left:
        best = max(left, key=lambda i: left[i])
        kept[best] = left.pop(best)
        a = rows[best]
        for i in list(left):
            b = rows[i]
            width = min(a[2], b[2]) - max(a[0], b[0]) + 1
            height = min(a[3], b[3]) - max(a[1], b[1]) + 1
            if width <= 0 or height <= 0:
                continue
            areas = [(r[2] - r[0] + 1) * (r[3] - r[1] + 1) for r in (a, b)]
            overlap = width * height / (sum(areas) - width * height)
            if method == "gaussian":
                left[i] *= math.exp(-(overlap**2) / 0.5)
            elif overlap > 0.3:
                left[i] *= 1 - overlap if method == "linear" else 0
            if left[i] < 0.02:
                del left[i]
    return kept


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 33, 150])
def test_equals_naive_rounds(implementation, method, count):
    boxes, scores = draw_boxes(count, seed=count)
    indices, weighed = soft_nms(
        boxes, scores, method=method, iou_threshold=0.3, score_threshold=0.02
    )
    expected = naive_rounds(boxes, scores, method)
    assert sorted(indices.tolist()) == sorted(expected)
    np.testing.assert_allclose(weighed, [expected[i] for i in indices.tolist()], rtol=1e-4)


def test_hard_is_plain_nms_of_boxes_one_pixel_larger(implementation):
    boxes, scores = draw_boxes(200)
    scores += 0.01  # one that overlaps, if little, is discarded below the score threshold
    indices, weighed = soft_nms(boxes, scores, method="hard", iou_threshold=0.5)
    larger = boxes + torch.tensor([0.0, 0.0, 1.0, 1.0])
    assert torch.equal(indices, nms(larger, scores, 0.5))
    assert torch.equal(weighed, scores[indices])


def test_classes_do_not_see_each_other(implementation):
    boxes, scores = draw_boxes(90, size=60)
    classes = torch.tensor([7, 0, 3])[torch.randperm(90) % 3]
    rows = soft_nms_rows(boxes, scores, classes, score_threshold=0.05)
    parts = []
    for value in (0, 3, 7):
        members = (classes == value).nonzero()[:, 0]
        part = soft_nms_rows(boxes[members], scores[members], score_threshold=0.05)
        parts.append(part._replace(indices=members[part.indices]))
    for name in SoftNMSRows._fields:
        assert torch.equal(getattr(rows, name), torch.cat([getattr(p, name) for p in parts]))
    assert not rows.keep.all()


def test_of_equal_scores_the_first_is_chosen(implementation):
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]]).repeat(3, 1) + torch.arange(3.0)[:, None]
    indices, scores = soft_nms(boxes, torch.full((3,), 0.5), method="hard", iou_threshold=0.2)
    assert indices.tolist() == [0] and scores.tolist() == [0.5]


def test_iou_counts_pixels(implementation):
    # 1 pixel each, side by side: they touch at no pixel; the same pixel: all of it.
    boxes = torch.tensor([[3.0, 3.0, 3.0, 3.0], [4.0, 3.0, 4.0, 3.0], [3.0, 3.0, 3.0, 3.0]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    indices, weighed = soft_nms(boxes, scores, method="linear")
    assert indices.tolist() == [0, 1]
    torch.testing.assert_close(weighed, torch.tensor([0.9, 0.8]))


def test_a_low_score_without_overlap_is_kept(implementation):
    boxes = torch.tensor([[0.0, 0.0, 5.0, 5.0], [50.0, 50.0, 60.0, 60.0]])
    indices, scores = soft_nms(boxes, torch.tensor([0.9, 1e-6]), score_threshold=0.001)
    assert indices.tolist() == [0, 1] and scores[1] < 0.001


def test_merging_moves_a_box_to_its_equals(implementation):
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 10.0], [90.0, 90.0, 95.0, 95.0]])
    boxes[1] += 2
    corners = torch.tensor([[0.9, 0.5], [0.3, 0.5], [0.1, 0.1]])
    found = soft_nms_merge(
        boxes, torch.tensor([0.7, 0.4, 0.1]), corners, weight_exp=1.0, method="hard"
    )
    # "hard": both weigh 1, times 0.9 and 0.3 (top left), 0.5 and 0.5 (bottom right).
    expected = [0.5, 0.5, 11.0, 11.0]
    torch.testing.assert_close(found.boxes[0], torch.tensor(expected))
    assert found.keep.tolist() == [True, True, False]
    torch.testing.assert_close(found.boxes[1], boxes[2])


@needs_extension
@pytest.mark.parametrize("weight_exp", [10.0, 3.0, 2.5, 0.0])
@pytest.mark.parametrize("method", METHODS)
def test_compiled_equals_plain(monkeypatch, method, weight_exp):
    boxes, scores = draw_boxes(300, size=150)
    classes = torch.arange(300) % 4
    corners = torch.rand(300, 2, generator=torch.Generator().manual_seed(1)) + 0.1

    def run() -> list[SoftNMSRows]:
        return [
            soft_nms_rows(boxes, scores, classes, method=method, score_threshold=0.01),
            soft_nms_merge(
                boxes,
                scores,
                corners,
                classes,
                method=method,
                weight_exp=weight_exp,
                score_threshold=0.01,
            ),
        ]

    compiled = run()
    monkeypatch.setattr(_extension, "_info", _extension.ExtensionInfo())
    monkeypatch.setattr(_extension, "_warned", {"cpu"})
    for actual, expected in zip(compiled, run(), strict=True):
        assert torch.equal(actual.indices, expected.indices)
        assert torch.equal(actual.keep, expected.keep) and not expected.keep.all()
        torch.testing.assert_close(actual.scores, expected.scores, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(actual.boxes, expected.boxes, rtol=1e-4, atol=1e-3)


def test_inputs_stay_as_they_are(implementation):
    boxes, scores = draw_boxes(30)
    corners = torch.rand(30, 2) + 0.1
    before = [x.clone() for x in (boxes, scores, corners)]
    soft_nms(boxes, scores)
    soft_nms_merge(boxes, scores, corners)
    assert all(torch.equal(a, b) for a, b in zip(before, (boxes, scores, corners), strict=True))


def test_other_dtypes_strides_and_gradients(implementation):
    boxes, scores = draw_boxes(30)
    expected = soft_nms(boxes, scores)
    wide = torch.zeros(30, 8, dtype=torch.float64)[:, ::2].copy_(boxes).requires_grad_()
    found = soft_nms(wide, scores.double(), torch.zeros(30, dtype=torch.int32))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found[1].dtype == torch.float32 and not found[1].requires_grad
    half, _ = soft_nms(boxes.half(), scores.bfloat16())
    assert half.shape[0] > 0


def test_no_boxes_and_odd_boxes(implementation):
    empty = soft_nms(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert [len(x) for x in empty] == [0, 0] and empty[0].dtype == torch.int64
    assert len(soft_nms(torch.zeros(0, 4), torch.zeros(0))[0]) == 0
    assert soft_nms_merge(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, 2)).boxes.shape == (
        0,
        4,
    )
    boxes, scores = draw_boxes(20)
    boxes[3], boxes[5], boxes[7] = math.nan, math.inf, boxes[7].flip(0)
    scores[9] = math.nan
    for method in METHODS:
        rows = soft_nms_rows(boxes, scores, method=method)
        assert len(rows.indices) == 20 and rows.keep.any()


@pytest.mark.parametrize("method", METHODS)
def test_a_box_with_an_infinite_side_stays(implementation, method):
    """It touches the selected one, but their IoU is 0."""
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [0.0, 0.0, math.inf, 9.0], [0.0, 0.0, 9.0, 9.0]])
    scores = torch.tensor([0.9, 0.1, 0.1])
    indices, _ = soft_nms(boxes, scores, method=method, score_threshold=0.2)
    assert indices.tolist() == [0, 1]


def test_wrong_arguments_are_named(implementation):
    boxes, scores = draw_boxes(5)
    for message, args, kwargs in (
        ("method must be one of hard", (boxes, scores), {"method": "soft"}),
        ("sigma must be > 0", (boxes, scores), {"sigma": 0.0}),
        ("boxes must be floating point of shape", (boxes[:, :3], scores), {}),
        ("boxes must be floating point of shape", (boxes.int(), scores), {}),
        ("scores must be floating point of shape", (boxes, scores[:4]), {}),
        ("classes must be integers of shape", (boxes, scores, scores), {}),
        ("classes must be integers of shape", (boxes, scores, torch.zeros(4).long()), {}),
    ):
        for function in (soft_nms, soft_nms_rows):
            with pytest.raises(ValueError, match=message):
                function(*args, **kwargs)
    with pytest.raises(ValueError, match="corner_scores must be floating point of shape"):
        soft_nms_merge(boxes, scores, torch.ones(5, 3))


@needs_extension
def test_opcheck():
    boxes, scores = draw_boxes(12)
    sizes = torch.tensor([5, 0, 7])
    for corners in (None, torch.rand(12, 2)):
        torch.library.opcheck(
            torch.ops.d2ext.soft_nms.default,
            (boxes, scores, corners, sizes, 2, 0.5, 0.5, 0.001, 10.0),
            test_utils=("test_schema", "test_faketensor"),
        )
    with pytest.raises(ValueError, match="add up"):
        torch.ops.d2ext.soft_nms(boxes, scores, None, sizes[:1], 2, 0.5, 0.5, 0.001, 10.0)


@needs_extension
def test_does_not_depend_on_the_number_of_threads():
    boxes, scores = draw_boxes(400)
    classes = torch.arange(400) % 5
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(soft_nms_rows(boxes, scores, classes))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_extension
@pytest.mark.parametrize("method", METHODS)
def test_a_thousand_boxes_take_milliseconds(method):
    """1 to 5 ms on one free core; the bound leaves room for busy machines, not for Python loops."""
    boxes, scores = draw_boxes(1000)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        soft_nms(boxes, scores, method=method)
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-2


def test_slots_are_the_rows_of_each_image(implementation):
    """Then come those without a box, which nothing reads; classes are those of the image alone."""
    images = [draw_boxes(count, seed=count) for count in (20, 0, 33)]
    boxes, scores = torch.full((3, 40, 4), math.nan), torch.full((3, 40), math.nan)
    classes = torch.full((3, 40), -5)
    valid = torch.zeros(3, 40, dtype=torch.bool)
    expected = []
    for i, (own_boxes, own_scores) in enumerate(images):
        slots = torch.randperm(40)[: len(own_boxes)].sort()[0]
        boxes[i, slots], scores[i, slots], valid[i, slots] = own_boxes, own_scores, True
        classes[i, slots] = slots % 3
        rows = soft_nms_rows(own_boxes, own_scores, slots % 3, score_threshold=0.1)
        expected.append(rows._replace(indices=slots[rows.indices]))
    found = soft_nms_slots(boxes, scores, classes, valid, score_threshold=0.1)
    for i, rows in enumerate(expected):
        count = len(rows.indices)
        for name in SoftNMSRows._fields:
            assert torch.equal(getattr(found, name)[i, :count], getattr(rows, name))
        assert (found.scores[i, count:] == -math.inf).all() and not found.keep[i, count:].any()
        assert torch.equal(found.indices[i, count:], (~valid[i]).nonzero()[:, 0])
    assert not expected[0].keep.all()
    with pytest.raises(ValueError, match="valid must be bool"):
        soft_nms_slots(boxes, scores, classes, valid[0])


@needs_extension
def test_nothing_waits_for_the_gpu(monkeypatch):
    """On a GPU of tensors without values, an operation that needs one raises an error."""
    module = importlib.import_module("d2ext.layers.soft_nms")  # the package's name is the function
    for name in ("has_cuda_extension", "compiled_for"):
        monkeypatch.setattr(module, name, lambda *_: True)
    with FakeTensorMode():
        boxes, scores = torch.empty(2, 30, 4, device="cuda"), torch.empty(2, 30, device="cuda")
        classes = torch.empty(2, 30, dtype=torch.int64, device="cuda")
        rows = soft_nms_slots(boxes, scores, classes, classes > 0)
        assert [x.shape for x in rows] == [(2, 30), (2, 30), (2, 30), (2, 30, 4)]
        assert all(x.device.type == "cuda" for x in rows)
        assert len(soft_nms_rows(boxes[0], scores[0]).keep) == 30


on_gpu = pytest.mark.skipif(not has_cuda_extension(), reason="d2ext_C is not compiled for CUDA")


def assert_gpu_is_cpu(boxes, scores, classes, cuda, **options) -> SoftNMSRows:
    expected = soft_nms_rows(boxes, scores, classes, **options)
    given = [None if x is None else x.to(cuda) for x in (boxes, scores, classes)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = soft_nms_rows(*given, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.is_cuda for x in found)
    assert torch.equal(found.indices.cpu(), expected.indices)
    assert torch.equal(found.keep.cpu(), expected.keep)
    close = {"rtol": 1e-5, "atol": 1e-7, "equal_nan": True}
    torch.testing.assert_close(found.scores.cpu(), expected.scores, **close)
    torch.testing.assert_close(found.boxes.cpu(), expected.boxes, rtol=0, atol=0, equal_nan=True)
    return expected


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [0, 1, 2, 31, 32, 33, 300, 1500])
@pytest.mark.parametrize("kinds", [1, 4, 80])
def test_gpu_equals_cpu(cuda, method, count, kinds):
    boxes, scores = draw_boxes(count, seed=count, size=30 + count / 5)
    classes = None if kinds == 1 else torch.arange(count) * 7 % kinds
    for threshold in (0.001, 0.05, 0.4):
        options = {"method": method, "iou_threshold": 0.3, "score_threshold": threshold}
        rows = assert_gpu_is_cpu(boxes, scores, classes, cuda, **options)
    assert count < 300 or not rows.keep.all()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("method", METHODS)
def test_gpu_equals_cpu_in_ties_and_of_numbers_that_are_not_finite(cuda, method):
    """Whole numbers, so that IoUs are equal too; the last box, and all after one, are discarded."""
    boxes, scores = draw_boxes(400, size=60)
    boxes, scores = boxes.round(), (scores * 8).round() / 8
    for threshold in (0.01, 0.3, 0.9):
        options = {"method": method, "score_threshold": threshold}
        assert_gpu_is_cpu(boxes, scores, torch.arange(400) % 2, cuda, **options)
        assert_gpu_is_cpu(boxes, scores.sort(descending=True)[0], None, cuda, **options)
        assert_gpu_is_cpu(boxes[:1].repeat(70, 1), scores[:70], None, cuda, **options)
        odd, values = boxes.clone(), scores.clone()
        odd[::9, 1], odd[3::11, 2], odd[5::13] = math.nan, math.inf, -math.inf
        values[::17], values[1::19], values[2::23] = math.nan, math.inf, -math.inf
        values[4::29], values[6::31] = 0.0, -0.0
        assert_gpu_is_cpu(odd, values, None, cuda, **options)
        assert_gpu_is_cpu(odd, values, torch.arange(400) % 5, cuda, **options)


@pytest.mark.gpu
@on_gpu
def test_the_operator_on_the_gpu(cuda):
    boxes, scores = (x.to(cuda) for x in draw_boxes(12))
    numbers = (2, 0.5, 0.5, 0.001, 10.0)
    sizes = torch.tensor([5, 0, 7], device=cuda)
    torch.library.opcheck(
        torch.ops.d2ext.soft_nms.default,
        (boxes, scores, None, sizes, *numbers),
        test_utils=("test_schema", "test_faketensor"),
    )
    # Sizes that do not add up, which the host cannot see without waiting: what is outside stays.
    for wrong in ([5, 99], [-3, 5], [13]):
        out = torch.ops.d2ext.soft_nms(
            boxes, scores, None, torch.tensor(wrong, device=cuda), *numbers
        )
        assert not out[3][9:].any() and torch.equal(out[1][9:], scores[9:])
    with pytest.raises(ValueError, match="merged on the CPU"):
        torch.ops.d2ext.soft_nms(boxes, scores, boxes[:, :2].contiguous(), sizes, *numbers)
    with pytest.raises(ValueError, match="sizes is on"):
        torch.ops.d2ext.soft_nms(boxes, scores, None, sizes.cpu(), *numbers)


@pytest.mark.gpu
def test_results_are_on_the_gpu(cuda):
    boxes, scores = draw_boxes(200)
    classes = torch.arange(200) % 3
    found = soft_nms(boxes.to(cuda), scores.to(cuda), classes.to(cuda))
    expected = soft_nms(boxes, scores, classes)
    assert all(a.device.type == "cuda" for a in found)
    assert torch.equal(found[0].cpu(), expected[0])
    torch.testing.assert_close(found[1].cpu(), expected[1], rtol=1e-5, atol=1e-7)
    merged = soft_nms_merge(
        *(x.to(cuda) for x in (boxes, scores, scores[:, None].expand(-1, 2))), classes.to(cuda)
    )
    assert merged.boxes.is_cuda
    with pytest.raises(ValueError, match="one device"):
        soft_nms(boxes.to(cuda), scores)
