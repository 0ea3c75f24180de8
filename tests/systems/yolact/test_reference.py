"""YOLACT against the published implementation: the fixtures in tests/reference/yolact."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks

from d2ext import model_zoo
from d2ext.checkpoint import convert_state_dict
from d2ext.codecs.prior_boxes import decode_boxes, mine_negatives
from d2ext.layers import assemble_masks
from d2ext.systems.yolact.model import YOLACT
from d2ext.systems.yolact.postprocess import Detections
from tests.reference.fixture import Fixture, draw_image
from tests.systems.fixture_files import classes, coco_annotation, load_batch, write_coco

REFERENCE = Path(__file__).parents[2] / "reference" / "yolact"
CASES = {
    "resnet50": "yolact/yolact_R_50_550.yaml",
    "plus_resnet50": "yolact/yolact_plus_R_50_550.yaml",
}
# DESIGN: raw outputs within 1e-4 relative.
RAW_TOLERANCE = 1e-4


class Case:
    """A fixture, the model with its weights, and what the model says of the fixture's image."""

    def __init__(self, name: str) -> None:
        self.fixture = Fixture(REFERENCE / name)
        self.cfg = model_zoo.get_config(CASES[name])
        self.cfg.MODEL.DEVICE = "cpu"
        # Frozen batch norms, as when the fixture was recorded.
        self.cfg.SOLVER.IMS_PER_BATCH = 2
        self.model: YOLACT = build_model(self.cfg)
        published = {k: torch.from_numpy(v) for k, v in self.fixture.state_dict().items()}
        self.model.load_state_dict(convert_state_dict("yolact", published), strict=True)
        self.model.eval()
        inputs = self.fixture.manifest["inputs"]
        self.inputs = [self.read(inputs["image"]["draw_image"])]
        with torch.no_grad():
            self.images = self.model.preprocess(self.inputs)
            self.bottom_up = self.model.backbone.bottom_up(self.images)
            self.pyramid = self.model.backbone(self.images)
            self.raw = self.model.head([self.pyramid[f] for f in self.model.network.in_features])
            self.semantic = self.model.head.semantic(self.pyramid["p3"])

    def read(self, image: dict[str, int]) -> dict[str, Any]:
        bgr = draw_image(**image)
        rgb = np.ascontiguousarray(bgr[:, :, ::-1].transpose(2, 0, 1))
        return {"image": torch.from_numpy(rgb), "height": image["height"], "width": image["width"]}

    def detect(self, nms: str, limit: int | None = None) -> Detections:
        """Detections of the image, without the batch dimension and empty slots."""
        self.model.nms = nms
        try:
            fields = self.model._decode(self.raw)[:4]
        finally:
            self.model.nms = "fast"
        found = Detections(*(field[0] for field in fields))
        return Detections(*(field[found.scores >= 0][:limit] for field in found))


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_preprocessing_and_raw_outputs(case: Case) -> None:
    actual = {
        "input": case.images,
        "proto": case.raw.prototypes,
        "head.loc": case.raw.offsets,
        "head.conf_logits": case.raw.logits,
        "head.mask_coeff": case.raw.coefficients,
        "head.segm_logits": case.semantic,
        **{f"backbone.c{i}": case.bottom_up[f"res{i}"] for i in (3, 4, 5)},
        **{f"fpn.p{i}": case.pyramid[f"p{i}"] for i in (3, 4, 5, 6, 7)},
    }
    for name, value in actual.items():
        assert case.fixture.compare(name, value.numpy()) < RAW_TOLERANCE, name


def test_priors_and_decoded_boxes(case: Case) -> None:
    priors = case.model.priors(case.raw.feature_sizes)
    assert case.fixture.compare("priors", priors.numpy()) < 1e-6
    boxes = decode_boxes(case.raw.offsets, priors)[0]
    assert case.fixture.compare("decoded_boxes", boxes.numpy()) < RAW_TOLERANCE


@pytest.mark.parametrize("nms", ["fast", "cross_class_fast", "traditional"])
def test_non_maximum_suppression(case: Case, nms: str) -> None:
    name = {"fast": "fast_nms", "cross_class_fast": "cross_class_fast_nms"}.get(
        nms, "traditional_nms"
    )
    inputs = case.fixture.manifest["inputs"]["postprocessing"]
    found = case.detect(nms)
    assert len(found.scores) == inputs["detections_found_by_each_nms"][name]
    kept = inputs["detections_kept_of_each_nms"][name]
    expected = case.fixture.expected
    np.testing.assert_array_equal(found.classes[:kept], expected[f"{name}.classes"])
    np.testing.assert_allclose(found.scores[:kept], expected[f"{name}.scores"], atol=1e-4)
    np.testing.assert_allclose(found.boxes[:kept], expected[f"{name}.boxes"], atol=0.05 / 640)
    np.testing.assert_allclose(found.coefficients[:kept], expected[f"{name}.mask_coeff"], atol=1e-3)


