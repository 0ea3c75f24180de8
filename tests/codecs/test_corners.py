"""Corner targets and corner pairing against the published values, and on bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from d2ext.codecs import corners
from d2ext.codecs.corners import (
    REJECTED,
    CornerPairs,
    PointMaps,
    decode_corners,
    decode_points,
    encode_corners,
)
from tests.reference.fixture import Fixture, draw_tensor

REFERENCE = Path(__file__).parents[1] / "reference"
IMAGES = ((180, 240), (120, 160))


def squared_boxes(fixture: Fixture, size: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The fixture's boxes as a sampler without augmentation hands them over: the image in the centre
    of a square canvas, resized to ``size`` pixels; and their classes."""
    boxes, classes = [], []
    for (height, width), listed in zip(
        IMAGES, fixture.manifest["inputs"]["boxes_x1_y1_x2_y2_class"], strict=True
    ):
        values = torch.tensor(listed, dtype=torch.float32)
        values[:, 1:4:2] += (width - height) // 2
        boxes.append(values[:, :4] * (size / width))
        classes.append(values[:, 4].long() - 1)
    return boxes, classes


@pytest.mark.parametrize(
    ("system", "variant", "overlap", "prefix"),
    [
        ("cornernet", "cornernet", 0.3, "plain_"),
        ("centernet_triplets", "triplets", 0.7, ""),
    ],
)
def test_targets_are_the_published_ones(
    system: str, variant: str, overlap: float, prefix: str
) -> None:
    fixture = Fixture(REFERENCE / system / "targets")
    boxes, classes = squared_boxes(fixture, 511)
    targets = encode_corners(
        boxes,
        classes,
        num_classes=5,
        input_size=(511, 511),
        output_size=(128, 128),
        min_overlap=overlap,
        radius_variant=variant,
        center_divisor=None if system == "cornernet" else 5.0,
    )
    kinds = {"tl": targets.top_left, "br": targets.bottom_right}
    if system == "cornernet":
        assert targets.center is None
    else:
        kinds["ct"] = targets.center
    # The last object of the first image has no width.
    assert targets.mask.tolist() == [[True] * 5 + [False]] * 2
    for i, mask in enumerate(targets.mask):
        count = int(mask.sum())
        assert count == int(fixture.expected[f"{prefix}mask"][i].sum())
        for name, target in kinds.items():
            index = fixture.expected[f"{prefix}{name}_index"][i, :count]
            np.testing.assert_array_equal(target.index[i][mask], index)
            offset = fixture.expected[f"{prefix}{name}_offset"][i, :count]
            np.testing.assert_allclose(target.offset[i][mask], offset, atol=2e-5)
    for name, target in kinds.items():
        np.testing.assert_allclose(target.heat, fixture.expected[f"{prefix}{name}_heat"], atol=1e-6)


