"""YOLACT's choice of detections against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor

from d2ext.systems.yolact.postprocess import (
    NMS,
    cross_class_fast_nms,
    fast_nms,
    pixel_boxes,
    topk_in_parts,
    traditional_nms,
)
from d2ext.testing import tiny_config


def _random(seed: int, batch: int = 2, priors: int = 60, classes: int = 4) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(batch, priors, 2, generator=generator) * 0.5
    size = 0.1 + torch.rand(batch, priors, 2, generator=generator) * 0.4
    scores = (torch.randn(batch, priors, classes + 1, generator=generator) * 2).softmax(-1)[..., 1:]
    coefficients = torch.arange(batch * priors).reshape(batch, priors, 1).float()
    return torch.cat([corner, corner + size], -1), scores, coefficients


def _iou(a: list[float], b: list[float], extra: float = 0.0) -> float:
    w = min(a[2], b[2]) - max(a[0], b[0]) + extra
    h = min(a[3], b[3]) - max(a[1], b[1]) + extra
    inter = max(w, 0) * max(h, 0)
    areas = [(c[2] - c[0] + extra) * (c[3] - c[1] + extra) for c in (a, b)]
    return inter / (sum(areas) - inter)


def _by_loops(
    boxes: Tensor, scores: Tensor, per_class: bool, fast: bool, top_k: int, threshold: float
) -> list[tuple[int, int]]:
    """(prior, class) of one image's detections, best first."""
    rows, values = boxes.tolist(), scores.tolist()
    best = [max(range(len(v)), key=v.__getitem__) for v in values]
    groups: dict[int, list[tuple[float, int, int]]] = {}
    for i, v in enumerate(values):
        if v[best[i]] <= threshold:
            continue
        for c, score in enumerate(v):
            if per_class and (fast or score > threshold):
                groups.setdefault(c, []).append((score, i, c))
            elif not per_class and c == best[i]:
                groups.setdefault(0, []).append((score, i, c))
    found = []
    for group in groups.values():
        group.sort(reverse=True)
        group = group[:top_k] if fast else group
        kept: list[tuple[float, int, int]] = []
        for j, candidate in enumerate(group):
            rivals = group[:j] if fast else kept
            if fast:
                clear = all(_iou(rows[r[1]], rows[candidate[1]]) <= 0.5 for r in rivals)
            else:
                pixels = [[550 * x for x in rows[k]] for k in range(len(rows))]
                clear = all(_iou(pixels[r[1]], pixels[candidate[1]], 1.0) < 0.5 for r in rivals)
            if clear:
                kept.append(candidate)
        found += kept
    return [(i, c) for _, i, c in sorted(found, reverse=True)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["fast", "cross_class_fast", "traditional"])
def test_equals_the_rule(name: str, seed: int) -> None:
    boxes, scores, coefficients = _random(seed)
    options: dict[str, Any] = {"score_threshold": 0.3, "max_detections": 25}
    if name != "traditional":
        options["top_k"] = 15
    found = NMS[name](boxes, scores, coefficients, **options)
    for b in range(len(boxes)):
        expected = _by_loops(
            boxes[b], scores[b], name != "cross_class_fast", name != "traditional", 15, 0.3
        )
        expected = expected if name == "cross_class_fast" else expected[:25]
        valid = found.scores[b] >= 0
        priors = (found.coefficients[b, valid, 0] - b * boxes.shape[1]).long()
        pairs = list(zip(priors.tolist(), found.classes[b, valid].tolist(), strict=True))
        assert pairs == expected
        torch.testing.assert_close(found.boxes[b, valid], boxes[b, priors])
        torch.testing.assert_close(
            found.scores[b, valid], scores[b, priors, found.classes[b, valid]]
        )
        assert not valid[len(expected) :].any()


def test_fast_nms_lets_suppressed_boxes_suppress() -> None:
    # b overlaps a, c overlaps b but not a: greedy NMS keeps c, Fast NMS does not.
    boxes = torch.tensor([[[0.0, 0, 0.4, 0.4], [0.1, 0, 0.5, 0.4], [0.2, 0, 0.6, 0.4]]])
    scores = torch.tensor([[[0.9], [0.8], [0.7]]])
    coefficients = torch.zeros(1, 3, 2)
    assert (fast_nms(boxes, scores, coefficients).scores >= 0).sum() == 1
    assert (traditional_nms(boxes, scores, coefficients).scores >= 0).sum() == 2


