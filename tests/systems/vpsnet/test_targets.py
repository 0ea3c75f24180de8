"""VPSNet's targets, samples, anchors, pooling, losses and fusion, without the published fixtures."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, pairwise_iou

from d2ext.systems.upsnet.boxes import end_behind
from d2ext.systems.upsnet.targets import NO_TARGET
from d2ext.systems.vpsnet import losses as L
from d2ext.systems.vpsnet.head import FusionNeck, match_logits, quarter_flow
from d2ext.systems.vpsnet.model import VPSNet
from d2ext.systems.vpsnet.roi_heads import VPSNetRoIAlign
from d2ext.systems.vpsnet.rpn import MAX_LOG_SCALE, assign, rounded_anchors
from d2ext.systems.vpsnet.targets import VPSNetTargets, match_targets, read_targets
from d2ext.testing import tiny_config

SIZE = (48, 64)


def instances(boxes: list[list[float]], ids: list[int], size: tuple[int, int] = SIZE) -> Instances:
    result = Instances(size)
    result.gt_boxes = Boxes(torch.tensor(boxes).view(-1, 4))
    result.gt_classes = torch.arange(len(boxes)) % 3
    result.gt_ids = torch.tensor(ids, dtype=torch.int64)
    masks = torch.zeros((len(boxes), *size), dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[int(y1) : int(y2), int(x1) : int(x2)] = True
    result.gt_masks = BitMasks(masks)
    return result


def targets_of(**changes: Any) -> VPSNetTargets:
    inputs = {
        "image": torch.zeros(3, *SIZE),
        "sem_seg": torch.ones(SIZE, dtype=torch.int64),
        "instances": instances([[2.0, 2, 20, 20], [30.0, 10, 50, 40]], [7, 70_000]),
        "reference": {"instances": instances([[0.0, 0, 9, 9], [31.0, 10, 51, 40]], [5, 70_000])},
    }
    inputs.update(changes)
    return read_targets(inputs, num_stuff=2, with_things=False, device=torch.device("cpu"))


A, B = [2.0, 2, 20, 20], [30.0, 10, 50, 40]


# ---------------------------------------------------------------- annotations


def test_targets_of_a_pair() -> None:
    targets = targets_of()
    assert targets.reference_ids.tolist() == [5, 70_000]
    assert targets.reference_boxes.tolist() == [[0, 0, 9, 9], [31, 10, 51, 40]]
    columns = match_targets(torch.tensor([0, 1, 1, -1]), targets)
    assert columns.tolist() == [0, 2, 2, 0] and columns.dtype == torch.int64
    first = targets_of(instances=instances([A], [5]))
    assert match_targets(torch.tensor([0, -1]), first).tolist() == [1, 0]


@pytest.mark.parametrize("kind", ["not annotated", "no objects", "no ids there", "no ids here"])
def test_pairs_without_common_objects(kind: str) -> None:
    reference = instances([[0.0, 0, 9, 9]], [7])
    current = instances([A, B], [7, 8])
    changes: dict[str, Any] = {"instances": current, "reference": {"instances": reference}}
    if kind == "not annotated":
        changes["reference"] = {"image": torch.zeros(3, *SIZE)}
    elif kind == "no objects":
        changes["instances"] = current[:0]
    elif kind == "no ids there":
        reference.remove("gt_ids")
    else:
        current.remove("gt_ids")
    targets = targets_of(**changes)
    index = torch.tensor([0, 1, -1]) if len(targets.instances) else torch.tensor([-1, -1, -1])
    assert match_targets(index, targets).tolist() == [0, 0, 0]
    assert match_targets(index[:0], targets).shape == (0,)


def test_boxes_without_area_in_the_reference_are_no_objects() -> None:
    reference = instances([[5.0, 5, 5, 9], [31.0, 10, 51, 40]], [7, 70_000])
    targets = targets_of(reference={"instances": reference})
    assert targets.reference_ids.tolist() == [70_000]
    assert match_targets(torch.tensor([0, 1]), targets).tolist() == [0, 1]


def test_boxes_end_behind_a_pixel_of_the_network_input() -> None:
    """An image at half its size: an original's pixel is half a pixel."""
    targets = targets_of(height=96, width=128)
    assert targets.pixel == 1.0
    assert targets.instances.gt_boxes.tensor[0].tolist() == [2, 2, 20.5, 20.5]
    assert targets.reference_boxes[0].tolist() == [0, 0, 9.5, 9.5]


