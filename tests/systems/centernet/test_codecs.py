"""CenterNet's pre-processing, targets, losses and decoding against the published code, map by map."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from fvcore.transforms.transform import Transform, TransformList
from torch import Tensor

from d2ext import model_zoo
from d2ext.codecs.affine import affine_matrix
from d2ext.config import get_cfg
from d2ext.data import D2extDatasetMapper, PoseMapper
from d2ext.data.augmentations.affine import PixelMirrorTransform, WarpTransform
from d2ext.layers.opencv_resample import resize_like_opencv
from d2ext.systems.centernet.losses import CenterNetCriterion
from d2ext.systems.centernet.postprocess import (
    CenterDetections,
    decode,
    merge_mirrored,
    merge_scales,
)
from d2ext.systems.centernet.preprocess import padded_canvas, warped_canvas
from d2ext.systems.centernet.targets import (
    CenterNetTargets,
    ObjectAnnotations,
    dense_targets,
    encode_targets,
    read_annotations,
)
from tests.reference.fixture import Fixture, draw_image, draw_tensor
from tests.systems.fixture_files import classes, coco_annotation, load_batch, write_coco

REFERENCE = Path(__file__).parents[2] / "reference" / "centernet"
FLIP_PAIRS = [(i, i + 1) for i in range(1, 17, 2)]
MEAN, STD = np.array([0.408, 0.447, 0.47]), np.array([0.289, 0.274, 0.278])

TRAINING = (
    np.array([0.40789654, 0.44719302, 0.47026115]),
    np.array([0.28863828, 0.27408164, 0.27809835]),
)
# Width and height of the fixture's picture and of the network's input.
WARPED = (260, 220, 256, 256)


def _normalized(canvas: Tensor, mean: np.ndarray = MEAN, std: np.ndarray = STD) -> np.ndarray:
    return ((canvas.permute(1, 2, 0).numpy() / 255 - mean) / std).transpose(2, 0, 1)


# ---------------------------------------------------------------- pre-processing


@pytest.mark.parametrize("kind", ["fix_res", "keep_res", "keep_res_hourglass"])
@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("scale", [1.0, 0.5, 1.25])
def test_network_inputs(kind: str, number: int, scale: float) -> None:
    fixture = Fixture(REFERENCE / "preprocessing")
    height, width, seed = ((300, 420, 5), (260, 130, 6))[number]
    image = torch.from_numpy(draw_image(height, width, seed)).permute(2, 0, 1)
    divisibility = 128 if kind == "keep_res_hourglass" else 32
    place = (
        warped_canvas((height, width), scale, (256, 256))
        if kind == "fix_res"
        else padded_canvas((height, width), scale, divisibility)
    )
    if scale != 1:
        image = resize_like_opencv(image, *place.content)
    canvas = place.draw(image)
    name = f"{kind}_image{number}_scale{scale}"
    # With a resize before it, a byte in a thousand differs by one.
    tolerance = 1e-6 if scale != 1.25 else 2e-4
    assert fixture.compare(name, _normalized(canvas)[None]) < tolerance
    # The way back: published centre and side, output cells.
    x, y, side, *_, rows, columns = fixture.expected[f"{name}_meta"]
    # `meta` may hold the size of the output map or of the input
    cells = 1 if rows * 4 == canvas.shape[1] else 4
    middle = torch.tensor([columns / cells / 2, rows / cells / 2])
    np.testing.assert_allclose(place.to_image(middle, 4) * scale, [x, y], rtol=1e-5)
    assert float(place.affine(4)[0, 0]) * scale == pytest.approx(side / (columns / cells))


def test_points_return_to_the_image() -> None:
    fixture = Fixture(REFERENCE / "preprocessing")
    place = warped_canvas((300, 420), 1.0, (512, 512))
    points = torch.tensor([[0.0, 0.0], [10.5, 3.25], [127.0, 127.0]])
    np.testing.assert_allclose(
        place.to_image(points, 4), fixture.expected["transform_preds"], rtol=1e-5, atol=1e-3
    )


# ---------------------------------------------------------------- targets


def _boxes(fixture: Fixture) -> tuple[Tensor, Tensor]:
    listed = torch.tensor(
        fixture.manifest["inputs"]["boxes_x1_y1_x2_y2_category"], dtype=torch.float64
    )
    return listed[:, :4], listed[:, 4].long() - 1


def _keypoints(boxes: Tensor) -> Tensor:
    """(6, 17, 3), as the manifest says they are drawn."""
    share = np.minimum(np.abs(draw_tensor("keypoints", (6, 17, 2), seed=5)) / 3, 1.2)
    place = boxes[:, None, :2].numpy() + share * (boxes[:, 2:] - boxes[:, :2])[:, None].numpy()
    visible = draw_tensor("keypoint_visible", (6, 17), seed=5) > -0.6
    visible[2] = False
    points = np.concatenate([place, np.full((6, 17, 1), 2.0)], axis=2) * visible[..., None]
    return torch.from_numpy(points)


def _plain_map(points: Tensor, side: int) -> Tensor:
    """Points of the 220 x 260 image in a map of ``side`` cells, letter-boxed; (..., 2)."""
    return (points - torch.tensor([130.0, 110.0])) * (side / 260) + side / 2


def _plain(side: int, *, pose: bool) -> ObjectAnnotations:
    fixture = Fixture(REFERENCE / "targets")
    boxes, classes = _boxes(fixture)
    mapped = _plain_map(boxes.view(-1, 2, 2), side).view(-1, 4).float()
    if not pose:
        return ObjectAnnotations(mapped, classes)
    joints = _keypoints(boxes)
    joints[..., :2] = _plain_map(joints[..., :2], side)
    return ObjectAnnotations(mapped, torch.zeros_like(classes), joints.float())


def _compare_detection(targets: CenterNetTargets, fixture: Fixture, name: str) -> None:
    expected, slots = fixture.expected, targets.index.shape[1]
    assert fixture.compare(f"{name}_hm", targets.heatmap[0]) < 1e-6
    mask = expected[f"{name}_reg_mask"]
    np.testing.assert_array_equal(targets.mask[0], mask[:slots])
    assert not mask[slots:].any() and mask.any()
    # Persons without joints have an index in the published lists, too, but no weight.
    index, size = targets.index[0], targets.size[0]
    np.testing.assert_array_equal(
        index[targets.mask[0]], expected[f"{name}_ind"][:slots][mask[:slots] > 0]
    )
    trained = mask[:slots, None] > 0
    np.testing.assert_allclose(size * trained, expected[f"{name}_wh"][:slots] * trained, atol=1e-4)
    offset = expected[f"{name}_reg"][:slots]
    np.testing.assert_allclose(targets.offset[0] * trained, offset * trained, atol=1e-4)


# Centre and side of the window, pixels of the image; 0.1 and 0.4 are the published deviations.
WINDOWS = {
    "plain": ((130.0, 110.0), 260.0),
    "crop_flip": ((260 - 140 - 1.0, 97.0), 260 * 0.9),
    "shift_scale": ((130 + 260 * 0.1 * 0.4, 110 - 260 * 0.1 * 1.1), 260 * (1 + 0.4 * 0.6)),
}


@pytest.mark.parametrize("name", list(WINDOWS))
def test_detection_targets(name: str, tmp_path: Path) -> None:
    """From files of a picture and its boxes, through the loader, with the recorded random numbers."""
    fixture = Fixture(REFERENCE / "targets")
    listed = fixture.manifest["inputs"]["boxes_x1_y1_x2_y2_category"]
    annotations = [coco_annotation(x[:4], int(x[4]) - 1) for x in listed]
    image = draw_image(220, 260, seed=5)
    files = write_coco(tmp_path, [image], [annotations], classes(80))
    steps: list[Transform] = [WarpTransform(affine_matrix(*WINDOWS[name], (256, 256)), *WARPED)]
    if name == "crop_flip":
        steps.insert(0, PixelMirrorTransform(260))
    cfg = model_zoo.get_config("centernet/centernet_R_18_dcn_512.yaml")
    (sample,) = load_batch(cfg, files, [steps])
    assert fixture.compare(f"{name}_input", _normalized(sample["image"], *TRAINING)) < 1e-5
    targets = encode_targets([read_annotations(sample, 4, 0)], (64, 64), 80)
    _compare_detection(targets, fixture, name)


def test_targets_of_kept_resolution() -> None:
    fixture = Fixture(REFERENCE / "targets")
    boxes, classes = _boxes(fixture)
    image = torch.from_numpy(draw_image(220, 260, seed=5)).permute(2, 0, 1)
    place = padded_canvas((220, 260), 1.0, 32)
    canvas = place.draw(image)
    assert fixture.compare("keep_res_input", _normalized(canvas, *TRAINING)) < 1e-5
    cells = (boxes - torch.tensor(place.corner * 2)) * place.scale / 4
    targets = encode_targets([ObjectAnnotations(cells.float(), classes)], (56, 72), 80)
    assert fixture.compare("keep_res_hm", targets.heatmap[0]) < 1e-6


def test_training_at_kept_resolution(tmp_path: Path) -> None:
    """A picture and its boxes through recipe, mapper and targets."""
    fixture = Fixture(REFERENCE / "targets")
    cfg = get_cfg()
    cfg.INPUT.AUGMENTATION.NAME = "centernet"
    cfg.INPUT.AUGMENTATION.AFFINE.MODE = "keep"
    cfg.INPUT.AUGMENTATION.FLIP_PROB = 0.0
    cfg.INPUT.AUGMENTATION.COLOR_JITTER = cfg.INPUT.AUGMENTATION.LIGHTING = 0.0
    record = _pose_record(tmp_path)
    for annotation, label in zip(record["annotations"], _boxes(fixture)[1].tolist(), strict=True):
        annotation["category_id"] = label
    sample = D2extDatasetMapper(cfg, True)(record)
    assert fixture.compare("keep_res_input", _normalized(sample["image"], *TRAINING)) < 1e-5
    targets = encode_targets([read_annotations(sample, 4, 0)], (56, 72), 80)
    assert fixture.compare("keep_res_hm", targets.heatmap[0]) < 1e-6
    # A divisible side grows, too.
    cfg.INPUT.AUGMENTATION.AFFINE.DIVISIBILITY = 20
    sample = D2extDatasetMapper(cfg, True)(record)
    assert sample["image"].shape == (3, 240, 280)


def _pose_record(tmp_path: Path) -> dict[str, Any]:
    """The fixture's picture and persons as a record; keypoints with Detectron2's half pixel."""
    cv2.imwrite(str(tmp_path / "image.png"), draw_image(220, 260, seed=5))
    boxes, _ = _boxes(Fixture(REFERENCE / "targets"))
    joints = _keypoints(boxes)
    joints[..., :2] += 0.5 * (joints[..., 2:] > 0)
    annotations = [
        {
            "bbox": box.tolist(),
            "bbox_mode": BoxMode.XYXY_ABS,
            "category_id": 0,
            "keypoints": points.flatten().tolist(),
        }
        for box, points in zip(boxes, joints, strict=True)
    ]
    return {"file_name": str(tmp_path / "image.png"), "annotations": annotations}


def _pose_mapper() -> PoseMapper:
    order = list(range(17))
    for left, right in FLIP_PAIRS:
        order[left], order[right] = right, left
    return PoseMapper(
        True,
        augmentations=[],
        image_format="BGR",
        use_keypoint=True,
        keypoint_hflip_indices=np.array(order),
    )


@pytest.mark.parametrize("name", ["pose_plain", "pose_crop_flip"])
def test_pose_targets(name: str, tmp_path: Path) -> None:
    """From a file of a picture and its annotations, through the mapper."""
    fixture = Fixture(REFERENCE / "targets")
    steps: list[Transform] = [WarpTransform(affine_matrix((130, 110), 260, (256, 256)), *WARPED)]
    if name == "pose_crop_flip":
        matrix = affine_matrix((260 - 140 - 1, 97), 260 * 0.9, (256, 256))
        steps = [PixelMirrorTransform(260), WarpTransform(matrix, *WARPED)]
    sample, _ = _pose_mapper().map(_pose_record(tmp_path), TransformList(steps))
    assert fixture.compare(f"{name}_input", _normalized(sample["image"], *TRAINING)) < 1e-5
    annotations = read_annotations(sample, 4, 17)
    targets = encode_targets([annotations], (64, 64), 1, max_objects=32)
    _compare_detection(targets, fixture, name)
    # box 2 has no joint: a positive that is not regressed
    assert targets.heatmap[0, 0].flatten()[targets.index[0, 2]] == 1 and not targets.mask[0, 2]
    _compare_joints(targets, fixture, name)


def _compare_joints(targets: CenterNetTargets, fixture: Fixture, name: str) -> None:
    joints, expected = targets.joints, fixture.expected
    assert joints is not None
    slots = joints.position.shape[1]
    assert fixture.compare(f"{name}_hm_hp", joints.heatmap[0]) < 1e-6
    trained = joints.position_mask[0]
    np.testing.assert_allclose(
        joints.position[0] * trained, expected[f"{name}_hps"][:slots] * trained.numpy(), atol=1e-4
    )
    np.testing.assert_array_equal(joints.position_mask[0], expected[f"{name}_hps_mask"][:slots])
    assert not expected[f"{name}_hps_mask"][slots:].any()
    # the published lists are stored up to the sixth person
    mask = expected[f"{name}_hp_mask"][: 17 * slots] > 0
    assert not expected[f"{name}_hp_mask"][17 * slots :].any()
    np.testing.assert_array_equal(joints.offset_mask[0], mask)
    index, offset = expected[f"{name}_hp_ind"], expected[f"{name}_hp_offset"]
    np.testing.assert_array_equal(joints.index[0][mask], index[: 17 * slots][mask])
    np.testing.assert_allclose(joints.offset[0][mask], offset[: 17 * slots][mask], atol=1e-4)


def test_targets_of_a_rotated_image(tmp_path: Path) -> None:
    """Its joints' heat maps and offsets are trained, and nothing else."""
    fixture, name = Fixture(REFERENCE / "targets"), "pose_crop_flip_rotate"
    center, side = (110, 120), 260 * 1.2
    warp = WarpTransform(
        affine_matrix(center, side, (256, 256), 25 * 0.35),
        *WARPED,
        box_matrix=affine_matrix(center, side, (256, 256)),
    )
    sample, _ = _pose_mapper().map(_pose_record(tmp_path), TransformList([warp]))
    targets = encode_targets([read_annotations(sample, 4, 17)], (64, 64), 1, max_objects=32)
    assert fixture.compare(f"{name}_hm", targets.heatmap[0]) < 1e-7
    assert not targets.mask.any() and not fixture.expected[f"{name}_reg_mask"].any()
    _compare_joints(targets, fixture, name)
    assert not dense_targets(targets, joints=True).weights.any()
    # Another image of the batch is as without it.
    plain = _plain(64, pose=True)
    both = encode_targets([read_annotations(sample, 4, 17), plain], (64, 64), 1)
    alone = encode_targets([plain], (64, 64), 1)
    assert both.heatmap[1].equal(alone.heatmap[0]) and both.mask[1].equal(alone.mask[0])


