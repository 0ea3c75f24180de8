"""UPSNet against the published implementation: the fixtures in tests/reference/upsnet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn import functional as F

from d2ext import model_zoo
from d2ext.checkpoint import convert_state_dict
from d2ext.data import build_train_loader
from d2ext.data.custom import apply_dataset_to_config, register_own_dataset
from d2ext.modeling.region_slots import select
from d2ext.systems.upsnet import losses as L
from d2ext.systems.upsnet import targets as T
from d2ext.systems.upsnet.boxes import clip, end_behind, inclusive
from d2ext.systems.upsnet.model import UPSNet
from d2ext.systems.upsnet.panoptic_head import panoptic_logits, predict_panoptic
from d2ext.systems.upsnet.postprocess import PanopticMap, clean, nearest
from tests.reference.fixture import Fixture, draw_image, draw_tensor

REFERENCE = Path(__file__).parents[2] / "reference" / "upsnet"
# DESIGN: raw outputs within 1e-4 relative.
RAW_TOLERANCE = 1e-4
CONFIG = "upsnet/upsnet_R_50_coco.yaml"


def upsample(x: Tensor, factor: int) -> Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def check(fixture: Fixture, outputs: dict[str, Tensor]) -> None:
    for name, value in outputs.items():
        assert fixture.compare(name, value.detach().numpy()) < RAW_TOLERANCE, name


def config(**test: Any) -> CfgNode:
    """The published config with the fixtures' pixel deviation."""
    cfg = model_zoo.get_config(CONFIG)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.PIXEL_STD = [64.0, 64.0, 64.0]
    cfg.MODEL.UPSNET.TEST.update({"MIN_SIZE": 0, **test})
    return cfg


def build(fixture: Fixture, cfg: CfgNode) -> UPSNet:
    """The model with the fixture's weights."""
    model: UPSNet = build_model(cfg)
    published = {k: torch.from_numpy(v) for k, v in fixture.state_dict().items()}
    model.load_state_dict(convert_state_dict("upsnet", published), strict=True)
    return model


# ---------------------------------------------------------------- panoptic head alone


class HeadCase:
    """The inputs of the fixture ``panoptic_head``."""

    def __init__(self) -> None:
        self.fixture = Fixture(REFERENCE / "panoptic_head")
        self.expected = self.fixture.expected
        self.inputs = self.fixture.manifest["inputs"]
        instances = torch.tensor(self.inputs["instances"])
        self.boxes, self.scores = instances[:, :4], instances[:, 5]
        self.classes = instances[:, 4].long() - 1
        score = 3 * upsample(torch.from_numpy(draw_tensor("semantic", (1, 19, 6, 8), 0)), 4)[0]
        for x1, y1, x2, y2, kind, *_ in self.inputs["instances"]:
            rows = slice(round(y1 / 4), round(y2 / 4) + 1)
            columns = slice(round(x1 / 4), round(x2 / 4) + 1)
            score[10 + int(kind), rows, columns] += 2.5
        self.score = score
        noise = torch.from_numpy(draw_tensor("mask_logits", (12, 1, 7, 7), 0))
        self.masks = 1.5 * upsample(noise, 4)[:, 0] + instances[:, 6, None, None]
        self.size = tuple(self.inputs["image_size"])


@pytest.fixture(scope="module")
def head_case() -> HeadCase:
    return HeadCase()


def as_published(target: Tensor) -> np.ndarray:
    return torch.where(target == T.NO_TARGET, 255, target).numpy()


def void_as_255(labels: Tensor, channels: int) -> np.ndarray:
    return torch.where(labels == channels, 255, labels).numpy()


