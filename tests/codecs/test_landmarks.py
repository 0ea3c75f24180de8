"""Codecs of landmarks: geometry, targets, and how far a round trip may lie off."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from d2ext.codecs.affine import invert_affine
from d2ext.codecs.landmark_crops import apply_affine, crop_to_image, pad_boxes
from d2ext.codecs.landmark_heatmaps import (
    DECODERS,
    HeatmapCodec,
    decode_argmax,
    decode_centroid,
    decode_dark,
    decode_dark_udp,
    decode_hourglass,
    decode_quarter,
    decode_taylor,
    draw_targets,
    gaussian_blur,
    profile,
    support,
)
from d2ext.codecs.landmark_integral import IntegralCodec
from d2ext.codecs.landmark_simcc import SimCCCodec
from d2ext.codecs.landmarks import GEOMETRIES, LandmarkCodec, RegressionCodec, to_cells, to_pixels

# Width and height of the crop and of the maps.
INPUT, MAP = (192, 256), (48, 64)
CELL = 4.0


def points(count: int = 400, *, margin: float = 0.0, seed: int = 0) -> Tensor:
    """(1, count, 2) anywhere inside the crop, at least ``margin`` pixels from its border."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor(INPUT) - 2 * margin
    return torch.rand((1, count, 2), generator=generator) * size + margin


def round_trip(codec: LandmarkCodec, x: Tensor) -> tuple[Tensor, Tensor]:
    """Errors (1, count) in x and y, the larger one, in pixels; and weights."""
    targets, weights = codec.encode(x, torch.ones(x.shape[:2], dtype=torch.bool))
    if isinstance(codec, (SimCCCodec, IntegralCodec)):
        raise TypeError("these predict logarithms")
    return (codec.decode(targets).points - x).abs().amax(dim=-1), weights


def heatmap_codec(**kwargs: object) -> HeatmapCodec:
    return HeatmapCodec(INPUT, MAP, **kwargs)  # type: ignore[arg-type]


# Geometry


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_cells_and_pixels_are_inverse(geometry: str) -> None:
    x = points()
    cells = to_cells(x, INPUT, MAP, geometry)
    torch.testing.assert_close(to_pixels(cells, INPUT, MAP, geometry), x)


def test_geometries_by_hand() -> None:
    first, last = torch.tensor([0.5, 0.5]), torch.tensor([191.5, 255.5])
    assert to_cells(first, INPUT, MAP, "continuous").tolist() == [-0.375, -0.375]
    assert to_cells(last, INPUT, MAP, "continuous").tolist() == [47.375, 63.375]
    assert to_cells(first, INPUT, MAP, "index").tolist() == [0, 0]
    assert to_cells(last, INPUT, MAP, "index").tolist() == [47.75, 63.75]
    torch.testing.assert_close(to_cells(first, INPUT, MAP, "udp"), torch.tensor([0.0, 0.0]))
    torch.testing.assert_close(to_cells(last, INPUT, MAP, "udp"), torch.tensor([47.0, 63.0]))
    with pytest.raises(ValueError, match="continuous"):
        to_cells(first, INPUT, MAP, "plain")


@pytest.mark.parametrize(
    ("geometry", "shift", "bound"),
    [
        ("continuous", False, 0.02),
        ("udp", False, 0.02),
        ("index", False, 3.1),
        ("index", True, 1.1),
    ],
)
def test_mirrored_maps(geometry: str, shift: bool, bound: float) -> None:
    """A map of the mirrored crop, turned back, shows the point; the common geometry is a cell less a
    pixel off, of which the published shift takes all but one pixel."""
    codec = heatmap_codec(geometry=geometry, flip_shift=shift)
    x = points(margin=16)
    partners = torch.arange(x.shape[1]).flip(0)
    mirrored = x[:, partners].clone()
    mirrored[..., 0] = INPUT[0] - mirrored[..., 0]
    (maps,), _ = codec.encode(mirrored, torch.ones(x.shape[:2], dtype=torch.bool))
    decoded = codec.decode(codec.mirror((maps,), partners)).points
    error = (decoded - x)[..., 0].abs()
    assert error.max() < bound
    if bound > 1:
        assert error.min() > bound - 0.2
    assert (decoded - x)[..., 1].abs().max() < 0.02


# Targets


def test_gaussian_by_hand() -> None:
    cells = torch.tensor([[[10.3, 20.6]]])
    (maps,), weights = draw_targets(cells, torch.ones(1, 1, dtype=torch.bool), MAP, sigma=2.0)
    for x, y in ((10, 21), (0, 0), (47, 63), (14, 19)):
        expected = math.exp(-((x - 10.3) ** 2 + (y - 20.6) ** 2) / 8)
        assert float(maps[0, 0, y, x]) == pytest.approx(expected, abs=1e-6)
    assert weights.tolist() == [[1.0]]


