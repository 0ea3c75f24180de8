"""UPSNet's model: options, bad inputs, test-time augmentation, weights."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Instances
from detectron2.utils.events import EventStorage
from torch import Tensor

from d2ext import model_zoo
from d2ext.checkpoint import ConversionError, convert_state_dict
from d2ext.checkpoint.checkpointer import Checkpointer
from d2ext.engine.predictor import BatchPredictor
from d2ext.engine.trainer import Trainer
from d2ext.layers.deform_conv import DeformConv
from d2ext.modeling.region_slots import select
from d2ext.modeling.tta import build_tta
from d2ext.systems.upsnet.boxes import PyramidRoIAlign, clip, detectron_anchors, inclusive
from d2ext.systems.upsnet.model import UPSNet
from d2ext.systems.upsnet.postprocess import PanopticMap, clean, nearest, segments
from d2ext.systems.upsnet.targets import UPSNetTargets
from d2ext.systems.upsnet.tta import UPSNetWithTTA
from d2ext.testing import NUM_CLASSES, NUM_STUFF, random_inputs, tiny_config


def build(**changes: Any) -> UPSNet:
    """The tiny model; keys as below MODEL.UPSNET, dots as double underscores."""
    torch.manual_seed(0)
    cfg = tiny_config("UPSNet")
    cfg.merge_from_list(
        [x for k, v in changes.items() for x in ("MODEL.UPSNET." + k.replace("__", "."), v)]
    )
    return build_model(cfg)


@pytest.fixture(scope="module")
def model() -> UPSNet:
    return build()


# ---------------------------------------------------------------- published constants


@pytest.mark.parametrize(
    ("stride", "expected"),
    [
        (4, [(-22, -10, 25, 13), (-14, -14, 17, 17), (-10, -22, 13, 25)]),
        (8, [(-40, -20, 47, 27), (-28, -28, 35, 35), (-20, -44, 27, 51)]),
        (16, [(-84, -40, 99, 55), (-56, -56, 71, 71), (-36, -80, 51, 95)]),
        (32, [(-164, -72, 195, 103), (-112, -112, 143, 143), (-76, -168, 107, 199)]),
        (64, [(-332, -152, 395, 215), (-224, -224, 287, 287), (-148, -328, 211, 391)]),
    ],
)
def test_anchors(stride: int, expected: list[tuple[int, ...]]) -> None:
    anchors = detectron_anchors(stride, [8 * stride], [0.5, 1.0, 2.0])
    assert inclusive(anchors).tolist() == [list(map(float, box)) for box in expected]


@pytest.mark.parametrize("share", [4, 5])
def test_an_instance_becomes_the_stuff_that_covers_half_of_it(share: int) -> None:
    """Not what merely covers most of it."""
    rest = 10 - share
    semantic = torch.tensor([[0] * share + [1] * (rest // 2) + [2] * (rest - rest // 2)])
    labels, classes = torch.full((1, 10), 3), torch.tensor([0])
    options = {"num_stuff": 3, "num_classes": 5, "stuff_area_limit": 0}
    result = clean(labels, semantic, classes, **options)
    assert result.labels.unique().tolist() == [0 if share == 5 else 3]


def test_levels_and_corners_of_pooled_boxes() -> None:
    pooler = PyramidRoIAlign(7, [4, 8, 16, 32])
    sides = torch.tensor([1.0, 111.9, 112.0, 223.9, 224.0, 448.0, 4000.0])
    boxes = torch.stack([sides * 0, sides * 0, sides, sides], dim=1)
    assert pooler.levels(boxes).tolist() == [0, 0, 1, 1, 2, 3, 3]
    # Of the inclusive box: a map that counts columns has its mean at the middle of 0..15, over 4.
    ramp = torch.arange(32.0).repeat(32, 1)[None, None]
    pooled = PyramidRoIAlign(1, [4])([ramp], [_boxes([[0.0, 0.0, 17.0, 17.0]])])
    assert float(pooled) == pytest.approx(16 / 4 / 2)


def test_proposals_of_no_width_in_the_images_own_pixels_are_not_trained_on(model: UPSNet) -> None:
    """An image made ten times smaller: a pixel of it is 0.1 wide, as is a half-pixel proposal less
    the network's pixel that it includes."""
    objects = Instances((40, 40))
    objects.gt_boxes = _boxes([[4.0, 4.0, 20.0, 20.0]])
    objects.gt_classes = torch.tensor([1])
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    maps = torch.zeros(40, 40, dtype=torch.int64), torch.ones(1, 40, 40, dtype=torch.bool)
    proposals = Instances((40, 40))
    proposals.proposal_boxes = _boxes([[5.0, 5.0, 5.5, 15.0], [4.0, 5.0, 20.0, 21.0]])
    regions = model.roi_heads.sample(proposals, UPSNetTargets(objects, *nothing, *maps, pixel=0.1))
    assert regions.gt_deltas.isfinite().all()
    boxes = regions.proposal_boxes.tensor
    widths = boxes[:, 2] - boxes[:, 0]
    assert len(widths) == 2 and (widths > 10).all()


