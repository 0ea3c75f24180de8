"""CenterNet's configs, options and bad input."""

from __future__ import annotations

import copy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.pascal_voc import register_pascal_voc
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.structures import Boxes, Instances, Keypoints
from torch import nn

from d2ext import model_zoo
from d2ext.data import build_augmentations, build_train_loader
from d2ext.evaluation import build_evaluator
from d2ext.systems.centernet.targets import ObjectAnnotations, encode_targets
from d2ext.testing import NUM_CLASSES, random_inputs, tiny_config

CONFIGS = [name for name in model_zoo.available() if name.startswith("centernet/centernet_")]
# Entries of the published state dicts without what is never used.
ENTRIES = {
    "centernet/centernet_R_18_dcn_512.yaml": 177,
    "centernet/centernet_dla34_512.yaml": 400 - 14,
    "centernet/centernet_pose_dla34_512.yaml": 412 - 14,
    "centernet/centernet_hourglass104_512.yaml": 984,
}


def _detector(**options: object) -> nn.Module:
    """The tiny CenterNet without poses."""
    cfg = tiny_config("CenterNet")
    cfg.MODEL.KEYPOINT_ON = False
    for key, value in options.items():
        cfg.merge_from_list([f"MODEL.CENTERNET.{key.replace('__', '.')}", value])
    torch.manual_seed(0)
    return build_model(cfg)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds(name: str) -> None:
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "cpu"
    with torch.device("meta"):
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    if name in ENTRIES:
        assert len(model.state_dict()) == ENTRIES[name]
    warp = build_augmentations(cfg, True)[0]
    assert tuple(warp.size) == (cfg.INPUT.AUGMENTATION.SIZE,) * 2
    assert warp.size[0] % model.backbone.size_divisibility == 0


@pytest.mark.parametrize(
    ("options", "heads"),
    [
        ({"SIZE_TARGET": "class_specific"}, {"size": 2 * NUM_CLASSES}),
        ({"SIZE_TARGET": "dense"}, {"size": 2}),
        ({"LOSS__REGRESSION": "smooth_l1"}, {"size": 2}),
    ],
)
def test_variants_train_and_detect(options: dict[str, object], heads: dict[str, int]) -> None:
    model = _detector(**options).train()
    losses = model(random_inputs())
    assert set(losses) == {"loss_heatmap", "loss_size", "loss_offset"}
    sum(losses.values()).backward()
    for name, channels in heads.items():
        assert model.head.stacks[0][name].output.out_channels == channels
    detections = model.eval()(random_inputs(1))[0]["instances"]
    assert len(detections) == 10 and not detections.has("pred_keypoints")


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        (["MODEL.CENTERNET.OFFSET", False], {"offset"}),
        (["MODEL.CENTERNET.POSE.OFFSET", False], {"joint_offset"}),
        (["MODEL.CENTERNET.POSE.HEATMAP", False], {"joint_heatmap", "joint_offset"}),
    ],
)
def test_models_without_some_maps(options: list[object], missing: set[str]) -> None:
    cfg = tiny_config("CenterNet")
    torch.manual_seed(0)
    every = build_model(cfg)
    names = {"heatmap", "size", "offset", "joints", "joint_heatmap", "joint_offset"}
    assert set(every.head.stacks[0]) == names
    cfg.merge_from_list(options)
    cfg.MODEL.CENTERNET.TEST.FLIP = True
    model = build_model(cfg).train()
    assert set(model.head.stacks[0]) == names - missing
    losses = model(random_inputs())
    # all that is trained has a loss and all losses train something
    expected = {f"loss_{name.removesuffix('s')}" for name in names - missing}
    assert set(losses) == expected
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.head.parameters())
    detections = model.eval()(random_inputs(1))[0]["instances"]
    assert len(detections) == 10 and detections.pred_keypoints.shape[1:] == (3, 3)


def test_dense_poses_train() -> None:
    cfg = tiny_config("CenterNet")
    cfg.MODEL.CENTERNET.POSE.TARGET = "dense"
    losses = build_model(cfg).train()(random_inputs())
    assert all(torch.isfinite(x) for x in losses.values()) and losses["loss_joint"].item() > 0


