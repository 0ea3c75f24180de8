"""The unresized image goes in, the model resizes it as published, results come back by its factor."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from torch import Tensor
from torch.nn import functional as F

from d2ext import model_zoo
from d2ext.data import build_augmentations
from d2ext.engine.predictor import BatchPredictor
from d2ext.systems.upsnet.boxes import inclusive
from d2ext.systems.upsnet.model import UPSNet
from d2ext.systems.upsnet.postprocess import nearest
from d2ext.systems.upsnet.tta import UPSNetWithTTA
from d2ext.testing import random_inputs, tiny_config
from tests.reference.fixture import draw_image


def config(short: int = 96, longest: int = 200, **changes: Any) -> CfgNode:
    cfg = tiny_config("UPSNet")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.PIXEL_MEAN = [102.9801, 115.9465, 122.7717]
    cfg.INPUT.FORMAT = "BGR"
    cfg.MODEL.UPSNET.TEST.MIN_SIZE, cfg.MODEL.UPSNET.TEST.MAX_SIZE = short, longest
    cfg.merge_from_list([x for pair in changes.items() for x in pair])
    return cfg


def build(cfg: CfgNode) -> UPSNet:
    torch.manual_seed(0)
    return build_model(cfg).eval()


def inputs_of(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    images = [draw_image(*size, i) for i, size in enumerate(sizes)]
    return [
        {"image": torch.from_numpy(x.transpose(2, 0, 1).copy()), "height": h, "width": w}
        for x, (h, w) in zip(images, sizes, strict=True)
    ]


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [
        (75, 101, 96 / 75),
        (101, 75, 96 / 75),
        (60, 150, 200 / 150),  # the long side's limit
        (180, 251, 96 / 180),
        (96, 130, 1.0),
    ],
)
def test_default_predictor_from_the_unresized_image(
    height: int, width: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = DefaultPredictor(config())
    seen: list[Tensor] = []
    network = predictor.model.inference_network
    monkeypatch.setattr(
        type(network),
        "__call__",
        lambda self, *x: seen.append(x[0]) or self.decode(self.network(*x)),
    )
    bgr = draw_image(height, width, 3)
    result = predictor(bgr)

    mean, std = (
        x.flatten().numpy() for x in (predictor.model.pixel_mean, predictor.model.pixel_std)
    )
    expected = cv2.resize(bgr.astype(np.float32) - mean, None, fx=scale, fy=scale)
    h, w = expected.shape[:2]
    assert predictor.model.network_size((height, width)) == (h, w)
    (images,) = seen
    assert images.shape[-2:] == (-(-h // 16) * 16, -(-w // 16) * 16)
    actual = images[0].permute(1, 2, 0).numpy() * std
    assert np.abs(actual[:h, :w] - expected).max() < (1e-3 if cv2.ipp.useIPP() else 0.1)
    assert not actual[h:].any() and not actual[:, w:].any()
    # Bytes, which d2ext's own predictor uploads, are the same to the model.
    resized = predictor.model.preprocess([{"image": torch.from_numpy(bgr).permute(2, 0, 1)}])
    torch.testing.assert_close(resized, images, atol=1e-5, rtol=0)

    assert result["panoptic_seg"][0].shape == result["sem_seg"].shape[1:] == (height, width)
    assert result["instances"].image_size == (height, width)
    assert len(result["instances"]) > 0


def test_results_come_back_by_the_exact_factor() -> None:
    """101 · 1.28 = 129.28 pixels are 129: the ratio of the sizes is another factor."""
    model = build(config())
    (inputs,) = inputs_of((75, 101))
    scale = 96 / 75
    assert model.output_scales(inputs) == (scale, scale)
    with torch.no_grad():
        predictions = model.inference_network(model.preprocess([inputs]))
        ((detections, candidates),) = model.detect(predictions, [(96, 129)])
        result = model([inputs])[0]
    boxes = inclusive(result["instances"].pred_boxes.tensor)
    expected = inclusive(detections.pred_boxes.tensor) / scale
    torch.testing.assert_close(boxes, expected.clamp(max=100), atol=1e-4, rtol=0)

    # The published map: cropped, nearest by 1 / scale.
    prediction = model.postprocessor.fuse(predictions.semantic.score[0], candidates)
    labels = prediction.labels[:96, :129].numpy().astype(np.uint8)
    back = cv2.resize(labels, None, fx=1 / scale, fy=1 / scale, interpolation=cv2.INTER_NEAREST)
    ours = nearest(prediction.labels, (96, 129), (75, 101), (scale, scale))
    np.testing.assert_array_equal(ours, back)
    by_sizes = nearest(prediction.labels, (96, 129), (75, 101))
    assert torch.equal(by_sizes[:, 0], ours[:, 0])

    # Semantic logits: at pixel i of the output, those of the network's pixel (i + 0.5) · scale - 0.5.
    score = predictions.semantic.score
    full = F.interpolate(score, scale_factor=4, mode="bilinear", align_corners=False)[0]
    assert result["sem_seg"].shape[1:] == (75, 101)
    ramp = torch.arange(full.shape[-1] / 4).expand_as(score[0]) * 4 + 1.5
    columns = model.postprocessor.semantic_map(ramp, (96, 129), (75, 101), (scale, scale))[0, 40]
    centres = (torch.arange(101) + 0.5) * scale - 0.5
    torch.testing.assert_close(columns[2:-2], centres[2:-2], atol=1e-3, rtol=0)


@pytest.mark.parametrize("scale", [800 / 480, 800 / 427, 96 / 75, 0.6, 352 / 1000])
def test_nearest_is_opencvs(scale: float) -> None:
    size = (round(75 * scale), round(300 * scale))
    maps = np.random.default_rng(0).integers(0, 255, size, dtype=np.uint8)
    back = cv2.resize(maps, None, fx=1 / scale, fy=1 / scale, interpolation=cv2.INTER_NEAREST)
    ours = nearest(torch.from_numpy(maps), size, (75, 300), (scale, scale)).numpy()
    rows, columns = (min(a, b) for a, b in zip(back.shape, ours.shape, strict=True))
    assert min(rows - 75, columns - 300) >= -1
    np.testing.assert_array_equal(ours[:rows, :columns], back[:rows, :columns])


def test_images_of_different_sizes_and_other_output_sizes() -> None:
    model = build(config())
    inputs = inputs_of((75, 101), (40, 120), (130, 90))
    inputs[1].update(height=20, width=61)
    inputs[2].update(height=None, width=None)
    together = model(inputs)
    sizes = [(75, 101), (20, 61), (130, 90)]
    assert [x["panoptic_seg"][0].shape for x in together] == sizes
    assert [x["sem_seg"].shape[1:] for x in together] == sizes
    assert model.output_scales(inputs[1]) == pytest.approx(
        ((200 / 120) * 2, (200 / 120) * 120 / 61)
    )
    padded = model.preprocess(inputs)
    assert padded.shape == (3, 3, 144, 208)
    torch.testing.assert_close(
        padded[0, :, :96, :129], model.preprocess(inputs[:1])[0, :, :96, :129]
    )
    # At another output size: the same boxes, scaled.
    inputs[1].update(height=40, width=120)
    plain = model(inputs[1:2])[0]["instances"].pred_boxes.tensor
    inputs[1].update(height=80, width=240)
    double = model(inputs[1:2])[0]["instances"].pred_boxes.tensor
    torch.testing.assert_close(inclusive(double), inclusive(plain) * 2, atol=1e-3, rtol=0)


def test_training_images_are_not_resized() -> None:
    model = build(config()).train()
    inputs = random_inputs(2)
    assert model.preprocess(inputs).shape == (2, 3, 64, 80)
    assert model.network_size((60, 80)) == (60, 80)
    losses = model(inputs)
    assert all(x.isfinite() for x in losses.values())


def test_images_that_detectron2_resized_are_left_as_they_are(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A config of an earlier version, or Detectron2's default."""
    cfg = config(**{"INPUT.MIN_SIZE_TEST": 48, "INPUT.MAX_SIZE_TEST": 70})
    model = build(cfg)
    for key in ("INPUT.MIN_SIZE_TEST", "MODEL.UPSNET.TEST.MIN_SIZE"):
        assert key in caplog.text
    (resized,) = build_augmentations(cfg, False)
    assert resized.get_transform(np.zeros((60, 80, 3))).new_w == 64
    assert model.network_size((48, 64)) == (48, 64)
    result = BatchPredictor(cfg, model)([draw_image(60, 80, 0)])[0]
    assert result["panoptic_seg"][0].shape == (60, 80)
    caplog.clear()
    build(config())
    assert not caplog.text


