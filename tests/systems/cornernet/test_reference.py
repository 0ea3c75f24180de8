"""CornerNet against the published implementation: the fixtures in tests/reference/cornernet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor

from d2ext.codecs.canvas import Canvas
from d2ext.codecs.corners import CornerTargets, PointMaps, encode_corners
from d2ext.data.augmentations.affine import PixelMirrorTransform
from d2ext.data.augmentations.canvas import CanvasCropTransform
from d2ext.data.augmentations.resize import ResizeToSquare
from d2ext.systems.cornernet.losses import CornerNetCriterion
from d2ext.systems.cornernet.postprocess import image_rows, suppress
from tests.reference import GRADIENT_TOLERANCE
from tests.reference.fixture import Fixture, draw_image, draw_tensor
from tests.systems.corner_cases import (
    IMAGE_SIZES,
    assert_detections,
    build_with_weights,
    load_boxes,
    squared_inputs,
)

REFERENCE = Path(__file__).parents[2] / "reference" / "cornernet"
# DESIGN: raw outputs within 1e-4 relative.
RAW_TOLERANCE = 1e-4


class TestTargets:
    fixture = Fixture(REFERENCE / "targets")

    def compare(self, kind: str, inputs: list[dict[str, Any]], size: int, cells: int) -> None:
        targets = encode_corners(
            [x["instances"].gt_boxes.tensor for x in inputs],
            [x["instances"].gt_classes for x in inputs],
            num_classes=5,
            input_size=(size, size),
            output_size=(cells, cells),
        )
        images = torch.stack([x["image"] for x in inputs]).float() / 255
        mean, std = (
            torch.tensor(self.fixture.manifest["inputs"][name])[:, None, None]
            for name in ("mean", "std")
        )
        assert self.fixture.compare(f"{kind}_images", (images - mean) / std) < 1e-5
        for name, target in (("tl", targets.top_left), ("br", targets.bottom_right)):
            for i, mask in enumerate(targets.mask):
                count = int(self.fixture.expected[f"{kind}_mask"][i].sum())
                index = self.fixture.expected[f"{kind}_{name}_index"][i, :count]
                np.testing.assert_array_equal(target.index[i][mask], index)
                offset = self.fixture.expected[f"{kind}_{name}_offset"][i, :count]
                np.testing.assert_allclose(target.offset[i][mask], offset, atol=2e-5)
            heat = self.fixture.expected[f"{kind}_{name}_heat"]
            np.testing.assert_allclose(target.heat, heat, atol=1e-6)

    def test_without_augmentation(self) -> None:
        self.compare("plain", squared_inputs(self.fixture, (1, 2), 511), 511, 128)

    def test_random_crop_and_mirror(self) -> None:
        """The recorded random numbers in the recipe's transforms."""
        inputs = self.fixture.manifest["inputs"]
        recorded = inputs["augmented"]
        size, centers = 255, iter(recorded["centers_x_y"])
        side = int(recorded["scale"] * size)
        images, transforms = [], []
        for i, (height, width) in enumerate(IMAGE_SIZES):
            images.append(draw_image(height, width, i + 1))
            steps = [
                CanvasCropTransform(width, height, next(centers), next(centers), side, side),
                ResizeToSquare(size).get_transform(np.zeros((side, side, 3))),
            ]
            if recorded["uniform"][i] > 0.5:
                steps.append(PixelMirrorTransform(size))
            transforms.append(steps)
        loaded = load_boxes(images, inputs["boxes_x1_y1_x2_y2_class"], size, transforms)
        self.compare("augmented", loaded, size, 64)