# ---------------------------------------------------------------- assignment and samples


def test_assign_by_highest_overlap() -> None:
    objects = Boxes(torch.tensor([[0.0, 0, 10, 10], [20.0, 0, 30, 10]]))
    boxes = Boxes(
        torch.tensor([[0.0, 0, 10, 8], [0.0, 0, 10, 4], [21.0, 0, 30, 10], [50.0, 0, 60, 9]])
    )
    best, highest = assign(objects, boxes, 0.5)
    assert best.tolist() == [0, 0, 1, 0]
    assert highest[[0, 2]].isinf().all()  # the objects' best boxes
    torch.testing.assert_close(highest[[1, 3]], torch.tensor([0.4, 0.0]))
    # Below the minimum an object takes none.
    _, highest = assign(objects, boxes, 0.85)
    torch.testing.assert_close(
        highest[:3],
        torch.tensor([0.8, 0.4, 0.9]).where(
            torch.tensor([True, True, False]), torch.tensor(torch.inf)
        ),
    )


def test_assign_takes_all_equal_boxes_and_later_objects_win() -> None:
    one = [0.0, 0, 10, 10]
    # Both boxes are the best of the first object; the second's is the first one, which it has less of.
    objects = Boxes(torch.tensor([one, [0.0, 0, 10, 30]]))
    boxes = Boxes(torch.tensor([one, one, [0.0, 50, 9, 60]]))
    best, highest = assign(objects, boxes, 0.3)
    assert best.tolist() == [1, 1, 0]
    assert highest.tolist() == [torch.inf, torch.inf, 0.0]
    best, _ = assign(objects, boxes, 0.5)
    assert best.tolist() == [0, 0, 0]


def test_the_first_object_too_takes_a_box_that_another_overlaps_more() -> None:
    objects = Boxes(torch.tensor([[0.0, 0, 10, 5], [0.0, 0, 10, 10]]))
    boxes = Boxes(torch.tensor([[0.0, 0, 10, 9], [0.0, 0, 10, 10]]))
    best, highest = assign(objects, boxes, 0.3)
    assert best.tolist() == [0, 1] and highest.isinf().all()