def test_candidates_above_score_threshold(case: Case) -> None:
    scores = case.raw.logits.softmax(-1)[0, :, 1:].amax(dim=1)
    expected = int(case.fixture.expected["num_above_conf_threshold"])
    assert abs(int((scores > case.model.score_threshold).sum()) - expected) <= 1


def test_final_detections(case: Case) -> None:
    expected = case.fixture.expected
    with torch.no_grad():
        result = case.model(case.inputs)[0]["instances"]
    count = len(expected["final.classes"])
    np.testing.assert_array_equal(result.pred_classes[:count], expected["final.classes"])
    np.testing.assert_allclose(result.scores[:count], expected["final.scores"], atol=1e-4)
    np.testing.assert_allclose(result.pred_boxes.tensor[:count], expected["final.boxes"], atol=0.05)
    masks, reference = result.pred_masks[:count].numpy(), expected["final.masks"].astype(bool)
    union = (masks | reference).sum(axis=(1, 2))
    iou = np.where(union > 0, (masks & reference).sum(axis=(1, 2)) / np.maximum(union, 1), 1.0)
    assert iou.min() >= 0.999, iou
    found = case.detect("fast", count)
    soft = assemble_masks(case.raw.prototypes[0], found.coefficients, found.boxes)
    assert case.fixture.compare("final.mask_probability", soft.numpy()) < RAW_TOLERANCE
    if "final.mask_scores" in expected:
        np.testing.assert_allclose(
            result.mask_scores[:count], expected["final.mask_scores"], atol=1e-4
        )


def test_mask_rescoring(case: Case) -> None:
    if case.model.mask_scorer is None:
        assert "maskiou_net" not in case.fixture.expected
        return
    found = case.detect("fast")
    with torch.no_grad():
        soft = assemble_masks(case.raw.prototypes[0], found.coefficients, found.boxes)
        quality = case.model.mask_scorer(soft)
    assert case.fixture.compare("maskiou_net", quality.numpy()) < RAW_TOLERANCE
    scores = found.scores * quality.gather(1, found.classes[:, None])[:, 0]
    np.testing.assert_allclose(scores, case.fixture.expected["fast_nms.mask_scores"], atol=1e-4)


def object_mask(shape: str, box: list[float], size: int) -> np.ndarray:
    """The fixture's mask rule, in float64 on pixel centres."""
    x1, y1, x2, y2 = box
    centers = (np.arange(size) + 0.5) / size
    x, y = centers[None, :], centers[:, None]
    inside = (x1 <= x) & (x < x2) & (y1 <= y) & (y < y2)
    if shape == "box":
        return inside
    if shape == "triangle":
        return inside & ((x - x1) / (x2 - x1) >= (y - y1) / (y2 - y1))
    assert shape == "ellipse"
    return ((x - (x1 + x2) / 2) / ((x2 - x1) / 2)) ** 2 + (
        (y - (y1 + y2) / 2) / ((y2 - y1) / 2)
    ) ** 2 <= 1


def without_augmentation(cfg: CfgNode) -> CfgNode:
    """A copy whose recipe only resizes."""
    cfg = cfg.clone()
    augmentation = cfg.INPUT.AUGMENTATION
    augmentation.PHOTOMETRIC_PROB = augmentation.EXPAND_PROB = augmentation.FLIP_PROB = 0.0
    augmentation.CROP_ENABLED = False
    return cfg