def test_losses_of_drawn_maps() -> None:
    fixture = Fixture(REFERENCE / "losses")
    inputs = squared_inputs(fixture, (1, 2), 127)
    targets = encode_corners(
        [x["instances"].gt_boxes.tensor for x in inputs],
        [x["instances"].gt_classes for x in inputs],
        num_classes=5,
        input_size=(127, 127),
        output_size=(32, 32),
    )

    def maps(stack: int, corner: str) -> PointMaps:
        def draw(name: str, channels: int, scale: float, shift: float = 0.0) -> Tensor:
            values = draw_tensor(f"{corner}_{name}_{stack}", (2, channels, 32, 32), 1)
            return (torch.from_numpy(values) * scale + shift).requires_grad_()

        return PointMaps(draw("heat", 5, 1.5, -2.0), draw("offset", 2, 0.6), draw("tag", 1, 0.7))

    stacks = [tuple(maps(s, corner) for corner in ("tl", "br")) for s in range(2)]
    criterion = CornerNetCriterion()
    compare_terms(fixture, criterion, stacks, targets, "offset")
    total = sum(criterion(stacks, targets).values())
    assert total.item() == pytest.approx(float(fixture.expected["total"]), rel=1e-5)
    total.backward()
    for s, stack in enumerate(stacks):
        for corner, predicted in zip(("tl", "br"), stack, strict=True):
            for name, values in zip(("heat", "offset", "tag"), predicted, strict=True):
                assert fixture.compare(f"grad_{corner}_{name}_{s}", values.grad) < 1e-4


def compare_terms(
    fixture: Fixture,
    criterion: CornerNetCriterion,
    stacks: list[tuple[PointMaps, ...]],
    targets: CornerTargets,
    offset: str,
    prefix: str = "",
) -> None:
    for s, stack in enumerate(stacks):
        terms = criterion.terms(stack, targets)
        expected = {
            "heat": [f"focal_{corner}_{s}" for corner in ("tl", "br")],
            "offset": [f"{offset}_{corner}_{s}" for corner in ("tl", "br")],
            "pull": [f"pull_{s}"],
            "push": [f"push_{s}"],
        }
        for name, keys in expected.items():
            for key, value in zip(keys, terms[name], strict=True):
                recorded = float(fixture.expected[prefix + key])
                assert value.item() == pytest.approx(recorded, rel=1e-4), key


class Case:
    """Hourglass-104 with the fixture's weights, and what it says of the fixture's image."""

    def __init__(self) -> None:
        self.fixture = Fixture(REFERENCE / "hourglass104")
        self.model = build_with_weights(
            "cornernet/cornernet_hourglass104_511.yaml", "cornernet", self.fixture
        )
        pixels = draw_image(180, 300, seed=1).transpose(2, 0, 1)
        self.image = torch.from_numpy(np.ascontiguousarray(pixels))
        self.seen: dict[str, Tensor] = {}
        network = self.model.network
        stacks, heads = network.backbone.stacks, network.head
        bottom = stacks[0]
        while hasattr(bottom, "inner"):
            bottom = bottom.inner
        watched = {
            "stem": network.backbone.stem,
            "hourglass_0_bottom": bottom,
            "hourglass_0": stacks[0],
            "hourglass_1": stacks[1],
            "cnv_0": network.backbone.convs[0],
            "cnv_1": network.backbone.convs[1],
            "inter_0": network.backbone.links[0],
            "tl_pooled_1": heads.top_left[1].pooling,
            "br_pooled_1": heads.bottom_right[1].pooling,
        }
        hooks = [
            module.register_forward_hook(
                lambda _m, _i, output, name=name: self.seen.__setitem__(name, output)
            )
            for name, module in watched.items()
        ]
        with torch.no_grad():
            self.canvas = self.model.canvas((180, 300), 1.0)
            self.input = self.model.preprocess([{"image": self.image}])
            self.raw = network(self.input)
        for hook in hooks:
            hook.remove()
        (self.rows,) = self.model._decode(self.raw)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def test_raw_outputs(case: Case) -> None:
    actual = {"network_input": case.input, **case.seen}
    for corner, maps in zip(("tl", "br"), case.raw, strict=True):
        actual[f"{corner}_heat"] = maps.heat
        actual[f"{corner}_regr"] = maps.offset
        actual[f"{corner}_tag"] = maps.embedding
    for name, value in actual.items():
        assert case.fixture.compare(name, value) < RAW_TOLERANCE, name
    statistics = torch.stack(
        [
            torch.stack([maps.heat.mean((2, 3)), maps.heat.std((2, 3), unbiased=False)], dim=-1)
            for maps in case.raw
        ]
    )
    assert case.fixture.compare("heat_channel_mean_std", statistics) < RAW_TOLERANCE