def test_joints_outside_the_crop_count_as_annotated(tmp_path: Path) -> None:
    """A person of whom only a part without joints is in the picture trains its size."""
    record = _pose_record(tmp_path)
    (person,) = record["annotations"] = record["annotations"][:1]
    person["bbox"] = [20.0, 30.0, 200.0, 200.0]
    person["keypoints"] = [30.5, 40.5, 1.0] + 48 * [0.0]
    warp = WarpTransform(affine_matrix((150, 150), 128, (256, 256)), *WARPED)
    sample, _ = _pose_mapper().map(record, TransformList([warp]))
    # 2 * (30 - 150) + 128, and Detectron2's half pixel
    np.testing.assert_allclose(sample["instances"].gt_keypoints.tensor[0, 0], [-111.5, -91.5, 1])
    targets = encode_targets([read_annotations(sample, 4, 17)], (64, 64), 1)
    assert targets.mask.tolist() == [[True]]
    assert targets.joints is not None and not targets.joints.offset_mask.any()


def test_dense_targets() -> None:
    fixture = Fixture(REFERENCE / "targets")
    targets = encode_targets([_plain(64, pose=False)], (64, 64), 80)
    dense = dense_targets(targets, joints=False)
    assert fixture.compare("dense_wh", dense.values[0]) < 1e-5
    assert fixture.compare("dense_wh_mask", dense.weights[0]) < 1e-5
    with pytest.raises(ValueError, match="no joints"):
        dense_targets(targets, joints=True)
    targets = encode_targets([_plain(64, pose=True)], (64, 64), 1)
    dense = dense_targets(targets, joints=True)
    assert fixture.compare("pose_dense_hps", dense.values[0]) < 1e-5
    assert fixture.compare("pose_dense_hps_mask", dense.weights[0]) < 1e-5


