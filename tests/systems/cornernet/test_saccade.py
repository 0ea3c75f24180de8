"""CornerNet-Saccade against the published implementation, and its search on its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from fvcore.transforms.transform import TransformList
from torch import Tensor

from d2ext.codecs.canvas import Canvas
from d2ext.config import get_cfg
from d2ext.data import D2extDatasetMapper
from d2ext.data.augmentations import DetectionInput
from d2ext.data.augmentations.affine import PixelMirrorTransform
from d2ext.data.augmentations.saccade import ContentCropTransform, RandomObjectCrop
from d2ext.data.dataset_mapper import _visible_shares
from d2ext.systems.cornernet.postprocess import COLUMNS, suppress
from d2ext.systems.cornernet.saccade import (
    CornerNetSaccade,
    attention_locations,
    box_locations,
    crop_around,
    suppress_locations,
)
from d2ext.systems.cornernet.targets import SaccadeTargets, encode_saccade
from d2ext.testing import random_inputs, tiny_config
from tests.reference.fixture import Fixture, draw_image
from tests.systems.corner_cases import assert_detections, build_with_weights, load_boxes

FIXTURE = Fixture(Path(__file__).parents[2] / "reference" / "cornernet" / "saccade")
# DESIGN: raw outputs within 1e-4 relative.
RAW_TOLERANCE = 1e-4
RANGES = ((96, 256), (32, 96), (0, 32))
# Crops that go through the network, of the eight recorded: all of them would take a minute.
CROPS = 1


class RecordedRandom:
    """Gives the fixture's random numbers, and checks that they are asked for as they were."""

    def __init__(self, calls: Iterator[list[Any]]) -> None:
        self.calls = calls

    def randint(self, low: int, high: int | None = None) -> int:
        kind, recorded_low, recorded_high, value = next(self.calls)
        asked = (0, low) if high is None else (low, high)
        assert (kind, recorded_low, recorded_high) == ("randint", *asked)
        return value

    def uniform(self) -> float:
        kind, value = next(self.calls)
        assert kind == "uniform"
        return value