@pytest.mark.parametrize("pose", [False, True])
def test_several_scales_and_mirror(pose: bool) -> None:
    cfg = tiny_config("CenterNet")
    cfg.MODEL.KEYPOINT_ON = pose
    cfg.MODEL.CENTERNET.TEST.FLIP = True
    cfg.MODEL.CENTERNET.TEST.SCALES = [0.5, 1.0, 1.5]
    cfg.MODEL.CENTERNET.TEST.MAX_DETECTIONS = 12
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    for result in model([*random_inputs(1), *random_inputs(1, height=90, width=40)]):
        detections = result["instances"]
        # Three times ten; poses are not limited.
        assert len(detections) == (30 if pose else 12)
        assert (detections.scores.diff() <= 0).all()
        assert detections.has("pred_keypoints") == pose


def test_mirrored_image_gives_mirrored_detections() -> None:
    """With the mirror test the network sees the same two images, but for their order."""
    cfg = tiny_config("CenterNet")
    cfg.MODEL.CENTERNET.TEST.FLIP = True
    cfg.MODEL.CENTERNET.TEST.CLIP_BOXES = False
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    # As wide as a canvas less 32: its centre then mirrors onto itself.
    image = torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8)
    plain, mirrored = (model([{"image": x}])[0]["instances"] for x in (image, image.flip(2)))
    torch.testing.assert_close(plain.scores, mirrored.scores)
    # Sizes are averaged, so they agree; offsets are of one image only, and may differ by a cell.
    sides = [x.pred_boxes.tensor[:, 2:] - x.pred_boxes.tensor[:, :2] for x in (plain, mirrored)]
    torch.testing.assert_close(*sides, rtol=1e-3, atol=1e-3)


def test_results_follow_the_requested_size() -> None:
    model = _detector(TEST__CLIP_BOXES=False).eval()
    image = torch.randint(0, 255, (3, 60, 80), dtype=torch.uint8)
    plain = model([{"image": image}])[0]["instances"]
    larger = model([{"image": image, "height": 120, "width": 400}])[0]["instances"]
    factors = torch.tensor([5.0, 2.0, 5.0, 2.0])
    torch.testing.assert_close(larger.pred_boxes.tensor, plain.pred_boxes.tensor * factors)
    torch.testing.assert_close(larger.centers, plain.centers * factors[:2])


def test_fixed_resolution_sees_the_whole_image() -> None:
    model = _detector(TEST__KEEP_RESOLUTION=False, TEST__INPUT_SIZE=[64, 96]).eval()
    for size in ((60, 80), (30, 300), (500, 100)):
        place = model.canvas(size, 1.0)
        assert place.size == (64, 96)
        corners = torch.tensor([[0.0, 0.0], [24.0, 16.0]], dtype=torch.float64)
        low, high = place.to_image(corners, 4)
        # the longer side fills the width; the published code does not look at the height
        assert float(high[0] - low[0]) == pytest.approx(max(size))
        assert model([{"image": torch.zeros(3, *size)}])[0]["instances"].image_size == size


