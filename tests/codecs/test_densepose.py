"""Predictions of surfaces: the structure, and results in boxes as the published code gives them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch.nn import functional as F

from d2ext.codecs import densepose
from d2ext.codecs.densepose import (
    ChartPredictions,
    EmbeddingPredictions,
    charts_in_boxes,
    decode_result,
    encode_result,
    integer_boxes,
    masks_in_boxes,
    nearest_vertices,
    paste_masks,
    paste_results,
    quantize,
    vertices_at,
    vertices_in_boxes,
)
from tests.reference.fixture import Fixture, draw_tensor

REFERENCE = Path(__file__).parents[1] / "reference" / "densepose"


def _predictions(count: int, side: int, channels: dict[str, int], seed: int) -> ChartPredictions:
    maps = {}
    for name, number in channels.items():
        x = draw_tensor(f"output.{name}", (count, number, side, side), seed)
        if name in "uv":
            x = np.float32(0.5) + np.float32(0.4) * x
        maps[name] = torch.from_numpy(x)
    return ChartPredictions(**maps)


@pytest.fixture(scope="module")
def fixture() -> Fixture:
    return Fixture(REFERENCE / "result_structures")


@pytest.fixture(scope="module")
def predictions(fixture: Fixture) -> ChartPredictions:
    channels = fixture.manifest["inputs"]["predictor_outputs"]["channels"]
    return _predictions(3, 28, channels, 41)


def test_results_as_published(fixture: Fixture, predictions: ChartPredictions) -> None:
    inputs, expected = fixture.manifest["inputs"], fixture.expected
    boxes = torch.tensor(inputs["boxes"])
    results = charts_in_boxes(predictions, boxes)
    for k, (result, stored) in enumerate(zip(results, inputs["stored_form"], strict=True)):
        quantized = quantize(result)
        published = torch.from_numpy(expected[f"result{k}.labels_uv_uint8"])
        assert torch.equal(quantized[0], published[0])
        # U and V are cut at a 255th: float32 may tip a few.
        different = (quantized.int() - published.int()).abs()
        assert different.max() <= 1 and (different > 0).float().mean() < 1e-3
        sigma_2 = expected[f"extracted{k}.sigma_2"]
        np.testing.assert_allclose(result.confidences["sigma_2"], sigma_2, atol=1e-5)
        assert list(published.shape) == stored["shape_chw"]
        assert torch.equal(decode_result(stored["labels_uv_str"]), published)
        text = encode_result(published)
        assert torch.equal(decode_result(text), published)
        assert text.endswith("\n") and {len(x) for x in text.splitlines()[:-1]} == {76}
    masks = paste_masks([r.labels > 0 for r in results], boxes, tuple(inputs["image_size_hw"]))
    assert np.array_equal(np.packbits(masks, axis=-1), expected["masks"])
    with pytest.raises(ValueError, match="PNG"):
        decode_result("")


def test_the_first_is_on_top() -> None:
    """Where it has a part; the second shows through its background, and both end with the image."""
    first = torch.tensor([[0, 1, 1], [0, 1, 1]], dtype=torch.uint8)
    quantized = [first.expand(3, 2, 3), torch.full((3, 5, 5), 7, dtype=torch.uint8)]
    boxes = torch.tensor([[1.9, 1.0, 4.9, 3.0], [0.0, 0.0, 5.0, 5.0]])
    surface, persons = paste_results(quantized, boxes, (3, 4))
    assert persons.tolist() == [[2, 2, 2, 2], [2, 2, 1, 1], [2, 2, 1, 1]]
    expected = torch.where(persons == 1, 1, 7).to(torch.uint8)
    assert torch.equal(surface, expected.expand(3, 3, 4))
    nothing, nobody = paste_results([], boxes[:0], (3, 4))
    assert nothing.shape == (3, 3, 4) and not nothing.any() and not nobody.any()


def test_vertices_of_some_pixels_are_those_of_all() -> None:
    predictions = EmbeddingPredictions(
        torch.from_numpy(draw_tensor("coarse", (3, 2, 8, 8), 1)),
        torch.from_numpy(draw_tensor("embedding", (3, 5, 8, 8), 2)),
    )
    boxes = torch.tensor([[3.2, 1.9, 40.0, 33.3], [0.0, 0.0, 7.9, 9.0], [5.0, 5.0, 5.2, 30.0]])
    vertices = torch.from_numpy(draw_tensor("vertices", (40, 5), 3))
    results = vertices_in_boxes(predictions, boxes, vertices)
    for mask, result in zip(masks_in_boxes(predictions, boxes), results, strict=True):
        assert torch.equal(mask, result.mask) and 0 < mask.sum() < mask.numel()
    person = torch.tensor([2, 0, 0, 1])
    row, column = torch.tensor([20, 0, 17, 8]), torch.tensor([0, 35, 5, 6])
    found = vertices_at(predictions, boxes[:, 2:] - boxes[:, :2], person, column, row, vertices)
    expected = [
        int(results[p].vertices[r, c]) if results[p].mask[r, c] else -1
        for p, r, c in zip(person.tolist(), row.tolist(), column.tolist(), strict=True)
    ]
    assert found.tolist() == expected and len(set(expected)) > 2


def test_travels_in_instances(predictions: ChartPredictions) -> None:
    instances = Instances((150, 200), pred_boxes=Boxes(torch.zeros(3, 4)))
    instances.pred_densepose = predictions
    both = Instances.cat([instances[torch.tensor([2, 0])], instances[1]]).to("cpu")
    found = both.pred_densepose
    assert torch.equal(found.u, predictions.u[[2, 0, 1]])
    assert torch.equal(found.sigma_2, predictions.sigma_2[[2, 0, 1]])
    assert found.kappa_u is None and "fine_segm (3, 25, 28, 28)" in repr(found)
    assert len(found[-1]) == 1 and torch.equal(found[-1].v, predictions.v[1:2])
    assert len(found[1]) == 1 and torch.equal(found[1].v, predictions.v[:1])
    assert found.to(torch.float64).coarse_segm.dtype == torch.float64
    nobody = found[torch.zeros(3, dtype=torch.bool)]
    assert len(nobody) == 0 and charts_in_boxes(nobody, torch.zeros(0, 4)) == []
    mesh = {"body": torch.ones(5, 3)}
    embedded = EmbeddingPredictions(torch.zeros(2, 2, 4, 4), torch.ones(2, 3, 4, 4), vertices=mesh)
    joined = EmbeddingPredictions.cat([embedded, embedded[:1]]).to("cpu")
    assert len(joined) == 3 and joined.vertices is mesh


def test_results_are_those_of_interpolation(
    predictions: ChartPredictions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one resize after the other, whatever the size of the chunks."""
    boxes = torch.tensor([[3.2, 1.9, 40.0, 33.3], [0.0, 0.0, 7.9, 9.0], [5.0, 5.0, 5.2, 90.0]])
    whole = charts_in_boxes(predictions, boxes)
    monkeypatch.setattr(densepose, "_CHUNK", 100)
    for k, (result, other) in enumerate(
        zip(whole, charts_in_boxes(predictions, boxes), strict=True)
    ):
        width, height = integer_boxes(boxes)[k, 2:].tolist()
        coarse, fine, u, v = (
            F.interpolate(x[k : k + 1], (height, width), mode="bilinear", align_corners=False)[0]
            for x in (predictions.coarse_segm, predictions.fine_segm, predictions.u, predictions.v)
        )
        labels = fine.argmax(0) * (coarse.argmax(0) > 0)
        uv = torch.stack([x.gather(0, labels[None])[0] * (labels > 0) for x in (u, v)])
        for one in (result, other):
            assert torch.equal(one.labels, labels)
            torch.testing.assert_close(one.uv, uv)


def test_nearest_vertices(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(50, 4, generator=generator)
    vertices = torch.randn(30, 4, generator=generator)
    expected = torch.cdist(pixels, vertices).argmin(dim=1)
    monkeypatch.setattr(densepose, "_CHUNK", 10)
    assert torch.equal(nearest_vertices(pixels, vertices), expected)
    assert len(nearest_vertices(pixels[:0], vertices)) == 0