def encode(boxes: list[list[float]], classes: list[int], size: int = 64) -> object:
    return encode_corners(
        [torch.tensor(boxes).reshape(-1, 4)],
        [torch.tensor(classes, dtype=torch.long)],
        num_classes=3,
        input_size=(size, size),
        output_size=(size // 4, size // 4),
        center_divisor=5.0,
    )


def test_objects_outside_leave_their_slot_empty() -> None:
    targets = encode(
        [[-30, 5, -2, 20], [70, 70, 90, 80], [5, 5, 5, 9], [63.2, 1, 80, 9], [4, 4, 30, 20]],
        [0, 0, 0, 0, 2],
    )
    assert targets.mask.tolist() == [[False, False, False, False, True]]
    for target in targets[:3]:
        assert (target.heat == 1).nonzero().tolist() == [
            [0, 2, *divmod(int(target.index[0, 4]), 16)]
        ]
        assert target.heat[:, :2].sum() == 0
        assert target.index[0, :4].tolist() == [0] * 4 and not target.offset[0, :4].any()


def test_cut_objects_have_their_corners_at_the_border() -> None:
    targets = encode([[-20, 10, 100, 30]], [1])
    assert targets.top_left.index.tolist() == [[2 * 16]]
    assert targets.bottom_right.index.tolist() == [[7 * 16 + 15]]
    assert targets.bottom_right.offset[0, 0].tolist() == pytest.approx([0.75, 0.5])
    # The centre is that of the visible part: (0 + 63) / 2 pixels.
    assert targets.center.index.tolist() == [[5 * 16 + 7]]


def test_objects_in_one_cell_and_smaller_than_a_cell() -> None:
    targets = encode([[8.1, 8.1, 10, 9], [8.2, 8.2, 9, 11], [8.3, 8.2, 8.4, 8.3]], [1, 1, 1])
    assert targets.mask.all()
    assert targets.top_left.index.tolist() == [[2 * 16 + 2] * 3]
    assert (targets.top_left.heat == 1).sum() == 1
    assert len({tuple(o.tolist()) for o in targets.top_left.offset[0]}) == 3


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_any_number_of_objects(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand((count, 2), generator=generator) * 40
    boxes = torch.cat([corner, corner + 2 + 20 * torch.rand((count, 2), generator=generator)], 1)
    targets = encode_corners(
        [boxes, boxes[:1]],
        [torch.arange(count) % 7, torch.zeros(min(count, 1), dtype=torch.long)],
        num_classes=7,
        input_size=(63, 63),
        output_size=(16, 16),
    )
    assert targets.mask.sum(1).tolist() == [count, min(count, 1)]
    assert torch.isfinite(targets.top_left.heat).all()
    index, keep = targets.bottom_right.index, targets.mask
    for i, image in enumerate(targets.bottom_right.heat):
        labels = (torch.arange(count) % 7)[: int(keep[i].sum())]
        assert (image.flatten(1)[labels, index[i][keep[i]]] == 1).all()


def drawn_maps() -> tuple[PointMaps, PointMaps]:
    def maps(corner: str) -> PointMaps:
        def draw(name: str, channels: int) -> torch.Tensor:
            values = draw_tensor(f"decode_{corner}_{name}", (1, channels, 40, 48), 1)
            return torch.from_numpy(values)

        return PointMaps(
            1.5 * draw("heat", 8) - 2, 0.5 + 0.2 * draw("offset", 2), 0.5 * draw("tag", 1)
        )

    return maps("tl"), maps("br")


def rows(pairs: CornerPairs) -> np.ndarray:
    """x1, y1, x2, y2, score, corner scores, class of the first image's pairs."""
    columns = torch.cat(
        [
            pairs.boxes[0],
            torch.stack(
                [
                    pairs.scores[0],
                    pairs.top_left_scores[0],
                    pairs.bottom_right_scores[0],
                    pairs.classes[0].float(),
                ],
                dim=1,
            ),
        ],
        dim=1,
    )
    return columns[pairs.scores[0] > REJECTED].numpy()


@pytest.mark.parametrize(("k", "distance"), [(100, 0.5), (70, 0.5), (20, 0.5), (100, 0.25)])
def test_pairs_are_the_published_ones(k: int, distance: float) -> None:
    fixture = Fixture(REFERENCE / "cornernet" / "decode")
    pairs = decode_corners(*drawn_maps(), k=k, max_distance=distance)
    assert pairs.scores.shape == (1, min(1000, k * k))
    expected = fixture.expected[f"decoded_K{k}_ae{distance}"]
    np.testing.assert_allclose(rows(pairs), expected, atol=1e-5)
    keep = pairs.distances[pairs.scores > REJECTED]
    assert keep.max() <= distance and keep.min() >= 0


def test_both_kinds_at_once_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = [
        PointMaps(*(torch.cat([x, x.flip(3)]) for x in kind if x is not None))
        for kind in drawn_maps()
    ]
    expected = decode_corners(*maps, k=20)
    monkeypatch.setattr(corners, "needs_fixed_shapes", lambda _: True)
    pairs = decode_corners(*maps, k=20)
    assert all(torch.equal(a, b) for a, b in zip(pairs, expected, strict=True))
    assert not torch.equal(pairs.scores[0], pairs.scores[1])


def test_corners_are_the_published_ones() -> None:
    expected = Fixture(REFERENCE / "cornernet" / "decode").expected["tl_topk"]
    maps = drawn_maps()[0]
    points = decode_points(maps, 100)
    np.testing.assert_allclose(points.scores[0], expected[:, 0], atol=1e-6)
    np.testing.assert_array_equal(points.classes[0], expected[:, 1])
    np.testing.assert_array_equal(points.index[0], expected[:, 2] * 48 + expected[:, 3])
    assert (points.xs[0] - torch.from_numpy(expected[:, 3])).abs().max() < 2


def test_every_rejection_counts() -> None:
    """One top-left corner and four bottom-right ones, of which one fits."""

    def maps(places: list[tuple[int, int, int, float]]) -> PointMaps:
        heat, tag = torch.full((1, 2, 12, 12), -20.0), torch.zeros(1, 1, 12, 12)
        for c, y, x, embedding in places:
            heat[0, c, y, x] = 3.0
            tag[0, 0, y, x] = embedding
        return PointMaps(heat, torch.zeros(1, 2, 12, 12), tag)

    first = maps([(0, 4, 4, 0.0)])
    second = maps([(0, 8, 8, 0.3), (1, 8, 11, 0.0), (0, 11, 4, 0.6), (0, 2, 9, 0.0)])
    pairs = decode_corners(first, second, k=5)
    boxes = pairs.boxes[pairs.scores > 0.9]
    assert boxes.tolist() == [[4, 4, 8, 8]]
    assert float(pairs.distances[0, 0]) == pytest.approx(0.3)
    pairs = decode_corners(first, second, k=5, max_distance=1.0)
    assert sorted(pairs.boxes[pairs.scores > 0.9].tolist()) == [[4, 4, 4, 11], [4, 4, 8, 8]]


def test_border_corners_can_be_rejected() -> None:
    first, second = drawn_maps()
    all_pairs = decode_corners(first, second, max_pairs=10_000)
    inner = decode_corners(first, second, max_pairs=10_000, reject_border=True)
    points = [decode_points(m, 100) for m in (first, second)]
    at_start = (points[0].index < 48) | (points[0].index % 48 == 0)
    at_end = (points[1].index >= 39 * 48) | (points[1].index % 48 == 47)
    assert at_start.any() and at_end.any()
    border = [
        set(zip(p.xs[m].tolist(), p.ys[m].tolist(), strict=True))
        for p, m in zip(points, (at_start, at_end), strict=True)
    ]
    boxes = all_pairs.boxes[all_pairs.scores > REJECTED].tolist()
    expected = [b for b in boxes if (b[0], b[1]) not in border[0] and (b[2], b[3]) not in border[1]]
    assert 0 < len(expected) < len(boxes)
    assert inner.boxes[inner.scores > REJECTED].tolist() == expected


def test_top_k_larger_than_the_map() -> None:
    first, second = (
        PointMaps(m.heat[..., :2, :3], m.offset[..., :2, :3], m.embedding[..., :2, :3])
        for m in drawn_maps()
    )
    pairs = decode_corners(first, second, k=1000, max_pairs=100_000)
    assert pairs.scores.shape == (1, 48 * 48)
    assert torch.isfinite(pairs.boxes).all()