@pytest.mark.parametrize("unknown", [True, False])
@pytest.mark.parametrize("case", ["test", "nothing_detected", "all_masks_empty"])
def test_panoptic_map(head_case: HeadCase, case: str, unknown: bool) -> None:
    used = {"test": slice(None), "nothing_detected": slice(0), "all_masks_empty": slice(3)}[case]
    masks = torch.full_like(head_case.masks, -1.0) if case == "all_masks_empty" else head_case.masks
    result = predict_panoptic(
        head_case.score,
        head_case.boxes[used],
        head_case.classes[used],
        head_case.scores[used],
        masks[used],
        head_case.size,
        num_stuff=11,
        overlap_fraction=0.3,
        unknown=unknown,
    )
    expected = head_case.expected
    np.testing.assert_array_equal(result.keep, expected[f"{case}.keep"])
    name = f"{case}.map" + ("" if unknown else "_without_void")
    labels = void_as_255(result.labels, 11 + len(result.keep))
    np.testing.assert_array_equal(labels, expected[name][0])
    np.testing.assert_array_equal(result.semantic, expected["test.semantic_argmax"][0])


def test_panoptic_logits_at_inference_and_in_training(head_case: HeadCase) -> None:
    for case, indices, semantic, scale in (
        ("test", "keep", upsample(head_case.score[None], 4)[0], 1),
        ("train", "keep_inds", head_case.score, 4),
    ):
        keep = torch.from_numpy(head_case.expected[f"{case}.{indices}"]).long()
        logits = panoptic_logits(
            semantic,
            head_case.boxes[keep] / scale,
            head_case.classes[keep],
            head_case.masks[keep],
            num_stuff=11,
        )
        assert logits.unknown is not None
        outputs = {
            "logits": logits.joined,
            "mask_energy": logits.mask,
            "semantic_instance_logits": logits.semantic,
            "void_logit": logits.unknown,
        }
        check(head_case.fixture, {f"{case}.{k}": v[None] for k, v in outputs.items()})


@pytest.mark.parametrize("drop", [True, False])
def test_panoptic_target_and_loss(head_case: HeadCase, drop: bool) -> None:
    expected = head_case.expected
    labels = torch.from_numpy(expected["train.semantic_label"]).long()
    masks = torch.from_numpy(expected["train.masks"])
    keep = torch.from_numpy(expected["train.keep_inds"]).long() if drop else torch.arange(12)
    target = T.panoptic_target(labels, masks[keep], 11, unknown=drop)
    name = "train.target" if drop else "train.target_without_drop"
    np.testing.assert_array_equal(as_published(target), expected[name][0])
    logits = panoptic_logits(
        head_case.score,
        head_case.boxes[keep] / 4,
        head_case.classes[keep],
        head_case.masks[keep],
        num_stuff=11,
        unknown=drop,
    )
    loss = float(L.panoptic_loss(logits.joined, target))
    name = "train.loss" if drop else "train.loss_without_drop_or_void"
    assert loss == pytest.approx(float(expected[name]), rel=1e-5)


def two_channels(
    labels: Tensor, panoptic: PanopticMap, classes: Tensor, *, num_stuff: int
) -> tuple[Tensor, Tensor]:
    """The published result's form: a map of semantic ids and a map of instance numbers.

    Returns:
        (h, w) ids, stuff 0..S-1, things S.., 255 void; (h, w) numbers: 0 for stuff and void, else
        1 + the rank of the instance among those present before the clean-up.
    """
    count = len(classes)
    present = torch.bincount(labels.flatten().long(), minlength=num_stuff + count + 1)
    rank = torch.cumsum(present[num_stuff : num_stuff + count] > 0, dim=0)
    # The last entries serve void, -1.
    ids = torch.cat([torch.arange(num_stuff, device=labels.device), classes + num_stuff])
    ids = torch.cat([ids, ids.new_full((1,), T.IGNORE)])
    numbers = torch.cat([rank.new_zeros(num_stuff), rank, rank.new_zeros(1)])
    return ids[panoptic.labels], numbers[panoptic.labels]