def test_a_candidate_competes_in_every_class() -> None:
    boxes, coefficients = torch.tensor([[[0.0, 0, 1, 1]]]), torch.zeros(1, 1, 2)
    scores = torch.tensor([[[0.9, 0.001, 0.0]]])
    assert (fast_nms(boxes, scores, coefficients).scores >= 0).sum() == 3
    assert (cross_class_fast_nms(boxes, scores, coefficients).scores >= 0).sum() == 1
    assert (traditional_nms(boxes, scores, coefficients).scores >= 0).sum() == 1


def test_cross_class_has_no_limit_of_detections() -> None:
    boxes = torch.zeros(1, 150, 4)
    boxes[0, :, 2:] = 1e-3
    boxes[0] += torch.arange(150)[:, None] * 2e-3
    scores = torch.linspace(0.5, 0.9, 150)[None, :, None]
    found = cross_class_fast_nms(boxes, scores, torch.zeros(1, 150, 2), max_detections=100)
    assert (found.scores >= 0).sum() == 150


@pytest.mark.parametrize("parts", [1, 4, 16])
def test_topk_in_parts(parts: int) -> None:
    scores = torch.stack([torch.randperm(320) for _ in range(3)]) / 320
    best, places = topk_in_parts(scores, 20, parts)
    expected = scores.topk(20, dim=1)
    assert torch.equal(best, expected.values) and torch.equal(places, expected.indices)


@pytest.mark.parametrize("name", sorted(NMS))
def test_nothing_above_the_threshold(name: str) -> None:
    boxes, scores, coefficients = _random(0)
    found = NMS[name](boxes, scores * 0.01, coefficients, score_threshold=0.05)
    assert (found.scores < 0).all()
    assert found.boxes.shape[0] == 2


@pytest.mark.parametrize("name", sorted(NMS))
def test_boxes_without_area_and_nan(name: str) -> None:
    boxes, scores, coefficients = _random(0)
    boxes[0, :, 2:] = boxes[0, :, :2]
    boxes[1, 3] = float("nan")
    found = NMS[name](boxes, scores, coefficients)
    assert (found.scores >= 0).any(dim=1).all()


def test_pixel_boxes_are_ordered_clipped_and_cut() -> None:
    boxes = torch.tensor([[0.5, 0.9, -0.2, 0.1], [0.11, 0.26, 1.5, 2.0]])
    exact = pixel_boxes(boxes, 50, 90, truncate=False)
    torch.testing.assert_close(exact, torch.tensor([[0.0, 5, 45, 45], [9.9, 13, 90, 50]]))
    cut = pixel_boxes(boxes, 50, 90, truncate=True)
    torch.testing.assert_close(
        cut, torch.tensor([[0.0, 5, 45, 45], [9, 13, 90, 50]]), atol=1, rtol=0
    )
    assert torch.equal(cut, cut.trunc())


@pytest.mark.parametrize("crop", ["before", "after"])
def test_a_batch_is_finished_as_its_images(crop: str) -> None:
    """To the bit: images of one size, whose masks are assembled together, and of others."""
    model = build_model(tiny_config("YOLACT")).eval()
    model.crop = crop
    generator = torch.Generator().manual_seed(0)
    counts, sizes = [5, 0, 9, 3, 9], [(40, 50), (40, 50), (33, 20), (40, 50), (33, 20)]
    corner = torch.rand(5, 9, 2, generator=generator) * 0.6
    boxes = torch.cat([corner, corner + 0.4 * torch.rand(5, 9, 2, generator=generator)], dim=2)
    scores = torch.rand(5, 9, generator=generator).sort(dim=1, descending=True)[0]
    for own, count in zip(scores, counts, strict=True):
        own[count:] = -1
    classes = torch.randint(3, (5, 9), generator=generator)
    coefficients = torch.randn(5, 9, 8, generator=generator)
    prototypes = torch.rand(5, 16, 16, 8, generator=generator)
    predictions = (boxes, scores, classes, coefficients, prototypes, scores * 0.5)
    inputs = [{"image": torch.zeros(3, *size)} for size in sizes]
    results = model.postprocess(predictions, inputs)
    for i, result in enumerate(results):
        (alone,) = model.postprocess(tuple(x[i : i + 1] for x in predictions), inputs[i : i + 1])
        own, other = result["instances"], alone["instances"]
        assert len(own) == counts[i] and own.image_size == other.image_size == sizes[i]
        assert own.pred_masks.shape == (counts[i], *sizes[i])
        for name, value in other.get_fields().items():
            actual = own.get(name)
            assert torch.equal(getattr(actual, "tensor", actual), getattr(value, "tensor", value))
    assert all(0 < x["instances"].pred_masks.float().mean() < 1 for x in (results[0], results[2]))
