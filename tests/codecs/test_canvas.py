"""How images lie on canvases, and the way back from maps."""

from __future__ import annotations

import torch

from d2ext.codecs.boxes import clip_boxes
from d2ext.codecs.canvas import Canvas, centered, scale_points


def test_centre_pixel_comes_to_the_centre_pixel() -> None:
    image = torch.arange(1, 16, dtype=torch.uint8).view(1, 3, 5).expand(3, 3, 5)
    for size in ((7, 8), (4, 6), (3, 5)):
        drawn = centered((3, 5), size).draw(image)
        assert drawn.shape == (3, *size) and drawn.dtype == torch.uint8
        assert int(drawn[0, size[0] // 2, size[1] // 2]) == int(image[0, 1, 2])
        assert torch.equal(drawn[drawn > 0], image.reshape(-1))


def test_cells_become_pixels_of_the_image() -> None:
    canvas = centered((50, 60), (63, 95), 0.5)  # of an image of 100 x 120
    assert canvas.map_size(4) == (16, 24)
    assert canvas.corner == (-2 * 17.0, -2 * 6.0)
    low, high = canvas.to_image(torch.tensor([[0.0, 0.0], [24.0, 16.0]]), 4)
    assert low.tolist() == [-34, -12]
    # The whole map covers the whole canvas.
    assert high.tolist() == [2 * 95 - 34, 2 * 63 - 12]
    boxes = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    expected = torch.cat([canvas.to_image(boxes[..., i : i + 2], 4) for i in (0, 2)], dim=-1)
    torch.testing.assert_close(canvas.to_image(boxes, 4), expected)
    homogeneous = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close((canvas.affine(4) @ homogeneous).float(), expected[0, 0, :2])


def test_points_are_scaled_for_each_axis() -> None:
    points = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, -1.0, 5.0, 6.0]])
    scaled = scale_points(points, (2.0, 10.0), (0.5, -1.0))
    assert scaled.tolist() == [[2.5, 19, 6.5, 39], [0.5, -11, 10.5, 59]]
    assert scale_points(points[:0], (2.0, 3.0)).shape == (0, 4)


def test_boxes_are_cut_and_ordered() -> None:
    boxes = torch.tensor([[-3.0, 2.0, 5.0, 90.0], [8.0, 7.0, 2.0, 1.0], [30.0, 30.0, 40.0, 40.0]])
    assert clip_boxes(boxes, (20, 10)).tolist() == [[0, 2, 5, 20], [2, 1, 8, 7], [10, 20, 10, 20]]
    assert clip_boxes(boxes[None], (20, 10))[0].equal(clip_boxes(boxes, (20, 10)))
    # A pixel of each side stays.
    assert clip_boxes(boxes[2:], (20, 10), min_overlap=1).tolist() == [[9, 19, 10, 20]]
    assert clip_boxes(-boxes[2:], (20, 10), min_overlap=1).tolist() == [[0, 0, 1, 1]]


def test_canvases_compare() -> None:
    assert centered((2, 3), (4, 5)) == Canvas((4, 5), (2, 3), 1.0, (-1.0, -1.0))