@pytest.mark.parametrize("limit", [0, 150])
def test_clean_up(head_case: HeadCase, limit: int) -> None:
    result = predict_panoptic(
        head_case.score,
        head_case.boxes,
        head_case.classes,
        head_case.scores,
        head_case.masks,
        head_case.size,
        num_stuff=11,
        overlap_fraction=0.3,
    )
    classes = head_case.classes[result.keep]
    cleaned = clean(
        result.labels,
        result.semantic,
        classes,
        num_stuff=11,
        num_classes=19,
        stuff_area_limit=limit,
    )
    ids, numbers = two_channels(result.labels, cleaned, classes, num_stuff=11)
    expected = head_case.expected[f"test.two_channel_limit{limit}"]
    np.testing.assert_array_equal(ids, expected[..., 0])
    np.testing.assert_array_equal(numbers, expected[..., 1])


@pytest.mark.parametrize("name", ["detect", "panoptic_candidates"])
def test_boxes_and_nms(head_case: HeadCase, name: str) -> None:
    expected = head_case.expected
    settings = head_case.inputs["boxes_and_nms"]
    rois = end_behind(torch.from_numpy(expected["detect.rois"][:, 1:]))
    scores = 4 * torch.from_numpy(draw_tensor("cls_score", (60, 9), 0))
    deltas = torch.from_numpy(draw_tensor("bbox_pred", (60, 36), 0))
    # The published background is class 0.
    decoded = Box2BoxTransform((10.0, 10.0, 5.0, 5.0)).apply_deltas(deltas, rois)
    decoded = clip(decoded.unflatten(1, (9, 4))[:, 1:], *settings["clip_to"])
    slots = select(
        decoded[None],
        scores.softmax(1)[None, :, 1:],
        score_threshold=settings[name]["score"],
        nms_threshold=settings[name]["nms"],
        limit=settings[name]["top"],
        across_classes=name != "detect",
    )
    selected = slots.instances(0, int(slots.counts), tuple(settings["clip_to"]))
    match_detections(selected, expected, name)


def match_detections(selected: Instances, expected: dict[str, np.ndarray], name: str) -> None:
    """One to one, in the published order: by class, then score; candidates by score."""
    stem = "panoptic.candidate_" if name == "panoptic" else f"{name}."
    boxes, classes = selected.pred_boxes.tensor, selected.pred_classes.numpy()
    scores = selected.scores.numpy()
    order = np.arange(len(scores))
    if not name.startswith("panoptic"):
        order = np.lexsort((-scores, classes))
    np.testing.assert_array_equal(classes[order] + 1, expected[f"{stem}classes"])
    np.testing.assert_allclose(scores[order], expected[f"{stem}scores"], atol=1e-4)
    published = inclusive(boxes[order]).numpy()
    np.testing.assert_allclose(published, expected[f"{stem}boxes"], atol=0.05)


# ---------------------------------------------------------------- whole model, inference


class InferenceCase:
    """The fixture ``resnet50_coco_inference`` and what our model says of its image."""

    def __init__(self) -> None:
        self.fixture = Fixture(REFERENCE / "resnet50_coco_inference")
        self.expected = self.fixture.expected
        settings = self.fixture.manifest["inputs"]["config"]
        cfg = config(
            SCORE_THRESH=settings["panoptic_score_thresh"],
            STUFF_AREA_LIMIT=settings["panoptic_stuff_area_limit"],
        )
        cfg.MODEL.RPN.PRE_NMS_TOPK_TEST = settings["rpn_pre_nms_top_n"]
        cfg.MODEL.RPN.POST_NMS_TOPK_TEST = settings["rpn_post_nms_top_n"]
        self.model = build(self.fixture, cfg).eval()
        image = self.fixture.manifest["inputs"]["image"]
        height, width, seed = image["height"], image["width"], image["seed"]
        bgr = draw_image(height, width, seed)
        self.inputs = [
            {
                "image": torch.from_numpy(bgr.transpose(2, 0, 1).copy()),
                "height": height,
                "width": width,
            }
        ]
        with torch.no_grad():
            self.images = self.model.preprocess(self.inputs)
            self.predictions = self.model.inference_network(self.images)
            ((self.detections, self.candidates),) = self.model.detect(
                self.predictions, [(height, width)]
            )
            self.score = self.predictions.semantic.score[0]
            self.prediction = self.model.postprocessor.fuse(self.score, self.candidates)


