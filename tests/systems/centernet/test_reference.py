"""CenterNet's networks against the published implementation: tests/reference/centernet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from torch import Tensor

from d2ext import model_zoo
from d2ext.checkpoint import convert_state_dict
from d2ext.codecs.heatmaps import draw_gaussians
from d2ext.layers.deform_conv import ModulatedDeformConv
from d2ext.systems.centernet.model import CenterNet
from tests.reference import GRADIENT_TOLERANCE
from tests.reference.fixture import Fixture, draw_image, draw_tensor
from tests.systems.fixture_files import classes, coco_annotation, load_batch, write_coco

REFERENCE = Path(__file__).parents[2] / "reference" / "centernet"
CASES = {
    "resdcn18_ctdet": "centernet/centernet_R_18_dcn_512.yaml",
    "hourglass_ctdet": "centernet/centernet_hourglass104_512.yaml",
}
PUBLISHED = {"heatmap": "hm", "size": "wh", "offset": "reg"}
# DESIGN: raw outputs within 1e-4 relative.
RAW_TOLERANCE = 1e-4


def all_maps(model: CenterNet, features: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Of every stack, as in training; norms stay as they are."""
    model.head.training = True
    maps = model.head([features[name] for name in model.network.in_features])
    model.head.training = False
    return maps