def test_cauchy_is_the_formula() -> None:
    """sigma / (dx^2 + dy^2 + sigma^2)^1.5, scaled to a peak of 1, size 6 sigma + 1."""
    for sigma in (1.0, 2.0, 3.0):
        cells = torch.tensor([[[20.0, 30.0]]])
        (maps,), _ = draw_targets(
            cells,
            torch.ones(1, 1, dtype=torch.bool),
            MAP,
            sigma=sigma,
            shape="cauchy",
            window=3.0,
        )
        radius = int(3 * sigma)
        ys, xs = np.mgrid[0:64, 0:48]
        expected = sigma**3 / ((xs - 20) ** 2 + (ys - 30) ** 2 + sigma**2) ** 1.5
        expected[(abs(xs - 20) > radius) | (abs(ys - 30) > radius)] = 0
        np.testing.assert_allclose(maps[0, 0], expected, rtol=1e-5)
        assert int((maps > 0).sum()) == (2 * radius + 1) ** 2


@pytest.mark.parametrize("shape", ["gaussian", "cauchy"])
@pytest.mark.parametrize(
    ("sigma", "size"), [(0.5, 4), (0.7, 5), (1.0, 7), (1.5, 10), (2.0, 13), (3.0, 19)]
)
def test_support_is_the_same_between_cells(sigma: float, size: int, shape: str) -> None:
    """6 sigma + 1 cells a side wherever the point is, those nearest to it."""
    assert support(sigma) == size
    for center in ("exact", "window", "rounded"):
        for x in (20.0, 20.1, 20.3, 20.49, 20.5, 20.51, 20.75, 21.0):
            (maps,), _ = draw_targets(
                torch.tensor([[[x, 31.2]]]),
                torch.ones(1, 1, dtype=torch.bool),
                MAP,
                sigma=sigma,
                shape=shape,
                center=center,
                window=3.0,
            )
            columns, rows = maps[0, 0].amax(0).nonzero()[:, 0], maps[0, 0].amax(1).nonzero()[:, 0]
            assert len(columns) == len(rows) == size
            assert columns[-1] - columns[0] == rows[-1] - rows[0] == size - 1
            if center == "exact":
                assert abs(float(columns.float().mean()) - x) <= 0.5
            elif size % 2:  # around the cell
                assert float(columns.float().mean()) == math.floor(x + 0.5)


@pytest.mark.parametrize("shape", ["gaussian", "cauchy"])
def test_peaks_at_cells_are_exactly_one(shape: str) -> None:
    """Whatever the width, and at one cell only."""
    x = points(3)
    labelled = torch.ones(x.shape[:2], dtype=torch.bool)
    for sigma in [0.1 * i for i in range(3, 41)]:
        for center in ("rounded", "hourglass"):
            for window in (0.0, 3.0):
                codec = heatmap_codec(sigma=sigma, shape=shape, center=center, window=window)
                (maps,), _ = codec.encode(x, labelled)
                assert maps.eq(1).sum(dim=(-2, -1)).eq(1).all(), (sigma, center)
                assert maps.max() == 1


def test_cauchy_tail_is_heavier() -> None:
    squared = torch.tensor([9.0])
    assert float(profile(squared, 1.0, "cauchy")) == pytest.approx(10**-1.5)
    assert float(profile(squared, 1.0, "gaussian")) == pytest.approx(math.exp(-4.5))


def test_centers_by_hand() -> None:
    cells = torch.tensor([[[10.4, 20.6]]])
    labelled = torch.ones(1, 1, dtype=torch.bool)

    def draw(center: str, **kwargs: float) -> Tensor:
        return draw_targets(cells, labelled, MAP, sigma=1.0, center=center, **kwargs).targets[0][
            0, 0
        ]

    rounded = draw("rounded", window=3.0)
    assert float(rounded[21, 10]) == 1 and int((rounded > 0).sum()) == 49
    window = draw("window", window=3.0)
    assert int((window > 0).sum()) == 49
    assert float(window[21, 10]) == pytest.approx(math.exp(-(0.4**2 + 0.4**2) / 2))
    assert float(window[24, 13]) > 0 and float(window[25, 13]) == 0
    # truncated to (10, 21) in continuous cells (10.9, 21.1); 9x9 cells
    published = draw("hourglass")
    assert float(published[21, 10]) == 1 and int((published > 0).sum()) == 81
    assert int((draw("exact") > 0).sum()) > 200
    assert int((draw("exact", window=1.0) > 0).sum()) == 9