@pytest.fixture(scope="module")
def inference() -> Iterator[InferenceCase]:
    yield InferenceCase()


def test_dense_outputs(inference: InferenceCase) -> None:
    model, predictions = inference.model, inference.predictions
    with torch.no_grad():
        x = inference.images
        stages = model.backbone.bottom_up(x)
        features = [predictions.features[n] for n in model.proposal_generator.in_features]
        logits, deltas = model.proposal_generator.rpn_head(features)
        outputs = {"backbone.pool1": model.backbone.bottom_up.stem(x)}
        head = model.sem_seg_head
        outputs["semantic.offset_p2"] = head.layers[0].offset(predictions.features["p2"])
        for i in range(2, 6):
            outputs[f"semantic.subnet.p{i}"] = head.level_features(predictions.features[f"p{i}"])
    for i in range(2, 6):
        outputs[f"backbone.res{i}"] = stages[f"res{i}"]
    for i in range(2, 7):
        outputs[f"fpn.p{i}"] = predictions.features[f"p{i}"]
        outputs[f"rpn.cls_score.p{i}"] = logits[i - 2]
        outputs[f"rpn.bbox_pred.p{i}"] = deltas[i - 2]
    outputs["semantic.feat"] = predictions.semantic.features
    outputs["semantic.score"] = predictions.semantic.score
    outputs["semantic.logits"] = upsample(predictions.semantic.score, 4)
    check(inference.fixture, outputs)


def test_proposals(inference: InferenceCase) -> None:
    rpn, predictions = inference.model.proposal_generator, inference.predictions
    with torch.no_grad():
        proposals, _ = rpn.propose(predictions, [(250, 310)])
    ours = inclusive(proposals[0].proposal_boxes.tensor)
    np.testing.assert_allclose(ours, inference.expected["rois"][:, 1:], atol=0.05)


def test_box_and_mask_heads(inference: InferenceCase) -> None:
    model, predictions, fixture = inference.model, inference.predictions, inference.fixture
    heads = model.roi_heads
    boxes = end_behind(torch.from_numpy(inference.expected["rois"][:, 1:]))
    with torch.no_grad():
        pooled = heads.box_pooler(
            [predictions.features[f"p{i}"] for i in range(2, 6)], [Boxes(boxes)]
        )
        logits, deltas = heads.predict_boxes(predictions.features, [boxes])
        hidden = heads.box_head(pooled)
    published_logits = torch.cat([logits[:, -1:], logits[:, :-1]], dim=1)
    check(
        fixture,
        {"rcnn.roi_feat": pooled, "rcnn.fc7": hidden, "rcnn.cls_score": published_logits},
    )
    # The background's deltas are dropped.
    expected = inference.expected["rcnn.bbox_pred"][:, 4:]
    error = np.linalg.norm(deltas.flatten(1).numpy() - expected) / np.linalg.norm(expected)
    assert error < RAW_TOLERANCE


def test_detections(inference: InferenceCase) -> None:
    match_detections(inference.detections, inference.expected, "det")
    match_detections(inference.candidates, inference.expected, "panoptic")
    detections = inference.detections
    order = np.lexsort((-detections.scores.numpy(), detections.pred_classes.numpy()))
    check(
        inference.fixture,
        {
            "det.mask_logits": detections.mask_logits[order],
            "panoptic.candidate_mask_logits": inference.candidates.mask_logits,
        },
    )


