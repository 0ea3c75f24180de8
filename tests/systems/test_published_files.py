"""Each whole published model, by the way of a user: its file of weights, through ``d2ext convert``, and
its pictures in files, through a predictor, give the published detections."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Instances

from d2ext import VideoPredictor, model_zoo
from d2ext.codecs.densepose import charts_in_boxes, quantize
from d2ext.data import build_test_loader
from d2ext.data.custom import register_own_dataset
from d2ext.systems.upsnet.boxes import inclusive
from d2ext.tools import convert
from tests.reference.fixture import Fixture, draw_image
from tests.systems.corner_cases import assert_detections

REFERENCE = Path(__file__).parents[1] / "reference"


def rows(instances: Instances) -> np.ndarray:
    """Class, x1, y1, x2, y2, score."""
    columns = (
        instances.pred_classes[:, None],
        instances.pred_boxes.tensor,
        instances.scores[:, None],
    )
    return torch.cat(columns, dim=1).numpy()


def pictures(inputs: dict[str, Any]) -> list[np.ndarray]:
    """The pictures of a fixture, BGR."""
    frames = inputs["frames"] if "frames" in inputs else [inputs["image"]]
    if isinstance(frames, dict):  # VPSNet's: columns of one picture
        whole = draw_image(*(frames[name] for name in ("height", "width", "seed")))
        return [whole[:, 4 * t : 4 * t + 256] for t in range(3)]
    drawn = []
    for frame in frames:
        if isinstance(frame, str):
            height, width, seed = map(int, re.findall(r"\d+", frame)[:3])
        else:
            listed = frame.get("draw_image", frame)
            height, width, seed = (listed[name] for name in ("height", "width", "seed"))
        crop = frame.get("crop") if isinstance(frame, dict) else None
        crop = crop or {"top": 0, "left": 0, "height": height, "width": width}
        bottom, right = crop["top"] + crop["height"], crop["left"] + crop["width"]
        image = draw_image(height, width, seed)
        drawn.append(image[crop["top"] : bottom, crop["left"] : right])
    return drawn


def check_boxes(name: str) -> Callable[..., None]:
    def check(fixture: Fixture, frame: int, outputs: dict[str, Any]) -> None:
        assert_detections(rows(outputs["instances"]), fixture.expected[name])

    return check


def check_masks(fixture: Fixture, frame: int, outputs: dict[str, Any]) -> None:
    prefix = f"frame{frame}.final" if f"frame{frame}.final.boxes" in fixture.expected else "final"
    expected = {
        x: fixture.expected[f"{prefix}.{x}"] for x in ("classes", "boxes", "scores", "masks")
    }
    found = outputs["instances"][: len(expected["classes"])]
    np.testing.assert_array_equal(found.pred_classes, expected["classes"])
    np.testing.assert_allclose(found.scores, expected["scores"], atol=1e-4)
    np.testing.assert_allclose(found.pred_boxes.tensor, expected["boxes"], atol=0.05)
    masks, published = found.pred_masks.numpy(), expected["masks"].astype(bool)
    union = (masks | published).sum(axis=(1, 2))
    overlap = (masks & published).sum(axis=(1, 2))
    assert (overlap >= 0.999 * union).all(), overlap / union.clip(1)


def check_faces(fixture: Fixture, frame: int, outputs: dict[str, Any]) -> None:
    found, expected = outputs["instances"], fixture.expected["detections"]
    points = found.pred_keypoints[..., :2].flatten(1)
    actual = torch.cat([found.pred_boxes.tensor, found.scores[:, None], points], dim=1)
    np.testing.assert_allclose(actual, expected, atol=0.01)
    np.testing.assert_allclose(actual[:, 4], expected[:, 4], atol=1e-5)


def check_surfaces(fixture: Fixture, frame: int, outputs: dict[str, Any]) -> None:
    found, expected = outputs["instances"], fixture.expected
    assert found.pred_classes.tolist() == expected["detections.classes"].tolist()
    np.testing.assert_allclose(found.scores, expected["detections.scores"], atol=1e-4)
    np.testing.assert_allclose(found.pred_boxes.tensor, expected["detections.boxes"], atol=0.01)
    boxes = torch.from_numpy(expected["detections.boxes"])
    for k, result in enumerate(charts_in_boxes(found.pred_densepose, boxes)):
        published = expected[f"detections.labels_uv_uint8.{k}"]
        assert (quantize(result).numpy() != published).mean() < 1e-3, k


def check_panoptic(fixture: Fixture, frame: int, outputs: dict[str, Any]) -> None:
    """The map of classes, and of objects as far as they are named over time, void is 255."""
    video = f"frame{frame}.panoptic.three_channel"
    expected = fixture.expected[video if video in fixture.expected else "panoptic.two_channel"]
    num_stuff = 11 if video in fixture.expected else 53
    ids, segments = outputs["panoptic_seg"]
    classes, objects = (np.full(ids.shape, 255) for _ in range(2))
    for segment in segments:
        category = segment["category_id"] + (num_stuff if segment["isthing"] else -1)
        classes[ids == segment["id"]] = category
        objects[ids == segment["id"]] = segment.get("track_id", category)
    # A change of 1e-6 in the weights moves 3e-5 of the pixels.
    assert (classes != expected[..., 0]).mean() < 1e-4
    things = (expected[..., 0] != 255) & (expected[..., 0] >= num_stuff)
    assert things.any()
    if video in fixture.expected:
        assert (objects[things] != expected[things][:, 2]).mean() < 1e-4
        return
    found = outputs["instances"]
    order = np.lexsort((-found.scores.numpy(), found.pred_classes.numpy()))
    boxes = inclusive(found.pred_boxes.tensor)[order]
    np.testing.assert_array_equal(found.pred_classes[order] + 1, fixture.expected["det.classes"])
    np.testing.assert_allclose(found.scores[order], fixture.expected["det.scores"], atol=1e-4)
    np.testing.assert_allclose(boxes, fixture.expected["det.boxes"], atol=0.05)


# CenterNet's demo, of which the fixtures are, has rounded numbers.
CENTERNET = ["MODEL.PIXEL_MEAN", [255 * x for x in (0.408, 0.447, 0.47)]]
CENTERNET += ["MODEL.PIXEL_STD", [255 * x for x in (0.289, 0.274, 0.278)]]
CENTERNET += ["MODEL.CENTERNET.TEST.FLIP", True]
FEWER = ["MODEL.RPN.PRE_NMS_TOPK_TEST", 100, "MODEL.RPN.POST_NMS_TOPK_TEST", 100]
UPSNET = [*FEWER, "MODEL.PIXEL_STD", [64.0] * 3, "MODEL.UPSNET.TEST.MIN_SIZE", 0]
UPSNET += ["MODEL.UPSNET.TEST.SCORE_THRESH", 0.3, "MODEL.UPSNET.TEST.STUFF_AREA_LIMIT", 500]
VPSNET = [*FEWER, "MODEL.UPSNET.TEST.STUFF_AREA_LIMIT", 200]
DENSEPOSE = ["MODEL.RPN.PRE_NMS_TOPK_TEST", 200, "MODEL.RPN.POST_NMS_TOPK_TEST", 60]
DENSEPOSE += ["TEST.DETECTIONS_PER_IMAGE", 8, "INPUT.MIN_SIZE_TEST", 0]
TRIPLETS = "centernet_triplets/centernet_triplets_hourglass52_511"
# fixture: config, what differs from it, comparison
CASES: dict[str, tuple[str, list[Any], Callable[..., None]]] = {
    "yolact/resnet50": ("yolact/yolact_R_50_550", [], check_masks),
    "yolact/plus_resnet50": ("yolact/yolact_plus_R_50_550", [], check_masks),
    "yolact_edge/edge_resnet50": ("yolact_edge/yolact_edge_R_50_550", [], check_masks),
    "yolact_edge/edge_mobilenetv2": ("yolact_edge/yolact_edge_mobilenetv2_550", [], check_masks),
    "yolact_edge/edge_vid_resnet50": ("yolact_edge/yolact_edge_vid_R_50_550", [], check_masks),
    "centernet/resdcn18_ctdet": (
        "centernet/centernet_R_18_dcn_512",
        CENTERNET,
        check_boxes("detections_flip"),
    ),
    "centernet/hourglass_ctdet": (
        "centernet/centernet_hourglass104_512",
        CENTERNET,
        check_boxes("detections_flip"),
    ),
    "cornernet/hourglass104": (
        "cornernet/cornernet_hourglass104_511",
        [],
        check_boxes("detections"),
    ),
    "cornernet/saccade": ("cornernet/cornernet_saccade_255", [], check_boxes("detections")),
    "centernet_triplets/hourglass52": (TRIPLETS, [], check_boxes("detections")),
    "retinaface/mobilenet025": ("retinaface/mobilenet025_wider", [], check_faces),
    "upsnet/resnet50_coco_inference": ("upsnet/upsnet_R_50_coco", UPSNET, check_panoptic),
    "vpsnet/fusetrack_3frames": (
        "vpsnet/vpsnet_fusetrack_R_50_cityscapes_vps",
        VPSNET,
        check_panoptic,
    ),
    "densepose/model_r50_fpn": (
        "densepose/densepose_rcnn_R_50_FPN_s1x",
        DENSEPOSE,
        check_surfaces,
    ),
}


def converted(fixture: Fixture, config: str, options: list[Any], folder: Path) -> Any:
    """The config with the weights that ``d2ext convert`` makes of the published file."""
    published, target = folder / "published.pth", folder / "converted.pth"
    torch.save({k: torch.from_numpy(v) for k, v in fixture.state_dict().items()}, published)
    words = ["--config-file", config, published, target, "--opts", *options]
    assert convert.run([str(word) for word in words]) == 0
    published.unlink()
    cfg = model_zoo.get_config(config)
    cfg.merge_from_list([*options, "MODEL.WEIGHTS", str(target), "MODEL.DEVICE", "cpu"])
    return cfg


# A minute together. The tests of their systems compare the same detections, from converted weights and
# the same pictures (test_reference.py, test_saccade.py), and what configs say of files (test_recipe.py).
LONG = {
    "centernet/hourglass_ctdet",
    "centernet_triplets/hourglass52",
    "cornernet/hourglass104",
    "cornernet/saccade",
    "vpsnet/fusetrack_3frames",
    "yolact/plus_resnet50",
}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.attack] if x in LONG else []) for x in CASES]
)
def test_detections_from_files(name: str, tmp_path: Path) -> None:
    config, options, check = CASES[name]
    fixture = Fixture(REFERENCE / name)
    cfg = converted(fixture, f"{config}.yaml", options, tmp_path)
    images = pictures(fixture.manifest["inputs"])
    predictor = DefaultPredictor(cfg) if len(images) == 1 else VideoPredictor(cfg)
    Path(cfg.MODEL.WEIGHTS).unlink()
    for t, image in enumerate(images):
        file = str(tmp_path / f"{t}.png")
        cv2.imwrite(file, image)
        check(fixture, t, predictor(cv2.imread(file)))


def test_every_whole_model_is_here() -> None:
    """All fixtures with images and the weights of a whole model, whose boxes need not be given."""
    whole = set()
    for path in REFERENCE.glob("*/*/manifest.json"):
        manifest = json.loads(path.read_text())
        if {"image", "frames"} & manifest.get("inputs", {}).keys() and manifest["parameters"]:
            whole.add("/".join(path.parts[-3:-1]))
    training = {"upsnet/resnet50_coco_training", "vpsnet/fusetrack_training"}
    assert whole - set(CASES) == {*training, "hourglass/hg2_mpii", "vpsnet/track_head"}


def test_landmarks_from_files(tmp_path: Path) -> None:
    """A top-down model needs the person's box, which an annotation file gives to the test loader."""
    fixture = Fixture(REFERENCE / "hourglass/hg2_mpii")
    person = fixture.manifest["inputs"]
    (image,) = pictures(person)
    cv2.imwrite(str(tmp_path / "0.png"), image)
    (x, y), side = person["center_xy"], 200 * person["scale"]
    names = [f"joint{i}" for i in range(16)]
    pairs = [[i, j] for i, j in enumerate(person["flip_pairs"]) if i < j]
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": side**2}
    annotation |= {"bbox": [x - side / 2, y - side / 2, side, side], "num_keypoints": 16}
    annotation["keypoints"] = [v for _ in names for v in (x, y, 2)]
    height, width = image.shape[:2]
    content = {
        "images": [{"id": 1, "file_name": "0.png", "height": height, "width": width}],
        "annotations": [annotation],
        "categories": [{"id": 1, "name": "person", "keypoints": names, "flip_pairs": pairs}],
    }
    (tmp_path / "people.json").write_text(json.dumps(content))
    # The fixture's scale is that of the published files, enlarged already.
    options = ["MODEL.LANDMARKS.CROP.PADDING", 1.0, "DATALOADER.NUM_WORKERS", 0]
    config = "landmarks/hourglass_2stack_mpii_256.yaml"
    cfg = converted(fixture, config, options, tmp_path)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ("hg2_mpii_val",)
    register_own_dataset(
        "hg2_mpii", val_json=str(tmp_path / "people.json"), val_images=str(tmp_path)
    )
    try:
        model = build_model(cfg).eval()
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        (batch,) = build_test_loader(cfg, "hg2_mpii_val")
        with torch.no_grad():
            found = model(batch)[0]["instances"]
    finally:
        DatasetCatalog.remove("hg2_mpii_val")
        MetadataCatalog.remove("hg2_mpii_val")
    expected = fixture.expected["keypoints_image"]
    np.testing.assert_array_equal(found.pred_keypoints[0, :, :2], expected[:, :2])
    np.testing.assert_allclose(found.pred_keypoints[0, :, 2], expected[:, 2], atol=1e-4)
