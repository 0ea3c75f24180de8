"""Heat maps against the published targets of three systems, and on their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from d2ext.codecs import heatmaps
from d2ext.codecs.heatmaps import (
    draw_gaussians,
    gather_at,
    gaussian_radius,
    local_peaks,
    maps_on_image,
    top_k,
    top_k_per_class,
)
from tests.reference.fixture import Fixture

REFERENCE = Path(__file__).parents[1] / "reference"
SIZES = torch.tensor(
    [
        (1, 1),
        (2, 3),
        (5, 5),
        (10, 20),
        (20, 10),
        (33, 47),
        (64, 64),
        (100, 30),
        (128, 128),
        (3, 120),
    ]
)
# x, y, radius, peak; the first six fields of the maps are drawn in turn on 40 x 50 cells.
DRAWN = torch.tensor(
    [
        (10, 12, 4, 1),
        (12, 13, 2, 1),
        (0, 0, 5, 1),
        (49, 39, 6, 1),
        (30, 20, 0, 1),
        (25, 39, 3, 0.5),
        (49, 0, 1, 1),
    ]
)


@pytest.mark.parametrize("system", ["cornernet", "centernet_triplets", "centernet"])
def test_radius_is_the_published_one(system: str) -> None:
    fixture = Fixture(REFERENCE / system / "targets")
    variant = system.removeprefix("centernet_")
    overlaps = {"radius": 0.7} if system == "centernet" else {}
    overlaps = overlaps or {f"radius_iou_{o}": o for o in (0.3, 0.5, 0.7)}
    for name, overlap in overlaps.items():
        radius = gaussian_radius(SIZES[:, 0], SIZES[:, 1], overlap, variant)
        np.testing.assert_allclose(radius, fixture.expected[name], rtol=1e-6)


def test_radius_means_an_overlap() -> None:
    """Both corners moved by the radius, whichever way, still overlap enough, and one way just so."""
    h, w, overlap = 20.0, 30.0, 0.6
    r = float(gaussian_radius(torch.tensor(h), torch.tensor(w), overlap, "cornernet"))
    inner = (h - 2 * r) * (w - 2 * r) / (h * w)
    outer = h * w / ((h + 2 * r) * (w + 2 * r))
    shared = (h - r) * (w - r)
    shifted = shared / (2 * h * w - shared)
    assert min(inner, outer, shifted) == pytest.approx(overlap)


def test_unknown_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="fcos"):
        gaussian_radius(torch.ones(1), torch.ones(1), 0.7, "fcos")


@pytest.mark.parametrize(
    ("system", "name", "divisor"),
    [
        ("cornernet", "gaussian_map", 6.0),
        ("centernet_triplets", "gaussian_map_divisor_6", 6.0),
        ("centernet_triplets", "gaussian_map_divisor_5", 5.0),
        ("centernet", "gaussian_map", 6.0),
    ],
)
def test_gaussians_are_the_published_ones(system: str, name: str, divisor: float) -> None:
    fixture = Fixture(REFERENCE / system / "targets")
    # CenterNet's map was drawn without peaks below 1.
    drawn = DRAWN[:6] if system == "centernet" else DRAWN
    cells, radii = drawn[:, :2].long(), drawn[:, 2].long()
    peaks = None if system == "centernet" else drawn[:, 3]
    classes = torch.zeros(len(drawn), dtype=torch.long)
    heat = draw_gaussians((40, 50), 1, cells, radii, classes, divisor, peaks)
    assert heat.dtype == torch.float32
    np.testing.assert_allclose(heat[0], fixture.expected[name], atol=1e-6)


@pytest.mark.parametrize(
    ("system", "variant", "overlap", "corners"),
    [
        ("cornernet", "cornernet", 0.3, ("tl", "br")),
        ("centernet_triplets", "triplets", 0.7, ("tl", "br", "ct")),
    ],
)
def test_corner_maps_of_a_batch(
    system: str, variant: str, overlap: float, corners: tuple[str, ...]
) -> None:
    """Boxes of padded, resized images → the published sampler's maps, both images at once."""
    fixture = Fixture(REFERENCE / system / "losses")
    inputs, ratio = fixture.manifest["inputs"], 32 / 127
    boxes, classes, images = [], [], []
    for i, listed in enumerate(inputs["boxes_x1_y1_x2_y2_class"]):
        height, width = (180, 240) if i == 0 else (120, 160)
        values = torch.tensor(listed, dtype=torch.float64)
        values[:, 1:4:2] += (width - height) // 2  # centred in a square
        values[:, :4] = (values[:, :4] * 127 / width).clamp(0, 126)
        keep = (values[:, 2] > values[:, 0]) & (values[:, 3] > values[:, 1])
        boxes.append(values[keep, :4] * ratio)
        classes.append(values[keep, 4].long() - 1)
        images.append(torch.full((int(keep.sum()),), i))
    box, label, image = torch.cat(boxes), torch.cat(classes), torch.cat(images)
    sides = (box[:, 2:] - box[:, :2]).ceil()
    radii = gaussian_radius(sides[:, 1], sides[:, 0], overlap, variant).long()
    places = {"tl": box[:, :2], "br": box[:, 2:], "ct": (box[:, :2] + box[:, 2:]) / 2}
    for corner in corners:
        cells = places[corner].long()
        index = (cells[:, 1] * 32 + cells[:, 0]).tolist()
        assert index == fixture.expected[f"{corner}_index"][:, :5].flatten().tolist()
        divisor = 5.0 if corner == "ct" else 6.0
        heat = draw_gaussians((32, 32), 10, cells, radii, image * 5 + label, divisor)
        np.testing.assert_allclose(
            heat.view(2, 5, 32, 32), fixture.expected[f"gt_{corner}_heat"], atol=1e-6
        )