# ---------------------------------------------------------------- losses

# published head → ours, channels, factor and shift of the drawn maps
MAPS: dict[str, tuple[str, int, float, float]] = {
    "hm": ("heatmap", 80, 1.5, -2.5),
    "wh": ("size", 2, 4.0, 8.0),
    "reg": ("offset", 2, 0.3, 0.5),
    "hps": ("joints", 34, 3.0, 0.0),
    "hm_hp": ("joint_heatmap", 17, 1.5, -2.5),
    "hp_offset": ("joint_offset", 2, 0.3, 0.5),
}
TERMS = {
    "hm_loss": "loss_heatmap",
    "wh_loss": "loss_size",
    "off_loss": "loss_offset",
    "hp_loss": "loss_joint",
    "hm_hp_loss": "loss_joint_heatmap",
    "hp_offset_loss": "loss_joint_offset",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "l1": {},
    "sl1": {"regression": "smooth_l1"},
    # --norm_wh has no effect in the published code
    "norm_wh": {},
    "dense_wh": {"size_target": "dense"},
    "cat_spec_wh": {"size_target": "class_specific"},
    "two_stacks": {},
    "pose": {},
    "pose_dense_hp": {"joint_target": "dense"},
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_losses(variant: str) -> None:
    fixture = Fixture(REFERENCE / "losses")
    pose = variant.startswith("pose")
    targets = encode_targets([_plain(32, pose=pose)], (32, 32), 1 if pose else 80)
    stacks = []
    for s in range(2 if variant == "two_stacks" else 1):
        maps = {}
        for name, (ours, channels, factor, shift) in MAPS.items():
            if not pose and name.startswith(("hp", "hm_hp")):
                continue
            if name == "hm" and pose:
                channels = 1
            if name == "wh" and variant == "cat_spec_wh":
                channels = 160
            drawn = draw_tensor(f"{name}_{s}", (1, channels, 32, 32), seed=5)
            maps[ours] = torch.from_numpy(drawn * np.float32(factor) + np.float32(shift))
            maps[ours].requires_grad_()
        stacks.append(maps)
    criterion = CenterNetCriterion(**VARIANTS[variant])
    losses = criterion(stacks, targets)
    total = sum(losses.values())
    assert total.item() == pytest.approx(float(fixture.expected[f"{variant}_loss"]), rel=1e-5)
    for theirs, ours in TERMS.items():
        if f"{variant}_{theirs}" in fixture.expected:
            expected = float(fixture.expected[f"{variant}_{theirs}"]) * criterion.weights[ours]
            assert losses[ours].item() == pytest.approx(expected, rel=1e-4), theirs
        else:
            assert ours not in losses
    total.backward()
    for s, maps in enumerate(stacks):
        for name, (ours, *_) in MAPS.items():
            if ours in maps:
                assert fixture.compare(f"{variant}_grad_{name}_{s}", maps[ours].grad) < 1e-4, name


def test_squared_error_of_heat_maps_is_of_the_maps_before_the_sigmoid() -> None:
    targets = encode_targets([_plain(32, pose=True)], (32, 32), 1)
    assert targets.joints is not None
    maps = {"heatmap": targets.heatmap + 2, "joint_heatmap": targets.joints.heatmap - 3}
    sizes = (("size", 2), ("offset", 2), ("joints", 34), ("joint_offset", 2))
    maps |= {name: torch.zeros(1, channels, 32, 32) for name, channels in sizes}
    losses = CenterNetCriterion(heatmap="mse", joint_heatmap_weight=0.5)([maps], targets)
    assert losses["loss_heatmap"].item() == pytest.approx(4)
    assert losses["loss_joint_heatmap"].item() == pytest.approx(9 * 0.5)
    with pytest.raises(ValueError, match=r"LOSS\.HEATMAP is one of .*'mse'"):
        CenterNetCriterion(heatmap="l2")


# ---------------------------------------------------------------- decoding


def _drawn(number: int, batch: int, height: int, width: int, *, pose: bool, size: int = 2) -> dict:
    """Maps of the decode case; heat maps as probabilities."""
    shapes = {"hm": 1 if pose else 6, "wh": size, "reg": 2}
    shapes |= {"hps": 34, "hm_hp": 17, "hp_offset": 2} if pose else {}
    maps = {}
    for name, channels in shapes.items():
        drawn = draw_tensor(f"decode_{name}_{number}", (batch, channels, height, width), seed=19)
        factor, shift = {"wh": (3, 9), "hps": (3, 0)}.get(name, (0.2, 0.5))
        if name.startswith("hm"):
            factor, shift = 1.2, -2
        value = torch.from_numpy(drawn) * factor + shift
        maps[MAPS[name][0]] = value.sigmoid() if name.startswith("hm") else value
    return maps


def _rows(detections) -> np.ndarray:
    """Of one image: box, score, joints if any, class."""
    columns = [detections.boxes, detections.scores[:, None]]
    if detections.joints is not None:
        columns.append(detections.joints)
    return torch.cat([*columns, detections.classes[:, None].float()], dim=1).numpy()


def _of_first(detections: CenterDetections) -> CenterDetections:
    return CenterDetections(*(None if x is None else x[0] for x in detections))


def _assert_close(actual: np.ndarray, expected: np.ndarray, pixels: float = 0.05) -> None:
    """Same rows in the same order, but for equal scores."""
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual[:, 4], expected[:, 4], atol=1e-5)
    for row in expected:
        near = np.abs(actual[:, 4] - row[4]) < 1e-4
        assert (np.abs(actual[near] - row) < pixels).all(axis=1).any(), row