def test_assign_against_the_rule_in_words() -> None:
    """Objects in order take their best boxes; a loop over random boxes with many ties."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        low = rng.integers(0, 6, (12, 2))
        every = torch.from_numpy(
            np.concatenate([low, low + rng.integers(1, 6, (12, 2))], 1)
        ).float()
        objects, boxes = Boxes(every[:4]), Boxes(every[4:])
        iou = pairwise_iou(objects, boxes)
        expected, taken = iou.argmax(dim=0), torch.zeros(8, dtype=torch.bool)
        for i, row in enumerate(iou):
            if row.max() >= 0.3:
                expected[row == row.max()] = i
                taken |= row == row.max()
        best, highest = assign(objects, boxes, 0.3)
        assert torch.equal(best, expected) and torch.equal(highest.isinf(), taken)


@pytest.mark.parametrize(("objects", "boxes"), [(0, 3), (2, 0), (0, 0)])
def test_assign_without_objects_or_boxes(objects: int, boxes: int) -> None:
    best, highest = assign(Boxes(torch.ones(objects, 4)), Boxes(torch.ones(boxes, 4)), 0.3)
    assert best.tolist() == [0] * boxes and highest.tolist() == [0.0] * boxes


@pytest.fixture(scope="module")
def model() -> VPSNet:
    torch.manual_seed(0)
    result: VPSNet = build_model(tiny_config("VPSNet"))
    return result


def test_regions_know_their_object(model: VPSNet) -> None:
    crowd = instances([[0.0, 30, 20, 48]], [1])
    targets = targets_of(crowd_instances=crowd)
    proposals = Instances(
        SIZE,
        proposal_boxes=Boxes(torch.tensor([[3.0, 2, 20, 20], [0, 30, 20, 47], [40, 0, 64, 9]])),
    )
    model.roi_heads.batch_size_per_image, model.roi_heads.positive_fraction = 20, 1.0
    regions = model.roi_heads.sample(proposals, targets)
    found = {
        tuple(box): (c, i)
        for box, c, i in zip(
            regions.proposal_boxes.tensor.tolist(),
            regions.gt_classes.tolist(),
            regions.gt_index.tolist(),
            strict=True,
        )
    }
    assert found == {
        (2, 2, 20, 20): (0, 0),
        (30, 10, 50, 40): (1, 1),
        (3, 2, 20, 20): (0, 0),
        (0, 30, 20, 47): (0, -1),
        (40, 0, 64, 9): (3, -1),
    }
    assert match_targets(regions.gt_index, targets).max() == 2
    masks = model.roi_heads.mask_targets(regions, targets, 28)
    means = dict(zip(found, masks.mean(dim=(1, 2)).tolist(), strict=True))
    assert means[3, 2, 20, 20] == 1 and means[0, 30, 20, 47] == means[40, 0, 64, 9] == 0
    for index, value in ((0, 1), (-1, 0)):
        on_object = Instances(
            SIZE, proposal_boxes=Boxes(torch.tensor([A])), gt_index=torch.tensor([index])
        )
        assert model.roi_heads.mask_targets(on_object, targets, 28).eq(value).all()
    nothing = targets_of(instances=instances([], []), crowd_instances=crowd)
    regions = model.roi_heads.sample(proposals, nothing)
    assert sorted(regions.gt_index.tolist()) == [-1] * 3
    assert sorted(regions.gt_classes.tolist()) == [0, 3, 3]
    assert not model.roi_heads.mask_targets(regions, nothing, 28).any()


def test_mask_targets_are_opencv_s(model: VPSNet) -> None:
    rng = np.random.default_rng(0)
    masks = np.stack([cv2.GaussianBlur(rng.random(SIZE), (0, 0), 3) > 0.5 for _ in range(3)])
    targets = targets_of()
    object.__setattr__(targets, "masks", torch.from_numpy(masks))
    low = rng.uniform(0, 40, (40, 2)) * [1.2, 0.9]
    high = np.minimum(low + rng.uniform(1.0, 40, (40, 2)), [SIZE[1], SIZE[0]])
    boxes = torch.from_numpy(np.concatenate([low, high], axis=1)).float()
    index = torch.from_numpy(rng.integers(0, 3, 40))
    regions = Instances(SIZE, proposal_boxes=Boxes(boxes), gt_index=index)
    actual = model.roi_heads.mask_targets(regions, targets, 28).numpy()
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        x1, y1, x2, y2 = (int(v) for v in (x1, y1, x2 - 1, y2 - 1))
        crop = masks[index[i], y1 : max(y2, y1) + 1, x1 : max(x2, x1) + 1].astype(np.uint8)
        expected = cv2.resize(crop, (28, 28))
        assert (actual[i] != expected).mean() <= 0.005, i
    assert 0.2 < actual.mean() < 0.8


def test_anchors_that_are_sampled(model: VPSNet) -> None:
    rpn = model.proposal_generator
    anchors = Boxes(torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 4], [0, 0, 10, 6], [30, 0, 40, 9]]))
    objects = Boxes(torch.tensor([[0.0, 0, 10, 10]]))
    label, best = rpn._label(objects, anchors)
    assert label.tolist() == [1, -1, -1, 0] and best.tolist() == [0] * 4
    # The best one, though its overlap is small; below the lower threshold it is background.
    assert rpn._label(objects, anchors[1:])[0].tolist() == [-1, 1, 0]
    assert rpn._label(objects, Boxes(torch.tensor([[0.0, 0, 10, 2]])))[0].tolist() == [0]
    assert rpn._label(objects[:0] if len(objects) else objects, anchors)[0].tolist() == [0] * 4
    assert rpn._class_loss_divisor(label >= 0) == 2
    assert rpn._class_loss_divisor(torch.zeros(4, dtype=torch.bool)) == 1


def test_decoding_clips_on_both_sides(model: VPSNet) -> None:
    rpn = model.proposal_generator
    anchors = torch.tensor([[[100.0, 100, 200, 200]]])
    boxes = rpn.decode(anchors, torch.tensor([[[0.0, 0, -50, 50]]]))
    sides = boxes.view(4)[2:] - boxes.view(4)[:2]
    assert sides[0].item() == pytest.approx(1.6, rel=1e-4)
    assert sides[1].item() == pytest.approx(6250, rel=1e-4)
    assert np.exp(MAX_LOG_SCALE) == pytest.approx(62.5)


# ---------------------------------------------------------------- geometry


def test_rounded_anchors() -> None:
    """The published ones, with their last pixel included."""
    behind = torch.tensor([0.0, 0, 1, 1])
    assert (rounded_anchors(4, [32], [0.5, 1, 2]) - behind).tolist() == [
        [-21, -9, 24, 12],
        [-14, -14, 17, 17],
        [-9, -21, 12, 24],
    ]
    assert (rounded_anchors(8, [64], [0.5]) - behind).tolist() == [[-41, -19, 48, 26]]
    assert rounded_anchors(4, [32, 64], [1, 2]).shape == (4, 4)


def naive_align(feature: torch.Tensor, box: list[float], size: int, stride: int) -> torch.Tensor:
    """2 x 2 samples a cell; nothing outside by more than a cell, clamped within."""
    x1, y1, x2, y2 = (v / stride for v in box)
    height, width = feature.shape
    result = torch.zeros(size, size)
    for row in range(size):
        for column in range(size):
            for i in range(2):
                for j in range(2):
                    y = y1 + (row + (i + 0.5) / 2) * (y2 - y1) / size
                    x = x1 + (column + (j + 0.5) / 2) * (x2 - x1) / size
                    if not (-1 <= y <= height and -1 <= x <= width):
                        continue
                    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
                    y0, x0 = min(int(y), height - 2), min(int(x), width - 2)
                    dy, dx = y - y0, x - x0
                    part = feature[y0 : y0 + 2, x0 : x0 + 2]
                    weights = torch.tensor(
                        [[(1 - dy) * (1 - dx), (1 - dy) * dx], [dy * (1 - dx), dy * dx]]
                    )
                    result[row, column] += (part * weights).sum() / 4
    return result


@pytest.mark.parametrize(
    "box",
    [
        [3.0, 5, 30, 27],
        [8.0, 8, 9, 9],  # one pixel
        [8.3, 8.4, 8.5, 8.45],  # less
        [8.0, 8, 8, 8],  # no area
        [-40.0, -4, 90, 70],  # beyond the image
    ],
)
def test_pooling_of_tiny_and_degenerate_boxes(box: list[float]) -> None:
    """Ends behind the last pixel and has no least size."""
    feature = torch.rand(1, 1, 12, 16, generator=torch.Generator().manual_seed(0))
    pooled = VPSNetRoIAlign(7, [4])([feature], [Boxes(torch.tensor([box]))])
    expected = naive_align(feature[0, 0], box, 7, 4)
    torch.testing.assert_close(pooled[0, 0], expected, atol=1e-5, rtol=1e-4)


def test_levels_of_degenerate_boxes() -> None:
    align = VPSNetRoIAlign(7, [4, 8, 16])
    boxes = torch.tensor([[5.0, 5, 5, 5], [0, 0, 1, 1], [0, 0, 112, 112], [0, 0, 9999, 9999]])
    assert align.levels(boxes).tolist() == [0, 0, 1, 2]
    features = [torch.ones(1, 2, 16 >> i, 16 >> i) for i in range(3)]
    assert torch.isfinite(align(features, [Boxes(boxes)])).all()
    assert align(features, [Boxes(boxes[:0])]).shape == (0, 2, 7, 7)
    assert end_behind(boxes)[0].tolist() == [5, 5, 6, 6]


# ---------------------------------------------------------------- fusion


def test_quarter_flow_is_in_cells() -> None:
    flow = torch.rand(1, 2, 8, 12, generator=torch.Generator().manual_seed(0))
    quarter = quarter_flow(flow)
    assert quarter.shape == (1, 2, 2, 3)
    # The mean of the middle pixels.
    expected = flow[:, :, 1:3, 1:3].mean(dim=(2, 3)) / 4
    torch.testing.assert_close(quarter[:, :, 0, 0], expected)
    torch.testing.assert_close(
        quarter_flow(torch.full((1, 2, 8, 8), 8.0)), torch.full((1, 2, 2, 2), 2.0)
    )


def test_gather_is_the_mean_of_the_levels() -> None:
    neck = FusionNeck(4)
    features = {f"p{i}": torch.full((2, 4, 8 >> i, 12 >> i), 3.0**i) for i in range(3)}
    features["p1"][:, :, 0, 0] = 0
    gathered = neck.gather(features)
    assert gathered.shape == (2, 4, 8, 12)
    torch.testing.assert_close(gathered[:, :, 3, 3], torch.full((2, 4), 13 / 3))
    torch.testing.assert_close(gathered[:, :, :2, :2], torch.full((2, 4, 2, 2), 10 / 3))


@pytest.mark.parametrize("published", [False, True])
def test_zero_flow(published: bool) -> None:
    """Published: moves the features by up to half a cell."""
    neck = FusionNeck(4, published_warp=published)
    features = torch.rand(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    warped = neck.warp(features, torch.zeros(1, 2, 8, 12))
    assert torch.allclose(warped, features, atol=1e-5) != published
    moved = neck.warp(features, torch.tensor([1.0, 0]).view(1, 2, 1, 1).expand(1, 2, 8, 12))
    assert torch.allclose(moved[..., :-1], features[..., 1:], atol=1e-5) != published


def test_a_new_neck_changes_hardly_anything_and_a_trained_one_every_level() -> None:
    torch.manual_seed(0)
    neck = FusionNeck(8, max_displacement=1)
    features = {f"p{i}": torch.rand(1, 8, 8 >> i, 12 >> i) for i in range(3)}
    gathered, reference = neck.gather(features), torch.rand(1, 8, 8, 12)
    arguments = features, gathered, reference, torch.zeros(1, 2, 8, 12)
    for name, x in neck(*arguments).items():
        torch.testing.assert_close(x, features[name], atol=0.05, rtol=0)
    assert neck.correct(gathered, reference, arguments[3]).abs().max() < 0.1  # cells
    torch.nn.init.normal_(neck.refine.weight)
    for name, x in neck(*arguments).items():
        assert x.shape == features[name].shape and (x - features[name]).max() > 0.1


# ---------------------------------------------------------------- losses


def test_match_logits_are_exact_in_mixed_precision() -> None:
    """They are large: inner products of many channels."""
    a, b = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)) * 10
    with torch.autocast("cpu", torch.bfloat16):
        logits = match_logits(a, b)
    expected = torch.cat([torch.zeros(3, 1), a @ b.T], dim=1)
    torch.testing.assert_close(logits, expected)
    assert match_logits(a, b[:0]).tolist() == [[0.0]] * 3


def test_match_loss_is_the_mean_over_images_of_means_over_regions() -> None:
    logits = [torch.tensor([[0.0, 0], [0, 0], [0, 0], [0, 0]]), torch.tensor([[0.0, 3.0, 1.0]])]
    targets = [torch.tensor([0, 1, 1, 0]), torch.tensor([2])]
    alone = -torch.tensor([0.0, 3, 1]).log_softmax(0)[2]
    expected = (np.log(2) + alone) / 2
    torch.testing.assert_close(L.match_loss(logits, targets), expected)
    # An image without positives counts as 0; a reference without objects has one column.
    logits = [torch.zeros(0, 3), logits[1], torch.zeros(2, 1)]
    targets = [torch.zeros(0, dtype=torch.int64), targets[1], torch.zeros(2, dtype=torch.int64)]
    torch.testing.assert_close(L.match_loss(logits, targets), alone / 3)


def test_panoptic_loss_is_the_mean_over_cells_with_a_target() -> None:
    logits = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    target = torch.full((3, 5), NO_TARGET)
    target[0, :2] = torch.tensor([1, 3])
    expected = -logits.log_softmax(0)[[1, 3], 0, [0, 1]]
    torch.testing.assert_close(L.panoptic_loss(logits, target), expected.mean())
    target[0, 1] = NO_TARGET
    torch.testing.assert_close(L.panoptic_loss(logits, target), expected[0])
    nothing = L.panoptic_loss(logits, torch.full((3, 5), NO_TARGET))
    nothing.backward()
    assert nothing.item() == 0 and not logits.grad.any()