def _boxes(rows: list[list[float]]) -> Any:
    from detectron2.structures import Boxes

    return Boxes(torch.tensor(rows))


def test_clipped_boxes_keep_a_pixel() -> None:
    boxes = torch.tensor([[-5.0, -6.0, -2.0, -1.0], [90.0, 70.0, 99.0, 99.0]])
    assert clip(boxes, 60, 80).tolist() == [[0.0, 0.0, 1.0, 1.0], [79.0, 59.0, 80.0, 60.0]]


def test_select_keeps_ties_with_the_last() -> None:
    boxes = torch.tensor([[0.0, 0, 9, 9], [20.0, 0, 29, 9], [40.0, 0, 49, 9]])[None, :, None]
    scores = torch.tensor([[[0.9], [0.7], [0.7]]])
    options = {"score_threshold": 0.1, "nms_threshold": 0.5}
    assert select(boxes, scores, limit=1, **options).counts.tolist() == [1]
    assert select(boxes, scores, limit=2, **options).counts.tolist() == [3]


# ---------------------------------------------------------------- training on bad input


def train(model: UPSNet, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
    model.train()
    model.zero_grad()
    losses = model(copy.deepcopy(inputs))
    assert all(torch.isfinite(x) for x in losses.values()), losses
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    return losses


@pytest.mark.parametrize("kind", ["no_stuff", "all_void", "nothing", "only_crowd", "vanishing"])
def test_trains_on_bad_input(model: UPSNet, kind: str) -> None:
    inputs = random_inputs(2)
    for x in inputs:
        none = torch.zeros(3, dtype=torch.bool)
        if kind == "no_stuff":
            x["sem_seg"][x["sem_seg"] > 0] = 255
        if kind in ("all_void", "nothing"):
            x["sem_seg"][:] = 255
        if kind in ("nothing", "only_crowd"):
            if kind == "only_crowd":
                x["crowd_instances"] = x["instances"]
            x["instances"] = x["instances"][none]
        if kind == "vanishing":  # boxes without masks
            masks = torch.zeros_like(x["instances"].gt_masks.tensor)
            x["instances"].gt_masks = BitMasks(masks)
    losses = train(model, inputs)
    if kind in ("all_void", "nothing"):
        assert float(losses["loss_sem_seg"]) == 0
    if kind == "nothing":
        assert float(losses["loss_panoptic"]) == 0
        assert float(losses["loss_mask"]) == 0
    else:
        assert float(losses["loss_cls"]) > 0


def test_losses_of_several_images_are_the_mean_of_each_ones() -> None:
    """What one process per image computes."""
    model = build(LOSS__KEEP_FRACTION=1.0)
    # Batch norms see the batch.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.track_running_stats = False
            module.eval()
    model.proposal_generator.batch_size_per_image = 10**6  # nothing left to draw
    model.roi_heads.batch_size_per_image = 10**6
    inputs = random_inputs(2)
    inputs[1]["instances"] = inputs[1]["instances"][:1]

    def losses(batch: list[dict[str, Any]]) -> dict[str, float]:
        model.training = model.proposal_generator.training = model.roi_heads.training = True
        return {k: float(v.detach()) for k, v in model(copy.deepcopy(batch)).items()}

    model.eval()
    both, first, second = losses(inputs), losses(inputs[:1]), losses(inputs[1:])
    expected = {k: (first[k] + second[k]) / 2 for k in both}
    assert both == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_share_of_instances_that_keep_their_channel(model: UPSNet) -> None:
    drawn = [model.sample_instances(10) for _ in range(20)]
    assert {len(x) for x in drawn} == {7}
    assert all(len(set(x.tolist())) == 7 for x in drawn)
    assert len({tuple(x.tolist()) for x in drawn}) > 1
    assert len(model.sample_instances(1)) == 1
    assert len(model.sample_instances(0)) == 0
    assert build(LOSS__KEEP_FRACTION=1.0).sample_instances(5).tolist() == [0, 1, 2, 3, 4]


def test_a_best_match_may_become_negative_and_few_candidates_do_not(model: UPSNet) -> None:
    rpn = model.proposal_generator
    iou = torch.zeros(1, 100)
    iou[0, 0] = 0.2  # the only box's best anchor, below the negative threshold
    drawn = torch.stack([rpn._sample(iou) for _ in range(40)])
    assert rpn.batch_size_per_image == 32
    # 31 of the 100 are drawn as negatives each time, sometimes the best match.
    assert set(drawn[:, 0].tolist()) == {0, 1}
    assert set((drawn == 0).sum(dim=1).tolist()) == {31}
    few = torch.full((1, 10), 0.1)
    few[0, 3] = 0.8
    assert rpn._sample(few).tolist() == [-1, -1, -1, 1, -1, -1, -1, -1, -1, -1]


# ---------------------------------------------------------------- inference


def test_inference_without_any_candidate() -> None:
    model = build(TEST__SCORE_THRESH=1.0).eval()
    with torch.no_grad():
        results = model(random_inputs(2, objects=0))
    for result in results:
        panoptic, infos = result["panoptic_seg"]
        assert panoptic.shape == (60, 80)
        assert not any(info["isthing"] for info in infos)
        assert set(panoptic.unique().tolist()) <= {0, *(info["id"] for info in infos)}


def test_small_stuff_becomes_void() -> None:
    model = build(TEST__SCORE_THRESH=1.0, TEST__STUFF_AREA_LIMIT=60 * 80 + 1).eval()
    panoptic, infos = model(random_inputs(1))[0]["panoptic_seg"]
    assert infos == [] and (panoptic == 0).all()


@pytest.mark.parametrize("category_ids", ["separated", "joint"])
@pytest.mark.parametrize("panoptic", ["head", "heuristic"])
def test_ids_of_segments_and_channels(category_ids: str, panoptic: str) -> None:
    model = build(CATEGORY_IDS=category_ids, TEST__PANOPTIC=panoptic).eval()
    if panoptic == "heuristic":
        model.postprocessor.heuristic.update(instances_score_thresh=0.0, stuff_area_thresh=1)
    result = model(random_inputs(1))[0]
    joint = category_ids == "joint"
    assert len(result["sem_seg"]) == NUM_STUFF + (NUM_CLASSES if joint else 1)
    panoptic_map, infos = result["panoptic_seg"]
    assert infos
    for info in infos:
        low = NUM_STUFF * joint if info["isthing"] else 1 - joint
        count = NUM_CLASSES if info["isthing"] else NUM_STUFF
        assert low <= info["category_id"] < low + count
        assert 0 < info["score"] <= 1
        assert (panoptic_map == info["id"]).any()


def test_both_merges_see_the_same_heads() -> None:
    inputs = random_inputs(1)
    head, heuristic = (build(TEST__PANOPTIC=x).eval()(inputs)[0] for x in ("head", "heuristic"))
    assert torch.equal(head["sem_seg"], heuristic["sem_seg"])
    assert torch.equal(head["instances"].scores, heuristic["instances"].scores)
    assert torch.equal(head["instances"].pred_masks, heuristic["instances"].pred_masks)


def test_more_instances_than_ids_of_a_byte() -> None:
    count = 600
    labels = torch.arange(count).repeat_interleave(4).view(1, -1) + 2
    cleaned = clean(
        labels,
        torch.full_like(labels, 2),
        torch.zeros(count, dtype=torch.int64),
        num_stuff=2,
        num_classes=3,
        stuff_area_limit=0,
    )
    panoptic, infos = segments(
        cleaned,
        torch.zeros(count, dtype=torch.int64),
        torch.ones(count),
        num_stuff=2,
        category_ids="separated",
    )
    assert len(infos) == count and panoptic.max() == count
    assert isinstance(cleaned, PanopticMap)


def test_clean_up_gives_an_instance_to_stuff_by_half_of_its_pixels() -> None:
    options = {"num_stuff": 2, "num_classes": 4, "stuff_area_limit": 0}
    labels = torch.tensor([[2, 2, 2, 2]])
    for semantic, expected in (
        ([0, 0, 2, 2], 0),  # half stuff, ties go to the lower class
        ([0, 2, 2, 3], 2),
        ([0, 3, 3, 2], 2),  # another thing
        ([0, 0, 1, 2], 0),
        ([0, 1, 2, 3], 2),  # most is stuff, but less than half
        ([1, 1, 1, 3], 1),
    ):
        cleaned = clean(labels, torch.tensor([semantic]), torch.tensor([1]), **options)
        assert (cleaned.labels == expected).all(), semantic
        assert int(cleaned.areas[expected]) == 4


def test_nearest_crops_the_padding() -> None:
    maps = torch.arange(6 * 8).view(6, 8)
    assert torch.equal(nearest(maps, (4, 6), (4, 6)), maps[:4, :6])
    assert torch.equal(nearest(maps, (4, 6), (8, 12))[::2, ::2], maps[:4, :6])
    assert nearest(maps, (4, 6), (2, 3)).tolist() == [[0, 2, 4], [16, 18, 20]]


def test_semantic_logits_at_any_size(model: UPSNet) -> None:
    score = torch.randn(NUM_STUFF + NUM_CLASSES, 10, 15)
    for image_size in ((40, 60), (33, 60), (40, 59)):
        for height in range(1, 90, 4):
            size = (height, height * 3 // 2 + 1)
            assert model.postprocessor.semantic_map(score, image_size, size).shape[1:] == size
    # At the network's own size, the logits are those of the network.
    own = model.postprocessor.semantic_map(score, (37, 58), (37, 58))
    full = torch.nn.functional.interpolate(score[None], scale_factor=4, mode="bilinear")[0]
    torch.testing.assert_close(own[1:], full[:NUM_STUFF, :37, :58])
    torch.testing.assert_close(own[0], full[NUM_STUFF:, :37, :58].amax(dim=0))


# ---------------------------------------------------------------- test-time augmentation


def test_one_view_changes_nothing(model: UPSNet) -> None:
    model.eval()
    inputs = random_inputs(2)
    plain = model(inputs)
    augmented = UPSNetWithTTA(model, min_sizes=[], max_size=4000, flip=False)(inputs)
    for a, b in zip(plain, augmented, strict=True):
        torch.testing.assert_close(a["sem_seg"], b["sem_seg"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(a["instances"].scores, b["instances"].scores)
        boxes = [x["instances"].pred_boxes.tensor for x in (a, b)]
        torch.testing.assert_close(*boxes, atol=1e-3, rtol=0)
        assert (a["panoptic_seg"][0] != b["panoptic_seg"][0]).float().mean() < 0.01


def test_a_mirrored_image_gives_the_mirrored_result() -> None:
    model = UPSNetWithTTA(build().eval(), min_sizes=[64, 96], max_size=4000, flip=True)
    # Sides that are multiples of the padding: nothing else breaks the symmetry.
    inputs = random_inputs(1, height=64, width=96)
    mirrored = [{**inputs[0], "image": inputs[0]["image"].flip(-1)}]
    (a,), (b,) = model(inputs), model(mirrored)
    torch.testing.assert_close(a["sem_seg"], b["sem_seg"].flip(-1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(a["instances"].scores, b["instances"].scores)
    boxes = b["instances"].pred_boxes.tensor[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1])
    boxes = boxes + torch.tensor([96, 0, 96, 0])
    torch.testing.assert_close(a["instances"].pred_boxes.tensor, boxes, atol=1e-2, rtol=0)
    same = a["instances"].pred_masks == b["instances"].pred_masks.flip(-1)
    assert same.float().mean() > 0.99


def test_views_of_an_image_fit_on_each_other(model: UPSNet) -> None:
    """Boxes and semantic logits go to a view and come back, for odd sizes too."""
    model.eval()
    augmented = UPSNetWithTTA(model, min_sizes=[61, 97], max_size=120, flip=True)
    image = random_inputs(1)[0]["image"]
    views = augmented.views(image)
    assert [v.size for v in views] == [(61, 81), (61, 81), (90, 120), (90, 120)]
    boxes = torch.tensor([[3.0, 4.0, 30.0, 50.0], [0.0, 0.0, 80.0, 60.0]])
    for view in views:
        there = view.to_view(boxes, (60, 80))
        torch.testing.assert_close(view.from_view(there, (60, 80)), boxes)
        assert there[1].tolist() == [0, 0, view.size[1], view.size[0]]
        # A score that tells the column of the image, at the cells of the view.
        cells = view.predictions.semantic.score.shape[-1]
        columns = (torch.arange(cells) + 0.5) * 4 / view.size[1] * 80
        columns = 80 - columns if view.flipped else columns
        told = view.predictions.semantic._replace(score=columns.expand(1, 1, 25, cells))
        told = view._replace(predictions=view.predictions._replace(semantic=told))
        score = told.score((64, 96), (60, 80), 4)
        expected = (torch.arange(24) + 0.5) * 4
        torch.testing.assert_close(score[0, 3, 1:19], expected[1:19])


def test_the_config_switches_augmentation_on(
    model: UPSNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.eval()
    cfg = tiny_config("UPSNet")
    assert build_tta(cfg, model) is model
    cfg.MODEL.UPSNET.TEST.AUG.ENABLED = True
    cfg.MODEL.UPSNET.TEST.AUG.MIN_SIZES = [40]
    predictor = BatchPredictor(cfg, model)
    assert predictor.model.model is model
    evaluated = []
    monkeypatch.setattr(
        DefaultTrainer, "test", lambda cfg, model, evaluators: evaluated.append(model)
    )
    Trainer.test(cfg, model)
    assert isinstance(evaluated[0], UPSNetWithTTA) and not evaluated[0].training
    assert [v.size for v in predictor.model.views(random_inputs(1)[0]["image"])] == [(40, 53)] * 2
    image = random_inputs(1)[0]["image"].permute(1, 2, 0).byte().numpy()
    assert predictor([image])[0]["panoptic_seg"][0].shape == (60, 80)
    cfg.MODEL.UPSNET.TEST.AUG.MIN_SIZES = [0]
    with pytest.raises(ValueError, match="MIN_SIZES"):
        build_tta(cfg, model)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("category_ids", ["separated", "joint"])
def test_pictures_change_no_number_of_the_training(category_ids: str) -> None:
    inputs = random_inputs(2)
    losses, states, pictures = [], [], []
    for period in (0, 1):
        model = build(CATEGORY_IDS=category_ids).train()
        model.vis_period = period
        # Statistics that a picture must not move.
        model.roi_heads.box_head.add_module("norm", torch.nn.BatchNorm1d(32))
        torch.manual_seed(1)
        np.random.seed(1)
        with EventStorage(0) as storage, torch.autocast("cpu", torch.bfloat16):
            losses.append({k: float(v.detach()) for k, v in model(inputs).items()})
            pictures.append(storage._vis_data)
        states.append([*model.state_dict().values(), torch.get_rng_state(), np.random.rand()])
        assert all(module.training for module in model.modules())
    assert losses[0] == losses[1]
    assert all(np.array_equal(a, b) for a, b in zip(*states, strict=True))
    assert not pictures[0]
    ((_, picture, _),) = pictures[1]
    assert picture.shape == (3, 60, 160) and 0 <= picture.min() < picture.max() <= 1
    # The annotations are the objects on two kinds of stuff, each in a colour of its own.
    left = picture[:, :, :80]
    seen = inputs[0]["image"].numpy() / 255
    assert np.abs(left - seen).mean() > 0.05
    assert np.abs(left[:, 5:25, 2:6].mean((1, 2)) - left[:, 35:55, 2:6].mean((1, 2))).max() > 0.1


# ---------------------------------------------------------------- configs and weights


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("CATEGORY_IDS", "contiguous", "CATEGORY_IDS"),
        ("TEST__PANOPTIC", "magic", "PANOPTIC"),
        ("LOSS__KEEP_FRACTION", 0.0, "KEEP_FRACTION"),
    ],
)
def test_wrong_settings(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**{key: value})


def _weightless(name: str) -> CfgNode:
    """A published config whose model is built without memory."""
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "meta"
    return cfg


def test_deformable_backbone_of_the_published_config() -> None:
    cfg = _weightless("upsnet/upsnet_R_101_dcn_coco.yaml")
    with torch.device("meta"):
        model = build_model(cfg)
    stages = {n: getattr(model.backbone.bottom_up, n) for n in ("res2", "res3", "res4", "res5")}
    assert [len(s) for s in stages.values()] == [3, 4, 23, 3]
    for name, stage in stages.items():
        for block in stage:
            assert isinstance(block.conv2, DeformConv) == (name != "res2")
            assert isinstance(block.conv1.norm, FrozenBatchNorm2d)
        if name != "res2":
            assert stage[0].conv1.stride == (2, 2) and stage[0].conv2.stride == 1
            assert stage[0].conv2.bias is None and stage[0].conv2.offset.bias is not None
    # What the converter makes of the published names of a deformable block.
    prefix = "resnet_backbone.res4.layers.7."
    published = {
        "fcn_head.score.weight": torch.zeros(133, 512, 1, 1),
        f"{prefix}conv2.weight": torch.zeros(1),
        f"{prefix}conv2_offset.weight": torch.zeros(1),
        f"{prefix}conv2_offset.bias": torch.zeros(1),
        f"{prefix}bn2.running_mean": torch.zeros(1),
    }
    assert set(convert_state_dict("upsnet", published)) <= set(model.state_dict())


def test_frozen_parts_of_the_published_config() -> None:
    with torch.device("meta"):
        model = build_model(_weightless("upsnet/upsnet_R_50_cityscapes.yaml"))
    frozen = {n.split(".")[2] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "res2"}
    assert not hasattr(model.backbone, "fpn_context")
    assert isinstance(model.sem_seg_head.layers[1], DeformConv)
    assert [x.weight.shape[:2] for x in model.sem_seg_head.layers] == [(128, 256), (128, 128)]
    assert model.semantic_roi_weight == 0


def test_imagenet_weights_load_into_the_backbone(tmp_path: Any) -> None:
    """Published ImageNet files of caffe-style ResNets have torchvision's names."""
    model = build()
    bottom_up = model.backbone.bottom_up
    names = {}
    for name, value in bottom_up.state_dict().items():
        name = name.replace("stem.conv1.norm", "bn1").replace("stem.conv1", "conv1")
        name = name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
        for i in (1, 2, 3):
            name = name.replace(f".conv{i}.norm", f".bn{i}")
        for stage in (2, 3, 4):
            name = name.replace(f"res{stage}.", f"layer{stage - 1}.")
        names[name] = torch.full_like(value, 0.25)
    torch.save(names, tmp_path / "imagenet.pth")
    Checkpointer(model, fit="finetune").load(str(tmp_path / "imagenet.pth"))
    values = bottom_up.state_dict()
    assert all((values[name] == 0.25).all() for name in values if "num_batches" not in name)
    assert not (model.sem_seg_head.score.weight == 0.25).any()


def test_converter_refuses_strangers() -> None:
    with pytest.raises(ConversionError, match=r"fcn_head\.score"):
        convert_state_dict("upsnet", {"conv1.weight": torch.zeros(1)})
    with pytest.raises(ConversionError, match="not known"):
        convert_state_dict(
            "upsnet", {"fcn_head.score.weight": torch.zeros(1), "fcn_head.odd": torch.zeros(1)}
        )


def test_classes_are_reordered_and_cityscapes_starts_from_coco() -> None:
    """Each row holds its own number."""

    def rows(count: int, per_class: int = 1) -> dict[str, Tensor]:
        numbers = torch.arange(count).repeat_interleave(per_class).float()
        return {"weight": numbers[:, None].repeat(1, 2), "bias": numbers}

    published = {
        f"{name}.{leaf}": value
        for name, count, per_class in (
            ("rcnn.cls_score", 81, 1),
            ("rcnn.bbox_pred", 81, 4),
            ("mask_branch.mask_score", 81, 1),
            ("fcn_head.score", 133, 1),
        )
        for leaf, value in rows(count, per_class).items()
    }
    ours = convert_state_dict("upsnet", published)
    predictor = "roi_heads.box_predictor."
    assert ours[predictor + "cls_score.bias"].tolist() == [*range(1, 81), 0]
    boxes = ours[predictor + "bbox_pred.weight"][:, 0]
    assert boxes.tolist() == np.repeat(np.arange(1, 81), 4).tolist()
    assert ours["roi_heads.mask_head.predictor.bias"].tolist() == list(range(1, 81))
    assert ours["sem_seg_head.score.bias"].tolist() == list(range(133))

    start = convert_state_dict("upsnet_coco_to_cityscapes", published)
    # person, (rider), car, truck, bus, train, motorcycle, bicycle, background
    assert start[predictor + "cls_score.bias"].tolist() == [1, 0, 3, 8, 6, 7, 4, 2, 0]
    assert start[predictor + "bbox_pred.weight"][4:8].abs().max() < 0.1
    assert start[predictor + "bbox_pred.bias"].tolist()[8:12] == [3, 3, 3, 3]
    semantic = start["sem_seg_head.score.bias"].tolist()
    expected = [20, 43, 49, 51, 37, 0, 62, 0, 36, 0, 39, 53, 0, 55, 60, 58, 59, 56, 54]
    assert semantic == expected
    assert start["sem_seg_head.score.weight"][5].abs().max() < 0.1


def test_instances_carry_the_documented_fields(model: UPSNet) -> None:
    model.eval()
    instances: Instances = model(random_inputs(1))[0]["instances"]
    assert set(instances.get_fields()) == {"pred_boxes", "scores", "pred_classes", "pred_masks"}
