"""Targets of UPSNet: label maps, masks, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from torch.nn import functional as F

from d2ext.systems.upsnet import losses as L
from d2ext.systems.upsnet import targets as T
from d2ext.systems.upsnet.boxes import image_scale
from d2ext.testing import NUM_STUFF, random_inputs

CPU = torch.device("cpu")


def read(inputs: dict, with_things: bool = False) -> T.UPSNetTargets:
    return T.read_targets(inputs, num_stuff=NUM_STUFF, with_things=with_things, device=CPU)


def test_separated_labels_become_full_ones() -> None:
    separated = torch.tensor([[1, 2, 0, 0], [255, 0, 0, 1]])
    masks = torch.zeros(2, 2, 4, dtype=torch.bool)
    masks[0, 0, 2] = masks[0, 0, 3] = masks[0, 0, 0] = True
    masks[1, 0, 3] = masks[1, 1, 1] = True
    labels = T.full_labels(separated, masks, torch.tensor([2, 0]), num_stuff=2)
    # Stuff stays where a mask lies over it; the later of two masks wins; the crowd has no label.
    assert labels.tolist() == [[0, 1, 4, 2], [255, 2, 255, 0]]
    none = T.full_labels(separated, masks[:0], torch.zeros(0, dtype=torch.int64), num_stuff=2)
    assert none.tolist() == [[0, 1, 255, 255], [255, 255, 255, 0]]


def test_labels_beyond_the_stuff_classes_are_refused() -> None:
    inputs = random_inputs(1)[0]
    inputs["sem_seg"][0, 0] = NUM_STUFF + 1
    with pytest.raises(ValueError, match="NUM_STUFF"):
        read(inputs)


def test_inputs_that_lack_something_are_refused() -> None:
    for key in ("instances", "sem_seg"):
        inputs = random_inputs(1)[0]
        del inputs[key]
        with pytest.raises(KeyError, match=key):
            read(inputs)
    inputs = random_inputs(1)[0]
    inputs["instances"].remove("gt_masks")
    with pytest.raises(ValueError, match="segmentation"):
        read(inputs)
    inputs = random_inputs(1)[0]
    inputs["sem_seg"] = inputs["sem_seg"][:-1]
    with pytest.raises(ValueError, match="shape"):
        read(inputs)


def test_objects_without_area_are_left_out() -> None:
    inputs = random_inputs(1)[0]
    inputs["instances"].gt_boxes.tensor[1, 2] = inputs["instances"].gt_boxes.tensor[1, 0]
    targets = read(inputs)
    assert len(targets.instances) == len(targets.masks) == 2


def test_polygons_are_drawn_at_the_size_of_the_original_image() -> None:
    square = np.array([2.0, 1.0, 6.0, 1.0, 6.0, 4.0, 2.0, 4.0])
    drawn = T.draw_polygons([square], 1.0, (8, 10))
    # Outline and inside: both ends belong to it.
    expected = np.zeros((8, 10), np.uint8)
    expected[1:5, 2:7] = 1
    np.testing.assert_array_equal(drawn, expected)
    masks = T.object_masks(PolygonMasks([[square * 2]]), (16, 20), (8, 10))
    np.testing.assert_array_equal(masks[0], expected.repeat(2, axis=0).repeat(2, axis=1))


@pytest.mark.parametrize(
    ("network", "original", "scale"),
    [
        ((256, 333), (160, 208), 1.6),  # the short side is exact, the long one rounded
        ((600, 1333), (450, 1000), 600 / 450),
        ((100, 100), (160, 208), None),
        ((60, 80), (60, 80), 1.0),
    ],
)
def test_the_scale_of_an_image(
    network: tuple[int, int], original: tuple[int, int], scale: float | None
) -> None:
    assert image_scale(network, original) == scale


def test_a_crop_has_no_scale_and_trains_at_its_own_size() -> None:
    inputs = random_inputs(1)[0]
    inputs.update(height=500, width=300)
    inputs["instances"].gt_masks = PolygonMasks(
        [[np.array([1.0, 1.0, 9.0, 1.0, 9.0, 9.0])] for _ in range(3)]
    )
    targets = read(inputs)
    assert targets.pixel == 1.0
    assert targets.masks.shape == (3, 60, 80) and targets.masks.any(dim=(1, 2)).all()


def test_quarter_size_rounds_half_to_even() -> None:
    maps = torch.arange(10 * 14).view(10, 14)
    quarter = T.quarter(maps, (32, 32))
    assert quarter.shape == (8, 8)
    # 10 / 4 = 2.5 -> 2 rows, 14 / 4 = 3.5 -> 4 columns.
    assert quarter[:2, :4].tolist() == [[0, 4, 8, 12], [56, 60, 64, 68]]
    assert (quarter[2:] == T.IGNORE).all() and (quarter[:, 4:] == T.IGNORE).all()


def test_panoptic_target() -> None:
    semantic = torch.tensor([[0, 1, 2, 3, 255, 255]])
    masks = torch.tensor([[[0, 0, 1, 0, 1, 0]], [[0, 1, 1, 0, 255, 255]]])
    target = T.panoptic_target(semantic, masks, 2, unknown=True)
    # stuff; a mask over stuff; the later of two; a thing without mask; a mask without label; neither
    assert target.tolist() == [[0, 3, 3, 4, 2, T.NO_TARGET]]
    target = T.panoptic_target(semantic, masks, 2, unknown=False)
    assert target.tolist() == [[0, 3, 3, T.NO_TARGET, 2, T.NO_TARGET]]
    target = T.panoptic_target(semantic, masks[:0], 2, unknown=True)
    assert target.tolist() == [[0, 1, 2, 2, T.NO_TARGET, T.NO_TARGET]]


def test_more_instances_than_ids_of_a_byte() -> None:
    semantic = torch.full((1, 400), 5)
    masks = torch.eye(400, dtype=torch.uint8)[:, None]
    target = T.panoptic_target(semantic, masks, 2, unknown=True)
    assert target[0].tolist() == list(range(2, 402))


def test_bitmasks_are_taken_as_they_come() -> None:
    inputs = random_inputs(1)[0]
    masks: BitMasks = inputs["instances"].gt_masks
    assert torch.equal(read(inputs).masks, masks.tensor)


def test_crowds_and_the_form_of_boxes() -> None:
    inputs = random_inputs(1)[0]
    crowd = Instances((60, 80))
    crowd.gt_boxes = Boxes(torch.tensor([[1.0, 2.0, 30.0, 40.0]]))
    crowd.gt_classes = torch.tensor([1])
    inputs["crowd_instances"] = crowd
    inputs.update(height=30, width=40)
    targets = read(inputs)
    assert targets.crowd_boxes.tolist() == [[1.0, 2.0, 30.0, 40.0]]
    assert targets.pixel == 2.0
    # The RPN's boxes end one pixel of the network input behind the last pixel, not two.
    difference = targets.instances.gt_boxes.tensor - targets.rpn_instances.gt_boxes.tensor
    assert difference.tolist() == [[0.0, 0.0, 1.0, 1.0]] * 3


def test_losses_of_few_regions_and_pixels() -> None:
    """Each image counts by its own number of regions or labelled pixels, one without any by none."""
    weights = L.region_weights([2, 0, 1], CPU)
    torch.testing.assert_close(weights, torch.tensor([1 / 6, 1 / 6, 1 / 3]))
    logits = torch.zeros(2, 3, 2, 2)
    logits[:, 0] = 1.0
    labels = torch.full((2, 2, 2), T.IGNORE)
    assert L.semantic_loss(logits, labels) == 0
    labels[0, 0, 0] = 1
    one = F.cross_entropy(logits[:1, :, 0, 0], torch.tensor([1]))
    torch.testing.assert_close(L.semantic_loss(logits, labels), one / 2)
