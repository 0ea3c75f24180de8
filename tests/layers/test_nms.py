"""NMS over fixed slots: each implementation against naive loops and torchvision's, and Fast NMS."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor

from d2ext.layers import has_cuda_extension
from d2ext.layers.nms import nms, overlapped, overlapped_reference

needs_cuda = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_cuda_extension()),
    reason="no CUDA device, or d2ext_C is not compiled for CUDA",
)
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]


def scene(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Boxes (..., N, 4), whole numbers in every other scene so that overlaps equal thresholds, and which
    are valid."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(*shape, 2, generator=generator) * 40
    sides = torch.rand(*shape, 2, generator=generator) * 20
    boxes = torch.cat([corners, corners + sides], dim=-1)
    boxes = boxes.round() if seed % 2 else boxes
    return boxes.to(dtype), torch.rand(*shape, generator=generator) < 0.8


def naive(boxes: Tensor, valid: Tensor, threshold: float) -> Tensor:
    """One group, in float64."""
    keep = torch.zeros_like(valid)
    for i, (x1, y1, x2, y2) in enumerate(boxes.double().tolist()):
        keep[i] = valid[i]
        for a1, b1, a2, b2 in boxes[:i][keep[:i]].double().tolist():
            common = max(min(x2, a2) - max(x1, a1), 0) * max(min(y2, b2) - max(y1, b1), 0)
            union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - common
            if union > 0 and common / union > threshold:
                keep[i] = False
    return keep


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(4))
def test_against_loops(device: str, seed: int) -> None:
    boxes, valid = scene(seed, 2, 3, 70, dtype=torch.float64)
    keep = nms(boxes.to(device), valid.to(device), 0.3).cpu()
    assert keep.shape == (2, 3, 70) and 0 < keep.sum() < valid.sum()
    for group in range(6):
        rows = [x.flatten(0, 1)[group] for x in (boxes, valid, keep)]
        assert torch.equal(rows[2], naive(rows[0], rows[1], 0.3))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 500])
def test_is_torchvisions_on_the_cpu(device: str, threshold: float, count: int) -> None:
    """To the bit: also where an overlap equals the threshold, and of boxes without area."""
    boxes, valid = scene(count, 3, count)
    boxes[:, ::7, 2:] = boxes[:, ::7, :2]
    keep = nms(boxes.to(device), valid.to(device), threshold).cpu()
    for own, good, stays in zip(boxes, valid, keep, strict=True):
        index = good.nonzero()[:, 0]
        expected = index[torchvision.ops.nms(own[index], -index.float(), threshold)]
        assert stays.nonzero()[:, 0].tolist() == sorted(expected.tolist())


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_not_valid_is_not_read(device: str) -> None:
    boxes, valid = scene(0, 2, 130)
    expected = nms(boxes.to(device), valid.to(device), 0.5)
    boxes[~valid] = torch.nan
    assert torch.equal(nms(boxes.to(device), valid.to(device), 0.5), expected)
    assert not nms(boxes.to(device), torch.zeros_like(valid).to(device), 0.5).any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_any_strides(device: str, dtype: torch.dtype) -> None:
    boxes, valid = (x.to(device) for x in scene(1, 3, 90, dtype=dtype))
    expected = nms(boxes.float(), valid, 0.4)
    assert torch.equal(nms(boxes, valid, 0.4), expected)
    strided = boxes.transpose(0, 1).contiguous().transpose(0, 1), valid.T.contiguous().T
    assert torch.equal(nms(*strided, 0.4), expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 5)])
def test_nothing(device: str, shape: tuple[int, ...]) -> None:
    boxes, valid = scene(0, *shape)
    assert nms(boxes.to(device), valid.to(device), 0.5).shape == shape


@pytest.mark.gpu
@needs_cuda
def test_many_groups_and_boxes_on_the_gpu_in_a_graph() -> None:
    for shape in ((70_000, 3), (5, 1000), (80, 1000), (1, 6000)):
        boxes, valid = (x.cuda() for x in scene(0, *shape))
        boxes = boxes * shape[-1] ** 0.5
        nms(boxes, valid, 0.6)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            keep = nms(boxes, valid, 0.6)
        graph.replay()
        assert torch.equal(keep[-5:].cpu(), nms(boxes[-5:].cpu(), valid[-5:].cpu(), 0.6))


def test_wrong_arguments() -> None:
    boxes, valid = scene(0, 2, 5)
    for wrong in (
        (boxes[..., :3], valid),
        (boxes.long(), valid),
        (boxes, valid[:1]),
        (boxes, valid.long()),
        (boxes, valid.to("meta")),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            nms(*wrong, 0.5)


@pytest.mark.parametrize("device", DEVICES)
def test_the_operator_keeps_pytorchs_rules(device: str) -> None:
    arguments = (*(x.to(device) for x in scene(0, 2, 20)), 0.5)
    torch.library.opcheck(torch.ops.d2ext.nms.default, arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("seed", range(2))
def test_overlapped_against_loops(device: str, seed: int) -> None:
    boxes, _ = scene(seed, 2, 70, dtype=torch.float64)
    found = overlapped(boxes.to(device), 0.3).cpu()
    assert found.shape == (2, 70) and 0 < found.sum() < 140
    for own, is_overlapped in zip(boxes.tolist(), found.tolist(), strict=True):
        for i, (x1, y1, x2, y2) in enumerate(own):
            expected = False
            for a1, b1, a2, b2 in own[:i]:
                common = max(min(x2, a2) - max(x1, a1), 0) * max(min(y2, b2) - max(y1, b1), 0)
                union = (x2 - x1) * (y2 - y1) + (a2 - a1) * (b2 - b1) - common
                expected |= union > 0 and common / union > 0.3
            assert is_overlapped[i] == expected


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 200, 255, 256, 257, 700])
def test_overlapped_on_the_gpu_is_the_plain_one(count: int, dtype: torch.dtype) -> None:
    """To the bit: overlaps that equal the threshold, boxes without area, ties, NaN and infinity."""
    boxes, _ = scene(count, 7, count, dtype=dtype)
    boxes[:, ::5] = boxes[:, :1].clone()
    boxes[0, ::3, 2:] = boxes[0, ::3, :2]
    boxes[1, ::4, 0], boxes[2, ::4, 3] = torch.nan, torch.inf
    boxes[3, ::4, :2], boxes[3, 1::4] = -torch.inf, torch.inf
    strided = boxes.cuda().transpose(0, 1).contiguous().transpose(0, 1)
    for threshold in (0.0, 0.3, 0.5, 1.0):
        expected = overlapped_reference(boxes, threshold)
        assert torch.equal(overlapped(strided, threshold).cpu(), expected)
        assert count < 200 or threshold == 1.0 or 0 < expected.sum() < expected.numel()


@pytest.mark.gpu
@needs_cuda
def test_overlapped_in_a_graph_and_of_many_groups() -> None:
    boxes = scene(1, 70_000, 3)[0].cuda()
    overlapped(boxes, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = overlapped(boxes, 0.5)
    graph.replay()
    assert torch.equal(found, overlapped_reference(boxes, 0.5))
    torch.library.opcheck(torch.ops.d2ext.overlapped.default, (boxes[:4], 0.5))


@pytest.mark.parametrize("device", DEVICES)
def test_overlapped_of_nothing_and_of_wrong_boxes(device: str) -> None:
    for shape in ((0, 4), (2, 0, 4), (0, 5, 4)):
        assert overlapped(torch.zeros(shape, device=device), 0.5).shape == shape[:-1]
    for wrong in (torch.zeros(5, 3), torch.zeros(4), torch.zeros(5, 4, dtype=torch.int64)):
        with pytest.raises(ValueError, match="boxes must be floating point of shape"):
            overlapped(wrong.to(device), 0.5)