def test_weights_of_points_that_are_not_there() -> None:
    x = torch.tensor(
        [
            *([50.0, 60.0], [50.0, 60.0], [-500.0, 60.0], [-8.0, 60.0]),
            *([192.0, 256.0], [-0.5, 60.0]),
        ]
    )[None]
    labelled = torch.tensor([[True, False, True, True, True, True]])
    (maps,), weights = heatmap_codec(sigma=1.0, window=3.0).encode(x, labelled)
    assert weights.tolist() == [[1, 0, 0, 1, 1, 1]]
    assert maps[0, 1].sum() == 0 and maps[0, 2].sum() == 0 and maps[0, 3].sum() > 0
    published, ones = heatmap_codec(sigma=1.0, center="hourglass").encode(x, labelled)
    assert ones.eq(1).all()
    assert published[0][0].flatten(1).amax(1).tolist() == [1, 0, 0, 0, 0, 0]
    for codec in (IntegralCodec(INPUT, MAP), SimCCCodec(INPUT)):
        assert codec.encode(x, labelled).weights.tolist() == [[1, 0, 0, 0, 1, 0]]
    assert RegressionCodec(INPUT).encode(x, labelled).weights.tolist() == [[1, 0, 1, 1, 1, 1]]


def test_bumps_count_up_to_three_sigma_outside() -> None:
    """One of sigma 2 that is not cut off: six cells from the centres of the outermost ones, 0 and 47."""
    cells = torch.tensor([[[-6.0, 9.0], [-6.1, 9.0], [53.0, 9.0], [53.1, 9.0]]])
    _, weights = draw_targets(cells, torch.ones(1, 4, dtype=torch.bool), MAP, sigma=2.0)
    assert weights.tolist() == [[1, 0, 1, 0]]


# Round trips


@pytest.mark.parametrize(
    ("options", "margin", "bound"),
    [
        ({"decoder": "argmax"}, 0, 0.5),
        ({"decoder": "argmax", "center": "rounded"}, 0, 0.5),
        ({"decoder": "argmax", "shape": "cauchy"}, 0, 0.5),
        ({"decoder": "quarter"}, 2, 0.25),
        ({"decoder": "quarter"}, 0, 0.5),
        ({"decoder": "quarter", "center": "rounded"}, 0, 0.5),
        ({"decoder": "hourglass"}, 1, 0.25),
        ({"decoder": "hourglass"}, 0, 0.75),
        ({"decoder": "hourglass", "center": "hourglass", "sigma": 1.0}, 0, 0.75),
        ({"decoder": "dark"}, 8, 0.05),
        ({"decoder": "dark_udp"}, 8, 0.05),
        ({"decoder": "dark_udp", "geometry": "udp"}, 8, 0.05),
        ({"decoder": "dark", "shape": "cauchy", "sigma": 0.5}, 8, 0.1),
        ({"decoder": "dark_udp", "shape": "cauchy", "sigma": 0.5}, 8, 0.1),
        ({"decoder": "taylor"}, 0, 0.01),
        ({"decoder": "taylor", "sigma": 1.0}, 0, 0.01),
        ({"decoder": "taylor", "sigma": 1.0, "center": "window", "window": 3.0}, 0, 0.01),
        ({"decoder": "taylor", "shape": "cauchy", "sigma": 1.0}, 0, 0.01),
        ({"decoder": "taylor", "geometry": "index"}, 0, 0.5),
        ({"decoder": "centroid", "sigma": 0.5}, 1.5, 0.03),
        ({"decoder": "centroid", "sigma": 0.5, "shape": "cauchy"}, 1.5, 0.1),
        ({"decoder": "centroid", "sigma": 0.5, "shape": "cauchy", "window": 3.0}, 1.5, 0.1),
        ({"decoder": "centroid", "sigma": 1.0}, 3, 0.03),
        ({"decoder": "centroid", "sigma": 1.0}, 0, 0.9),
    ],
)
def test_heatmaps_round_trip(options: dict[str, object], margin: float, bound: float) -> None:
    """As the codec's table says; the worst point comes near the bound where that is not a small one."""
    codec = heatmap_codec(**options)
    error, weights = round_trip(codec, points(800, margin=margin * CELL))
    assert weights.all()
    assert error.max() <= bound * CELL + 1e-3
    if bound > 0.2 and codec.geometry == "continuous":
        assert error.max() > 0.9 * bound * CELL


def test_sub_cell_decoders_beat_whole_cells() -> None:
    x = points(1000, margin=8 * CELL)
    means = {
        name: float(round_trip(heatmap_codec(decoder=name), x)[0].mean())
        for name in ("argmax", "quarter", "dark", "taylor")
    }
    assert means["taylor"] < means["dark"] < means["quarter"] / 3 < means["argmax"] / 5


