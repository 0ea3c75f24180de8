"""CenterNet with triplets against the published implementation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from d2ext.codecs.canvas import centered
from d2ext.codecs.corners import (
    CornerTargets,
    PointMaps,
    decode_corners,
    decode_points,
    encode_corners,
)
from d2ext.systems.centernet_triplets.head import CascadeCornerPooling, CenterPooling
from d2ext.systems.centernet_triplets.postprocess import (
    confirm_by_centers,
    image_centers,
    rows_of_centers,
)
from d2ext.systems.cornernet.losses import CornerNetCriterion
from d2ext.systems.cornernet.postprocess import (
    SuppressionOptions,
    image_rows,
    rows_of_pairs,
    suppress,
)
from tests.reference import GRADIENT_TOLERANCE
from tests.reference.fixture import Fixture, draw_image, draw_tensor
from tests.systems.corner_cases import assert_detections, build_with_weights, squared_inputs

REFERENCE = Path(__file__).parents[2] / "reference" / "centernet_triplets"
# DESIGN: raw outputs within 1e-4 relative.
RAW_TOLERANCE = 1e-4
KINDS = ("tl", "br", "ct")
# Published parts of the pooling modules and ours.
POOLING_PARTS = {
    "p1_conv1.conv": "vertical.conv",
    "p1_conv1.bn": "vertical.conv.norm",
    "p2_conv1.conv": "horizontal.conv",
    "p2_conv1.bn": "horizontal.conv.norm",
    "p_conv1": "merge",
    "p_bn1": "merge.norm",
    "conv1": "skip",
    "bn1": "skip.norm",
    "conv2.conv": "output.conv",
    "conv2.bn": "output.conv.norm",
    "look_conv1.conv": "vertical_inward.conv",
    "look_conv1.bn": "vertical_inward.conv.norm",
    "look_conv2.conv": "horizontal_inward.conv",
    "look_conv2.bn": "horizontal_inward.conv.norm",
    "P1_look_conv": "vertical_side",
    "P2_look_conv": "horizontal_side",
}


@pytest.mark.parametrize("kind", KINDS)
def test_pooling_modules(kind: str) -> None:
    fixture = Fixture(REFERENCE / "pooling_modules")
    module = (
        CenterPooling(256, 128, norm="BN")
        if kind == "ct"
        else CascadeCornerPooling(
            256, 128, corner={"tl": "top_left", "br": "bottom_right"}[kind], norm="BN"
        )
    )
    state = {}
    for name, values in fixture.state_dict().items():
        prefix, _, rest = name.partition(".")
        part, _, leaf = rest.rpartition(".")
        if prefix == kind:
            state[f"{POOLING_PARTS[part]}.{leaf}"] = torch.from_numpy(values)
    module.load_state_dict(state, strict=True)
    module.eval()
    seen: dict[str, Tensor] = {}
    watched = {}
    if kind != "ct":
        watched = {
            "p_bn1": module.merge,
            "look_conv1": module.vertical_inward,
            "P1_look_conv": module.vertical_side,
            "P2_look_conv": module.horizontal_side,
        }
    for name, part in watched.items():
        part.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out))
    x = torch.from_numpy(draw_tensor("pool_module_input", (1, 256, 16, 22), 3)).requires_grad_()
    output = module(x)
    output.backward(torch.from_numpy(draw_tensor("pool_module_grad", (1, 256, 16, 22), 3)))
    compared = {"output": output, "grad_input": x.grad, **seen}
    for name, value in compared.items():
        error = fixture.compare(f"{kind}_{name}", value.detach().numpy())
        assert error < RAW_TOLERANCE, name


def compare_terms(
    fixture: Fixture,
    criterion: CornerNetCriterion,
    stacks: list[tuple[PointMaps, ...]],
    targets: CornerTargets,
    prefix: str = "",
) -> None:
    """Unweighted terms of every stack, and the five published values."""
    for s, stack in enumerate(stacks):
        terms = criterion.terms(stack, targets)
        keys = {
            "heat": [f"focal_{kind}_{s}" for kind in KINDS],
            "offset": [f"offset_{kind}_{s}" for kind in KINDS],
            "pull": [f"pull_{s}"],
            "push": [f"push_{s}"],
        }
        for name, recorded in keys.items():
            for key, value in zip(recorded, terms[name], strict=True):
                expected = float(fixture.expected[prefix + key])
                assert value.item() == pytest.approx(expected, rel=1e-4), key
    losses = criterion(stacks, targets)
    for ours, published in (
        ("heat", "focal"),
        ("pull", "pull"),
        ("push", "push"),
        ("offset", "offset"),
    ):
        expected = float(fixture.expected[prefix + published])
        assert losses[f"loss_{ours}"].item() == pytest.approx(expected, rel=1e-4), ours
    expected = float(fixture.expected[f"{prefix}total"])
    assert sum(losses.values()).item() == pytest.approx(expected, rel=1e-4)


def test_losses_of_drawn_maps() -> None:
    fixture = Fixture(REFERENCE / "losses")
    inputs = squared_inputs(fixture, (1, 2), 127)
    targets = encode_corners(
        [x["instances"].gt_boxes.tensor for x in inputs],
        [x["instances"].gt_classes for x in inputs],
        num_classes=5,
        input_size=(127, 127),
        output_size=(32, 32),
        min_overlap=0.7,
        radius_variant="triplets",
        center_divisor=5.0,
    )

    def maps(stack: int, kind: str) -> PointMaps:
        def draw(name: str, channels: int, scale: float, shift: float = 0.0) -> Tensor:
            values = draw_tensor(f"{kind}_{name}_{stack}", (2, channels, 32, 32), 3)
            return (torch.from_numpy(values) * scale + shift).requires_grad_()

        tag = None if kind == "ct" else draw("tag", 1, 0.7)
        return PointMaps(draw("heat", 5, 1.5, -2.0), draw("offset", 2, 0.6), tag)

    stacks = [tuple(maps(s, kind) for kind in KINDS) for s in range(2)]
    criterion = CornerNetCriterion()
    compare_terms(fixture, criterion, stacks, targets)
    sum(criterion(stacks, targets).values()).backward()
    for s, stack in enumerate(stacks):
        for kind, predicted in zip(KINDS, stack, strict=True):
            for name, values in zip(("heat", "offset", "tag"), predicted, strict=True):
                if values is not None:
                    error = fixture.compare(f"grad_{kind}_{name}_{s}", values.grad)
                    assert error < RAW_TOLERANCE, (kind, name, s)


def numbered(rows: Tensor) -> np.ndarray:
    """Rows of both images → batch index, x1, ..., class, without rejected ones."""
    index = torch.arange(len(rows))[:, None, None].expand(-1, rows.shape[1], 1)
    flat = torch.cat([index, rows[..., :8]], dim=2).flatten(0, 1)
    return flat[flat[:, 5] > -1].numpy()


def check_postprocessing(
    fixture: Fixture, boxes: Tensor, centers: Tensor, options: SuppressionOptions
) -> Tensor:
    """Boxes and centres in pixels, through the centre check and soft-NMS; returns the detections."""
    expected = fixture.expected
    passed = confirm_by_centers(boxes, centers)
    before = expected["before_soft_nms"]
    assert_detections(passed[:, [7, 0, 1, 2, 3, 4]].numpy(), before[:, :6])
    # Whether soft-NMS drops a box depends on the order of its array.
    passed_by_class = passed[passed[:, 7].argsort(stable=True)]
    np.testing.assert_allclose(passed_by_class[:, :4], before[:, 1:5], atol=0.05)
    np.testing.assert_allclose(passed_by_class[:, 5:7], before[:, 6:], atol=1e-4)
    detections = suppress(passed, options)
    assert_detections(detections[:, [7, 0, 1, 2, 3, 4]].numpy(), expected["detections"])
    return detections


def test_decoding_of_drawn_maps() -> None:
    fixture = Fixture(REFERENCE / "decode")

    def draw(name: str, channels: int) -> Tensor:
        return torch.from_numpy(draw_tensor(f"decode_{name}_0", (2, channels, 96, 128), 9))

    maps = [
        PointMaps(
            1.5 * draw(f"{kind}_heat", 3) - 2,
            0.5 + 0.2 * draw(f"{kind}_regr", 2),
            None if kind == "ct" else 0.5 * draw(f"{kind}_tag", 1),
        )
        for kind in KINDS
    ]
    rows = rows_of_pairs(decode_corners(*maps[:2], k=70))
    centers = rows_of_centers(decode_points(maps[2], 70))
    canvas = centered((300, 420), (383, 511))
    np.testing.assert_allclose(numbered(rows), fixture.expected["decoded_0"], atol=2e-3, rtol=1e-4)
    # ours: x, y, score, class
    np.testing.assert_allclose(
        centers[..., [0, 1, 3, 2]], fixture.expected["centers_0"], atol=2e-3, rtol=1e-4
    )
    boxes, places = image_rows(rows, canvas, 4, 5.0), image_centers(centers, canvas, 4)
    detections = check_postprocessing(fixture, boxes, places, SuppressionOptions())
    # Each detection's score before soft-NMS is the mean of its three points' scores.
    assert detections.shape[1] == 12
    assert (
        detections[:, 4] <= (detections[:, 5] + detections[:, 6] + detections[:, 11]) / 3 + 1e-5
    ).all()


def test_network() -> None:
    """Raw outputs, detections, losses and gradients of CenterNet-52."""
    fixture = Fixture(REFERENCE / "hourglass52")
    model = build_with_weights(
        "centernet_triplets/centernet_triplets_hourglass52_511.yaml", "centernet_triplets", fixture
    )
    network = model.network
    image = torch.from_numpy(np.ascontiguousarray(draw_image(230, 250, seed=3).transpose(2, 0, 1)))
    seen: dict[str, Tensor] = {}
    heads = network.head
    watched = {
        "stem": network.backbone.stem,
        "hourglass_0": network.backbone.stacks[0],
        "cnv_last": network.backbone.convs[0],
        "tl_cascade_look_1": heads.top_left[0].pooling.vertical_side,
        "tl_pooled": heads.top_left[0].pooling,
        "br_pooled": heads.bottom_right[0].pooling,
        "ct_pooled": heads.center[0].pooling,
    }
    hooks = [
        module.register_forward_hook(
            lambda _m, _i, output, name=name: seen.__setitem__(name, output)
        )
        for name, module in watched.items()
    ]
    with torch.no_grad():
        canvas = model.canvas((230, 250), 1.0)
        batch = model.preprocess([{"image": image}])
        raw = network(batch)
        rows, centers = model._decode(raw)
    for hook in hooks:
        hook.remove()
    actual = {"network_input": batch, **seen}
    for kind, maps in zip(KINDS, raw, strict=True):
        actual[f"{kind}_heat"] = maps.heat
        actual[f"{kind}_regr"] = maps.offset
        if maps.embedding is not None:
            actual[f"{kind}_tag"] = maps.embedding
    for name, value in actual.items():
        assert fixture.compare(name, value) < RAW_TOLERANCE, name
    statistics = torch.stack(
        [
            torch.stack([maps.heat.mean((2, 3)), maps.heat.std((2, 3), unbiased=False)], dim=-1)
            for maps in raw
        ]
    )
    assert fixture.compare("heat_channel_mean_std", statistics) < RAW_TOLERANCE
    boxes, places = image_rows(rows, canvas, 4, 5.0), image_centers(centers, canvas, 4)
    # The published code scales its arrays in place: recorded are pixels of the image.
    np.testing.assert_allclose(
        boxes[:, :8], fixture.expected["decoded"][:, 1:], atol=5e-3, rtol=1e-4
    )
    np.testing.assert_allclose(
        places[:, [0, 1, 3, 2]],
        fixture.expected["centers"].reshape(-1, 4),
        atol=5e-3,
        rtol=1e-4,
    )
    detections = check_postprocessing(fixture, boxes, places, model.suppression)

    # The whole way, with the network's output taken from before.
    forward = network.forward
    network.forward = lambda images: raw
    result = model([{"image": image, "height": 460, "width": 250}])[0]["instances"]
    network.forward = forward
    scale = torch.tensor([1.0, 2.0, 1.0, 2.0])
    torch.testing.assert_close(result.pred_boxes.tensor, detections[:, :4] * scale)
    torch.testing.assert_close(result.scores, detections[:, 4])
    torch.testing.assert_close(result.centers, detections[:, 9:11] * scale[:2])
    torch.testing.assert_close(result.center_scores, detections[:, 11])
    boxes = result.pred_boxes.tensor
    low, high = boxes[:, :2], boxes[:, 2:]
    assert ((result.centers - (low + high) / 2).abs() < (high - low) / 6 + 1e-3).all()

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    published = {
        "grad_pre_0_conv_weight": network.backbone.stem[0].conv.weight,
        "grad_tl_cnvs_0_P1_look_conv_weight": heads.top_left[0].pooling.vertical_side.weight,
        "grad_ct_cnvs_0_p1_conv1_bn_weight": heads.center[0].pooling.vertical.conv.norm.weight,
    }
    for parameter in published.values():
        parameter.requires_grad_(True)
    images, targets = model.training_batch(squared_inputs(fixture, (2, 3), 255))
    model.head.training = True  # of every stack; norms stay as they are
    stacks = network(images)
    compare_terms(fixture, model.criterion, stacks, targets, prefix="loss_")
    sum(model.criterion(stacks, targets).values()).backward()
    for name, parameter in published.items():
        assert fixture.compare(name, parameter.grad) < GRADIENT_TOLERANCE, name