def test_panoptic_outputs(inference: InferenceCase) -> None:
    expected, prediction = inference.expected, inference.prediction
    candidates = inference.candidates
    np.testing.assert_array_equal(prediction.keep, expected["panoptic.keep"])
    candidates = candidates[prediction.keep]
    classes, scores = candidates.pred_classes, candidates.scores
    np.testing.assert_array_equal(classes + 1, expected["panoptic.classes"])
    np.testing.assert_allclose(scores, expected["panoptic.scores"], atol=1e-4)
    logits = panoptic_logits(
        upsample(inference.score[None], 4)[0],
        inclusive(candidates.pred_boxes.tensor),
        classes,
        candidates.mask_logits,
        num_stuff=53,
    )
    assert logits.unknown is not None
    outputs = {
        "panoptic.mask_energy": logits.mask,
        "panoptic.stuff_logits": logits.stuff,
        "panoptic.seg_inst_logits": logits.semantic,
        "panoptic.void_logit": logits.unknown,
        "panoptic.logits": logits.joined,
    }
    check(inference.fixture, {k: v[None] for k, v in outputs.items()})
    # The fixture's own checks: a change of 1e-6 in the weights moves 1.2e-5 of the pixels.
    labels = void_as_255(prediction.labels, 53 + len(prediction.keep))
    assert (labels != expected["panoptic.map"][0]).mean() < 1e-4
    assert (prediction.semantic.numpy() != expected["semantic.argmax"][0]).mean() < 1e-4
    # Exactly: the arg max of the logits that were just compared.
    np.testing.assert_array_equal(prediction.labels, logits.joined.argmax(dim=0))


def test_cleaned_result_and_segments(inference: InferenceCase) -> None:
    prediction, size = inference.prediction, (250, 310)
    classes = inference.candidates.pred_classes[prediction.keep]
    labels = nearest(prediction.labels, size, size)
    cleaned = clean(
        labels,
        nearest(prediction.semantic, size, size),
        classes,
        num_stuff=53,
        num_classes=133,
        stuff_area_limit=500,
    )
    ids, numbers = two_channels(labels, cleaned, classes, num_stuff=53)
    expected = inference.expected["panoptic.two_channel"]
    assert (ids.numpy() != expected[..., 0]).mean() < 1e-4
    assert (numbers.numpy() != expected[..., 1]).mean() < 1e-4
    # The model's output says the same in Detectron2's terms.
    panoptic, infos = inference.model(inference.inputs)[0]["panoptic_seg"]
    semantic = torch.full(size, 255)
    for info in infos:
        category = info["category_id"] + 53 if info["isthing"] else info["category_id"] - 1
        semantic[panoptic == info["id"]] = category
    np.testing.assert_array_equal(semantic, ids)
    assert {i["id"] for i in infos if i["isthing"]} == set(panoptic[numbers > 0].unique().tolist())


# ---------------------------------------------------------------- whole model, training


def write_training_files(fixture: Fixture, folder: Path) -> dict[str, str]:
    """The image and annotations of ``resnet50_coco_training``: arguments of ``register_own_dataset``."""
    inputs = fixture.manifest["inputs"]
    image = inputs["image"]
    bgr = draw_image(image["height"], image["width"], image["seed"])
    cv2.imwrite(str(folder / "image.png"), bgr)
    labels = fixture.expected["semantic_label"]
    # One segment for each label: number 1 + label; stuff has categories from 101, things from 1.
    segments = [
        {"id": v + 1, "category_id": 101 + v if v < 53 else v - 52, "iscrowd": 0}
        for v in np.unique(labels[labels != T.IGNORE]).tolist()
    ]
    numbers = np.where(labels == T.IGNORE, 0, labels + 1).astype(np.uint8)
    cv2.imwrite(str(folder / "panoptic.png"), np.stack([0 * numbers, 0 * numbers, numbers], 2))
    categories = [{"id": i, "name": f"c{i}", "isthing": int(i <= 80)} for i in range(1, 154)]
    categories = [c for c in categories if c["id"] <= 80 or c["id"] > 100]
    size = {"height": image["height"], "width": image["width"]}
    images = [{"id": 1, "file_name": "image.png", **size}]
    panoptic = [{"image_id": 1, "file_name": "panoptic.png", "segments_info": segments}]
    for name, entries, listed in (
        ("instances", inputs["annotations"], categories[:80]),
        ("panoptic", panoptic, categories),
    ):
        content = {"images": images, "annotations": entries, "categories": listed}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return {
        "train_json": str(folder / "instances.json"),
        "train_images": str(folder),
        "train_panoptic_json": str(folder / "panoptic.json"),
        "train_panoptic_root": str(folder),
    }


