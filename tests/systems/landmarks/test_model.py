"""LandmarkNet: crops, boxes, chunks, flip test, heads, and what users give it by mistake."""

from __future__ import annotations

import copy
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from torch import Tensor

from d2ext.codecs.landmarks import RegressionCodec
from d2ext.systems.landmarks import HeatmapHead, LandmarkNet, RegressionHead
from d2ext.systems.landmarks.head import MapHead, Upsampling
from d2ext.systems.landmarks.model import find_flip_indices, mark_points
from d2ext.systems.landmarks.postprocess import instance_scores
from d2ext.systems.landmarks.targets import read_keypoints
from d2ext.testing import NUM_KEYPOINTS, random_inputs, tiny_config

HEADS = ("HeatmapHead", "IntegralHead", "RegressionHead", "SimCCHead")


def config(head: str = "HeatmapHead", backbone: str = "hourglass", **options: Any) -> CfgNode:
    cfg = tiny_config("LandmarkNet")
    cfg.MODEL.LANDMARKS.HEAD = head
    if backbone == "resnet":
        cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
        cfg.MODEL.RESNETS.DEPTH = 18
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
        cfg.MODEL.RESNETS.NORM = "BN"
        cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
        cfg.MODEL.LANDMARKS.UPSAMPLE.NUM_LAYERS = 2
        cfg.MODEL.LANDMARKS.UPSAMPLE.CHANNELS = 16
    cfg.MODEL.LANDMARKS.FLIP_INDICES = [1, 0, 2]
    cfg.merge_from_list([x for pair in options.items() for x in pair])
    return cfg


def model(head: str = "HeatmapHead", backbone: str = "hourglass", **options: Any) -> LandmarkNet:
    torch.manual_seed(0)
    return build_model(config(head, backbone, **options)).eval()


def with_boxes(image: Tensor, boxes: list[list[float]], **fields: Tensor) -> dict[str, Any]:
    instances = Instances(tuple(image.shape[-2:]))
    instances.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4))
    for name, value in fields.items():
        instances.set(name, value)
    return {"image": image, "instances": instances}


@pytest.fixture
def image() -> Tensor:
    return random_inputs(1)[0]["image"]  # 60 x 80


# Crops


def test_crops_are_warps_of_the_padded_box(image: Tensor) -> None:
    net = model()
    boxes = [[10.0, 12.0, 50.0, 33.0], [-20.0, 30.0, 30.0, 90.0]]
    crops = net.preprocess([with_boxes(image, boxes)])
    assert crops.shape == (2, 3, 32, 48)
    array = image.permute(1, 2, 0).numpy().astype(np.float32)
    # widened to 3:2 and by 1.25, worked out by hand
    for crop, (x, y, width) in zip(crops, ((30, 22.5, 50), (5, 60, 112.5)), strict=True):
        factor = 48 / width
        # from indices to indices
        shift = [24 - factor * x + 0.5 * factor - 0.5, 16 - factor * y + 0.5 * factor - 0.5]
        matrix = np.array([[factor, 0, shift[0]], [0, factor, shift[1]]])
        expected = cv2.warpAffine(array, matrix, (48, 32)) / 255
        # OpenCV rounds positions to 1/32 pixel
        assert np.abs(crop.permute(1, 2, 0).numpy() - expected).mean() < 0.004
        assert np.abs(crop.permute(1, 2, 0).numpy() - expected).max() < 0.1


def test_images_alike_are_cropped_together_to_the_same() -> None:
    net = model()
    images = [x["image"] for x in random_inputs(3)]
    boxes = [[[10.0, 12.0, 50.0, 33.0], [5.0, 5.0, 30.0, 30.0 + i]] for i in range(3)]
    inputs = [with_boxes(x, b) for x, b in zip(images, boxes, strict=True)]
    alone = torch.cat([net.preprocess([x]) for x in inputs])
    torch.testing.assert_close(net.preprocess(inputs), alone)
    # different images, counts and sizes take the other way
    nobody, small = with_boxes(images[0], []), with_boxes(images[1][:, :40], boxes[1])
    mixed = [inputs[0], nobody, small, {"image": images[2]}]
    for some, count in ((mixed, 5), (mixed[:3], 4)):
        expected = torch.cat([net.preprocess([x]) for x in some])
        torch.testing.assert_close(net.preprocess(some), expected)
        assert len(expected) == count