def test_decoded_boxes() -> None:
    expected = Fixture(REFERENCE / "decode").expected
    maps = _drawn(0, 1, 40, 56, pose=False)
    _assert_close(_rows(_of_first(decode(maps))), expected["ct_decode"], 1e-3)
    without = {k: v for k, v in maps.items() if k != "offset"}
    _assert_close(_rows(_of_first(decode(without, 50))), expected["ct_decode_no_reg"], 1e-3)
    maps["size"] = torch.from_numpy(draw_tensor("decode_wh_1", (1, 12, 40, 56), seed=19)) * 3 + 9
    _assert_close(_rows(_of_first(decode(maps))), expected["ct_decode_cat_spec_wh"], 1e-3)


@pytest.mark.parametrize(
    ("case", "left_out"),
    [
        ("pose_decode", ()),
        ("pose_decode_no_hm_hp", ("joint_heatmap",)),
        ("pose_decode_no_offsets", ("offset", "joint_offset")),
    ],
)
def test_decoded_poses(case: str, left_out: tuple[str, ...]) -> None:
    expected = Fixture(REFERENCE / "decode").expected
    maps = _drawn(2, 1, 40, 56, pose=True)
    detections = decode({k: v for k, v in maps.items() if k not in left_out})
    _assert_close(_rows(_of_first(detections)), expected[case], 1e-3)