class TrainingCase:
    """The fixture ``resnet50_coco_training``: one image with annotations, from files through the
    training loader; our raw outputs."""

    def __init__(self, folder: Path) -> None:
        self.fixture = Fixture(REFERENCE / "resnet50_coco_training")
        self.expected = self.fixture.expected
        cfg = config()
        register_own_dataset("upsnet_fixture", **write_training_files(self.fixture, folder))
        apply_dataset_to_config(cfg, "upsnet_fixture")
        # 1.6 times the file's 160 x 208.
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (256,), 448
        cfg.INPUT.RANDOM_FLIP = "none"
        cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 1, 0
        self.model = build(self.fixture, cfg).train()
        self.batch = next(iter(build_train_loader(cfg)))
        self.images = self.model.preprocess(self.batch)
        (self.targets,) = self.model.encode_targets(self.batch, self.images)
        self.predictions = self.model.network(self.images)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainingCase]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D2EXT_CACHE", str(tmp_path_factory.mktemp("cache")))
        case = TrainingCase(tmp_path_factory.mktemp("coco"))
    yield case
    DatasetCatalog.remove("upsnet_fixture_train")
    MetadataCatalog.remove("upsnet_fixture_train")


def test_training_targets(training: TrainingCase) -> None:
    expected, targets = training.expected, training.targets
    check(training.fixture, {"input.data": training.images})
    padded = training.images.shape[-2:]
    labels = F.pad(targets.semantic, (0, padded[1] - targets.semantic.shape[1]), value=T.IGNORE)
    np.testing.assert_array_equal(labels, expected["target.semantic"][0])
    quarter = T.quarter(targets.semantic, padded)
    np.testing.assert_array_equal(quarter, expected["target.semantic_quarter"][0])
    masks = T.quarter(targets.masks.to(torch.uint8), padded)
    np.testing.assert_array_equal(masks, expected["target.masks_quarter"])
    boxes = inclusive(targets.instances.gt_boxes.tensor, targets.pixel)
    np.testing.assert_array_equal(T.crop_labels(labels, boxes, 28), expected["target.semantic_roi"])
    keep = torch.from_numpy(expected["panoptic.keep_inds"]).long()
    np.testing.assert_allclose(boxes[keep], expected["panoptic.gt_rois"][:, 1:], rtol=1e-5)
    target = T.panoptic_target(quarter, masks[keep], 53, unknown=True)
    np.testing.assert_array_equal(as_published(target), expected["panoptic.target"][0])
    rois = Instances(targets.instances.image_size)
    rois.proposal_boxes = Boxes(end_behind(torch.from_numpy(expected["mask.rois"][:, 1:])))
    mask_targets = training.model.roi_heads.mask_targets(rois, targets, 28)
    np.testing.assert_array_equal(mask_targets, expected["mask.targets"])