def test_training_crops_carry_their_landmarks(image: Tensor) -> None:
    """A bright dot at a landmark is at the landmark's place in the crop."""
    net = model()
    picture = torch.zeros_like(image)
    picture[:, 25, 33] = 255
    instances = Instances((60, 80))
    instances.gt_boxes = Boxes(torch.tensor([[20.0, 10.0, 60.0, 40.0], [30.0, 20.0, 40.0, 30.0]]))
    points = torch.zeros(2, NUM_KEYPOINTS, 3)
    points[:, 1] = torch.tensor([33.5, 25.5, 2.0])
    instances.gt_keypoints = Keypoints(points)
    crops, (positions, labelled) = net.training_batch([{"image": picture, "instances": instances}])
    assert labelled.tolist() == [[False, True, False]] * 2
    ys, xs = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(48) + 0.5, indexing="ij")
    for crop, (x, y) in zip(crops, positions[:, 1].tolist(), strict=True):
        weight = crop[0] / crop[0].sum()
        assert float((weight * xs).sum()) == pytest.approx(x, abs=0.15)
        assert float((weight * ys).sum()) == pytest.approx(y, abs=0.15)
    assert positions[0, 1].tolist() == pytest.approx(
        [(33.5 - 40) * 48 / 56.25 + 24, 16.427], abs=0.01
    )


def test_points_in_a_row_are_trained_on(image: Tensor) -> None:
    """A box without height is cropped as in a test; one that is a dot is not."""
    net = model()
    instances = Instances((60, 80))
    row = [20.0, 25.0, 60.0, 25.0]
    instances.gt_boxes = Boxes(torch.tensor([row, [9.0, 9.0, 9.0, 9.0], [50.0, 9.0, 20.0, 40.0]]))
    instances.gt_keypoints = Keypoints(torch.full((3, NUM_KEYPOINTS, 3), 20.0))
    crops = net.training_batch([{"image": image, "instances": instances}])[0]
    assert len(crops) == 1
    torch.testing.assert_close(crops, net.preprocess([with_boxes(image, [row])]))


def test_no_image_gives_no_result() -> None:
    assert model()([]) == [] and model(**{"MODEL.LANDMARKS.TEST.HEATMAPS": True})([]) == []


def test_mapped_crops_are_taken_as_they_are(image: Tensor) -> None:
    net = model()
    crop = torch.rand(3, 32, 48) * 255
    instances = Instances((32, 48))
    points = torch.tensor([[[4.0, 5.0, 2.0], [-3.0, 60.0, 1.0], [0.0, 0.0, 0.0]]])
    instances.gt_keypoints = Keypoints(points)
    sample = {"image": crop, "crop": True, "instances": instances}
    crops, (positions, labelled) = net.training_batch([sample, *random_inputs(1)])
    torch.testing.assert_close(crops[0], crop / 255)
    assert torch.equal(positions[0], points[0, :, :2]) and labelled[0].tolist() == [
        True,
        True,
        False,
    ]
    assert len(crops) == 4
    with pytest.raises(ValueError, match="INPUT_SIZE"):
        net.training_batch([{**sample, "image": crop[:, :16]}])


def test_no_more_than_the_wanted_instances_are_trained_on() -> None:
    net = model(**{"MODEL.LANDMARKS.CROP.MAX_TRAINED": 4})
    assert len(net.training_batch(random_inputs(3))[0]) == 4
    assert len(net.training_batch(random_inputs(1))[0]) == 3
    crowd = random_inputs(1)[0]
    crowd["instances"] = Instances.cat([crowd["instances"]] * 100)
    crops, keypoints = net._crop_boxes(crowd)
    assert len(crops) == len(keypoints) == 4


# Boxes in, instances out


def test_one_instance_for_each_box_in_its_order(image: Tensor) -> None:
    net = model()
    boxes = [[10.0, 12.0, 50.0, 33.0], [30.0, 5.0, 70.0, 50.0]]
    scores, classes = torch.tensor([0.5, 0.25]), torch.tensor([2, 1])
    together = net([with_boxes(image, boxes, scores=scores, pred_classes=classes)])[0]["instances"]
    plain = net([with_boxes(image, boxes)])[0]["instances"]
    assert torch.equal(together.pred_boxes.tensor, torch.tensor(boxes))
    assert together.pred_classes.tolist() == [2, 1] and plain.pred_classes.tolist() == [0, 0]
    torch.testing.assert_close(together.scores, plain.scores * scores)
    for i, box in enumerate(boxes):
        alone = net([with_boxes(image, [box])])[0]["instances"]
        # Convolutions of one crop and of two round differently.
        torch.testing.assert_close(
            alone.pred_keypoints[0], plain.pred_keypoints[i], atol=1e-3, rtol=0
        )
    assert together.pred_keypoints.shape == (2, NUM_KEYPOINTS, 3)


