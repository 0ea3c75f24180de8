"""DensePose against the published implementation: heads, predictors, charts, and the whole model."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from d2ext import model_zoo
from d2ext.checkpoint import ConversionError, convert_state_dict
from d2ext.codecs.densepose import ChartPredictions, charts_in_boxes, paste_masks, quantize
from d2ext.data.densepose import DensePoseAnnotations, SurfacePoints
from d2ext.systems.densepose import ChartLoss, DensePoseChartPredictor, DensePoseV1ConvXHead
from d2ext.systems.densepose.exported import SlotNetwork
from d2ext.systems.densepose.roi_heads import build_chart_loss
from d2ext.systems.densepose.targets import DensePoseTargets, encode_targets, select_proposals
from d2ext.tools.convert import read_state_dict, system_of
from tests.reference.fixture import Fixture, draw_image, draw_tensor
from tests.systems.densepose.published import (
    REFERENCE,
    TOLERANCE,
    check_gradients,
    check_losses,
    check_result,
    load,
    proposals,
)

MAPS = ("coarse_segm", "fine_segm", "u", "v")


def _targets(fixture: Fixture, side: int, **options: bool) -> DensePoseTargets:
    masks = options.get("trained_by_masks", False)
    selected = select_proposals(
        proposals(fixture.manifest["inputs"]["targets"], masks=masks),
        num_classes=1,
        iou_threshold=0.7,
        with_masks=masks,
    )
    kind = "with_masks" if masks else "the_filter"
    kind = f"proposals_that_survive_{kind}"
    expected = fixture.manifest["inputs"]["targets"][kind]
    assert [x.proposal_boxes.tensor.tolist() for x in selected] == expected
    return encode_targets(selected, side, **options)


def _check_points(
    fixture: Fixture, targets: DensePoseTargets, predictions: ChartPredictions
) -> None:
    points, valid = targets.points.points, fixture.expected["points.valid"].astype(bool)
    assert not valid.all()
    assert points.person.tolist() == fixture.expected["points.roi"][valid].tolist()
    assert points.parts.tolist() == fixture.expected["points.part"][valid].tolist()
    for name, x in predictions.maps().items():
        expected = fixture.expected.get(f"points.{name}_estimate")
        if expected is not None:
            actual = targets.points.sample(x, points.parts).detach().numpy()
            np.testing.assert_allclose(actual, expected[valid], atol=1e-5, rtol=1e-5)


def test_head_predictor_results_and_losses() -> None:
    fixture = Fixture(REFERENCE / "head_v1convx")
    cfg = model_zoo.get_config("densepose/densepose_rcnn_R_50_FPN_s1x.yaml")
    head = DensePoseV1ConvXHead(256, num_convs=8, channels=512, kernel=3)
    predictor = DensePoseChartPredictor(cfg, 512)
    load(head, fixture, "roi_heads.densepose_head.")
    load(predictor, fixture, "roi_heads.densepose_predictor.")
    with torch.no_grad():
        pooled = head(torch.from_numpy(draw_tensor("roi_features", (4, 256, 28, 28), 0)))
        predictions = predictor(pooled)
    assert fixture.compare("head", pooled) < TOLERANCE
    errors = {name: fixture.compare(name, x) for name, x in predictions.maps().items()}
    assert errors.keys() == set(MAPS) and max(errors.values()) < TOLERANCE, errors

    boxes = torch.tensor(fixture.manifest["inputs"]["result_boxes"])
    results = charts_in_boxes(predictions[:3], boxes)
    for k, result in enumerate(results):
        check_result(fixture, f"result{k}", result)
        expected = fixture.expected[f"result{k}.labels_uv_uint8"].astype(int)
        different = np.abs(quantize(result).numpy() - expected)
        assert different.max() <= 1 and (different > 0).mean() < 1e-3
    masks = paste_masks([r.labels > 0 for r in results], boxes, (200, 200))
    assert np.array_equal(np.packbits(masks, axis=-1), fixture.expected["result_masks"])

    targets = _targets(fixture, 112)
    _check_points(fixture, targets, predictions)
    assert targets.coarse is not None
    assert np.array_equal(targets.coarse, fixture.expected["coarse_target"])
    check_losses(fixture, build_chart_loss(cfg)(predictions, targets))


class ConfidenceCase:
    def __init__(self, name: str, config: str, seed: int) -> None:
        self.fixture = Fixture(REFERENCE / name)
        cfg = model_zoo.get_config(f"densepose/densepose_rcnn_R_50_FPN_{config}_s1x.yaml")
        self.channels = self.fixture.manifest["inputs"]["config"]["NUM_COARSE_SEGM_CHANNELS"]
        cfg.MODEL.ROI_DENSEPOSE_HEAD.NUM_COARSE_SEGM_CHANNELS = self.channels
        self.loss = build_chart_loss(cfg)
        self.predictor: nn.Module = DensePoseChartPredictor(cfg, 64)
        load(self.predictor, self.fixture, "roi_heads.densepose_predictor.")
        features = draw_tensor("head_features", (5, 64, 8, 8), seed)
        self.features = torch.from_numpy(features).requires_grad_()
        self.annotated = self.fixture.manifest["inputs"]["targets"]["roi_index_of_the_annotated"]

    def check(self, features: torch.Tensor, targets: DensePoseTargets, prefix: str) -> None:
        """Losses and gradients of regions."""
        losses = self.loss(self.predictor(features), targets)
        check_losses(self.fixture, losses, prefix)
        prefixed = {
            f"roi_heads.densepose_predictor.{name}": x
            for name, x in self.predictor.named_parameters()
        }
        total = sum(losses.values(), torch.zeros(()))
        check_gradients(self.fixture, total, {**prefixed, "head_features": features}, prefix)


@pytest.mark.parametrize(
    ("name", "config", "seed"),
    [
        ("confidences_iid", "WC1", 11),
        ("confidences_aniso", "WC2", 13),
        ("confidences_segm", "WC1M", 15),
    ],
)
def test_confidences(name: str, config: str, seed: int) -> None:
    case = ConfidenceCase(name, config, seed)
    fixture = case.fixture
    predictions = case.predictor(case.features)
    errors = {k: fixture.compare(k, x.detach()) for k, x in predictions.maps().items()}
    assert max(errors.values()) < TOLERANCE, errors
    boxes = torch.tensor(fixture.manifest["inputs"]["result_boxes"])
    for k, result in enumerate(charts_in_boxes(predictions[:3], boxes)):
        check_result(fixture, f"result{k}", result)

    targets = _targets(fixture, 32)
    annotated = case.features[case.annotated].detach().requires_grad_()
    _check_points(fixture, targets, case.predictor(annotated))
    case.check(annotated, targets, "")
    background = targets.points.points._replace(parts=torch.zeros_like(targets.points.points.parts))
    points = targets.points._replace(points=background)
    case.check(annotated, targets._replace(points=points), "all_background.")


def test_coarse_segmentation_trained_by_masks() -> None:
    case = ConfidenceCase("confidences_segm", "WC1M", 15)
    targets = _targets(case.fixture, 32, trained_by_masks=True)
    assert targets.coarse is not None
    assert np.array_equal(targets.coarse, case.fixture.expected["mask_trained.coarse_target"])
    case.check(case.features, targets, "mask_trained.")


def test_a_person_without_mask_leaves_the_coarse_segmentation_untrained() -> None:
    point = SurfacePoints([100.0], [100.0], [3], [0.5], [0.5])
    person = Instances((50, 50), gt_densepose=DensePoseAnnotations([point, point._replace(mask=1)]))
    person.proposal_boxes = person.gt_boxes = Boxes(torch.tensor([[10.0, 10.0, 40.0, 40.0]] * 2))
    predictions = ChartPredictions(*(torch.ones(2, c, 8, 8) for c in (2, 25, 25, 25)))
    losses = ChartLoss()(predictions, encode_targets([person], 8))
    assert float(losses["loss_densepose_S"]) == 0
    assert float(losses["loss_densepose_I"]) > 0
    losses = ChartLoss()(predictions[1:], encode_targets([person[1:]], 8))
    assert float(losses["loss_densepose_S"]) > 0


def test_points_on_a_mesh_alone_do_not_train_charts() -> None:
    charts = SurfacePoints([100.0], [100.0], [3], [0.5], [0.25])
    mesh = SurfacePoints([50.0], [80.0], vertices=[2], mesh="cow")
    persons = DensePoseAnnotations([charts, mesh])
    x = Instances((50, 50), gt_densepose=persons)
    x.proposal_boxes = x.gt_boxes = Boxes(torch.tensor([[10.0, 10.0, 40.0, 40.0]] * 2))
    predictions = ChartPredictions(*(torch.zeros(2, c, 8, 8) for c in (2, 25, 25, 25)))
    losses = ChartLoss()(predictions, encode_targets([x], 8))
    # One point: smooth L1 of 0.5 and of 0.25, and 25 parts that are all as likely.
    assert float(losses["loss_densepose_U"]) == pytest.approx(0.01 * 0.5**2 / 2)
    assert float(losses["loss_densepose_V"]) == pytest.approx(0.01 * 0.25**2 / 2)
    assert float(losses["loss_densepose_I"]) == pytest.approx(np.log(25), rel=1e-5)


def test_parts_of_all_pixels_of_the_masks() -> None:
    """All 25 fine parts as likely, those of the right half less: the torso is two of them."""
    mask = np.zeros((256, 256), np.uint8)
    mask[:, :120] = 1
    person = SurfacePoints([100.0], [100.0], [3], [0.5], [0.5], mask=mask)
    x = Instances((50, 50), gt_densepose=DensePoseAnnotations([person]))
    x.proposal_boxes = x.gt_boxes = Boxes(torch.tensor([[10.0, 10.0, 40.0, 40.0]]))
    fine = torch.zeros(1, 25, 8, 8)
    fine[:, 1:, :, 4:] = -20
    predictions = ChartPredictions(torch.zeros(1, 15, 8, 8), fine, fine, fine)
    targets = encode_targets([x], 8)
    points, both = (ChartLoss(part_mask_weight=w)(predictions, targets) for w in (0.0, 3.0))
    difference = both["loss_densepose_I"] - points["loss_densepose_I"]
    assert float(difference) == pytest.approx(3 * np.log(25 / 2) / 2, rel=1e-4)


def test_the_coarse_segmentation_of_two_channels_and_its_weight_of_the_background() -> None:
    mask = np.zeros((256, 256), np.uint8)
    mask[:, 128:] = 7
    person = SurfacePoints([100.0], [100.0], [3], [0.5], [0.5], mask=mask)
    x = Instances((50, 50), gt_densepose=DensePoseAnnotations([person]))
    x.proposal_boxes = x.gt_boxes = Boxes(torch.tensor([[10.0, 10.0, 40.0, 40.0]]))
    targets = encode_targets([x], 8)
    coarse = torch.tensor([1.0, 3.0]).view(1, 2, 1, 1).expand(1, 2, 8, 8)
    fine = torch.zeros(1, 25, 8, 8)
    predictions = ChartPredictions(coarse, fine, fine, fine)
    # Halves of person and background, whose logits are 3 and 1.
    person_loss, background_loss = np.log1p(np.exp(-2)), np.log1p(np.exp(2))
    for weight in (1.0, 0.25):
        losses = ChartLoss(coarse_weight=2.0, background_weight=weight)(predictions, targets)
        expected = 2 * (person_loss + weight * background_loss) / (1 + weight)
        assert float(losses["loss_densepose_S"]) == pytest.approx(expected, rel=1e-5)


def test_losses_are_by_default_the_published_recipe_s() -> None:
    cfg = model_zoo.get_config("densepose/densepose_rcnn_R_50_FPN_s1x.yaml")
    assert build_chart_loss(cfg) == ChartLoss()


class Case:
    """The fixture, the model with its weights, and the features of the fixture's image."""

    def __init__(self) -> None:
        self.fixture = Fixture(REFERENCE / "model_r50_fpn")
        self.cfg = model_zoo.get_config("densepose/densepose_rcnn_R_50_FPN_s1x.yaml")
        options = self.fixture.manifest["inputs"]["config"]["overrides"]
        self.cfg.merge_from_list(["MODEL.DEVICE", "cpu", *options])
        self.model = build_model(self.cfg).eval()
        weights = {k: torch.from_numpy(v) for k, v in self.fixture.state_dict().items()}
        self.names = weights.keys()
        self.model.load_state_dict(convert_state_dict("densepose", weights), strict=True)
        drawn = self.fixture.manifest["inputs"]["image"]
        image = draw_image(drawn["height"], drawn["width"], drawn["seed"]).transpose(2, 0, 1)
        self.inputs = [{"image": torch.from_numpy(image.astype(np.float32))}]
        with torch.no_grad():
            self.images = self.model.preprocess_image(self.inputs)
            self.features: dict[str, Tensor] = self.model.backbone(self.images.tensor)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