def test_resize_in_inference(training: TrainingCase) -> None:
    """The model's own resize of a test image gives the published network input, too."""
    image = training.fixture.manifest["inputs"]["image"]
    bgr = draw_image(image["height"], image["width"], image["seed"])
    model = training.model.eval()
    model.min_size = 256
    try:
        inputs = [{"image": torch.from_numpy(bgr.transpose(2, 0, 1).copy())}]
        check(training.fixture, {"input.data": model.preprocess(inputs)})
    finally:
        model.min_size = 0
        model.train()


def _stored_rpn(training: TrainingCase) -> tuple[Tensor, Tensor]:
    """Labels (A,) and box targets (A, 4) of the fixture, in our order of the anchors."""
    labels, boxes = [], []
    for stride in (4, 8, 16, 32, 64):
        label = training.expected[f"rpn.labels.s{stride}"][0]
        box = training.expected[f"rpn.bbox_targets.s{stride}"][0]
        labels.append(label.transpose(1, 2, 0).reshape(-1))
        boxes.append(box.reshape(3, 4, *box.shape[1:]).transpose(2, 3, 0, 1).reshape(-1, 4))
    return (
        torch.from_numpy(np.concatenate(labels)).long(),
        torch.from_numpy(np.concatenate(boxes)),
    )


def test_anchor_labels(training: TrainingCase) -> None:
    """Our drawing differs; what may be drawn, and the targets, do not."""
    rpn = training.model.proposal_generator
    anchors = rpn.anchor_generator([training.predictions.features[f"p{i}"] for i in range(2, 7)])
    stored, targets = _stored_rpn(training)
    rpn.batch_size_per_image, size = 10**6, rpn.batch_size_per_image
    try:
        labels, _ = rpn.label_and_sample_anchors(anchors, [training.targets.rpn_instances])
        every = labels[0]
        rpn.batch_size_per_image = 256
        labels, boxes = rpn.label_and_sample_anchors(anchors, [training.targets.rpn_instances])
    finally:
        rpn.batch_size_per_image = size
    # Too few candidates for a million: no negatives, all positives.
    assert set(every.unique().tolist()) == {-1, 1}
    positive = stored == 1
    # A positive that the published drawing made negative is missing there.
    assert positive[every != 1].sum() == 0
    assert ((every == 1) & (stored == -1)).sum() == 0
    assert int((labels[0] >= 0).sum()) == int((stored >= 0).sum()) == 256
    deltas = rpn.box2box_transform.get_deltas(
        torch.cat([x.tensor for x in anchors])[positive], boxes[0][positive]
    )
    np.testing.assert_allclose(deltas, targets[positive], atol=1e-5)


def test_region_sampling(training: TrainingCase) -> None:
    """The stored regions, offered as proposals, get the stored classes and targets."""
    expected = training.expected
    rois = torch.from_numpy(expected["rcnn.rois"][:, 1:])
    heads = training.model.roi_heads
    proposals = Instances((256, 333), proposal_boxes=Boxes(end_behind(rois)))
    sampled = heads.sample(proposals, training.targets)
    ours = {
        tuple(np.round(b, 2)): i
        for i, b in enumerate(inclusive(sampled.proposal_boxes.tensor).tolist())
    }
    published = (expected["rcnn.labels"] - 1) % 81
    published[published == 80] = 80
    compared = 0
    for i, box in enumerate(rois.tolist()):
        j = ours.get(tuple(np.round(box, 2)))
        if j is None:
            continue
        compared += 1
        assert int(sampled.gt_classes[j]) == int(published[i])
        if published[i] < 80:
            target = expected["rcnn.bbox_targets"][i]
            np.testing.assert_allclose(sampled.gt_deltas[j], target, atol=1e-4)
    assert compared > 400
    # Positives: the objects, and a proposal matched to the crowd, whose own box is not among them.
    crowd = training.targets.crowd_boxes[0]
    assert (
        not (inclusive(sampled.proposal_boxes.tensor) - inclusive(crowd, 1.6))
        .abs()
        .amax(1)
        .lt(0.1)
        .any()
    )


