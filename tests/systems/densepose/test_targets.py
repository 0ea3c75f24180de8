"""Where points lie on the maps of proposals, by hand."""

from __future__ import annotations

import torch

from d2ext.data.densepose import DensePoseAnnotations, SurfacePoints
from d2ext.systems.densepose.targets import place_points


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