@torch.no_grad()
def test_stages_and_given_boxes(case: Case) -> None:
    heads, actual = case.model.roi_heads, {"padded_input": case.images.tensor, **case.features}
    (actual["decoder"],) = heads.maps(case.features)
    given = Instances(case.images.image_sizes[0])
    given.pred_boxes = Boxes(case.fixture.manifest["inputs"]["given_boxes"])
    given.pred_classes = torch.zeros(3, dtype=torch.int64)
    actual["given.pooled"] = heads.densepose_pooler([actual["decoder"]], [given.pred_boxes])
    actual["given.head"] = heads.densepose_head(actual["given.pooled"])
    (result,) = heads.forward_with_given_boxes(case.features, [given])
    actual |= {f"given.{name}": x for name, x in result.pred_densepose.maps().items()}
    errors = {name: case.fixture.compare(name, x) for name, x in actual.items()}
    assert len(errors) == 13 and max(errors.values()) < TOLERANCE, errors


@torch.no_grad()
def test_detections(case: Case) -> None:
    heads, expected = case.model.roi_heads, case.fixture.expected
    proposed, _ = case.model.proposal_generator(case.images, case.features, None)
    assert case.fixture.compare("proposals", proposed[0].proposal_boxes.tensor) < TOLERANCE
    heads.densepose_on = False
    ((found,), _) = heads(case.images, case.features, proposed)
    heads.densepose_on = True
    np.testing.assert_allclose(found.pred_boxes.tensor, expected["detections.boxes"], atol=0.01)
    np.testing.assert_allclose(found.scores, expected["detections.scores"], atol=1e-4)
    assert found.pred_classes.tolist() == expected["detections.classes"].tolist()
    # Three of the eight, one of a single row; the others would take seconds.
    rows = torch.tensor([0, 3, 5])
    (found,) = heads.forward_with_given_boxes(case.features, [found[rows]])
    for name, x in found.pred_densepose.maps().items():
        step = case.fixture.manifest["outputs"][f"detections.{name}"]["slice"][-1][-1]
        torch.testing.assert_close(
            x[:, :, ::step, ::step],
            torch.from_numpy(expected[f"detections.{name}"])[rows],
            atol=1e-4,
            rtol=1e-4,
        )
    # Boxes of the published run: a box that is rounded otherwise has other pixels.
    boxes = torch.from_numpy(expected["detections.boxes"])[rows]
    results = charts_in_boxes(found.pred_densepose, boxes)
    for k, result in zip(rows.tolist(), results, strict=True):
        different = quantize(result).numpy() != expected[f"detections.labels_uv_uint8.{k}"]
        assert different.mean() < 1e-3, k
    masks = np.packbits(
        paste_masks([r.labels > 0 for r in results], boxes, found.image_size), axis=-1
    )
    assert np.array_equal(masks, expected["detections.masks"][rows])


