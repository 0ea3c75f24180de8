"""Where points and masks lie on the maps of proposals, by hand."""

from __future__ import annotations

import torch

from d2ext.data.densepose import DensePoseAnnotations, SurfacePoints
from d2ext.systems.densepose.targets import place_points, resample_masks


def test_points_on_the_edges_of_a_proposal() -> None:
    # Positions 0, 28, 30.5, 31.75 and 32 of 64 pixels, in a proposal of the pixels 0..32 in x.
    x = [0.0, 112.0, 122.0, 127.0, 128.0]
    person = SurfacePoints(x, [64.0] * 5, [1, 2, 3, 4, 5], [0.0] * 5, [0.0] * 5)
    persons, boxes = torch.tensor([[0.0, 0.0, 64.0, 64.0]]), torch.tensor([[0.0, 0.0, 32.0, 64.0]])
    placed = place_points(DensePoseAnnotations([person]).points(), persons, boxes, 8)
    # The last lies on the right edge and does not count.
    assert placed.points.parts.tolist() == [1, 2, 3, 4]
    # Cells of 4 pixels; the last one has no right neighbour, so that what lies beyond it is its value.
    assert placed.low[0].tolist() == [0, 7, 7, 7]
    assert placed.high[0].tolist() == [1, 7, 7, 7]
    assert placed.weight[0].tolist() == [0, 0, 0, 0]
    assert placed.low[1].tolist() == [2] * 4 and placed.weight[1].tolist() == [0] * 4
    shifted = place_points(DensePoseAnnotations([person]).points(), persons, boxes + 2, 8)
    assert shifted.low[0].tolist() == [6, 7, 7, 7]
    assert shifted.weight[0].tolist() == [0.5, 0, 0, 0]


def test_a_point_just_before_the_edge_has_a_cell() -> None:
    """One of twenty proposals has an edge before which float32 rounds a point's cell up to S."""
    low, high = torch.tensor([31.940853118896484, 97.83389282226562])
    before = torch.nextafter(high, low)
    assert (before - low) * 8 / (high - low) == 8
    person = SurfacePoints([float(before)], [10.0], [1], [0.0], [0.0])
    persons = torch.tensor([[0.0, 0.0, 256.0, 256.0]])
    boxes = torch.stack([low, torch.tensor(0.0), high, torch.tensor(64.0)])[None]
    placed = place_points(DensePoseAnnotations([person]).points(), persons, boxes, 8)
    assert placed.low[0].tolist() == placed.high[0].tolist() == [7]


def test_masks_of_proposals_take_the_nearest_value() -> None:
    """Cells at 0, 85, 170, 255 and 340 of 255 pixels: the last row and column count, then come zeros."""
    mask = torch.arange(256, dtype=torch.uint8)
    persons, boxes = torch.tensor([[0.0, 0, 255, 255]]), torch.tensor([[0.0, 0, 425, 425]])
    columns = resample_masks(mask.expand(1, 256, 256), persons, boxes, 5)
    expected = torch.tensor([0, 85, 170, 255, 0])
    assert torch.equal(columns[0], torch.where(torch.arange(5) < 4, 1, 0)[:, None] * expected)
    rows = resample_masks(mask[:, None].expand(1, 256, 256), persons, boxes, 5)
    assert torch.equal(rows, columns.mT)


def test_values_stand_in_the_middle_of_their_cells() -> None:
    """What is written to the maps is read where it was: the middles of cells 0, 1, 3 and a corner."""
    x = [32.0, 96.0, 224.0, 255.0, 128.0, 10.0]
    person = SurfacePoints(x, [64.0] * 6, [1] * 6, [0.0] * 6, [0.0] * 6)
    points = DensePoseAnnotations([person]).points()
    persons = boxes = torch.tensor([[0.0, 0.0, 64.0, 64.0]])
    placed = place_points(points, persons, boxes, 4, published_grid=False)
    assert placed.low[0].tolist() == [0, 1, 3, 3, 1, 0]
    assert placed.weight[0].tolist() == [0, 0, 0, 0, 0.5, 0]
    assert placed.low[1].tolist() == [0] * 6 and placed.weight[1].tolist() == [0.5] * 6
    column = torch.arange(256, dtype=torch.uint8).expand(1, 256, 256)
    masks = resample_masks(column, persons, boxes, 4, published_grid=False)
    assert masks[0, 0].tolist() == [32, 96, 160, 224]
    # The first and the last cell of a box twice as wide see nothing of the person.
    wide = torch.tensor([[-32.0, 0.0, 96.0, 64.0]])
    masks = resample_masks(column, persons, wide, 4, published_grid=False)
    assert masks[0, 0].tolist() == [0, 64, 192, 0]