def test_gaussians_of_many_objects_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(0, 20, (1000, 2), generator=generator)
    radii = torch.randint(0, 6, (1000,), generator=generator)
    classes = torch.randint(0, 3, (1000,), generator=generator)
    whole = draw_gaussians((20, 20), 3, cells, radii, classes)
    monkeypatch.setattr("d2ext.codecs.heatmaps._DRAWING_LIMIT", 20 * 20 * 7)
    assert torch.equal(draw_gaussians((20, 20), 3, cells, radii, classes), whole)
    assert (whole[classes, cells[:, 1], cells[:, 0]] == 1).all()


def test_nothing_to_draw() -> None:
    none = torch.zeros(0, dtype=torch.long)
    heat = draw_gaussians((4, 5), 2, none.view(0, 2), none, none)
    assert heat.shape == (2, 4, 5) and not heat.any()


def test_two_objects_on_one_cell() -> None:
    cells = torch.tensor([[3, 2], [3, 2]])
    heat = draw_gaussians((6, 7), 1, cells, torch.tensor([1, 2]), torch.zeros(2, dtype=torch.long))
    wide = draw_gaussians((6, 7), 1, cells[1:], torch.tensor([2]), torch.zeros(1, dtype=torch.long))
    assert torch.equal(heat, wide) and (heat == 1).sum() == 1


def test_peaks_keep_plateaus() -> None:
    heat = torch.zeros(1, 1, 5, 6)
    heat[0, 0, 1, 1] = heat[0, 0, 1, 2] = 0.5  # equal neighbours
    heat[0, 0, 4, 5] = 0.3  # at the border
    heat[0, 0, 3, 4] = 0.2  # beside a higher one
    peaks = local_peaks(heat)
    expected = heat.clone()
    expected[0, 0, 3, 4] = 0
    assert torch.equal(peaks, expected)


def test_best_places() -> None:
    heat = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    best = top_k(heat, 7)
    for b in range(2):
        order = np.argsort(-heat[b].flatten().numpy())[:7]
        classes, ys, xs = np.unravel_index(order, (3, 4, 5))
        np.testing.assert_array_equal(best.classes[b], classes)
        np.testing.assert_array_equal(best.ys[b], ys)
        np.testing.assert_array_equal(best.xs[b], xs)
        np.testing.assert_array_equal(best.index[b], ys * 5 + xs)
        np.testing.assert_array_equal(best.scores[b], heat[b].flatten()[order])
    per_class = top_k_per_class(heat, 2)
    assert per_class.scores.shape == (2, 3, 2)
    assert torch.equal(per_class.scores[:, :, 0], heat.flatten(2).amax(2))
    assert per_class.classes[1, :, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("k", [1, 7, 100])
def test_best_places_as_on_a_gpu(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    heat = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(2))
    expected = top_k(heat, k)
    monkeypatch.setattr(heatmaps, "needs_fixed_shapes", lambda _: True)
    monkeypatch.setattr(heatmaps, "top_k_per_class", None)
    for actual, field in zip(top_k(heat, k), expected, strict=True):
        assert torch.equal(actual, field)


@pytest.mark.parametrize("k", [60, 61, 1000])
def test_top_k_larger_than_the_map(k: int) -> None:
    heat = torch.rand(1, 3, 4, 5)
    best = top_k(heat, k)
    assert all(field.shape == (1, 60) for field in best)
    assert best.scores[0].tolist() == sorted(heat.flatten().tolist(), reverse=True)
    assert top_k_per_class(heat, k).index.shape == (1, 3, 20)


def test_gather_at_takes_all_channels() -> None:
    maps = torch.rand(2, 3, 4, 5)
    index = torch.tensor([[0, 19, 7], [5, 5, 1]])
    values = gather_at(maps, index)
    assert values.shape == (2, 3, 3)
    assert torch.equal(values[0, 2], maps[0, :, 1, 2])
    assert torch.equal(values[1, 0], maps[1, :, 1, 0])
    strided = maps.contiguous(memory_format=torch.channels_last)
    assert torch.equal(gather_at(strided, index), values)


def test_maps_lie_on_the_output_where_they_lie_on_the_image() -> None:
    """The largest of two maps, worked out by hand: cells of 3x4 pixels from (5, 7)."""
    maps = torch.zeros(2, 6, 5)
    maps[0, 2, 1], maps[1, 4, 3] = 0.5, 1.0  # centres at (9.5, 17) and (15.5, 25)
    to_image = torch.tensor([[3.0, 0.0, 5.0], [0.0, 4.0, 7.0]])
    shown = maps_on_image(maps, to_image, (40, 50), (40, 50))
    assert shown.shape == (40, 50)
    for row, column, value in ((16, 9, 0.5), (17, 9, 0.5), (24, 15, 1.0), (25, 15, 1.0)):
        assert float(shown[row, column]) == pytest.approx(value * 7 / 8, abs=1e-5)
    # Nothing a cell or more from the centres.
    assert shown[:13].eq(0).all() and shown[29:].eq(0).all()
    assert shown[:, :6].eq(0).all() and shown[:, 19:].eq(0).all()
    # On an output of three times the width and twice the height.
    shown = maps_on_image(maps, to_image, (40, 50), (80, 150))
    assert float(shown[33, 28]) == pytest.approx(0.5 * 15 / 16, abs=1e-5)
    assert float(shown[50, 46]) == pytest.approx(15 / 16, abs=1e-5)