@pytest.mark.parametrize(
    ("case", "scales", "soft_nms"),
    [
        ("ct_flip", (1.0,), False),
        ("ct_multi_scale", (0.5, 0.75, 1.0, 1.25, 1.5), True),
        ("ct_fix_res_nms", (1.0,), True),
        ("pose_flip", (1.0,), False),
        ("pose_multi_scale", (0.5, 1.0, 1.5), True),
    ],
)
def test_whole_runs(case: str, scales: tuple[float, ...], soft_nms: bool) -> None:
    """An image of 200 x 300: mirror merging, the way back, soft-NMS over scales."""
    fixture = Fixture(REFERENCE / "decode")
    expected, pose = fixture.expected[case], case.startswith("pose")
    fixed = (256, 256) if case == "ct_fix_res_nms" else None
    detections = []
    for i, scale in enumerate(scales):
        place = (
            padded_canvas((200, 300), scale, 32)
            if fixed is None
            else warped_canvas((200, 300), scale, fixed)
        )
        batch, height, width = fixture.manifest["inputs"]["run_shapes"][case][i]
        assert place.size == (4 * height, 4 * width)
        maps = _drawn(i, batch, height, width, pose=pose)
        if batch == 2:
            maps = merge_mirrored(maps, FLIP_PAIRS)
        one = _of_first(decode(maps))
        detections.append(one.map_points(partial(place.to_image, stride=4)))
    result = merge_scales(detections, None if pose else 100) if soft_nms else detections[0]
    rows = _rows(result)
    if pose:
        rows = rows[:, :-1]
        order = np.argsort(-expected[:, 4], kind="stable")
        _assert_close(rows, expected[order])
    else:
        listed = np.concatenate([expected[:, 1:6], expected[:, :1]], axis=1)
        _assert_close(rows, listed[np.argsort(-listed[:, 4], kind="stable")])