def test_centroid_averages_what_is_near_and_leaves_out_what_is_far() -> None:
    maps = torch.zeros(1, 3, 12, 16)
    maps[0, 0, 4, 5], maps[0, 0, 4, 7], maps[0, 0, 11, 15] = 0.5, 0.3, 0.4
    maps[0, 0, 4, 6] = -0.4  # no probability
    maps[0, 1, 0, 15], maps[0, 1, 1, 15] = 0.75, 0.25  # in a corner
    maps[0, 2], maps[0, 2, 3, 2] = -1.0, -0.5
    cells, scores = decode_centroid(maps, sigma=0.5)
    torch.testing.assert_close(cells[0, 0], torch.tensor([(5 * 0.5 + 7 * 0.3) / 0.8, 4.0]))
    torch.testing.assert_close(cells[0, 1], torch.tensor([15.0, 0.25]))
    assert cells[0, 2].tolist() == [2, 3]  # no mass: the best cell
    torch.testing.assert_close(scores[0], torch.tensor([0.5, 0.75, -0.5]))
    maps[0, 1, 0, 11] = 0.5  # four cells away, beyond 3 sigma
    torch.testing.assert_close(decode_centroid(maps, sigma=1.0)[0][0, 1], cells[0, 1])
    # One that reaches farther sees the third place too.
    assert decode_centroid(maps, sigma=4.0)[0][0, 0, 0] > 8


def border_points(offset: float, count: int = 25) -> Tensor:
    """(1, 4 count + 8, 2): along the crop's four edges, ``offset`` cells outside (negative: inside),
    and at the corners and four places of the edges exactly there."""
    generator = torch.Generator().manual_seed(1)
    width, height = INPUT
    d = offset * CELL
    u = torch.rand((4, count), generator=generator)
    sides = [
        torch.stack([torch.full((count,), -d), u[0] * height], dim=-1),
        torch.stack([torch.full((count,), width + d), u[1] * height], dim=-1),
        torch.stack([u[2] * width, torch.full((count,), -d)], dim=-1),
        torch.stack([u[3] * width, torch.full((count,), height + d)], dim=-1),
    ]
    xs, ys = (-d, width + d), (-d, height + d)
    corners = [[x, y] for x in xs for y in ys]
    edges = [[x, 80.0] for x in xs] + [[80.0, y] for y in ys]
    return torch.cat([*sides, torch.tensor(corners + edges)])[None]


_BOUNDS = {
    "argmax": 0.5,
    "quarter": 0.5,
    "hourglass": 0.75,
    "dark": 0.5,
    "dark_udp": 1.01,
    "taylor": 0.5,
    "centroid": 1.0,
}


# For dark_udp and Cauchy targets no bound is stated.
@pytest.mark.parametrize(
    ("decoder", "shape"),
    [(d, "gaussian") for d in DECODERS] + [(d, "cauchy") for d in DECODERS if d != "dark_udp"],
)
def test_bounds_at_borders_and_outside(decoder: str, shape: str) -> None:
    """Inside, on the edges and outside: as the codec's table and the words below it say, for the
    widths and windows that configs use."""
    sigmas = [0.5, 0.6, 0.7, 0.8, 1.0, 1.5, 2.0] if decoder == "taylor" else [0.5, 1.0, 2.0]
    if decoder == "centroid":
        sigmas = [0.5] if shape == "cauchy" else [0.5, 0.7, 1.0]
    for sigma in sigmas:
        for window in (0.0, 3.0):
            codec = heatmap_codec(decoder=decoder, shape=shape, sigma=sigma, window=window)
            for offset in (-1.9, -1.0, -0.6, -0.5, -0.25, 0.0, 0.4, 0.9, 1.7, 4.2):
                x = border_points(offset)
                targets, weights = codec.encode(x, torch.ones(x.shape[:2], dtype=torch.bool))
                decoded = codec.decode(targets).points
                nearest = torch.minimum(x.clamp(min=0), torch.tensor(INPUT).float())
                error = ((decoded - nearest).abs().amax(dim=-1) * (weights > 0)).max() / CELL
                inside = {"taylor": 0.01, "centroid": 0.9} if offset <= 0 else {}
                bound = inside.get(decoder, _BOUNDS[decoder])
                assert error <= bound + 1e-3, (sigma, window, offset)
                assert offset > 0 or weights.all()