def training_sample(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The recorded sample, from files through the recipe's transforms."""
    sample = FIXTURE.manifest["inputs"]["training_sample"]
    objects = sample["boxes_x1_y1_x2_y2_class"]
    calls = iter(sample["random_calls_in_order"])
    recorded = RecordedRandom(calls)
    images, transforms = [], []
    for (height, width, seed), listed in zip(
        ((300, 340, 51), (280, 400, 52)), objects, strict=True
    ):
        images.append(draw_image(height, width, seed))
        boxes = np.array([o[:4] for o in listed], dtype=np.float32)
        with monkeypatch.context() as patch:
            patch.setattr(np.random, "randint", recorded.randint)
            patch.setattr(np.random, "uniform", recorded.uniform)
            crop = RandomObjectCrop(255).get_transform(
                images[-1], boxes, np.zeros(len(boxes), dtype=bool)
            )
            mirrored = recorded.uniform() > 0.5
        transforms.append([*crop.transforms, *([PixelMirrorTransform(255)] if mirrored else [])])
    assert next(calls, None) is None
    return load_boxes(images, objects, 255, transforms)


def targets_of(inputs: list[dict[str, Any]]) -> SaccadeTargets:
    return encode_saccade(
        [x["instances"].gt_boxes.tensor for x in inputs],
        [x["instances"].gt_classes for x in inputs],
        [x["instances"].gt_visible_shares for x in inputs],
        num_classes=5,
        input_size=(255, 255),
        output_size=(64, 64),
        attention_ranges=RANGES,
    )


def test_training_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = training_sample(monkeypatch)
    mean, std = (
        torch.tensor(FIXTURE.manifest["inputs"][name])[:, None, None]
        for name in ("mean_bgr", "std_bgr")
    )
    images = torch.stack([x["image"] for x in inputs]).float() / 255
    assert FIXTURE.compare("training_images", (images - mean) / std) < 1e-5
    targets = targets_of(inputs)
    expected = FIXTURE.expected
    corners = targets.corners
    for i, mask in enumerate(corners.mask):
        count = int(expected["target_mask"][i].sum())
        assert int(mask.sum()) == count
        for name, target in (("tl", corners.top_left), ("br", corners.bottom_right)):
            np.testing.assert_array_equal(
                target.index[i][mask], expected[f"target_{name}_index"][i, :count]
            )
            np.testing.assert_allclose(
                target.offset[i][mask], expected[f"target_{name}_off"][i, :count], atol=2e-5
            )
    np.testing.assert_allclose(corners.top_left.heat, expected["target_tl_heat"], atol=1e-6)
    np.testing.assert_allclose(corners.bottom_right.heat, expected["target_br_heat"], atol=1e-6)
    np.testing.assert_array_equal(targets.corners.top_left.valid, expected["target_tl_valid"])
    np.testing.assert_array_equal(targets.corners.bottom_right.valid, expected["target_br_valid"])
    assert not targets.corners.top_left.valid.all()
    for level, attention in enumerate(targets.attention):
        np.testing.assert_array_equal(attention, expected[f"target_att_{level}"])


class Case:
    """The published model with the fixture's weights, and what it says of the small views."""

    def __init__(self) -> None:
        self.model: Any = build_with_weights(
            "cornernet/cornernet_saccade_255.yaml", "cornernet", FIXTURE
        )
        pixels = draw_image(400, 420, seed=4).transpose(2, 0, 1)
        self.inputs = {"image": torch.from_numpy(np.ascontiguousarray(pixels))}
        self.seen: dict[str, Tensor] = {}
        backbone = self.model.backbone
        watched = {
            "stem": backbone.stem,
            "hourglass_0": backbone.stacks[0],
            "cnv_2": backbone.convs[2],
        }
        hooks = [
            module.register_forward_hook(
                lambda _m, _i, output, name=name: self.seen.__setitem__(name, output)
            )
            for name, module in watched.items()
        ]
        with torch.no_grad():
            self.views = self.model.preprocess([self.inputs])
            self.raw = self.model.network(self.views)
        for hook in hooks:
            hook.remove()


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_first_views(case: Case) -> None:
    actual = {"first_images": case.views, **case.seen}
    for corner, maps in zip(("tl", "br"), case.raw[:2], strict=True):
        actual[f"first_{corner}_heat"] = maps.heat
        actual[f"first_{corner}_off"] = maps.offset
        actual[f"first_{corner}_tag"] = maps.embedding
    for level, logits in enumerate(case.raw.attention):
        actual[f"first_att_{level}"] = logits
    for name, value in actual.items():
        assert FIXTURE.compare(name, value) < RAW_TOLERANCE, name
    compare_pairs(case.model._decode(case.raw)[0], "first_decoded")


def compare_pairs(rows: Tensor, name: str) -> None:
    expected = FIXTURE.expected[name]
    for view, own in enumerate(rows):
        np.testing.assert_allclose(
            own[own[:, 4] > -1][:, :8],
            expected[expected[:, 0] == view, 1:],
            atol=2e-3,
            rtol=1e-4,
        )


def recorded_rows(name: str, views: int) -> Tensor:
    """Recorded pairs as rows (B, P, COLUMNS); rejected ones fill up."""
    rows = torch.zeros(views, 12, COLUMNS)
    rows[..., 4] = -1
    expected = FIXTURE.expected[name]
    for view in range(views):
        own = torch.from_numpy(expected[expected[:, 0] == view, 1:])
        rows[view, : len(own), :8] = own
    return rows


def test_search(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locations, crops, what the network finds in some of them, and the way to the detections."""
    model = case.model
    calls: list[Tensor] = []

    def look(views: Tensor) -> Tensor:
        calls.append(views)
        return recorded_rows("second_decoded", len(views))

    monkeypatch.setattr(model, "_look", look)
    monkeypatch.setattr(model.network, "forward", lambda images: case.raw)
    first, *attention = model._decode(case.raw)
    rows, locations = model.first_look(first, attention, (400, 420))
    expected = FIXTURE.expected["locations"]
    np.testing.assert_allclose(locations, expected, atol=1e-3, rtol=1e-4)
    result = model([case.inputs])[0]["instances"]
    assert FIXTURE.compare("second_images", calls[0]) < 1e-5
    detections = [result.pred_classes[:, None], result.pred_boxes.tensor, result.scores[:, None]]
    assert_detections(torch.cat(detections, 1).numpy(), FIXTURE.expected["detections"])
    monkeypatch.undo()

    canvases = [canvas for _, canvas in model._crops(locations, (400, 420))]
    second = model._rows_on_image(recorded_rows("second_decoded", 8), canvases)
    before = torch.cat([rows, second[second[:, 4] > -1]])
    assert_detections(
        before[:, [7, 0, 1, 2, 3, 4]].numpy(), FIXTURE.expected["before_soft_nms"][:, :6]
    )
    assert len(suppress(before, model.suppression)) == len(result)

    with torch.no_grad():
        maps = model.network(calls[0][:CROPS])
    tags = FIXTURE.expected["second_tl_tag"][:CROPS]
    error = np.linalg.norm(maps[0].embedding[..., ::4, ::4].numpy() - tags) / np.linalg.norm(tags)
    assert error < RAW_TOLERANCE
    compare_pairs(model._decode(maps)[0], "second_decoded")


def test_losses(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model, expected = case.model, FIXTURE.expected
    with torch.no_grad():
        images, targets = model.training_batch(training_sample(monkeypatch))
        model.head.training = True  # of every stack; norms stay as they are
        stacks = model.network(images)
        model.head.training = False
        for s, predictions in enumerate(stacks):
            terms = model.criterion.terms(predictions, targets)
            recorded = {
                "heat": [f"focal_tl_{s}", f"focal_br_{s}"],
                "pull": [f"pull_{s}"],
                "push": [f"push_{s}"],
                "offset": [f"off_tl_{s}", f"off_br_{s}"],
                "attention": [f"att_{level}_{s}" for level in range(3)],
            }
            for name, keys in recorded.items():
                for key, value in zip(keys, terms[name], strict=True):
                    reference = float(expected[f"loss_{key}"])
                    assert value.item() == pytest.approx(reference, rel=1e-4), key
        losses = model.criterion(stacks, targets)
    total = sum(losses.values()).item()
    assert total == pytest.approx(float(expected["loss_total"]), rel=1e-4)
    # Quirk: the attention losses are divided by the number of stacks twice.
    attention = sum(float(expected[f"loss_att_{i}_{s}"]) for i in range(3) for s in range(3))
    assert losses["loss_attention"].item() == pytest.approx(attention / 9, rel=1e-4)


def test_crop_by_hand() -> None:
    crop = crop_around(10, 50, 63, 63, 40, 60)
    assert crop.source == (slice(0, 40), slice(19, 60))
    assert crop.target == (slice(21, 61), slice(0, 41))
    assert crop.corner == (19, -21)
    doubled = crop_around(30, 30, 31, 63, 60, 60)
    assert doubled.source == (slice(15, 45), slice(15, 45))
    # 31 pixels become 63: 15 on either side of the middle become int(15 * 63 / 31).
    assert doubled.target == (slice(1, 61), slice(1, 61))


def test_the_whole_image_is_seen_whole() -> None:
    """255 / float32(255 / 420) is 420 in float32 and less in float64."""
    model = build_model(tiny_config("CornerNetSaccade")).eval()
    model.options = model.options._replace(input_size=255, first_sizes=(255,))
    image = torch.zeros(3, 400, 420)
    image[:, :, :2] = 255
    views, (canvas,) = model._views(image, model._first_locations((400, 420)))
    assert canvas.corner == (0.0, -10.0)
    pixels = views * model.pixel_std + model.pixel_mean
    assert pixels[0, 0, 127, 0] == pytest.approx(255, abs=1e-2)


def test_locations_of_boxes() -> None:
    rows = np.array(
        [
            [0, 0, 96.5, 20, 0.9],
            [10, 10, 42, 74, 0.6],
            [5, 5, 15, 37, 0.7],
            [5, 5, 15, 15, 0.5],
            [7, 7, 7, 7, 0.9],
        ]
    )
    locations = box_locations(rows, 0.5)
    assert locations[:3].tolist() == [
        [10, 48.25, 192 / 96.5, 1],
        [42, 26, 64 / 64, 1],
        [21, 10, 24 / 32, 1],
    ]
    assert len(locations) == 4 and np.isfinite(locations).all()


def test_locations_of_attention() -> None:
    attention = [np.zeros((2, 4, 4)), np.zeros((2, 8, 8))]
    attention[0][0, 1, 2] = 0.9
    attention[1][0, 7, 0] = 0.4
    attention[1][0, 0, 0] = 0.3  # not above the threshold
    attention[0][1, 3, 3] = 0.8  # outside the image

    def views(*scales: float, corners: Any = ((0, 0), (0, 0))) -> list[Canvas]:
        return [Canvas((64, 64), (64, 64), *x) for x in zip(scales, corners, strict=True)]

    canvases = views(0.5, 1.5, corners=((6.0, -4.0), (80, 80)))
    locations = attention_locations(attention, canvases, [16, 8], [1, 2], 0.3, (120, 90))
    assert locations.tolist() == [[28, 70, 0.5, 0.9], [108, 6, 1.0, 0.4]]
    # Too close already; close enough for the finer map only.
    for scale, factors, count in ((2.1, [1, 1], 0), (1.9, [1, 3], 2), (1.9, [3, 2], 1)):
        locations = attention_locations(
            attention, views(scale, scale), [16, 8], factors, 0.3, (500, 500)
        )
        assert len(locations) == count


def test_near_locations_are_one() -> None:
    locations = np.array(
        [
            [100, 100, 1.0, 0.5],
            [115, 400, 1.0, 0.4],  # near in y is near: a quirk
            [117, 117, 1.0, 0.6],
            [100, 100, 1.3, 0.3],  # of another scale
        ]
    )
    selected = suppress_locations(locations)
    assert selected[:, 3].tolist() == [0.6, 0.5, 0.3]
    assert suppress_locations(np.zeros((0, 4))).shape == (0, 4)


def test_limits_of_locations() -> None:
    """Published numbers (NOTES.md), each from both sides."""
    sides = [(0.05, 24), (32, 24), (32.1, 64), (96, 64), (96.1, 192)]
    rows = np.array([[0.0, 0.0, side, 1e-3, 0.9] for side, _ in sides])
    scales = box_locations(rows, 0.5)[:, 2]
    np.testing.assert_allclose(scales, [seen / side for side, seen in sides])

    # Views of up to twice the image's scale, crops of up to four times.
    peak = np.ones((1, 1, 1), np.float32)
    for scale, factors in ((2.0, [1, 2]), (2.01, []), (1.01, [1, 2]), (1.0, [1, 2, 4])):
        canvas = Canvas((15, 15), (15, 15), scale, (0, 0))
        found = attention_locations([peak] * 3, [canvas], [16, 8, 4], [1, 2, 4], 0.3, (9, 9))
        np.testing.assert_allclose(found[:, 2], [f * scale for f in factors])
    # A location on the image's last pixel is inside, and none beside it.
    for corner, count in (((0, 0), 1), ((8, 8), 1), ((9, 0), 0), ((0, 9), 0), ((-1, 0), 0)):
        canvas = Canvas((15, 15), (15, 15), 1.0, corner)
        found = attention_locations([peak], [canvas], [16], [1], 0.3, (9, 9))
        assert len(found) == count, corner

    def kept(distance: float, ratio: float) -> int:
        """Of two locations, apart along both axes."""
        best = [100.0, 100.0, 2.0, 0.9]
        other = [100 + distance, 100 + distance, 2 / ratio, 0.5]
        return len(suppress_locations(np.array([best, other])))

    # Of one when at most 16 pixels of the view apart, and of scales within a fifth.
    assert [kept(8.0, 1.0), kept(8.1, 1.0)] == [1, 2]
    assert [kept(0.0, x) for x in (0.79, 0.81, 1.19, 1.21)] == [2, 1, 1, 2]


def test_objects_that_are_neither_positive_nor_negative() -> None:
    boxes = torch.tensor([[10.0, 10, 25.9, 20], [30, 30, 60, 60], [70, 70, 120, 120]])
    targets = encode_saccade(
        [boxes],
        [torch.tensor([0, 1, 1])],
        [torch.tensor([1.0, 0.5, 0.51])],
        num_classes=2,
        input_size=(127, 127),
        output_size=(32, 32),
        attention_ranges=[[48, 128], [24, 48], [0, 24]],
    )
    assert targets.corners.mask.tolist() == [[False, False, True]]
    assert [int((~x.valid).any(dim=(2, 3)).sum()) for x in targets.corners[:2]] == [2, 2]
    assert [int(a.sum()) for a in targets.attention] == [1, 1, 1]
    assert [tuple(a.shape) for a in targets.attention] == [
        (1, 1, 8, 8),
        (1, 1, 16, 16),
        (1, 1, 32, 32),
    ]


def test_mapper_says_how_much_of_an_object_is_left(tmp_path: Path) -> None:
    """Objects wider than the crop are cut; without such a crop nothing is reported."""
    cv2.imwrite(str(tmp_path / "image.png"), np.full((100, 300, 3), 90, np.uint8))
    boxes = [[-20, 10, 40, 20], [200, 10, 50, 80], [250, 90, 5, 5]]
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0}
        for box in boxes
    ]
    sample = {"file_name": str(tmp_path / "image.png"), "annotations": annotations}
    cfg = get_cfg()
    cfg.INPUT.AUGMENTATION.NAME = "cornernet_saccade"
    cfg.INPUT.AUGMENTATION.SIZE = 127
    cfg.INPUT.AUGMENTATION.FLIP_PROB = 0.0
    mapper = D2extDatasetMapper(cfg, is_train=True)
    np.random.seed(0)
    seen = []
    for _ in range(20):
        instances = mapper(sample)["instances"]
        shares = instances.gt_visible_shares
        assert len(shares) == len(instances) and ((shares > 0) & (shares <= 1)).all()
        seen += shares.tolist()
    assert min(seen) < 0.6 and max(seen) > 0.99
    sample["annotations"] = []
    assert len(mapper(sample)["instances"].gt_visible_shares) == 0
    cfg.INPUT.AUGMENTATION.NAME = "cornernet"
    sample["annotations"] = annotations
    assert not D2extDatasetMapper(cfg, is_train=True)(sample)["instances"].has("gt_visible_shares")


def test_visible_share_by_hand() -> None:
    window = ContentCropTransform(100, 80, 50, 40, 61, 41)
    # The window shows columns 20 to 79 and rows 20 to 59; the last pixel's index is the limit.
    boxes = [[20, 20, 60, 59], [0, 20, 40, 40], [70, 50, 90, 70], [0, 0, 10, 10]]
    shares = _visible_shares([{"bbox": box} for box in boxes], TransformList([window]))
    assert shares.tolist() == pytest.approx([1, 0.5, 9 * 9 / 400, 0])
    mirrored = TransformList([window, PixelMirrorTransform(61)])
    again = _visible_shares([{"bbox": box} for box in boxes], mirrored)
    assert again.tolist() == pytest.approx(shares.tolist())


def test_object_crops_hold_their_object() -> None:
    np.random.seed(0)
    image = np.zeros((200, 300, 3), np.uint8)
    for box in ([5.0, 5, 150, 120], [100, 50, 140, 90], [280, 190, 299, 199]):
        for _ in range(20):
            given = DetectionInput(image, boxes=np.array([box]), crowd=np.zeros(1, bool))
            RandomObjectCrop(127)(given)
            assert given.image.shape == (127, 127, 3)
            sides = given.boxes[0, 2:] - given.boxes[0, :2]
            assert (sides > 0).all()
    # Crowds are no objects; a tiny one makes no giant.
    given = DetectionInput(image, boxes=np.array([[5.0, 5, 5.5, 5.5]]), crowd=np.zeros(1, bool))
    tfms = RandomObjectCrop(127)(given)
    assert max(tfms.transforms[0].new_w, tfms.transforms[0].new_h) <= 4096


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.CORNERNET.SACCADE.ATTENTION_SCALES", [1, 2, 4], "ATTENTION_SCALES"),
        ("MODEL.CORNERNET.SACCADE.INPUT_SIZE", 64, "INPUT_SIZE"),
        ("MODEL.CORNERNET_HOURGLASS.OUT_LEVELS", False, "OUT_LEVELS"),
    ],
)
def test_wrong_settings_are_explained(key: str, value: object, message: str) -> None:
    cfg = tiny_config("CornerNetSaccade")
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


@pytest.mark.parametrize("size", [(8, 200), (300, 7), (1, 1)])
def test_images_far_from_square(size: tuple[int, int]) -> None:
    cfg = tiny_config("CornerNetSaccade")
    cfg.MODEL.CORNERNET.SACCADE.ATTENTION_THRESH = 0.0
    cfg.MODEL.CORNERNET.SACCADE.CONFIDENT_SCORE = 0.0
    cfg.MODEL.CORNERNET.SACCADE.MAX_CROPS = 4
    torch.manual_seed(0)
    model: CornerNetSaccade = build_model(cfg).eval()
    result = model([{"image": torch.rand(3, *size) * 255}])[0]["instances"]
    assert result.image_size == size
    # Benchmarks hand over the first views.
    inputs = random_inputs(1)
    direct = model(inputs)[0]["instances"]
    with torch.no_grad():
        staged = model.postprocess(model.inference_network(model.preprocess(inputs)), inputs)
    torch.testing.assert_close(direct.scores, staged[0]["instances"].scores)