def _published_soft_nms(rows: np.ndarray) -> np.ndarray:
    """The rounds on an array of poses, in place, as the notes describe them: boxes and scores are
    copied over what is discarded, joints (the columns from 5 on) change places with it."""
    count, i = len(rows), 0
    while i < count:
        best = i + int(rows[i:count, 4].argmax())
        rows[[i, best]] = rows[[best, i]]
        x1, y1, x2, y2 = rows[i, :4]
        place = i + 1
        while place < count:
            b = rows[place]
            w, h = min(x2, b[2]) - max(x1, b[0]) + 1, min(y2, b[3]) - max(y1, b[1]) + 1
            if w > 0 and h > 0:
                areas = (x2 - x1 + 1) * (y2 - y1 + 1) + (b[2] - b[0] + 1) * (b[3] - b[1] + 1)
                b[4] *= np.exp(-((w * h / (areas - w * h)) ** 2) / 0.5)
                if b[4] < 0.001:
                    last = rows[count - 1].copy()
                    rows[count - 1, 5:] = b[5:]
                    b[:] = last
                    count -= 1
                    continue
            place += 1
        i += 1
    return rows


@pytest.mark.parametrize("score, replaced", [(0.105, True), (0.095, False)])
def test_peaks_of_joints_count_from_a_tenth(score: float, replaced: bool) -> None:
    maps = {
        "heatmap": torch.zeros(1, 1, 16, 16),
        "size": torch.full((1, 2, 16, 16), 12.0),
        "joints": torch.zeros(1, 2, 16, 16),
        "joint_heatmap": torch.zeros(1, 1, 16, 16),
        "joint_offset": torch.full((1, 2, 16, 16), 0.25),
    }
    maps["heatmap"][0, 0, 8, 8] = 0.9
    maps["joint_heatmap"][0, 0, 9, 10] = score
    joints = decode(maps, 1).joints
    assert joints is not None
    assert joints[0, 0].tolist() == ([10.25, 9.25] if replaced else [8, 8])