def test_hourglass_targets_outside_are_empty_and_count() -> None:
    """As published: x <= 0 or x = W is an empty map that counts, decoded at the first corner."""
    codec = heatmap_codec(center="hourglass", sigma=1.0, decoder="hourglass")
    x = torch.tensor(
        [[[0.0, 100.0], [192.0, 100.0], [-3.0, 100.0], [90.0, 256.0], [90.0, -5.0], [90.0, -3.0]]]
    )
    (maps,), weights = codec.encode(x, torch.ones(1, 6, dtype=torch.bool))
    assert weights.eq(1).all()
    assert maps.amax((-2, -1)).tolist() == [[0, 0, 0, 0, 0, 1]]
    decoded = codec.decode((maps,)).points
    assert decoded[0, :5].eq(0).all()
    # Truncated toward zero, y = -3 is in the first cell.
    assert (decoded[0, 5] - torch.tensor([90.0, 0.0])).abs().max() <= 0.75 * CELL


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize(("ratio", "sigma"), [(2.0, 6.0), (1.0, 2.0), (3.0, 4.0)])
def test_simcc_round_trip(refine: bool, ratio: float, sigma: float) -> None:
    codec = SimCCCodec(INPUT, ratio=ratio, sigma=sigma, refine=refine)
    x = points(margin=1 / ratio if refine else 0.0)
    targets, weights = codec.encode(x, torch.ones(x.shape[:2], dtype=torch.bool))
    assert [t.shape[-1] for t in targets] == [192 * ratio, 256 * ratio]
    for target in targets:
        torch.testing.assert_close(target.sum(-1), torch.ones_like(target[..., 0]))
    decoded, scores = codec.decode(tuple(t.clamp(min=1e-30).log() for t in targets))
    error = (decoded - x).abs().max()
    assert weights.all()
    assert error <= (0.02 if refine else 0.5) / ratio + 1e-4
    assert refine or error > 0.45 / ratio
    assert scores.min() > 0.9 and scores.max() <= 1


def test_simcc_labels_and_scores_by_hand() -> None:
    codec = SimCCCodec(INPUT)
    corner = torch.tensor([[[192.0, 0.0]]])
    (along_x, along_y), _ = codec.encode(corner, torch.ones(1, 1, dtype=torch.bool))
    # The middle of the last and of the first bin, with a deviation of six bins.
    bell = torch.exp(-(torch.arange(512) ** 2) / 72)
    torch.testing.assert_close(along_x[0, 0], bell[:384].flip(0) / bell[:384].sum())
    torch.testing.assert_close(along_y[0, 0], bell / bell.sum())
    # A label's peak is 1 / (6 sqrt(2 pi)); the smaller of both axes counts, at most 1.
    logits = []
    for bins, best in ((384, [0.03, 0.2, 0.2]), (512, [0.05, 0.05, 0.3])):
        p = torch.tensor(best)[:, None].expand(-1, bins).clone()
        p[:, :-1] = (1 - p[:, :1]) / (bins - 1)
        logits.append(p.log()[None])
    scores = codec.decode(tuple(logits)).scores[0]
    unit = 6 * math.sqrt(2 * math.pi)
    assert scores.tolist() == pytest.approx([0.03 * unit, 0.05 * unit, 1.0], rel=1e-4)


def test_simcc_refines_all_but_the_first_and_last_bin() -> None:
    codec = SimCCCodec((8, 8), sigma=0.5, refine=True)
    middles = torch.tensor([0.2, 1.2, 13.8, 14.8])
    logits = -((torch.arange(16) - middles[:, None]) ** 2) / 72
    logits = torch.cat([logits, torch.zeros(1, 16)])[None]  # and one that is flat
    found = codec.decode((logits, logits.flip(1))).points[0]
    expected = torch.tensor([0.5, 1.7, 14.3, 15.5, 0.5]) / 2
    torch.testing.assert_close(found, torch.stack([expected, expected.flip(0)], dim=1))


def test_regression_round_trip_anywhere() -> None:
    codec = RegressionCodec(INPUT)
    x = points() * 4 - 200
    error, _ = round_trip(codec, x)
    assert error.max() < 1e-3
    partners = torch.arange(x.shape[1]).flip(0)
    mirrored = x[:, partners].clone()
    mirrored[..., 0] = INPUT[0] - mirrored[..., 0]
    (values,), _ = codec.encode(mirrored, torch.ones(x.shape[:2], dtype=torch.bool))
    torch.testing.assert_close(
        codec.decode(codec.mirror((values,), partners)).points, x, atol=1e-3, rtol=0
    )


def test_integral_round_trip() -> None:
    sigma = 1.5
    codec = IntegralCodec(INPUT, MAP)
    x = points(margin=(3 * sigma + 0.5) * CELL)
    cells = to_cells(x, INPUT, MAP, "continuous")
    (maps,), _ = draw_targets(cells, torch.ones(x.shape[:2], dtype=torch.bool), MAP, sigma=sigma)
    decoded, scores = codec.decode((maps.clamp(min=1e-30).log(),))
    assert (decoded - x).abs().max() <= 0.05 * CELL
    # within 2 cells of a bump of deviation 1.5
    assert scores.min() > 0.5 and scores.max() < 0.65


def test_integral_bias() -> None:
    """A map of 0 away from its peak pulls the expectation to the middle."""
    x = torch.tensor([[[40.0, 50.0], [150.0, 200.0]]])
    cells = to_cells(x, INPUT, MAP, "continuous")
    (maps,), _ = draw_targets(cells, torch.ones(1, 2, dtype=torch.bool), MAP, sigma=1.0)
    decoded = IntegralCodec(INPUT, MAP).points(10 * maps)
    middle = torch.tensor(INPUT) / 2
    assert ((decoded - middle).abs() < (x - middle).abs() - 1).all()


