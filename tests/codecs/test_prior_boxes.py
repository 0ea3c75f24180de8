"""Prior boxes, their coding and their matching, against plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from d2ext.codecs.prior_boxes import (
    BACKGROUND,
    NEUTRAL,
    decode_boxes,
    decode_points,
    encode_boxes,
    encode_points,
    match_priors,
    mine_negatives,
    prior_boxes,
    to_corners,
)

NO_CROWD = torch.zeros(0, 4)


def _random_boxes(count: int, seed: int, largest: float = 0.4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * (1 - largest)
    return torch.cat(
        [corner, corner + 0.02 + largest * torch.rand(count, 2, generator=generator)], 1
    )


def test_priors_run_over_shapes_then_columns_rows_levels() -> None:
    priors = prior_boxes([(2, 3), (1, 1)], [[10], [20]], [1.0, 4.0], 100, square=False)
    assert priors.shape == (2 * 3 * 2 + 2, 4)
    torch.testing.assert_close(priors[0], torch.tensor([1 / 6, 0.25, 0.1, 0.1]))
    torch.testing.assert_close(priors[1], torch.tensor([1 / 6, 0.25, 0.2, 0.05]))
    torch.testing.assert_close(priors[2, :2], torch.tensor([0.5, 0.25]))
    torch.testing.assert_close(priors[6, :2], torch.tensor([1 / 6, 0.75]))
    torch.testing.assert_close(priors[12], torch.tensor([0.5, 0.5, 0.2, 0.2]))


def test_square_priors_repeat_the_width() -> None:
    priors = prior_boxes([(1, 1)], [[10]], [1.0, 0.5, 2.0], 100, square=True)
    widths = torch.tensor([0.1, 0.1 * math.sqrt(0.5), 0.1 * math.sqrt(2)])
    torch.testing.assert_close(priors[:, 2], widths)
    torch.testing.assert_close(priors[:, 3], widths)


def test_levels_and_scales_must_agree() -> None:
    with pytest.raises(ValueError, match="SCALES"):
        prior_boxes([(1, 1)], [[10], [20]], [1.0], 100, square=True)


def test_coding_round_trip() -> None:
    boxes = _random_boxes(50, 0)
    priors = prior_boxes([(5, 10)], [[30]], [1.0], 100, square=False)
    torch.testing.assert_close(decode_boxes(encode_boxes(boxes, priors), priors), boxes)


def test_coding_by_hand() -> None:
    prior = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    box = torch.tensor([[0.5, 0.4, 0.7, 0.8]])
    expected = torch.tensor([[0.1 / (0.1 * 0.2), 0.1 / (0.1 * 0.4), 0.0, 0.0]])
    torch.testing.assert_close(encode_boxes(box, prior), expected, atol=1e-5, rtol=1e-5)


def _iou(a: list[float], b: list[float]) -> float:
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(w, 0) * max(h, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def _match_by_loops(priors: torch.Tensor, boxes: torch.Tensor, classes: list[int]) -> list[int]:
    """The rule of yolact/NOTES.md §5, word by word; ties go to the first object and prior."""
    corners = to_corners(priors).tolist()
    table = [[_iou(b, c) for c in corners] for b in boxes.tolist()]
    best = [max(range(len(table)), key=lambda j: table[j][i]) for i in range(len(corners))]
    best_iou = [table[best[i]][i] for i in range(len(corners))]
    objects, anchors = set(range(len(table))), set(range(len(corners)))
    while objects:
        _, j, i = min((-table[j][i], j, i) for j in objects for i in anchors)
        best[i], best_iou[i] = j, 2.0
        objects.remove(j)
        anchors.remove(i)
    labels = []
    for i, iou in enumerate(best_iou):
        if iou < 0.4:
            labels.append(BACKGROUND)
        else:
            labels.append(NEUTRAL if iou < 0.5 else classes[best[i]] + 1)
    return labels


@pytest.mark.parametrize("seed", range(5))
def test_matching_equals_the_rule(seed: int) -> None:
    priors = prior_boxes([(6, 6), (3, 3)], [[15], [40]], [1.0, 0.5, 2.0], 100, square=False)
    boxes = _random_boxes(8, seed)
    # Two that want the same priors
    boxes[1] = boxes[0] + torch.tensor([0.001, 0.002, 0.004, 0.003])
    classes = torch.arange(8)
    matches = match_priors(priors, boxes, classes, NO_CROWD)
    assert matches.labels.tolist() == _match_by_loops(priors, boxes, classes.tolist())
    assert set(matches.labels[matches.labels > 0].tolist()) == set(range(1, 9))


def test_more_objects_than_priors() -> None:
    priors = prior_boxes([(1, 2)], [[50]], [1.0], 100, square=True)
    matches = match_priors(priors, _random_boxes(5, 0), torch.arange(5), NO_CROWD)
    assert (matches.labels > 0).all()


def test_no_objects_is_background() -> None:
    priors = prior_boxes([(2, 2)], [[50]], [1.0], 100, square=True)
    empty = torch.zeros(0, dtype=torch.int64)
    assert (match_priors(priors, NO_CROWD, empty, NO_CROWD).labels == BACKGROUND).all()


def test_priors_in_crowds_are_neutral_unless_positive() -> None:
    priors = prior_boxes([(4, 4)], [[25]], [1.0], 100, square=True)
    boxes = to_corners(priors[:1])
    crowd = torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    labels = match_priors(priors, boxes, torch.tensor([6]), crowd).labels
    assert labels[0] == 7
    assert labels[[1, 4, 5]].tolist() == [NEUTRAL] * 3
    assert (labels[[2, 3, 6, 7, *range(8, 16)]] == BACKGROUND).all()


def test_negatives_are_the_hardest_background_priors() -> None:
    # log-sum-exp minus background logit grows with the foreground logit
    logits = torch.zeros(1, 6, 2)
    logits[0, :, 1] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    labels = torch.tensor([[1, NEUTRAL, BACKGROUND, BACKGROUND, BACKGROUND, BACKGROUND]])
    chosen = mine_negatives(logits, labels, 2)
    assert chosen[0].tolist() == [False, False, True, True, False, False]


def test_images_without_positives_give_no_negatives() -> None:
    labels = torch.tensor([[BACKGROUND] * 4, [1, BACKGROUND, BACKGROUND, BACKGROUND]])
    chosen = mine_negatives(torch.randn(2, 4, 3), labels, 3)
    assert chosen.sum(dim=1).tolist() == [0, 3]


def test_all_negatives_are_taken_where_there_are_too_few() -> None:
    labels = torch.tensor([[1, 2, NEUTRAL, BACKGROUND], [1, 2, 1, 2]])
    chosen = mine_negatives(torch.randn(2, 4, 3), labels, 3)
    assert chosen.tolist() == [[False, False, False, True], [False] * 4]


def test_images_without_positives_give_the_minimum_of_negatives() -> None:
    logits = torch.zeros(2, 4, 2)
    logits[:, :, 1] = torch.tensor([0.0, 2.0, 1.0, 3.0])
    labels = torch.tensor([[BACKGROUND] * 4, [1, BACKGROUND, BACKGROUND, BACKGROUND]])
    chosen = mine_negatives(logits, labels, 3, minimum=2)
    assert chosen.tolist() == [[False, True, False, True], [False, True, True, True]]


def test_priors_of_cells_that_exceed_the_input() -> None:
    # 50x20 pixels, cells of 16: the last column's centre lies at 56 of 50
    priors = prior_boxes([(2, 4)], [[10, 30]], [1.0], (20, 50), square=True, strides=[16])
    assert priors.shape == (16, 4)
    torch.testing.assert_close(priors[0], torch.tensor([8 / 50, 8 / 20, 10 / 50, 10 / 20]))
    torch.testing.assert_close(priors[7], torch.tensor([56 / 50, 8 / 20, 30 / 50, 30 / 20]))


def test_point_coding() -> None:
    priors = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.1, 0.2, 0.1, 0.1]])
    points = torch.rand(2, 3, 2)
    points[0, 0] = torch.tensor([0.6, 0.3])
    offsets = encode_points(points, priors)
    torch.testing.assert_close(offsets[0, 0], torch.tensor([5.0, -5.0]))
    torch.testing.assert_close(decode_points(offsets, priors), points)