def test_keypoints_are_in_detectron2s_convention() -> None:
    """What is predicted for a joint is where it was annotated: training and testing shift alike."""
    cfg = tiny_config("CenterNet")
    cfg.MODEL.CENTERNET.TEST.KEEP_RESOLUTION = False
    cfg.MODEL.CENTERNET.TEST.INPUT_SIZE = [64, 64]
    model = build_model(cfg)
    instances = Instances((64, 64))
    instances.gt_boxes = Boxes(torch.tensor([[10.0, 12.0, 50.0, 40.0]]))
    instances.gt_classes = torch.zeros(1, dtype=torch.int64)
    points = torch.tensor([[[15.5, 20.5, 2.0], [30.0, 30.5, 2.0], [44.5, 13.5, 1.0]]])
    instances.gt_keypoints = Keypoints(points)
    targets = model.encode_targets([{"instances": instances}], torch.zeros(1, 3, 64, 64))
    assert targets.joints is not None
    # As published, the network learns coordinates of COCO, half a pixel less.
    cell = torch.tensor([targets.index[0, 0] % 16, targets.index[0, 0] // 16])
    torch.testing.assert_close(
        targets.joints.position[0, 0].view(3, 2), (points[0, :, :2] - 0.5) / 4 - cell
    )
    # Perfect maps, decoded; the image is as large as the canvas, so nothing moves.
    h, w = targets.heatmap.shape[-2:]

    def at_cells(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        maps = torch.zeros(values.shape[1], h * w)
        maps[:, index] = values.T
        return maps.view(1, -1, h, w)

    joints = targets.joints
    maps = {
        "heatmap": torch.logit(targets.heatmap, eps=1e-4),
        "size": at_cells(targets.size[0], targets.index[0]),
        "offset": at_cells(targets.offset[0], targets.index[0]),
        "joints": at_cells(joints.position[0], targets.index[0]),
        "joint_heatmap": torch.logit(joints.heatmap, eps=1e-4),
        "joint_offset": at_cells(joints.offset[0], joints.index[0]),
    }
    fields = model._decode(maps)
    assert model.canvas((64, 64), 1.0).to_image(torch.zeros(2), 4).tolist() == [0.0, 0.0]
    result = model.postprocess(fields, [{"image": torch.zeros(3, 64, 64)}])[0]["instances"]
    torch.testing.assert_close(result.pred_keypoints[0, :, :2], points[0, :, :2])
    torch.testing.assert_close(result.pred_boxes.tensor[0], torch.tensor([10.0, 12.0, 50.0, 40.0]))


# ---------------------------------------------------------------- bad input


def _encode(boxes: list[list[float]], size: tuple[int, int] = (20, 30), **options: int):
    tensor = torch.tensor(boxes).view(-1, 4)
    classes = torch.zeros(len(tensor), dtype=torch.int64)
    return encode_targets([ObjectAnnotations(tensor, classes)], size, 1, **options)


def test_objects_that_left_the_image() -> None:
    boxes = [[-9, -9, -1, -1], [40, 30, 50, 40], [-10, 5, 4, 9], [28, 3, 90, 9], [9, 17, 13, 60]]
    targets = _encode(boxes)
    assert targets.mask[0].tolist() == [False, False, True, True, True]
    assert (targets.heatmap == 1).sum() == 3
    # the visible part decides
    assert targets.size[0, 2:].tolist() == [[4, 4], [1, 6], [4, 2]]


def test_joints_in_the_cells_at_the_border() -> None:
    """Trained from the map's outer edge on, in a map of 20 x 30 cells."""
    places = [(-0.4, 5), (0.2, 5), (5, -0.4), (5, 0.2), (29.8, 5), (30.2, 5), (5, 19.8), (5, 20.2)]
    joints = torch.tensor([[(x, y, 1.0) for x, y in places]])
    annotations = ObjectAnnotations(torch.tensor([[2.0, 2, 8, 8]]), torch.tensor([0]), joints)
    targets = encode_targets([annotations], (20, 30), 1).joints
    assert targets is not None
    inside = [False, True, False, True, True, False, True, False]
    assert targets.offset_mask[0].tolist() == inside
    cells = [0, 150, 0, 5, 179, 0, 19 * 30 + 5, 0]
    assert targets.index[0].tolist() == cells


def test_two_objects_on_one_cell() -> None:
    targets = _encode([[2, 2, 8, 8], [3, 3, 7, 7]])
    assert targets.index[0, 0] == targets.index[0, 1] and (targets.heatmap == 1).sum() == 1
    assert targets.mask.all() and targets.size[0].tolist() == [[6, 6], [4, 4]]


def test_a_thousand_objects() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(1000, 2, generator=generator) * torch.tensor([25.0, 15.0])
    boxes = torch.cat([low, low + 1 + 4 * torch.rand(1000, 2, generator=generator)], 1).tolist()
    assert _encode(boxes, max_objects=128).mask.shape == (1, 128)
    targets = _encode(boxes, max_objects=1000)
    assert targets.mask.sum() == 1000
    assert (targets.heatmap.flatten()[targets.index[0]] == 1).all()


def test_objects_smaller_than_a_cell() -> None:
    targets = _encode([[3.2, 4.1, 3.4, 4.2]])
    assert targets.mask.all() and targets.radii[0, 0] == 0
    assert targets.heatmap.sum() == 1 and targets.heatmap[0, 0, 4, 3] == 1
    torch.testing.assert_close(targets.offset[0, 0], torch.tensor([0.3, 0.15]))


def test_images_of_a_batch_do_not_mix() -> None:
    a = ObjectAnnotations(torch.tensor([[2.0, 2, 8, 8]]), torch.tensor([1]))
    b = ObjectAnnotations(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    c = ObjectAnnotations(torch.tensor([[1.0, 1, 5, 9], [9, 9, 15, 12]]), torch.tensor([0, 1]))
    together = encode_targets([a, b, c], (20, 30), 2)
    for i, one in enumerate((a, b, c)):
        alone = encode_targets([one], (20, 30), 2)
        assert torch.equal(alone.heatmap[0], together.heatmap[i])
        count = len(one.boxes)
        assert torch.equal(alone.size[0], together.size[i, :count])
        assert not together.mask[i, count:].any()


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (900, 2)])
@pytest.mark.parametrize("keep", [True, False])
def test_images_of_odd_sizes(size: tuple[int, int], keep: bool) -> None:
    model = _detector(TEST__KEEP_RESOLUTION=keep, TEST__INPUT_SIZE=[64, 64]).eval()
    image = torch.randint(0, 255, (3, *size), dtype=torch.uint8)
    detections = model([{"image": image}])[0]["instances"]
    assert detections.image_size == size and torch.isfinite(detections.pred_boxes.tensor).all()
    model.scales = [0.3, 1.0]
    assert len(model([{"image": image}])[0]["instances"]) > 0


@pytest.mark.parametrize("size", [(3, 300), (200, 7)])
def test_training_images_far_from_square(size: tuple[int, int]) -> None:
    model = _detector().train()
    inputs = random_inputs(1, height=size[0], width=size[1])
    losses = model([*inputs, *random_inputs(1)])
    assert all(torch.isfinite(x) for x in losses.values())


def test_top_k_larger_than_the_map() -> None:
    model = _detector(TEST__TOP_K=5000).eval()
    detections = model([{"image": torch.zeros(3, 20, 20, dtype=torch.uint8)}])[0]["instances"]
    assert len(detections) == NUM_CLASSES * 8 * 8


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_of_nan_give_no_crash(value: float) -> None:
    model = _detector().eval()
    detections = model([{"image": torch.full((3, 40, 50), value)}])[0]["instances"]
    assert torch.isfinite(detections.pred_boxes.tensor).all()


def test_missing_annotations_are_explained() -> None:
    cfg = tiny_config("CenterNet")
    model = build_model(cfg).train()
    inputs = random_inputs(1)
    wrong = copy.deepcopy(inputs)
    wrong[0]["instances"].remove("gt_keypoints")
    with pytest.raises(ValueError, match="KEYPOINT_ON"):
        model(wrong)
    wrong = copy.deepcopy(inputs)
    wrong[0]["instances"].gt_keypoints = Keypoints(torch.zeros(3, 5, 3))
    with pytest.raises(ValueError, match="NUM_KEYPOINTS"):
        model(wrong)
    del wrong[0]["instances"]
    with pytest.raises(KeyError, match="instances"):
        model(wrong)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.CENTERNET.IN_FEATURES", ["p2"], "IN_FEATURES"),
        ("MODEL.CENTERNET.IN_FEATURES", [], "IN_FEATURES"),
        ("MODEL.CENTERNET.TEST.SCALES", [], "SCALES"),
        ("MODEL.CENTERNET.TEST.SCALES", [0.0], "SCALES"),
        ("MODEL.CENTERNET.POSE.FLIP_PAIRS", [[0, 3]], "FLIP_PAIRS"),
        ("MODEL.CENTERNET.LOSS.REGRESSION", "l2", "REGRESSION"),
        ("MODEL.CENTERNET.SIZE_TARGET", "all", "SIZE_TARGET"),
        ("MODEL.DECONV.CHANNELS", [], "CHANNELS"),
        ("MODEL.DECONV.IN_FEATURE", "res4", "IN_FEATURE"),
        ("MODEL.INFERENCE.MODE", "fast", "INFERENCE.MODE"),
    ],
)
def test_wrong_settings_are_explained(key: str, value: object, message: str) -> None:
    cfg = tiny_config("CenterNet")
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=message):
        build_model(cfg)