# Decoders in special places


def test_quarter_and_hourglass_rules_by_hand() -> None:
    maps = torch.zeros(1, 1, 8, 8)
    maps[0, 0, 4, 3] = 0.9
    maps[0, 0, 4, 4] = 0.2
    cells, scores = decode_quarter(maps)
    assert cells.tolist() == [[[3.25, 4.0]]] and float(scores) == pytest.approx(0.9)
    # a tie moves to the lower side
    assert decode_hourglass(maps)[0].tolist() == [[[3.25, 3.75]]]
    border = torch.zeros(1, 1, 8, 8)
    border[0, 0, 1, 3] = 0.9
    border[0, 0, 2, 3] = 0.5
    assert decode_quarter(border)[0].tolist() == [[[3.0, 1.0]]]
    assert decode_hourglass(border)[0].tolist() == [[[2.75, 1.25]]]


def test_published_hourglass_quirks() -> None:
    plateau = torch.zeros(1, 1, 8, 8)
    plateau[0, 0, 5, 5], plateau[0, 0, 2, 2] = 3.0, 1.5
    # Values above 1 are cut, the first cell wins.
    cells, scores = decode_hourglass(plateau)
    assert cells.round().tolist() == [[[2, 2]]] and float(scores) == 1
    negative = torch.full((1, 1, 8, 8), -1.0)
    negative[0, 0, 5, 5] = -0.1
    # A cell that is no peak has value 0 after the suppression, beats the peak, and stays at its corner.
    cells, scores = decode_hourglass(negative)
    assert float(scores) == 0 and cells.tolist() == [[[3.5, 3.5]]]
    assert decode_argmax(negative)[0].tolist() == [[[5, 5]]]


def test_dark_outside_its_range_and_on_flat_maps() -> None:
    flat = torch.zeros(2, 3, 16, 16)
    centroid = partial(decode_centroid, sigma=1.0)
    for decode in (decode_dark, decode_taylor, decode_quarter, decode_hourglass, centroid):
        cells, scores = decode(flat)
        assert cells.isfinite().all() and (cells.abs() <= 1).all() and scores.eq(0).all()
    x = torch.tensor([[[4.0, 130.0]]])
    (maps,), _ = heatmap_codec(decoder="dark").encode(x, torch.ones(1, 1, dtype=torch.bool))
    assert decode_dark(maps)[0].tolist() == decode_argmax(maps)[0].tolist()


def test_udp_takes_the_published_mixed_derivative() -> None:
    """dxy = (f(1,1) - f(1,0) - f(0,1) + 2 f(0,0) - f(-1,0) - f(0,-1) + f(-1,-1)) / 2, by hand."""
    noise = torch.rand(1, 1, 9, 10, generator=torch.Generator().manual_seed(2))
    maps = 0.5 * noise
    maps[0, 0, 4, 5] = 2.0
    f = gaussian_blur(maps, 3)[0, 0].clamp(0.001, 50).log().double().numpy()
    x, y = 5, 4

    def at(i: int, j: int) -> float:
        return float(f[y + j, x + i])

    gradient = np.array([at(1, 0) - at(-1, 0), at(0, 1) - at(0, -1)]) / 2
    dxx = at(1, 0) - 2 * at(0, 0) + at(-1, 0)
    dyy = at(0, 1) - 2 * at(0, 0) + at(0, -1)
    around = at(1, 0) + at(0, 1) + at(-1, 0) + at(0, -1)
    dxy = (at(1, 1) + at(-1, -1) + 2 * at(0, 0) - around) / 2
    central = (at(1, 1) + at(-1, -1) - at(1, -1) - at(-1, 1)) / 4
    expected = np.array([x, y]) - np.linalg.solve(np.array([[dxx, dxy], [dxy, dyy]]), gradient)
    other = np.array([x, y]) - np.linalg.solve(np.array([[dxx, central], [central, dyy]]), gradient)
    decoded = decode_dark_udp(maps, 3)[0][0, 0].numpy()
    np.testing.assert_allclose(decoded, expected, atol=1e-4)
    assert np.abs(decoded - other).max() > 1e-3


def test_taylor_is_steady_on_noise() -> None:
    """It never leaves the best cell by more than one, and noise of 5 % costs less than half a cell."""
    codec = heatmap_codec()
    x = points(500, margin=8)
    (maps,), _ = codec.encode(x, torch.ones(x.shape[:2], dtype=torch.bool))
    noise = torch.randn(maps.shape, generator=torch.Generator().manual_seed(0))
    noisy = maps + 0.05 * noise
    best = decode_argmax(noisy)[0]
    decoded = decode_taylor(noisy)[0]
    assert (decoded - best).abs().max() <= 1
    cells = to_cells(x, INPUT, MAP, "continuous")
    assert (decoded - cells).abs().mean() < 0.5
    wild = decode_taylor(noise[:, :50])[0]
    assert wild.isfinite().all() and (wild - decode_argmax(noise[:, :50])[0]).abs().max() <= 1