def test_losses_and_gradients(training: TrainingCase, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, model = training.expected, training.model
    labels, targets = _stored_rpn(training)
    rpn, heads = model.proposal_generator, model.roi_heads
    anchors = rpn.anchor_generator([training.predictions.features[f"p{i}"] for i in range(2, 7)])
    every = torch.cat([x.tensor for x in anchors])
    boxes = rpn.box2box_transform.apply_deltas(targets, every)
    rois = end_behind(torch.from_numpy(expected["rcnn.rois"][:, 1:]))
    classes = torch.from_numpy(expected["rcnn.labels"]).long()
    regions = Instances(
        (256, 333),
        proposal_boxes=Boxes(rois),
        gt_classes=torch.where(classes == 0, 80, classes - 1),
        gt_deltas=torch.from_numpy(expected["rcnn.bbox_targets"]),
    )
    keep = torch.from_numpy(expected["panoptic.keep_inds"]).long()
    # What the published code drew at random.
    monkeypatch.setattr(rpn, "label_and_sample_anchors", lambda *_: ([labels], [boxes]))
    monkeypatch.setattr(heads, "sample", lambda *_: regions)
    monkeypatch.setattr(model, "sample_instances", lambda _: keep)
    model.zero_grad()
    losses = model.losses(training.predictions, [training.targets])

    names = training.fixture.manifest["inputs"]["losses"]
    published = dict(zip(names, expected["losses"].tolist(), strict=True))
    ours = {
        "loss_rpn_cls": published["rpn_cls_loss"],
        "loss_rpn_loc": published["rpn_bbox_loss"],
        "loss_cls": published["cls_loss"],
        "loss_box_reg": published["bbox_loss"],
        "loss_mask": published["mask_loss"],
        "loss_sem_seg": 0.2 * published["fcn_loss"],
        "loss_sem_seg_roi": 0.04 * published["fcn_roi_loss"],
        "loss_panoptic": 0.1 * published["panoptic_loss"],
    }
    assert {k: float(v) for k, v in losses.items()} == pytest.approx(ours, rel=1e-4)
    total = sum(losses.values())
    assert float(total) == pytest.approx(published["total"], rel=1e-4)

    total.backward()
    renamed = _published_to_ours(training.fixture)
    parameters = dict(model.named_parameters())
    for name, norm in zip(
        training.fixture.manifest["inputs"]["grad_norms_of"], expected["grad_norms"], strict=True
    ):
        parameter = parameters.get(renamed[name])
        if norm < 0:  # frozen
            assert parameter is None or parameter.grad is None, name
            continue
        assert parameter is not None and parameter.grad is not None, name
        assert float(parameter.grad.norm()) == pytest.approx(float(norm), rel=1e-3), name


def _published_to_ours(fixture: Fixture) -> dict[str, str]:
    """Which published name became which of ours, told by values that differ."""
    tagged = {}
    for i, (name, shape) in enumerate(fixture.manifest["parameters"]):
        tagged[name] = torch.full((shape[0] if shape else 1,), float(i))
    converted = convert_state_dict("upsnet", tagged)
    by_value = {float(v[0]): k for k, v in converted.items()}
    return {n: by_value[float(v[0])] for n, v in tagged.items() if float(v[0]) in by_value}


def test_raw_outputs_in_training(training: TrainingCase) -> None:
    """Raw outputs of the training pass."""
    predictions, fixture, model = training.predictions, training.fixture, training.model
    logits, deltas = model.proposal_generator.rpn_head(
        [predictions.features[n] for n in model.proposal_generator.in_features]
    )
    outputs = {"semantic.score": predictions.semantic.score}
    for i, stride in enumerate((4, 8, 16, 32, 64)):
        outputs[f"rpn.cls_score.s{stride}"] = logits[i]
        outputs[f"rpn.bbox_pred.s{stride}"] = deltas[i]
    check(fixture, outputs)