def test_pairs(case: Case) -> None:
    """The recorded rows are in pixels of the image: the published code scales its array in place."""
    expected = case.fixture.expected["decoded"]
    rows = image_rows(case.rows, case.canvas, case.model.stride)[:, :8]
    np.testing.assert_allclose(rows, expected[:, 1:], atol=5e-3, rtol=1e-4)
    keep = (case.rows[..., 4] > -1).sum(dim=1)
    assert keep.tolist() == [(expected[:, 0] == i).sum() for i in range(2)]


def test_detections(case: Case) -> None:
    rows = image_rows(case.rows, case.canvas, case.model.stride)
    expected = case.fixture.expected["before_soft_nms"]
    assert_detections(rows[:, [7, 0, 1, 2, 3, 4]].numpy(), expected[:, :6])
    # Whether soft-NMS drops a box depends on the order of its array.
    order = np.argsort(rows[:, 7].numpy(), kind="stable")
    np.testing.assert_allclose(rows[order, :4], expected[:, 1:5], atol=0.05)
    detections = suppress(rows, case.model.suppression)[:, [7, 0, 1, 2, 3, 4]]
    assert_detections(detections.numpy(), case.fixture.expected["detections"])


def test_model_gives_these_detections(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the image to instances; the network's output is taken from before."""
    monkeypatch.setattr(case.model.network, "forward", lambda images: case.raw)
    result = case.model([{"image": case.image, "height": 360, "width": 300}])[0]["instances"]
    boxes = result.pred_boxes.tensor.clone()
    boxes[:, 1::2] /= 2
    columns = [result.pred_classes[:, None], boxes, result.scores[:, None]]
    assert_detections(torch.cat(columns, 1).numpy(), case.fixture.expected["detections"])
    assert (result.scores.diff() <= 0).all()
    assert result.embedding_distances.max() <= 0.5


def test_network_losses_and_gradients(case: Case) -> None:
    fixture, model = case.fixture, case.model
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    network = model.network
    published = {
        "grad_pre_0_conv_weight": network.backbone.stem[0].conv.weight,
        "grad_tl_cnvs_0_p1_conv1_bn_weight": (
            network.head.top_left[0].pooling.vertical.conv.norm.weight
        ),
        "grad_br_cnvs_1_p2_conv1_bn_weight": (
            network.head.bottom_right[1].pooling.horizontal.conv.norm.weight
        ),
    }
    for parameter in published.values():
        parameter.requires_grad_(True)
    images, targets = model.training_batch(squared_inputs(fixture, (1, 2), 255))
    model.head.training = True  # of every stack; norms stay as they are
    stacks = network(images)
    model.head.training = False
    compare_terms(fixture, model.criterion, stacks, targets, "offset", prefix="loss_")
    total = sum(model.criterion(stacks, targets).values())
    assert total.item() == pytest.approx(float(fixture.expected["loss_total"]), rel=1e-4)
    total.backward()
    for name, parameter in published.items():
        assert fixture.compare(name, parameter.grad) < GRADIENT_TOLERANCE, name


def test_view_of_the_largest_image() -> None:
    """Quirk: an image as large as the canvas loses its last row and column."""
    from d2ext.testing import tiny_config

    model = build_model(tiny_config("CornerNet"))
    unit = model.backbone.size_divisibility
    image = torch.full((3, 2 * unit - 1, 2 * unit - 2), 7, dtype=torch.uint8)
    canvas = model.canvas(tuple(image.shape[1:]), 1.0)
    (pixels, mirrored) = model.preprocess([{"image": image}]) * model.pixel_std + model.pixel_mean
    assert torch.equal(mirrored, pixels.flip(-1))
    sizes = (2 * unit - 1, 2 * unit - 1), (2 * unit - 1, 2 * unit - 2)
    assert canvas == Canvas(*sizes, scale=1.0, corner=(0, 0))
    expected = torch.zeros_like(pixels)
    expected[:, :-1, :-1] = 7
    torch.testing.assert_close(pixels, expected, atol=1e-4, rtol=0)
