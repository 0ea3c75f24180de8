"""YOLACT's parts, its config errors and its options."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone, build_model
from detectron2.structures import Boxes, BoxMode, Instances
from torch import nn

from d2ext import model_zoo
from d2ext.evaluation import build_evaluator
from d2ext.systems.yolact.head import MaskScorer
from d2ext.testing import random_inputs, tiny_config

CONFIGS = [name for name in model_zoo.available() if name.startswith("yolact/yolact_")]
# Entries of the published state dicts (yolact/NOTES.md §10), batch norm counters included.
ENTRIES = {
    "yolact/yolact_R_50_550.yaml": 354,
    "yolact/yolact_R_50_550_pascal.yaml": 354,
    "yolact/yolact_R_101_550.yaml": 660,
    "yolact/yolact_darknet53_550.yaml": 348,
    "yolact/yolact_plus_R_50_550.yaml": 405,
    "yolact/yolact_plus_R_101_550.yaml": 705,
    "yolact/yolact_R_101_400.yaml": 660,
    "yolact/yolact_R_101_700.yaml": 660,
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds(name: str) -> None:
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "cpu"
    with torch.device("meta"):
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    if name in ENTRIES:
        assert len(model.state_dict()) == ENTRIES[name]


@pytest.mark.parametrize("backbone", ["build_resnet_backbone", "build_darknet53_backbone"])
@pytest.mark.parametrize("size", [(64, 64), (70, 45), (33, 90)])
def test_pyramid_takes_any_size(backbone: str, size: tuple[int, int]) -> None:
    cfg = tiny_config("YOLACT")
    cfg.MODEL.YOLACT.BOTTOM_UP = backbone
    cfg.MODEL.YOLACT.NUM_EXTRA_LEVELS = 2
    if backbone == "build_darknet53_backbone":
        cfg.MODEL.YOLACT.IN_FEATURES = ["dark3", "dark4", "dark5"]
    pyramid = build_backbone(cfg)
    shapes = pyramid.output_shape()
    assert [shapes[k].stride for k in ("p3", "p4", "p5", "p6", "p7")] == [8, 16, 32, 64, 128]
    outputs = pyramid(torch.rand(1, 3, *size))
    for name, feature in outputs.items():
        stride = shapes[name].stride
        assert feature.shape == (1, 16, -(-size[0] // stride), -(-size[1] // stride))
    assert all((outputs[k] >= 0).all() for k in ("p3", "p4", "p5"))


def test_priors_cover_all_predictions() -> None:
    model = build_model(tiny_config("YOLACT")).eval()
    pyramid = model.backbone(torch.rand(1, 3, 64, 64))
    predictions = model.head([pyramid[name] for name in model.network.in_features])
    assert len(model.priors(predictions.feature_sizes)) == predictions.logits.shape[1]
    assert predictions.prototypes.shape == (1, 16, 16, 8)


def test_pascal_has_classes_priors_and_evaluation_of_its_own(tmp_path: Path) -> None:
    cfg = model_zoo.get_config("yolact/yolact_R_50_550_pascal.yaml")
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg)
    assert model.head.predictor.logits.out_channels == 3 * 21
    priors = 550 * model.priors([(1, 1)] * 5)[:, 2:]
    sides = priors.prod(dim=1).sqrt().view(5, 3)
    torch.testing.assert_close(sides, torch.tensor([32.0, 64, 128, 256, 512])[:, None].expand(5, 3))
    ratios = (priors[:, 0] / priors[:, 1]).view(5, 3)
    torch.testing.assert_close(ratios, torch.tensor([1.0, 0.5, 2.0]).expand(5, 3))
    name = "yolact_pascal_test"
    box = {"bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    sizes = [[0, 0, 4.1, 9], [0, 0, 9, 3.9], [0, 0, 3.9, 9], [0, 0, 4, 4]]
    record = {"file_name": "x.png", "image_id": 1, "height": 550, "width": 550}
    record["annotations"] = [{"bbox": s, **box} for s in sizes]
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).set(evaluator_type="coco", thing_classes=["thing"])
    try:
        evaluator = build_evaluator(cfg, name, str(tmp_path))
        kept = [a["bbox"] for a in evaluator._coco_api.anns.values()]
        assert kept == [sizes[0], sizes[3]]
        evaluator.reset()
        found = Instances((550, 550), pred_boxes=Boxes(torch.tensor([[0.0, 0, 4, 4]])))
        found.scores, found.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.int64)
        evaluator.process([{"image_id": 1}], [{"instances": found}])
        assert evaluator.evaluate()["bbox"]["AP70"] == pytest.approx(100 * 51 / 101)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_mask_rescoring_adds_mask_scores() -> None:
    cfg = tiny_config("YOLACT")
    cfg.MODEL.YOLACT.MASK_RESCORING.ENABLED = True
    cfg.MODEL.YOLACT.INPUT_SIZE = 256
    torch.manual_seed(0)
    model = build_model(cfg)
    losses = model.train()(random_inputs())
    assert "loss_mask_iou" in losses
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.mask_scorer.parameters())
    result = model.eval()(random_inputs(1))[0]["instances"]
    assert result.mask_scores.shape == result.scores.shape
    # The last layer may answer exactly 0 everywhere; its bias then decides.
    nn.init.constant_(model.mask_scorer.output.bias, 0.5)
    nn.init.zeros_(model.mask_scorer.output.weight)
    result = model(random_inputs(1))[0]["instances"]
    torch.testing.assert_close(result.mask_scores, result.scores * 0.5)


def test_mask_scorer_needs_large_prototypes() -> None:
    scorer = MaskScorer(2)
    assert scorer(torch.rand(3, MaskScorer.MIN_SIDE, MaskScorer.MIN_SIDE)).shape == (3, 2)
    cfg = tiny_config("YOLACT")
    cfg.MODEL.YOLACT.MASK_RESCORING.ENABLED = True
    with pytest.raises(ValueError, match="INPUT_SIZE"):
        build_model(cfg)


def test_batch_norms_are_frozen_for_small_batches() -> None:
    cfg = tiny_config("YOLACT")
    small = build_model(cfg).train()
    cfg.SOLVER.IMS_PER_BATCH = 8
    large = build_model(cfg).train()
    for model, trained in ((small, False), (large, True)):
        norms = [m for m in model.backbone.bottom_up.modules() if isinstance(m, nn.BatchNorm2d)]
        assert norms and all(m.training == trained for m in norms)
        assert all(m.weight.requires_grad == trained for m in norms)
    before = copy.deepcopy(small.backbone.bottom_up.stem.conv1.norm.running_mean)
    small(random_inputs())
    assert torch.equal(before, small.backbone.bottom_up.stem.conv1.norm.running_mean)


def test_frozen_norm_config_builds() -> None:
    cfg = tiny_config("YOLACT")
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    norm = build_model(cfg).backbone.bottom_up.stem.conv1.norm
    assert isinstance(norm, FrozenBatchNorm2d)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.YOLACT.TEST.NMS", "soft", "TEST.NMS"),
        ("MODEL.YOLACT.ANCHORS.SCALES", [[10.0]], "ANCHORS.SCALES"),
        ("MODEL.YOLACT.LOSS.NORMALIZER", "none", "NORMALIZER"),
        ("MODEL.INFERENCE.MODE", "fast", "INFERENCE.MODE"),
        ("MODEL.INFERENCE.DTYPE", "int8", "INFERENCE.DTYPE"),
        ("MODEL.YOLACT.IN_FEATURES", ["res3", "res9"], "res9"),
    ],
)
def test_wrong_settings_are_explained(key: str, value: object, message: str) -> None:
    cfg = tiny_config("YOLACT")
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_instances_without_masks_are_explained() -> None:
    model = build_model(tiny_config("YOLACT")).train()
    inputs = random_inputs(1)
    inputs[0]["instances"].remove("gt_masks")
    with pytest.raises(ValueError, match="segmentation"):
        model(inputs)
    del inputs[0]["instances"]
    with pytest.raises(KeyError, match="instances"):
        model(inputs)


def test_polygons_train_as_bitmasks_do() -> None:
    from detectron2.structures import PolygonMasks

    torch.manual_seed(0)
    model = build_model(tiny_config("YOLACT")).train()
    inputs = random_inputs(1, objects=1)
    box = inputs[0]["instances"].gt_boxes.tensor[0].round()
    inputs[0]["instances"].gt_boxes.tensor[0] = box
    x1, y1, x2, y2 = box.tolist()
    mask = torch.zeros(1, 60, 80, dtype=torch.bool)
    mask[0, int(y1) : int(y2), int(x1) : int(x2)] = True
    inputs[0]["instances"].gt_masks.tensor = mask
    expected = model(copy.deepcopy(inputs))
    inputs[0]["instances"].gt_masks = PolygonMasks([[[x1, y1, x2, y1, x2, y2, x1, y2]]])
    for key, value in model(inputs).items():
        torch.testing.assert_close(value, expected[key])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_of_nan_give_no_crash(value: float) -> None:
    model = build_model(tiny_config("YOLACT")).eval()
    image = torch.full((3, 20, 30), value)
    result = model([{"image": image}])[0]["instances"]
    assert torch.isfinite(result.pred_boxes.tensor).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (3000, 2)])
def test_images_of_odd_sizes(size: tuple[int, int]) -> None:
    model = build_model(tiny_config("YOLACT")).eval()
    result = model([{"image": torch.randint(0, 255, (3, *size), dtype=torch.uint8)}])
    assert result[0]["instances"].pred_masks.shape[1:] == size