def test_input_size_fits_the_backbone() -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        _detector(TEST__KEEP_RESOLUTION=False, TEST__INPUT_SIZE=[64, 70])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prepared_network_agrees(dtype: str) -> None:
    """Folded norms and channels-last memory, on the CPU."""
    cfg = tiny_config("CenterNet")
    torch.manual_seed(0)
    plain = build_model(cfg).eval()
    cfg.MODEL.INFERENCE.DTYPE = dtype
    cfg.MODEL.INFERENCE.CHANNELS_LAST = True
    other = build_model(cfg).eval()
    other.load_state_dict(plain.state_dict())
    inputs = random_inputs(2)
    expected, actual = (m.heatmaps(inputs)[0]["centers"] for m in (plain, other))
    torch.testing.assert_close(actual, expected)  # the plain network, in both
    images = plain.preprocess(inputs)
    scores = [m.inference_network(images)[1] for m in (plain, other)]
    tolerance = 1e-4 if dtype == "float32" else 0.03
    assert (scores[0] - scores[1]).abs().max() < tolerance


def test_pascal_voc_in_its_own_form(tmp_path: Path) -> None:
    """From VOC's folder through loader and model's output to VOC's AP."""
    cfg = model_zoo.get_config("centernet/centernet_R_18_dcn_384_voc.yaml")
    epoch = (5011 + 11540) / cfg.SOLVER.IMS_PER_BATCH
    assert [round(x / epoch) for x in (*cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER)] == [45, 60, 70]
    name, boxes = "voc_test_centernet", [[11, 21, 60, 80], [31, 1, 100, 40]]
    classes = MetadataCatalog.get("voc_2007_test").thing_classes
    assert len(classes) == cfg.MODEL.CENTERNET.NUM_CLASSES
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ImageSets/Main/test.txt").write_text("000001\n000002\n")
    objects = "".join(
        f"<object><name>{classes[i]}</name><pose>Left</pose><truncated>0</truncated>"
        f"<difficult>0</difficult><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax>"
        f"<ymax>{d}</ymax></bndbox></object>"
        for i, (a, b, c, d) in zip((3, 7), boxes, strict=True)
    )
    size = "<size><width>120</width><height>90</height><depth>3</depth></size>"
    xml = f"<annotation>{size}{objects}</annotation>"
    for image in ("000001", "000002"):
        (tmp_path / f"Annotations/{image}.xml").write_text(xml)
        cv2.imwrite(str(tmp_path / f"JPEGImages/{image}.jpg"), np.zeros((90, 120, 3), np.uint8))
    register_pascal_voc(name, str(tmp_path), "test", 2007, classes)
    MetadataCatalog.get(name).evaluator_type = "pascal_voc"
    try:
        cfg.DATASETS.TRAIN = (name,)
        cfg.DATALOADER.NUM_WORKERS = 0
        cfg.SOLVER.IMS_PER_BATCH = 1
        batch = next(iter(build_train_loader(cfg)))
        assert batch[0]["image"].shape == (3, 384, 384)
        assert set(batch[0]["instances"].gt_classes.tolist()) <= {3, 7}
        evaluator = build_evaluator(cfg, name, str(tmp_path))
        evaluator.reset()
        found = Instances((90, 120), pred_classes=torch.tensor([3, 7]), scores=torch.ones(2))
        # VOC counts pixels from 1, and boxes up to their last one.
        found.pred_boxes = Boxes(
            torch.tensor(boxes, dtype=torch.float32) - torch.tensor([1.0, 1, 0, 0])
        )
        for image in ("000001", "000002"):
            evaluator.process([{"image_id": image}], [{"instances": found}])
        assert evaluator.evaluate()["bbox"]["AP50"] == pytest.approx(100 * 2 / 20)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