class Case:
    """A fixture, the model with its weights, and what the network says of the fixture's image."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.fixture = Fixture(REFERENCE / name)
        inputs = self.fixture.manifest["inputs"]
        cfg = model_zoo.get_config(CASES[name])
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.CENTERNET.TEST.FLIP = True
        # The fixture's inference has the demo's mean and deviation.
        cfg.MODEL.PIXEL_MEAN = [255 * x for x in inputs["mean_bgr"]]
        cfg.MODEL.PIXEL_STD = [255 * x for x in inputs["std_bgr"]]
        with torch.device("meta"):  # no time for random weights
            self.model: CenterNet = META_ARCH_REGISTRY.get("CenterNet")(cfg)
        self.model.to_empty(device="cpu")
        self.model.pixel_mean.copy_(torch.tensor(cfg.MODEL.PIXEL_MEAN).view(3, 1, 1))
        self.model.pixel_std.copy_(torch.tensor(cfg.MODEL.PIXEL_STD).view(3, 1, 1))
        published = {k: torch.from_numpy(v) for k, v in self.fixture.state_dict().items()}
        self.model.load_state_dict(convert_state_dict("centernet", published), strict=True)
        self.model.eval()
        height, width = (300, 420) if name == "resdcn18_ctdet" else (200, 300)
        self.image = torch.from_numpy(
            draw_image(height, width, seed=3 if name == "resdcn18_ctdet" else 2)
        ).permute(2, 0, 1)
        self.place = self.model.canvas((height, width), 1.0)
        with torch.no_grad():
            self.images = self.model.preprocess([{"image": self.image}])
            self.features = self.model.backbone(self.images)
            self.maps = all_maps(self.model, self.features)


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_input_and_raw_maps(case: Case) -> None:
    fixture = case.fixture
    assert fixture.compare("network_input", case.images) < 1e-6
    for ours, theirs in PUBLISHED.items():
        assert fixture.compare(theirs, case.maps[-1][ours]) < RAW_TOLERANCE, theirs
        if f"{theirs}_stack0" in fixture.expected:
            assert fixture.compare(f"{theirs}_stack0", case.maps[0][ours]) < RAW_TOLERANCE
    heat = case.maps[-1]["heatmap"]
    statistics = torch.stack([heat.mean((2, 3)), heat.std((2, 3), correction=0)], dim=2)
    assert fixture.compare("hm_channel_mean_std", statistics) < 1e-3


def test_intermediate_maps(case: Case) -> None:
    backbone = case.model.backbone
    with torch.no_grad():
        if case.name == "resdcn18_ctdet":
            x = backbone.bottom_up.stem(case.images)
            for i in range(2, 6):
                x = getattr(backbone.bottom_up, f"res{i}")(x)
                assert case.fixture.compare(f"layer{i - 1}", x) < RAW_TOLERANCE
            dcn = backbone.stages[0].reduce.conv
            norm, dcn.norm = dcn.norm, None
            top = backbone.bottom_up(case.images)["res5"]
            assert case.fixture.compare("deconv_0_dcn", dcn(top)) < RAW_TOLERANCE
            dcn.norm = norm
            up = backbone.stages[0].up(backbone.stages[0].reduce(top))
            assert case.fixture.compare("deconv_0_up", up) < RAW_TOLERANCE
            assert case.fixture.compare("deconv_out", case.features["deconv"]) < RAW_TOLERANCE
        else:
            stem = backbone.stem(case.images)
            assert case.fixture.compare("stem", stem) < RAW_TOLERANCE
            for i in range(2):
                name = f"cnv_{i}"
                assert case.fixture.compare(name, case.features[f"stack{i + 1}"]) < RAW_TOLERANCE


def _rows(detections: Any) -> np.ndarray:
    """Detections of one image → x1, y1, x2, y2, score, class."""
    scores, classes = detections.scores[:, None], detections.classes[:, None].float()
    boxes = getattr(detections, "boxes", None)
    boxes = detections.pred_boxes.tensor if boxes is None else boxes
    return torch.cat([boxes, scores, classes], dim=1).numpy()


def _assert_same_detections(actual: np.ndarray, expected: np.ndarray, pixels: float) -> None:
    """One to one: every expected row has its own row of equal class, score and box."""
    assert actual.shape == expected.shape
    free = list(range(len(actual)))
    for row in expected:
        close = [
            i
            for i in free
            if actual[i, 5] == row[5]
            and abs(actual[i, 4] - row[4]) < 1e-4
            and np.abs(actual[i, :4] - row[:4]).max() < pixels
        ]
        assert close, row
        free.remove(close[0])


@pytest.mark.parametrize("flip", [True, False])
def test_detections(case: Case, flip: bool) -> None:
    """Through the whole model: from the image to its pixels."""
    kind = "flip" if flip else "single"
    model, expected = case.model, case.fixture.expected
    model.flip = flip
    try:
        maps = case.maps[-1] if flip else {k: v[:1] for k, v in case.maps[-1].items()}
        boxes, scores, classes, _ = (x[0] for x in model._decode(maps))
        detections = None
        if case.name != "hourglass_ctdet":  # once more through it takes too long
            detections = model([{"image": case.image}])[0]["instances"]
    finally:
        model.flip = True
    rows = torch.cat([boxes, scores[:, None], classes[:, None].float()], dim=1).numpy()
    _assert_same_detections(rows, expected[f"decoded_{kind}"], 0.05 / 4)
    # published: class, box, score
    listed = expected[f"detections_{kind}"]
    listed = np.concatenate([listed[:, 1:6], listed[:, :1]], axis=1)
    rows[:, :4] = case.place.to_image(boxes, 4).numpy()
    _assert_same_detections(rows, listed, 0.05)
    if detections is not None:
        detections.scores, detections.classes = detections.scores, detections.pred_classes
        _assert_same_detections(_rows(detections), listed, 0.05)
        assert (np.diff(detections.scores) <= 0).all()


def _training_inputs(case: Case, folder: Path) -> list[dict[str, Any]]:
    """The picture and its boxes, from files through the loader, at the picture's own resolution."""
    listed = case.fixture.manifest["inputs"]["loss"]["boxes_x1_y1_x2_y2_category"]
    annotations = [coco_annotation(x[:4], int(x[4]) - 1) for x in listed]
    image = case.image.permute(1, 2, 0).numpy()
    cfg = model_zoo.get_config(CASES[case.name])
    augmentation = cfg.INPUT.AUGMENTATION
    augmentation.AFFINE.MODE, augmentation.FLIP_PROB = "keep", 0.0
    augmentation.AFFINE.DIVISIBILITY = case.model.backbone.size_divisibility
    augmentation.COLOR_JITTER = augmentation.LIGHTING = 0.0
    return load_batch(cfg, write_coco(folder, [image], [annotations], classes(80)))


