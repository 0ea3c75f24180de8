"""Masks keep their holes, labels keep clear of each other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances

from d2ext.utils.drawing import VideoDrawer
from d2ext.utils.visualizer import Visualizer

SIDE = 120


def ring() -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE] - 60
    return (np.hypot(x, y) < 45) & (np.hypot(x, y) > 20)


@pytest.mark.parametrize("as_prediction", [True, False])
def test_a_hole_is_not_filled(as_prediction: bool) -> None:
    mask = ring()
    mask[:8, :8] = True  # a second part
    visualizer = Visualizer(np.full((SIDE, SIDE, 3), 100, np.uint8))
    if as_prediction:
        instances = Instances((SIDE, SIDE), pred_masks=torch.from_numpy(mask)[None])
        visualizer.draw_instance_predictions(instances)
    else:
        visualizer.overlay_instances(masks=[mask], labels=[""], assigned_colors=["r"])
    picture = visualizer.output.get_image()
    changed = np.abs(picture.astype(int) - 100).max(axis=2) > 5
    assert changed[60, 90] and changed[30, 60] and changed[4, 4]
    assert not changed[50:70, 50:70].any() and not changed[60, 112]


def test_a_hole_is_not_filled_in_a_video() -> None:
    mask = torch.from_numpy(ring())[None]
    instances = Instances((SIDE, SIDE), pred_masks=mask, scores=torch.ones(1))
    instances.pred_boxes = Boxes([[15.0, 15, 105, 105]])
    instances.pred_classes = torch.zeros(1, dtype=torch.int64)
    image = np.full((SIDE, SIDE, 3), 100, np.uint8)
    drawn = VideoDrawer(Metadata(thing_classes=["ring"]))(image, {"instances": instances})
    changed = np.abs(drawn.astype(int) - 100).max(axis=2) > 5
    assert changed[60, 90] and not changed[55:65, 55:65].any()


def test_labels_keep_clear_of_each_other() -> None:
    metadata = Metadata(thing_classes=["quadrilateral"])
    corners = torch.tensor([[20.0, 30, 110, 110], [22, 32, 100, 100], [20, 30, 110, 104]])
    instances = Instances((SIDE, SIDE), pred_boxes=Boxes(corners), scores=torch.ones(3))
    instances.pred_classes = torch.zeros(3, dtype=torch.int64)
    visualizer = Visualizer(np.zeros((SIDE, SIDE, 3), np.uint8), metadata, scale=4)
    visualizer.draw_instance_predictions(instances)
    renderer = visualizer.output.canvas.get_renderer()
    places = [x.get_window_extent(renderer) for x in visualizer.output.ax.texts]
    assert len(places) == 3
    assert not any(a.overlaps(b) for a, b in itertools.combinations(places, 2))
    assert all(x.y0 >= 0 and x.y1 <= 4 * SIDE for x in places)