def object_annotations(
    height: int, width: int, objects: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """COCO's form of a fixture's objects: ``box``, relative to the image, ``cls``, ``crowd``. Masks are
    the boxes, see :func:`set_masks`."""
    annotations = []
    for x in objects:
        box = (np.float64(x["box"]) * [width, height, width, height]).tolist()
        x1, y1, x2, y2 = box
        polygons = [[x1, y1, x2, y1, x2, y2, x1, y2]]
        fields = {"iscrowd": int(x.get("crowd", False)), "segmentation": polygons}
        annotations.append(coco_annotation(box, max(x["cls"], 0), **fields))
    return annotations


def load_objects(
    cfg: CfgNode, folder: Path, images: list[np.ndarray], objects: list[list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """A fixture's batch of images (BGR), from files through the training loader."""
    pairs = zip(images, objects, strict=True)
    annotations = [object_annotations(*image.shape[:2], listed) for image, listed in pairs]
    files = write_coco(folder, images, annotations, classes(80))
    batch = load_batch(without_augmentation(cfg), files)
    for inputs, listed in zip(batch, objects, strict=True):
        set_masks(inputs, listed)
    return batch


def set_masks(inputs: dict[str, Any], objects: list[dict[str, Any]]) -> None:
    """The recorded masks, which are of the network's grid: no file can hold them."""
    size = inputs["image"].shape[-1]
    masks = [object_mask(x["shape"], x["box"], size) for x in objects if not x.get("crowd", False)]
    inputs["instances"].gt_masks = BitMasks(torch.from_numpy(np.stack(masks)))


def test_losses_targets_and_gradients(case: Case, tmp_path: Path) -> None:
    fixture, model = case.fixture, case.model
    expected, recorded = fixture.expected, fixture.manifest["inputs"]
    images = [draw_image(**x["draw_image"]) for x in recorded["loss_batch"]]
    batch = load_objects(case.cfg, tmp_path, images, recorded["loss"]["ground_truth"])
    areas = [x["instances"].gt_masks.tensor.sum(dim=(1, 2)).tolist() for x in batch]
    mask_areas = recorded["loss"]["mask_areas"]
    assert areas == [a[: len(b)] for a, b in zip(mask_areas, areas, strict=True)]

    model.train()
    model.zero_grad()
    ours = dict(model.named_parameters())
    if model.mask_scorer is not None:
        # Deformable convolutions are slow on a CPU: those of res5 stand for all.
        for name, parameter in ours.items():
            parameter.requires_grad_(not re.search(r"bottom_up\.(stem|res[234])", name))
    try:
        images = model.preprocess(batch)
        predictions = model.network(images)
        priors = model.priors(predictions.feature_sizes)
        targets = model.encode_targets(batch, images)
        matches = model.criterion.match(priors, targets)
        losses = model.losses(predictions, targets)
    finally:
        model.eval()

    labels = torch.stack([m.labels for m in matches])
    np.testing.assert_array_equal(labels, expected["target.conf"])
    positives = (labels > 0).nonzero()
    np.testing.assert_array_equal(positives, expected["target.positives"])
    objects = torch.stack([m.objects for m in matches])
    np.testing.assert_array_equal(objects, expected["target.matched_gt"])
    mined = mine_negatives(predictions.logits, labels, 3).nonzero()
    np.testing.assert_array_equal(
        sorted(map(tuple, mined.tolist())),
        sorted(map(tuple, expected["target.ohem_negatives"].tolist())),
    )

    names = {
        "loss_box": "B",
        "loss_class": "C",
        "loss_mask": "M",
        "loss_semantic": "S",
        "loss_mask_iou": "I",
    }
    assert {names[k] for k in losses} == {k[5:] for k in expected if k.startswith("loss.")}
    for key, value in losses.items():
        assert float(value) == pytest.approx(float(expected[f"loss.{names[key]}"]), rel=1e-4), key

    sum(losses.values()).backward()
    published = {name: torch.zeros(()) for name, _ in fixture.manifest["parameters"]}
    renamed = published_to_ours(fixture, "yolact")
    for name, norm in zip(
        fixture.manifest["inputs"]["grad_norms_parameters"], expected["grad_norms"], strict=True
    ):
        assert name in published
        if not ours[renamed[name]].requires_grad:
            continue
        gradient = ours[renamed[name]].grad
        actual = 0.0 if gradient is None else float(gradient.norm())
        assert actual == pytest.approx(float(norm), rel=1e-3, abs=1e-6), name


def published_to_ours(fixture: Fixture, system: str) -> dict[str, str]:
    """Which published name became which of ours, told by the identity of the tensors."""
    tagged = {
        name: torch.full((1,), float(i))
        for i, (name, _) in enumerate(fixture.manifest["parameters"])
    }
    converted = convert_state_dict(system, tagged)
    by_value = {float(v): k for k, v in converted.items()}
    return {name: by_value[float(v)] for name, v in tagged.items() if float(v) in by_value}