def test_targets_losses_and_gradients(case: Case, tmp_path: Path) -> None:
    model, fixture = case.model, case.fixture
    expected = fixture.expected
    exact = model_zoo.get_config(CASES[case.name]).MODEL
    before = model.pixel_mean.clone(), model.pixel_std.clone()
    model.pixel_mean.copy_(torch.tensor(exact.PIXEL_MEAN).view(3, 1, 1))
    model.pixel_std.copy_(torch.tensor(exact.PIXEL_STD).view(3, 1, 1))
    images, targets = model.training_batch(_training_inputs(case, tmp_path))
    model.pixel_mean.copy_(before[0])
    model.pixel_std.copy_(before[1])
    assert fixture.compare("training_input", images[0]) < 1e-6

    assert fixture.compare("target_hm", targets.heatmap[0]) < 1e-6
    count = len(targets.index[0])
    np.testing.assert_array_equal(targets.index[0], expected["target_ind"][:count])
    np.testing.assert_allclose(targets.size[0], expected["target_wh"][:count], atol=1e-4)
    np.testing.assert_allclose(targets.offset[0], expected["target_reg"][:count], atol=1e-4)
    np.testing.assert_array_equal(targets.mask[0], expected["target_reg_mask"][:count])
    assert expected["target_reg_mask"][count:].sum() == 0

    backbone = model.backbone
    if case.name == "resdcn18_ctdet":
        convs = [stage.reduce.conv for stage in backbone.stages]
        parameters = {
            "grad_conv1_weight": backbone.bottom_up.stem.conv1.weight,
            "grad_deconv_layers_6_conv_offset_mask_bias": convs[1].offset_mask.bias,
            "grad_deconv_layers_12_weight": convs[2].weight,
        }
    else:
        parameters = {"grad_pre_0_conv_weight": backbone.stem[0].conv.weight}
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    stacks = all_maps(model, model.backbone(images))
    losses = model.criterion(stacks, targets)
    terms = [model.criterion.terms(maps, targets) for maps in stacks]
    for ours, theirs in (("heatmap", "hm"), ("size", "wh"), ("offset", "off")):
        mean = sum(t[f"loss_{ours}"].item() for t in terms) / len(terms)
        assert mean == pytest.approx(float(expected[f"loss_{theirs}_loss"]), rel=1e-4), theirs
    total = sum(losses.values())
    assert total.item() == pytest.approx(float(expected["loss_loss"]), rel=1e-4)
    total.backward()
    for name, parameter in parameters.items():
        assert fixture.compare(name, parameter.grad) < GRADIENT_TOLERANCE, name


def test_deformable_convolution() -> None:
    fixture = Fixture(REFERENCE / "dcn_v2")
    published = {k: torch.from_numpy(v) for k, v in fixture.state_dict().items()}
    conv = ModulatedDeformConv(16, 12)
    conv.load_state_dict(
        {k.replace("conv_offset_mask", "offset_mask"): v for k, v in published.items()}
    )
    x = torch.from_numpy(draw_tensor("dcn_input", (2, 16, 11, 14), seed=5)).requires_grad_()
    output = conv(x)
    output.backward(torch.from_numpy(draw_tensor("dcn_grad", (2, 12, 11, 14), seed=5)))
    for name, value in (
        ("output", output.detach()),
        ("offset_and_mask_logits", conv.offset_mask(x).detach()),
        ("grad_input", x.grad),
        ("grad_weight", conv.weight.grad),
        ("grad_bias", conv.bias.grad),
        ("grad_conv_offset_mask_weight", conv.offset_mask.weight.grad),
        ("grad_conv_offset_mask_bias", conv.offset_mask.bias.grad),
    ):
        assert fixture.compare(name, value) < 1e-5, name


def test_the_fixture_maps_have_peaks() -> None:
    """Guards the comparison of targets: an empty map would agree with an empty one."""
    fixture = Fixture(REFERENCE / "resdcn18_ctdet")
    assert (fixture.expected["target_hm"] == 1).sum() == 5
    none = torch.zeros(0, dtype=torch.long)
    assert (
        fixture.compare("target_hm", draw_gaussians((80, 112), 80, none.view(0, 2), none, none))
        == 1
    )