@torch.no_grad()
def test_detections_in_slots(case: Case) -> None:
    """What exported files find."""
    expected = case.fixture.expected
    sizes = torch.tensor(case.images.image_sizes).float()
    slots = SlotNetwork(case.model).detect(case.features, sizes)
    count = int(slots.counts)
    assert slots.boxes.shape[1] == case.cfg.TEST.DETECTIONS_PER_IMAGE
    assert slots.classes[0, :count].tolist() == expected["detections.classes"].tolist()
    np.testing.assert_allclose(slots.boxes[0, :count], expected["detections.boxes"], atol=0.01)
    np.testing.assert_allclose(slots.scores[0, :count], expected["detections.scores"], atol=1e-4)


def test_losses_of_the_branch(case: Case) -> None:
    given = proposals(case.fixture.manifest["inputs"]["targets"])
    with torch.no_grad():
        losses = case.model.roi_heads.densepose_losses(case.features, given)
    check_losses(case.fixture, losses)


def test_published_files_convert(case: Case, tmp_path: Path) -> None:
    """A pickle of arrays, as in Detectron2's model zoo, with what old files have besides."""
    arrays: dict[str, Any] = {name: np.float32([i]) for i, name in enumerate(case.names)}
    arrays["pixel_mean"] = arrays["pixel_std"] = np.zeros((3, 1, 1), np.float32)
    arrays["proposal_generator.anchor_generator.cell_anchors.0"] = np.zeros((3, 4), np.float32)
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2"}))
    assert system_of(case.cfg) == "densepose"
    published = read_state_dict(str(path))
    converted = convert_state_dict("densepose", published)
    assert converted.keys() == case.names == case.model.state_dict().keys()
    assert all(torch.equal(converted[name], published[name]) for name in case.names)
    with pytest.raises(ConversionError, match="another system"):
        convert_state_dict("densepose", {"backbone.fpn_lateral2.weight": torch.zeros(1)})
    with pytest.raises(ConversionError, match="not known"):
        convert_state_dict("densepose", {**converted, "roi_heads.mask.weight": torch.zeros(1)})
