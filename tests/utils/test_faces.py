"""Wires of meshes and small points: where they are drawn, and what they leave of the face."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances

from d2ext.utils.drawing import PictureDrawer, VideoDrawer, reduced
from d2ext.utils.faces import draw_five_points, draw_meshes

GREY = np.full((100, 120, 3), 100, np.uint8)
# A square of two triangles, of which the first looks at the camera.
SQUARE = torch.tensor([[[20.0, 30, 0], [80, 30, 0], [80, 90, 0], [20, 90, 0]]])
TRIANGLES = np.array([[0, 3, 1], [1, 2, 3]])


def changed(picture: np.ndarray, before: np.ndarray = GREY) -> np.ndarray:
    """(n, 2) rows and columns."""
    return np.argwhere((picture != before).any(axis=2))


def test_triangles_that_face_the_camera() -> None:
    places = changed(draw_meshes(GREY, SQUARE, TRIANGLES))
    assert (GREY == 100).all()
    on_left, on_top = np.abs(places[:, 1] - 20) <= 1, np.abs(places[:, 0] - 30) <= 1
    on_diagonal = np.abs(places.sum(axis=1) - 110) <= 2
    assert (on_left | on_top | on_diagonal).all()
    for line in (on_left, on_top, on_diagonal):
        assert line.sum() > 50
    dots = changed(draw_meshes(GREY, SQUARE, None))
    corners = SQUARE[0, :, [1, 0]].numpy()
    distance = np.linalg.norm(dots[:, None] + 0.5 - corners, axis=2)
    assert distance.min(axis=1).max() < 3 and distance.min(axis=0).max() < 1


@pytest.mark.parametrize("side", [8.0, 40.0, 90.0])
def test_the_face_can_be_recognised(side: float) -> None:
    """Of a mesh of 33 by 33 vertices, as the built-in head's, the picture still shows its stripes."""
    grid = torch.linspace(0, side, 33)
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    mesh = torch.stack([x + 3, y + 3, 0 * x], dim=-1).view(1, -1, 3)
    first = (torch.arange(32)[:, None] * 33 + torch.arange(32)).flatten()
    triangles = torch.cat(
        [
            torch.stack([first, first + 33, first + 1], 1),
            torch.stack([first + 1, first + 33, first + 34], 1),
        ]
    ).numpy()
    image = GREY.copy()
    image[:, ::2] = 180
    drawn = draw_meshes(image, mesh, triangles)[5 : int(side), 5 : int(side)].astype(float)
    assert (drawn != image[5 : int(side), 5 : int(side)]).any()
    columns = drawn.mean(axis=(0, 2))
    assert np.abs(np.diff(columns)).min() > 0.4 * 80


def test_anything_may_be_predicted() -> None:
    odd = torch.cat([SQUARE, SQUARE + 1e9, SQUARE - 500, torch.full_like(SQUARE, torch.nan)])
    for triangles in (TRIANGLES, None):
        expected = draw_meshes(GREY, SQUARE, triangles)
        assert (draw_meshes(GREY, odd[:3], triangles) == expected).all()
        draw_meshes(GREY, odd, triangles)
        draw_meshes(GREY[:0], SQUARE, triangles)
    points = torch.tensor([[[torch.nan, 1e30, 1]] * 5, [[60.0, 50.0, 1.0]] * 5])
    places = changed(draw_five_points(GREY, points))
    assert np.abs(places - [50, 60]).min() <= 1


def faces() -> Instances:
    result = Instances((100, 120), pred_boxes=Boxes(torch.tensor([[20.0, 30.0, 80.0, 90.0]])))
    result.scores, result.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    result.pred_face_meshes = SQUARE
    points = [[35.0, 45], [65, 45], [50, 60], [40, 75], [60, 75]]
    result.pred_keypoints = torch.tensor([[[x, y, 1.0] for x, y in points]])
    return result


@pytest.mark.parametrize("drawer", [PictureDrawer, VideoDrawer])
@pytest.mark.parametrize("tracked", [False, True])
def test_drawers(drawer: type[PictureDrawer], tracked: bool) -> None:
    names = ["left_eye", "right_eye", "nose", "left_mouth", "right_mouth"]
    metadata = Metadata(name="f", thing_classes=["face"], keypoint_names=names)
    rules = [("left_eye", "right_mouth", (255, 0, 0))]
    metadata.keypoint_connection_rules = rules
    instances = faces()
    if tracked and drawer is VideoDrawer:
        instances.track_ids = torch.tensor([3])
    drawn = drawer(metadata, 9, TRIANGLES)(GREY, {"instances": instances})
    # Points, BGR, of which the left eye's is red; small, and without lines between them.
    assert drawn[44, 34].tolist() == [60, 60, 255]
    assert (drawn[50, 42:45] == GREY[50, 42:45]).all() and (drawn[45, 29:32] == 100).all()
    # The wire on the diagonal, and the box.
    diagonal = [drawn[y, 110 - y].tolist() for y in (55, 65, 85)]
    assert all(pixel != [100, 100, 100] for pixel in diagonal)
    assert (drawn[85, 78:83] != 100).any()
    assert instances.has("pred_keypoints")
    # Points of anything else are drawn as ever.
    others = Metadata(name="o", thing_classes=["thing"], keypoint_names=list("abcde"))
    instances.remove("pred_face_meshes")
    assert drawer(others)(GREY, {"instances": instances})[44, 32].tolist() != [100, 100, 100]


def test_large_images_are_drawn_smaller() -> None:
    _, output = reduced(GREY, {"instances": faces()}, 2)
    assert torch.equal(output["instances"].pred_face_meshes, SQUARE / 2)
    assert output["instances"].pred_keypoints[0, 0].tolist() == [17.5, 22.5, 1]