def test_blur_keeps_the_maximum() -> None:
    cv2 = pytest.importorskip("cv2")
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(1, 2, 20, 24, generator=generator)
    blurred = gaussian_blur(maps, 11)
    torch.testing.assert_close(blurred.amax((-2, -1)), maps.amax((-2, -1)))
    for plain, ours in zip(maps[0].numpy(), blurred[0].numpy(), strict=True):
        padded = np.zeros((40, 44), dtype=np.float32)
        padded[10:-10, 10:-10] = plain
        expected = cv2.GaussianBlur(padded, (11, 11), 0)[10:-10, 10:-10]
        np.testing.assert_allclose(ours, expected * (plain.max() / expected.max()), atol=1e-5)
    with pytest.raises(ValueError, match="odd"):
        gaussian_blur(maps, 10)


def test_wrong_names_are_told() -> None:
    for options in (
        {"shape": "laplace"},
        {"center": "middle"},
        {"decoder": "best"},
        {"sigma": 0.0},
    ):
        with pytest.raises(ValueError, match=r"MODEL\.LANDMARKS"):
            heatmap_codec(**options)
    for numbers in ({"ratio": 0.0}, {"sigma": 0.0}):
        with pytest.raises(ValueError, match="positive RATIO"):
            SimCCCodec(INPUT, **numbers)


def test_empty_batches() -> None:
    empty = torch.zeros(0, 5, 2)
    labelled = torch.zeros(0, 5, dtype=torch.bool)
    codecs: list[LandmarkCodec] = [
        *(heatmap_codec(decoder=d) for d in DECODERS),
        IntegralCodec(INPUT, MAP),
        SimCCCodec(INPUT),
        RegressionCodec(INPUT),
    ]
    for codec in codecs:
        targets, weights = codec.encode(empty, labelled)
        if isinstance(codec, IntegralCodec):
            targets = (torch.zeros(0, 5, 64, 48),)
        decoded = codec.decode(targets)
        assert decoded.points.shape == (0, 5, 2) and decoded.scores.shape == weights.shape == (0, 5)


# Boxes and crops


def test_padding_rule_by_hand() -> None:
    boxes = torch.tensor([[10.0, 20.0, 50.0, 100.0], [0.0, 0.0, 100.0, 30.0], [5.0, 5.0, 5.0, 5.0]])
    padded = pad_boxes(boxes, (256, 192), 1.25)
    # 40x80 is narrower than 3:4, so it becomes 60x80, then 75x100; 100x30 becomes 100x133.3.
    expected = torch.tensor([[-7.5, 10.0, 67.5, 110.0], [-12.5, -68.333, 112.5, 98.333]])
    torch.testing.assert_close(padded[:2], expected, atol=1e-3, rtol=0)
    assert (padded[2, 2:] - padded[2, :2]).min() > 0


def test_crops_and_their_inverse() -> None:
    boxes = torch.tensor([[-7.5, 10.0, 67.5, 110.0]], dtype=torch.float64)
    matrices = crop_to_image(boxes, (256, 192))
    corners = torch.tensor([[[0.0, 0.0], [192.0, 256.0]]], dtype=torch.float64)
    torch.testing.assert_close(apply_affine(corners, matrices)[0].flatten(), boxes[0])
    back = apply_affine(apply_affine(corners, matrices), invert_affine(matrices))
    torch.testing.assert_close(back, corners)


# Constants that no other test noticed (tests/mutations.py)


def _turned_gaussian(middle: tuple[float, float], side: int = 9) -> Tensor:
    """(1, 1, side, side): a Gaussian whose axes are not the map's; its logarithm is a parabola."""
    cells = torch.arange(side, dtype=torch.float64)
    x, y = cells[None] - middle[0], cells[:, None] - middle[1]
    return torch.exp(-(0.11 * x**2 + 0.07 * y**2 + 0.09 * x * y))[None, None]


@pytest.mark.parametrize("middle", [(4.3, 3.8), (2.4, 5.8)])
@pytest.mark.parametrize(
    ("decode", "bound"), [(decode_taylor, 1e-6), (partial(decode_dark, blur=1), 1e-6)]
)
def test_newton_step_is_exact_on_a_turned_gaussian(
    decode: Callable, bound: float, middle: tuple[float, float]
) -> None:
    """With the mixed derivative, up to the last cells where DARK moves (1 < x < w - 2)."""
    found, _ = decode(_turned_gaussian(middle))
    torch.testing.assert_close(found[0, 0], torch.tensor(middle).to(found), atol=bound, rtol=0)