@pytest.mark.parametrize("apart, lowest", [(0, 0.002), (500, 0.0002)])
def test_stale_poses_have_foreign_joints(apart: float, lowest: float) -> None:
    """Also of two crowds ``apart``, with poses that only an overlap discards."""
    generator = np.random.default_rng(0)
    low = generator.uniform(0, 30, (60, 2))
    low[1::2] += apart
    boxes = np.concatenate([low, low + generator.uniform(30, 50, (60, 2))], axis=1)
    scores = np.geomspace(0.3, lowest, 60)[:, None]
    # joints that say whose they are
    joints = np.repeat(np.arange(60.0)[:, None], 4, axis=1)
    rows = np.concatenate([boxes, scores, joints], axis=1)
    expected = _published_soft_nms(rows.copy())
    owners = expected[:, 5]
    assert len(np.unique(owners)) == 60 > len(np.unique(expected[:, 0]))  # some rows are stale
    tensor = torch.from_numpy(rows).float()
    detections = CenterDetections(
        tensor[:, :4],
        tensor[:, 4],
        torch.zeros(60, dtype=torch.int64),
        torch.zeros(60, 2),
        tensor[:, 5:],
    )
    merged = merge_scales(
        [
            CenterDetections(*(x[:25] for x in detections)),
            CenterDetections(*(x[25:] for x in detections)),
        ],
        None,
    )
    order = np.argsort(-expected[:, 4], kind="stable")
    assert merged.joints is not None
    np.testing.assert_array_equal(merged.joints[:, 0], owners[order])
    np.testing.assert_allclose(merged.boxes, expected[order, :4], rtol=1e-5)
    np.testing.assert_allclose(merged.scores, expected[order, 4], rtol=1e-4)