@pytest.mark.parametrize("field", ["pred_boxes", "proposal_boxes", "gt_boxes"])
def test_fields_that_hold_boxes(image: Tensor, field: str) -> None:
    net = model()
    expected = net([with_boxes(image, [[10.0, 12.0, 50.0, 33.0]])])[0]["instances"]
    instances = Instances((60, 80))
    instances.set(field, Boxes(torch.tensor([[10.0, 12.0, 50.0, 33.0]])))
    for key in ("instances", "proposals"):
        detections = net([{"image": image, key: instances}])[0]["instances"]
        torch.testing.assert_close(detections.pred_keypoints, expected.pred_keypoints)
    instances.remove(field)
    with pytest.raises(ValueError, match="gt_boxes"):
        net([{"image": image, "instances": instances}])


def test_whole_image_without_boxes(image: Tensor) -> None:
    net = model()
    detections = net([{"image": image}])[0]["instances"]
    expected = net([with_boxes(image, [[0.0, 0.0, 80.0, 60.0]])])[0]["instances"]
    torch.testing.assert_close(detections.pred_keypoints, expected.pred_keypoints)
    assert detections.pred_boxes.tensor.tolist() == [[0, 0, 80, 60]]


def test_output_size_scales_all(image: Tensor) -> None:
    net = model(**{"MODEL.LANDMARKS.TEST.HEATMAPS": True})
    inputs = with_boxes(image, [[10.0, 12.0, 50.0, 33.0]])
    small = net([inputs])[0]["instances"]
    large = net([{**inputs, "height": 180, "width": 160}])[0]["instances"]
    assert large.image_size == (180, 160)
    factor = torch.tensor([2.0, 3.0])
    torch.testing.assert_close(
        large.pred_keypoints[..., :2], small.pred_keypoints[..., :2] * factor
    )
    torch.testing.assert_close(large.pred_boxes.tensor, small.pred_boxes.tensor * factor.repeat(2))
    # The matrices say where the maps lie.
    for detections in (small, large):
        maps, matrix = (
            detections.pred_keypoint_heatmaps[0],
            detections.pred_keypoint_heatmap_matrices[0],
        )
        assert maps.shape == (NUM_KEYPOINTS, 8, 12)
        best = maps.flatten(1).argmax(1)
        cells = torch.stack([best % 12 + 0.5, best // 12 + 0.5], dim=1)
        places = cells @ matrix[:, :2].T + matrix[:, 2]
        cell = matrix[:, :2].diagonal()
        # The decoder moves by one cell at most.
        assert ((places - detections.pred_keypoints[0, :, :2]).abs() <= cell * 1.01).all()


def test_five_hundred_boxes_pass_in_chunks(image: Tensor) -> None:
    net = model(**{"MODEL.LANDMARKS.TEST.MAX_CROPS": 16})
    sizes: list[int] = []
    hook = net.backbone.register_forward_hook(lambda m, i, o: sizes.append(len(i[0])))
    boxes = torch.rand(500, 4, generator=torch.Generator().manual_seed(0)) * 30
    boxes[:, 2:] += boxes[:, :2] + 3
    crowd = with_boxes(image, boxes.tolist())
    few = with_boxes(image.flip(-1), boxes[:7].tolist())
    detections = [x["instances"] for x in net([crowd, {"image": image}, few])]
    hook.remove()
    assert max(sizes) == 16 and sum(sizes) == 508
    assert [len(x) for x in detections] == [500, 1, 7]
    alone = net([few])[0]["instances"]
    torch.testing.assert_close(
        alone.pred_keypoints, detections[2].pred_keypoints, atol=1e-3, rtol=0
    )
    other = net([with_boxes(image, boxes[490:].tolist())])[0]["instances"]
    torch.testing.assert_close(
        other.pred_keypoints, detections[0].pred_keypoints[490:], atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("head", HEADS)
def test_nobody_found(image: Tensor, head: str) -> None:
    options = {"MODEL.LANDMARKS.TEST.HEATMAPS": True} if head == "HeatmapHead" else {}
    net = model(head, **options)
    nobody, somebody = with_boxes(image, []), with_boxes(image, [[10.0, 12.0, 50.0, 33.0]])
    for inputs, counts in (([nobody], [0]), ([nobody, somebody, nobody], [0, 1, 0])):
        detections = [x["instances"] for x in net(copy.deepcopy(inputs))]
        assert [len(x) for x in detections] == counts
        assert detections[0].pred_keypoints.shape == (0, NUM_KEYPOINTS, 3)
        assert detections[0].has("pred_keypoint_heatmaps") == bool(options)
        assert detections[0].pred_classes.dtype == torch.int64
    assert net.preprocess([nobody]).shape == (0, 3, 32, 48)


def test_boxes_that_hold_nothing_get_no_score(image: Tensor) -> None:
    net = model()
    nan, inf = float("nan"), float("inf")
    good = [10.0, 12.0, 50.0, 33.0]
    bad = [
        [20.0, 20.0, 20.0, 20.0],  # a dot
        [20.0, 20.0, 20.0, 10.0],
        [50.0, 33.0, 10.0, 12.0],  # corners exchanged
        [-50.0, -50.0, -10.0, -10.0],  # outside
        [90.0, 10.0, 120.0, 40.0],
        [10.0, 65.0, 40.0, 75.0],
        [nan, 0.0, 10.0, 10.0],
        [0.0, 0.0, inf, 10.0],
    ]
    detections = net([with_boxes(image, [*bad, good])])[0]["instances"]
    alone = net([with_boxes(image, [good])])[0]["instances"]
    assert len(detections) == len(bad) + 1
    assert detections.scores[:-1].eq(0).all() and detections.pred_keypoints[:-1, :, 2].eq(0).all()
    torch.testing.assert_close(detections.pred_keypoints[-1], alone.pred_keypoints[0])
    assert (
        detections.pred_keypoints.isfinite().all() and detections.pred_boxes.tensor.isfinite().all()
    )
    boxes = detections.pred_boxes.tensor
    assert (boxes >= 0).all() and (boxes[:, 2:] >= boxes[:, :2]).all()
    assert (boxes[:, 0::2] <= 80).all() and (boxes[:, 1::2] <= 60).all()
    assert boxes[3].eq(0).all()  # of the one above and left of the image nothing remains
    # Two points in a row are looked at in a crop about them, 50 x 50 / 1.5 after padding.
    row = [10.0, 30.0, 50.0, 30.0]
    detections = net([with_boxes(image, [row, [10.0, 16.7, 50.0, 43.3]])])[0]["instances"]
    assert detections.scores[0] > 0
    torch.testing.assert_close(
        detections.pred_keypoints[0], detections.pred_keypoints[1], atol=0.2, rtol=0
    )
    # A huge one is a place to look at.
    wide = net([with_boxes(image, [[-1e9, -1e9, 1e9, 1e9]])])[0]["instances"]
    assert wide.pred_keypoints.isfinite().all()


def test_scores_are_those_of_top_down_systems() -> None:
    points = torch.tensor([[0.9, 0.1, 0.5], [0.1, 0.2, 0.15], [3.0, 1.0, 0.0], [0.9, 0.0, 0.1]])
    scores = instance_scores(points, torch.tensor([0.5, 1.0, 1.0, 1.0]), 0.2)
    assert scores.tolist() == pytest.approx([0.35, 0.0, 1.0, 0.9])


def test_whole_coordinates_on_request(image: Tensor) -> None:
    inputs = [with_boxes(image, [[10.0, 12.0, 50.0, 33.0]])]
    exact = model()(inputs)[0]["instances"].pred_keypoints[..., :2]
    whole = model(**{"MODEL.LANDMARKS.TEST.TRUNCATE": True})(inputs)[0]["instances"]
    assert torch.equal(whole.pred_keypoints[..., :2], exact.trunc())
    assert not torch.equal(exact, exact.trunc())


def test_a_coordinate_just_below_a_whole_number_is_cut_below_it(
    image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e-6 below 60 is 60 in float32."""
    net = model(**{"MODEL.LANDMARKS.TEST.TRUNCATE": True, "MODEL.LANDMARKS.CROP.PADDING": 1.0})
    inputs = with_boxes(image, [[0.0, 0.0, 0.0, 0.0]])
    start = 40 - 1e-6
    inputs["instances"].pred_boxes.tensor = torch.tensor(
        [[start, 9.0, start + 48, 41.0]], dtype=torch.float64
    )
    place = torch.full((1, NUM_KEYPOINTS, 2), 20.0)
    monkeypatch.setattr(net, "_run", lambda images: (place, torch.ones(1, NUM_KEYPOINTS)))
    keypoints = net([inputs])[0]["instances"].pred_keypoints[0, :, :2]
    assert keypoints.tolist() == [[59.0, 29.0]] * NUM_KEYPOINTS


# Heads and backbones


@pytest.mark.parametrize(
    ("head", "backbone"),
    [*((head, "hourglass") for head in HEADS), ("HeatmapHead", "resnet"), ("SimCCHead", "resnet")],
)
def test_heads_learn_one_batch(head: str, backbone: str) -> None:
    """A few steps bring the landmarks of the batch nearer, in pixels of the image."""
    cfg = config(head, backbone, **{"MODEL.LANDMARKS.REGRESSION.POOL": 2})
    torch.manual_seed(0)
    net = build_model(cfg).train()
    inputs = random_inputs(2)
    targets = torch.cat([x["instances"].gt_keypoints.tensor[..., :2] for x in inputs])

    def error() -> float:
        with torch.no_grad():
            net.eval()
            predicted = torch.cat([x["instances"].pred_keypoints[..., :2] for x in net(inputs)])
            net.train()
        return float((predicted - targets).norm(dim=-1).mean())

    before = error()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(30):
        losses = net(inputs)
        assert all(x.isfinite() for x in losses.values())
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    for module in net.modules():  # statistics of one batch, as in training
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        net(inputs)
    assert error() < 0.6 * before


def test_maps_have_the_stride_after_up_sampling() -> None:
    cfg, shapes = config(backbone="resnet"), {"res4": ShapeSpec(channels=8, stride=16)}
    upsample = cfg.MODEL.LANDMARKS.UPSAMPLE
    for layers, size in ((1, (6, 4)), (2, (12, 8)), (4, (48, 32))):
        upsample.NUM_LAYERS = layers
        arguments, map_size = HeatmapHead.arguments(cfg, shapes)
        assert map_size == size and len(arguments["upsampling"]) == 3 * layers
    upsample.NUM_LAYERS = 5
    with pytest.raises(ValueError, match="too many"):
        HeatmapHead.arguments(cfg, shapes)


def test_last_layers_begin_with_small_weights() -> None:
    """Of deviation 0.001 (simple baselines' published code); coordinates begin in the middle."""
    codec = RegressionCodec((48, 32))
    coordinates = RegressionHead(in_feature="res5", in_channels=512, num_keypoints=98, codec=codec)
    maps = MapHead(in_features=["x"], upsampling=Upsampling(64, 64, 1, "BN"), num_keypoints=98)
    weights = [maps.upsampling[0].weight, maps.predictor.weight, coordinates.predictor.weight]
    for weight in weights:
        assert float(weight.detach().std()) == pytest.approx(0.001, rel=0.05)
    assert coordinates.predictor.bias.eq(0.5).all()
    # A fully connected layer on the averaged feature, as the published recipe has it.
    assert coordinates.hidden is None and weights[2].shape == (196, 512)


@pytest.mark.parametrize("loss", ["adaptive_wing", "cross_entropy"])
def test_losses_of_maps_train(loss: str) -> None:
    options = {"MODEL.LANDMARKS.LOSS.MAPS": loss, "MODEL.LANDMARKS.TARGET.CENTER": "rounded"}
    net = model(**options).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    values = []
    for _ in range(15):
        value = net(random_inputs())["loss_heatmap"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.8 * values[0]


@pytest.mark.parametrize("head", ["IntegralHead", "SimCCHead"])
def test_a_flip_test_averages_probabilities(head: str) -> None:
    """The average of a prediction with itself decodes to what it does alone; of two, to their mean."""
    net = model(head).head
    shapes = [(8, 12)] if head == "IntegralHead" else [(bins,) for bins in net.codec.bins]
    generator = torch.Generator().manual_seed(0)
    one, other = (
        tuple(5 * torch.randn((1, 3, *shape), generator=generator) for shape in shapes)
        for _ in range(2)
    )
    alone, averaged = (net.codec.decode(x) for x in (one, net.average(one, one)))
    torch.testing.assert_close(averaged.points, alone.points, atol=1e-3, rtol=0)
    for a, b, mean in zip(one, other, net.average(one, other), strict=True):
        expected = (a.flatten(2).softmax(-1) + b.flatten(2).softmax(-1)) / 2
        torch.testing.assert_close(mean.flatten(2).softmax(-1), expected)


@pytest.mark.parametrize("shape", ["gaussian", "cauchy"])
def test_classified_maps_are_scored_by_their_target(shape: str) -> None:
    """Logits that are the logarithm of a target give the target back, peak 1 and not 1 / sum."""
    net = model(
        **{
            "MODEL.LANDMARKS.LOSS.MAPS": "cross_entropy",
            "MODEL.LANDMARKS.TARGET.SHAPE": shape,
            "MODEL.LANDMARKS.TARGET.WINDOW": 3.0,
        }
    )
    points = torch.tensor([[[20.3, 15.1], [24.0, 18.0], [22.0, 14.0]]])
    (target,), _ = net.head.codec.encode(points, torch.ones(1, 3, dtype=torch.bool))
    (maps,) = net.head.prediction((target.clamp(min=1e-12).log(),))
    torch.testing.assert_close(maps, target, atol=0.1, rtol=0)
    decoded = net.head.codec.decode((maps,))
    torch.testing.assert_close(decoded.points, points, atol=0.05, rtol=0)
    assert (decoded.scores > 0.6).all() and (decoded.scores < 1.1).all()


@pytest.mark.parametrize("head", HEADS)
def test_flip_test_is_symmetric(image: Tensor, head: str) -> None:
    """With a flip test, a mirrored image gives mirrored landmarks; without, it does not."""
    boxes = [[10.0, 12.0, 50.0, 33.0], [30.0, 5.0, 70.0, 50.0]]
    mirrored_boxes = [[80 - x2, y1, 80 - x1, y2] for x1, y1, x2, y2 in boxes]
    errors = {}
    for flip in (True, False):
        net = model(head, **{"MODEL.LANDMARKS.TEST.FLIP": flip})
        straight = net([with_boxes(image, boxes)])[0]["instances"].pred_keypoints
        mirrored = net([with_boxes(image.flip(-1), mirrored_boxes)])[0]["instances"].pred_keypoints
        back = mirrored[:, [1, 0, 2]].clone()
        back[..., 0] = 80 - back[..., 0]
        errors[flip] = float((back - straight).abs().max())
    # soft arithmetic differs by rounding; a decoder that chooses may not
    assert errors[True] < 0.02 < errors[False]


def test_no_flip_in_training() -> None:
    losses = [
        model(**{"MODEL.LANDMARKS.TEST.FLIP": flip}).train()(random_inputs())
        for flip in (False, True)
    ]
    torch.testing.assert_close(losses[0], losses[1])


def test_flip_indices_from_metadata(caplog: pytest.LogCaptureFixture) -> None:
    cfg = config(**{"MODEL.LANDMARKS.TEST.FLIP": True})
    cfg.MODEL.LANDMARKS.FLIP_INDICES = []
    cfg.DATASETS.TEST = ("shapes_val_keypoints",)
    with pytest.raises(ValueError, match=r"8 landmarks.*NUM_KEYPOINTS is 3"):
        find_flip_indices(cfg)
    cfg.MODEL.LANDMARKS.NUM_KEYPOINTS = 8
    assert find_flip_indices(cfg) == [1, 0, 2, 3, 5, 4, 7, 6]
    assert MetadataCatalog.get("shapes_val_keypoints").keypoint_names[0] == "left_eye"
    # The data set's partners win over the config's, and the log says so.
    wrong = [0, 1, 2, 3, 4, 5, 6, 7]
    for given in (wrong, [1, 0, 2, 3, 5, 4, 7, 6]):
        cfg.MODEL.LANDMARKS.FLIP_INDICES = given
        caplog.clear()
        with caplog.at_level("WARNING", logger="d2ext"):
            assert find_flip_indices(cfg) == [1, 0, 2, 3, 5, 4, 7, 6]
        assert ("other mirror partners" in caplog.text) == (given is wrong)
    # A data set of other landmarks, or of landmarks without partners, says nothing of this model's.
    cfg.MODEL.LANDMARKS.NUM_KEYPOINTS, cfg.MODEL.LANDMARKS.FLIP_INDICES = 3, [1, 0, 2]
    assert find_flip_indices(cfg) == [1, 0, 2]
    MetadataCatalog.get("named_points").keypoint_names = ["a", "b", "c"]
    cfg.DATASETS.TEST = ("named_points",)
    assert find_flip_indices(cfg) == [1, 0, 2]
    MetadataCatalog.pop("named_points")
    cfg.MODEL.LANDMARKS.FLIP_INDICES = []
    cfg.DATASETS.TEST, cfg.DATASETS.TRAIN = ("no_such_set",), ()
    with pytest.raises(ValueError, match="FLIP_INDICES"):
        find_flip_indices(cfg)
    with pytest.raises(ValueError, match="each of 3 landmarks once"):
        wrong = config(**{"MODEL.LANDMARKS.TEST.FLIP": True})
        wrong.MODEL.LANDMARKS.FLIP_INDICES = [0, 0, 2]
        build_model(wrong)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("mode", ["eager", "compile"])
def test_faster_inference_says_the_same(
    image: Tensor, mode: str, flip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compilation is replaced by a function that records shapes: a power of two of crops."""
    shapes: set[int] = set()

    def no_compile(function: Any, **_: Any) -> Any:
        def run(images: Tensor) -> Any:
            shapes.add(len(images))
            return function(images)

        return run

    monkeypatch.setattr(torch, "compile", no_compile)
    options = {
        "MODEL.INFERENCE.MODE": mode,
        "MODEL.INFERENCE.CHANNELS_LAST": True,
        "MODEL.LANDMARKS.TEST.FLIP": flip,
        "MODEL.LANDMARKS.TEST.MAX_CROPS": 6,
    }
    boxes = [[5.0 * i, 4.0 * i, 5.0 * i + 30, 4.0 * i + 25] for i in range(9)]
    inputs = [with_boxes(image, boxes)]
    expected = model(**{"MODEL.LANDMARKS.TEST.FLIP": flip})(inputs)[0]["instances"]
    detections = model(**options)(inputs)[0]["instances"]
    torch.testing.assert_close(
        detections.pred_keypoints, expected.pred_keypoints, atol=1e-3, rtol=1e-4
    )
    assert shapes == ({6, 4} if mode == "compile" else set())


@pytest.mark.parametrize("head", ["HeatmapHead", "RegressionHead"])
def test_exported_for_any_number_of_crops(head: str) -> None:
    options = {
        "MODEL.NEWELL_HOURGLASS.NUM_STACKS": 1,
        "MODEL.NEWELL_HOURGLASS.DEPTH": 1,
        "MODEL.LANDMARKS.DECODER": "quarter",
        "MODEL.LANDMARKS.TEST.FLIP": True,
    }
    net = model(head, **options)

    class Decoded(torch.nn.Module):
        def forward(self, crops: Tensor) -> tuple[Tensor, ...]:
            return net._decode(net.network(crops))

    module = Decoded()
    module.parts = net
    crops = torch.rand(5, 3, 32, 48)
    count = torch.export.Dim("count", min=1, max=64)
    program = torch.export.export(module, (crops[:3],), dynamic_shapes=({0: count},))
    for actual, expected in zip(program.module()(crops), module(crops), strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-4)


def test_parts_that_benchmarks_time(image: Tensor) -> None:
    net = model()
    inputs = [with_boxes(image, [[10.0, 12.0, 50.0, 33.0], [30.0, 5.0, 70.0, 50.0]])]
    expected = net(inputs)[0]["instances"].pred_keypoints
    images = net.preprocess(inputs)
    keypoints = net.postprocess(net.inference_network(images), inputs)[0][
        "instances"
    ].pred_keypoints
    torch.testing.assert_close(keypoints, expected)
    with pytest.raises(ValueError, match="1 crops for 2 boxes"):
        net.postprocess(net.inference_network(images[:1]), inputs)


@pytest.mark.parametrize("head", ["HeatmapHead", "IntegralHead"])
def test_heatmaps_lie_where_the_landmarks_are(image: Tensor, head: str) -> None:
    net = model(head, **{"MODEL.LANDMARKS.DECODER": "argmax"})
    box = [[10.0, 12.0, 50.0, 33.0]]

    def one_bright_cell(raw: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        maps = torch.full_like(raw[-1], -20.0 if head == "IntegralHead" else 0.0)
        maps[:, :, 5, 7] = 20.0 if head == "IntegralHead" else 1.0
        return (maps,)

    hook = net.head.register_forward_hook(lambda module, inputs, output: one_bright_cell(output))
    for size in ({}, {"height": 120, "width": 240}):
        inputs = [{**with_boxes(image, box), **size}, with_boxes(image, [])]
        maps = [x["joints"] for x in net.heatmaps(inputs)]
        keypoints = net(inputs)[0]["instances"].pred_keypoints[0, 1, :2]
        assert maps[0].shape == (size.get("height", 60), size.get("width", 80))
        assert maps[0].max() <= 1 and maps[1].eq(0).all()
        bright = (maps[0] > 0.9 * maps[0].max()).nonzero().float() + 0.5
        assert (bright.mean(dim=0).flip(0) - keypoints).abs().max() < 1.5
    hook.remove()
    assert model("SimCCHead").heatmaps([{"image": image}]) == [{}]


# Mistakes


def test_another_number_of_landmarks() -> None:
    net = model(**{"MODEL.LANDMARKS.NUM_KEYPOINTS": 5}).train()
    with pytest.raises(ValueError, match=r"3 landmarks.*NUM_KEYPOINTS is 5"):
        net(random_inputs())


def test_an_image_without_instances_needs_no_keypoints() -> None:
    nobody = Instances((4, 4), gt_boxes=Boxes(torch.zeros(0, 4)))
    assert read_keypoints(nobody, 5, torch.device("cpu")).shape == (0, 5, 3)


def test_instances_without_what_is_needed() -> None:
    net = model().train()
    for key, error, message in (
        ("gt_keypoints", ValueError, "KEYPOINT_ON"),
        ("gt_boxes", ValueError, "gt_boxes"),
    ):
        inputs = random_inputs(1)
        inputs[0]["instances"].remove(key)
        with pytest.raises(error, match=message):
            net(inputs)
    with pytest.raises(KeyError, match="instances"):
        net([{"image": random_inputs(1)[0]["image"]}])


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("case", ["invisible", "outside", "one_invisible", "not_finite"])
def test_landmarks_that_cannot_be_seen(head: str, case: str) -> None:
    net = model(head).train()
    inputs = random_inputs()
    for x in inputs:
        points = x["instances"].gt_keypoints.tensor
        if case == "invisible":
            points[..., 2] = 0
        elif case == "outside":
            points[..., :2] += 1e4
        elif case == "one_invisible":
            points[0, :, 2] = 0
        else:
            points[0, 0, 0] = float("nan")
    loss = sum(net(inputs).values())
    loss.backward()
    assert loss.isfinite()
    gradients = [p.grad for p in net.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    if case == "invisible" or (case == "outside" and head != "RegressionHead"):
        assert float(loss.detach()) == 0
    else:
        assert float(loss.detach()) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"MODEL.LANDMARKS.HEAD": "NoHead"}, "known heads"),
        ({"MODEL.LANDMARKS.DECODER": "best"}, "DECODER"),
        ({"MODEL.LANDMARKS.LOSS.MAPS": "l0"}, r"LOSS\.MAPS"),
        ({"MODEL.LANDMARKS.CROP.METHOD": "cut"}, r"CROP\.METHOD"),
        ({"MODEL.LANDMARKS.INPUT_SIZE": [30, 48]}, r"multiples of"),
        ({"MODEL.LANDMARKS.IN_FEATURE": "res9"}, "stack1"),
        ({"MODEL.NEWELL_HOURGLASS.NUM_STACKS": 0}, "NUM_STACKS"),
        ({"MODEL.NEWELL_HOURGLASS.CHANNELS": 15}, "even"),
        (
            {"MODEL.LANDMARKS.HEAD": "SimCCHead", "MODEL.LANDMARKS.TEST.HEATMAPS": True},
            "no heat maps",
        ),
        ({"MODEL.LANDMARKS.HEAD": "RegressionHead", "MODEL.LANDMARKS.LOSS.POINTS": "x"}, "POINTS"),
    ],
)
def test_wrong_settings_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**options)


def test_hourglass_takes_no_image_of_another_multiple() -> None:
    net = model()
    with pytest.raises(ValueError, match="multiples of 16"):
        net.backbone(torch.zeros(1, 3, 24, 48))


def test_a_batch_without_boxes_changes_no_statistics() -> None:
    net = model().train()
    net.vis_period = 1
    inputs = random_inputs()
    for x in inputs:
        x["instances"] = x["instances"][:0]
    before = copy.deepcopy(dict(net.named_buffers()))
    with EventStorage() as storage:
        losses = net(inputs)
        assert len(storage._vis_data) == 1
    assert list(losses) == ["loss_no_instances"]
    losses["loss_no_instances"].backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in net.parameters())
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, before[name])


def test_marks_are_cut_at_the_picture_s_edges() -> None:
    points = torch.tensor([[[0.5, 0.9], [2.0, 3.0]], [[4.0, 1.0], [3.5, 3.5]]])
    shown = torch.tensor([[True, False], [False, True]])
    marked = mark_points(torch.zeros(2, 3, 4, 4), points, shown, (0.0, 9.0, 0.0))
    corner = torch.zeros(4, 4)
    corner[:2, :2] = 9
    assert torch.equal(marked[:, 1], torch.stack([corner, corner.flip(0, 1)]))
    assert not marked[:, ::2].any()


def test_training_pictures() -> None:
    net = model().train()
    net.vis_period = 1
    with EventStorage() as storage:
        net(random_inputs())
        name, picture, _ = storage._vis_data[0]
    assert "annotations" in name
    assert picture.shape == (3, 64, 6 * 48) and picture.min() >= 0 and picture.max() <= 1
    green = (picture[1, :32] == 1) & (picture[0, :32] == 0) & (picture[2, :32] == 0)
    red = (picture[0, 32:] == 1) & (picture[1, 32:] == 0) & (picture[2, 32:] == 0)
    assert green.sum() > 20 and red.sum() > 20