def test_taylor_without_a_maximum_moves_a_quarter() -> None:
    row = torch.tensor([0.2, 0.5, 1.0, 0.8, 0.1])
    found, _ = decode_taylor(row.expand(1, 1, 4, 5))  # no curvature in y
    assert found.tolist() == [[[2.25, 0.0]]]


def test_taylor_takes_no_step_to_a_saddle_or_a_minimum() -> None:
    """But the quarter, toward the larger neighbour."""
    logs = torch.full((5, 5), -5.0)
    # A ridge along the falling diagonal: the best along x and along y, but second derivatives of -0.1
    # with a mixed one of -0.45.
    logs[1:4, 1:4] = torch.tensor([[-1.0, -0.05, -0.1], [-0.06, 0.0, -0.04], [-0.1, -0.05, -1.0]])
    found, _ = decode_taylor(logs.exp()[None, None])
    assert found.tolist() == [[[2.25, 2.0]]]
    # A corner from which the map falls ever less steeply.
    slope = torch.tensor([0.0, -1.0, -1.9, -2.7])
    found, _ = decode_taylor((slope + slope[:, None]).exp()[None, None])
    assert found.tolist() == [[[-0.25, -0.25]]]


def test_taylor_needs_three_cells_a_side() -> None:
    def draw(width: int, height: int) -> Tensor:
        x, y = torch.arange(width) - 1.3, torch.arange(height) - 0.8
        return torch.exp(-(x**2 + y[:, None] ** 2) / 2)[None, None]

    torch.testing.assert_close(decode_taylor(draw(3, 3))[0][0, 0], torch.tensor([1.3, 0.8]))
    assert decode_taylor(draw(2, 5))[0].tolist() == [[[1.0, 1.0]]]
    assert decode_taylor(draw(5, 2))[0].tolist() == [[[1.0, 1.0]]]


@pytest.mark.parametrize(
    ("decode", "last"), [(decode_quarter, 8), (partial(decode_dark, blur=1), 7)]
)
def test_where_published_decoders_move(decode: Callable, last: int) -> None:
    """1 < x < w - 1 (simple baselines) and 1 < x < w - 2 (DARK), y alike."""
    cells = torch.arange(10.0)
    along = torch.exp(-((cells - cells[:, None] - 0.2) ** 2) / 4)  # peaks at 0.2, 1.2, ..., 9.2
    maps = along[:, None, :] * along[5][:, None]
    for transposed in (False, True):
        found, _ = decode((maps.mT if transposed else maps)[None])
        best, _ = decode_argmax((maps.mT if transposed else maps)[None])
        assert best[0, :, int(transposed)].tolist() == cells.tolist()
        moved = (found != best).all(dim=-1)[0].nonzero()[:, 0]
        assert moved.tolist() == [*range(2, last + 1)]


def test_floors_before_logarithms_are_the_published_ones() -> None:
    """DARK: 1e-10; UDP: 0.001 to 50. A peak beside a smaller value, zeros around both."""
    maps = torch.zeros(1, 1, 9, 9)
    maps[0, 0, 4, 4], maps[0, 0, 4, 5] = 1.0, 0.5
    low = math.log(1e-10)
    # gx / -dxx = (log 0.5 - low) / 2 / (-2 low / 4)
    expected = torch.tensor([4 + (low - math.log(0.5)) / low, 4.0])
    torch.testing.assert_close(decode_dark(maps, 1)[0][0, 0], expected, atol=1e-5, rtol=0)

    maps[0, 0, 4, 4], maps[0, 0, 4, 5] = 99.0, 1.0
    low, top = math.log(0.001), math.log(50)
    dxx, dyy = low - 2 * top, 2 * low - 2 * top
    dxy = (dyy - dxx - dyy) / 2
    step = np.linalg.solve([[dxx, dxy], [dxy, dyy]], [low / 2, 0.0])
    expected = torch.tensor([4.0, 4.0]) + torch.from_numpy(step).float()
    torch.testing.assert_close(decode_dark_udp(maps, 1)[0][0, 0], expected, atol=1e-5, rtol=0)


def test_dark_blurs_with_eleven_cells() -> None:
    """DARK's kernel for a Gaussian of sigma 2 (arXiv 1910.06278)."""
    maps = torch.rand((1, 3, 20, 20), generator=torch.Generator().manual_seed(0))
    for decode in (decode_dark, decode_dark_udp):
        assert decode(maps)[0].equal(decode(maps, 11)[0])
        assert not decode(maps)[0].equal(decode(maps, 9)[0])


def test_widths_are_the_published_ones() -> None:
    assert HeatmapCodec(INPUT, MAP).sigma == 2
    simcc = SimCCCodec(INPUT)
    assert (simcc.ratio, simcc.sigma) == (2, 6)