def test_sizes_are_checked() -> None:
    for short, longest in ((-1, 200), (96, 0)):
        with pytest.raises(ValueError, match="MIN_SIZE"):
            build(config(short, longest))
    assert build(config(0)).network_size((300, 500)) == (300, 500)


def test_views_of_test_time_augmentation_come_from_the_unresized_image() -> None:
    model = build(config())
    inputs = inputs_of((75, 101))
    plain = model(inputs)[0]
    augmented = UPSNetWithTTA(model, min_sizes=[], max_size=4000, flip=False)
    torch.testing.assert_close(
        augmented(inputs)[0]["sem_seg"], plain["sem_seg"], atol=1e-4, rtol=1e-4
    )
    wider = UPSNetWithTTA(model, min_sizes=[50, 150], max_size=180, flip=True)
    views = wider.views(inputs[0]["image"])
    assert [v.size for v in views] == [(50, 67)] * 2 + [(134, 180)] * 2
    assert wider(inputs)[0]["panoptic_seg"][0].shape == (75, 101)


@pytest.mark.parametrize("name", ["R_50_coco", "R_101_dcn_coco", "R_50_cityscapes", "shapes"])
def test_configs_leave_the_resize_to_the_model(name: str) -> None:
    cfg = model_zoo.get_config(f"upsnet/upsnet_{name}.yaml")
    assert cfg.INPUT.MIN_SIZE_TEST == 0 and cfg.INPUT.AUGMENTATION.NAME == "upsnet"
    sizes = {"coco": (800, 1333), "cityscapes": (1024, 2048), "shapes": (160, 160)}
    test = cfg.MODEL.UPSNET.TEST
    assert sizes[name.rpartition("_")[2]] == (test.MIN_SIZE, test.MAX_SIZE)
