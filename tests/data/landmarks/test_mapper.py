"""Top-down samples and test inputs."""

import copy
import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from d2ext.config import get_cfg
from d2ext.data import build_test_loader, build_train_loader
from d2ext.data.errors import AnnotationError, DatasetError, ImageReadError
from d2ext.data.landmarks import (
    TopDownMapper,
    TopDownTestMapper,
    add_detections,
    flip_indices,
    instance_records,
)
from d2ext.data.landmarks.mapper import upper_body
from d2ext.data.landmarks.transforms import RandomCropGeometry

# A point on each of four coloured spots, then one that is not labelled.
SPOTS = np.array([[40.0, 30.0], [70.0, 30.0], [45.0, 62.0], [66.0, 60.0]])
COLORS = ((250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0))
FLIP = [1, 0, 3, 2, 4]


@pytest.fixture
def record(tmp_path):
    """An image of four spots (RGB) with one instance."""
    ys, xs = np.mgrid[:90, :120] + 0.5
    image = np.zeros((90, 120, 3))
    for (x, y), color in zip(SPOTS, COLORS, strict=True):
        spot = np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / 10)
        image += spot[:, :, None] * color
    path = tmp_path / "spots.png"
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)
    points = np.concatenate([SPOTS, np.full((4, 1), 2.0)], axis=1)
    points[2, 2] = 1
    annotation = {
        "id": 11,
        "bbox": [30.0, 20.0, 50.0, 50.0],
        "bbox_mode": BoxMode.XYWH_ABS,
        "category_id": 0,
        "iscrowd": 0,
        "keypoints": [*points.reshape(-1).tolist(), 0, 0, 0],
    }
    return {
        "file_name": str(path),
        "image_id": 3,
        "height": 90,
        "width": 120,
        "annotations": [annotation],
    }


def make_mapper(**options) -> TopDownMapper:
    defaults = {"size": (64, 64), "flip_indices": FLIP, "image_format": "RGB", "recipe": "none"}
    return TopDownMapper(**{**defaults, **options})


def check_points_are_on_spots(sample, tolerance=0.6):
    """Each labelled point inside the crop lies on the spot of its colour, also after a flip."""
    image = sample["image"].permute(1, 2, 0).numpy()
    points = sample["instances"].gt_keypoints.tensor[0].numpy()
    order = [FLIP.index(i) for i in range(4)] if sample["flipped"] else range(4)
    checked = 0
    for point, source in zip(points, order, strict=False):
        x, y, v = point
        if not (3 < x < 61 and 3 < y < 61) or v == 0:
            continue
        red, green, blue = (c > 0 for c in COLORS[source])
        near = np.ones(image.shape[:2])
        for channel, wanted in enumerate((red, green, blue)):
            near *= image[:, :, channel] / 255 if wanted else 1 - image[:, :, channel] / 255
        ys, xs = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
        near = near**4 * (np.hypot(xs - x, ys - y) < 8)
        center = np.array([(near * xs).sum(), (near * ys).sum()]) / near.sum()
        assert np.hypot(*(center - (x, y))) < tolerance, (source, center, point)
        checked += 1
    return checked


def test_plain_crop(record):
    before = copy.deepcopy(record)
    sample = make_mapper()(record)
    assert record == before
    assert sample["image"].shape == (3, 64, 64) and sample["image"].dtype == torch.float32
    assert sample["crop"] is True and sample["flipped"] is False and sample["instance_id"] == 11
    assert (sample["height"], sample["width"], sample["image_id"]) == (90, 120, 3)
    assert "annotations" not in sample
    instances = sample["instances"]
    assert len(instances) == 1 and instances.image_size == (64, 64)
    points = instances.gt_keypoints.tensor[0].numpy()
    # The box is 50 x 50 about (55, 45), padded 62.5.
    np.testing.assert_allclose(sample["crop_box"], [23.75, 13.75, 86.25, 76.25])
    np.testing.assert_allclose(points[:4, :2], (SPOTS - (23.75, 13.75)) * 64 / 62.5, rtol=1e-6)
    assert points[:, 2].tolist() == [2, 2, 1, 2, 0] and (points[4] == 0).all()
    np.testing.assert_allclose(instances.gt_boxes.tensor, [[6.4, 6.4, 57.6, 57.6]], atol=1e-5)
    mapped = SPOTS @ sample["crop_matrix"][:, :2].numpy().T + sample["crop_matrix"][:, 2].numpy()
    np.testing.assert_allclose(mapped, points[:4, :2], rtol=1e-6)
    assert check_points_are_on_spots(sample) == 4


def test_points_outside_the_image_and_the_crop_keep_their_place(record):
    record["annotations"][0]["keypoints"][:3] = [-20.0, 130.0, 2]
    points = make_mapper()(record)["instances"].gt_keypoints.tensor[0]
    np.testing.assert_allclose(points[0], [-43.75 * 1.024, 116.25 * 1.024, 2], rtol=1e-6)


def test_augmented_points_stay_on_their_spots(record):
    np.random.seed(0)
    mapper = make_mapper(
        recipe="default", geometry=RandomCropGeometry((64, 64), rotation=25, shift=0.1)
    )
    samples = [mapper(record) for _ in range(30)]
    assert sum(check_points_are_on_spots(s) for s in samples) > 80
    flipped = [s for s in samples if s["flipped"]]
    assert 5 < len(flipped) < 25
    for sample in flipped:  # the hidden point changes places with its partner
        assert sample["instances"].gt_keypoints.tensor[0, :, 2].tolist() == [2, 2, 2, 1, 0]
    for sample in samples:
        matrix = sample["crop_matrix"].numpy()
        mapped = SPOTS @ matrix[:, :2].T + matrix[:, 2]
        mapped = mapped[[1, 0, 3, 2]] if sample["flipped"] else mapped
        points = sample["instances"].gt_keypoints.tensor[0, :4, :2]
        np.testing.assert_allclose(points, mapped, atol=1e-4)


def test_cutout_hides_and_half_body_zooms(record):
    np.random.seed(0)
    cut = make_mapper(recipe="default", cutout_prob=1.0, cutout_size=(0.5, 0.5))
    hidden = 0
    for _ in range(10):
        sample = cut(record)
        points = sample["instances"].gt_keypoints.tensor[0]
        assert (points[:, 2] > 0).tolist() == [True] * 4 + [False]
        hidden += int((points[:, 2] == 1).sum()) - 1
        painted = (sample["image"] - make_mapper()(record)["image"]).abs().amax(0) > 1
        assert 800 < painted.sum() <= 34 * 34
    assert hidden > 3
    half = make_mapper(
        recipe="default",
        half_body_prob=1.0,
        half_body_min_points=3,
        upper=[True, True, True, False, False],
    )
    points = half(record)["instances"].gt_keypoints.tensor[0]
    # The three upper points: extent 30 x 32 times 1.5 about their mean.
    scale = 64 / 48
    mean = SPOTS[:3].mean(axis=0)
    np.testing.assert_allclose(points[:4, :2], (SPOTS - mean) * scale + 32, rtol=1e-5)


def test_hourglass_recipe(record):
    np.random.seed(3)
    mapper = make_mapper(recipe="hourglass")
    samples = [mapper(record) for _ in range(12)]
    assert {s["flipped"] for s in samples} == {True, False}
    for sample in samples:
        assert sample["image"].min() >= 0 and sample["image"].max() <= 255
        points = sample["instances"].gt_keypoints.tensor[0]
        assert points[4, 2] == 0
        if not sample["flipped"]:  # the others change their colours, and are half a pixel off
            # Corners and joints are cut to whole pixels: up to one each, times up to 1.33.
            assert check_points_are_on_spots(sample, tolerance=3.0) >= 2
    # In BGR the same picture, with its channels in the other order.
    np.random.seed(3)
    other = make_mapper(recipe="hourglass", image_format="BGR")(record)["image"]
    torch.testing.assert_close(other.flip(0), samples[0]["image"], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "hg"}, "RECIPE"),
        ({"recipe": "hourglass", "size": (64, 48)}, "square"),
        ({"half_body_prob": 0.5}, "UPPER_BODY"),
    ],
)
def test_impossible_settings_are_clear_errors(change, message):
    with pytest.raises(ValueError, match=message):
        make_mapper(**change)


def test_bad_samples_are_clear_errors(record, tmp_path):
    mapper = make_mapper()
    annotation = record["annotations"][0]
    with pytest.raises(AnnotationError, match="2 instances; expected one"):
        mapper({**record, "annotations": [annotation, annotation]})
    for keypoints, message in (
        (annotation["keypoints"][:9], "has 3 points; the data set has 5"),
        ([float("nan")] * 15, "not finite"),
    ):
        with pytest.raises(AnnotationError, match=message):
            mapper({**record, "annotations": [{**annotation, "keypoints": keypoints}]})
    box = {**annotation, "bbox": [float("inf"), 0, 5, 5]}
    with pytest.raises(AnnotationError, match="not finite"):
        mapper({**record, "annotations": [box]})
    with pytest.raises(ImageReadError, match="no such file"):
        mapper({**record, "file_name": str(tmp_path / "none.png")})
    with pytest.raises(AnnotationError, match=r"[Mm]ismatch"):
        mapper({**record, "width": 7})


def test_box_outside_the_image_gives_a_black_crop(record):
    record["annotations"][0]["bbox"] = [500.0, 500.0, 10.0, 10.0]
    sample = make_mapper()(record)
    assert (sample["image"] == 0).all()
    assert (sample["instances"].gt_keypoints.tensor[0, :4, :2] < 0).all()


def test_instances_without_landmarks_are_left_out(record):
    good = record["annotations"][0]
    bad = [
        {**good, "iscrowd": 1},
        {**good, "keypoints": [0] * 15},
        {**good, "bbox": [5, 5, 0, 0]},
        {**good, "bbox": [5, 5, float("nan"), 3]},
        {k: v for k, v in good.items() if k != "keypoints"},
    ]
    flat = {**good, "bbox": [5.0, 5.0, 20.0, 0.0]}  # padding gives it the input's shape
    samples = instance_records([{**record, "annotations": [*bad, good, flat]}, {**record}])
    assert [r["annotations"] for r in samples] == [[good], [flat], [good]]
    with pytest.raises(DatasetError, match="No instance is left"):
        instance_records([{**record, "annotations": bad}])
    sample = make_mapper()(samples[1])
    np.testing.assert_allclose(sample["crop_box"], [2.5, -7.5, 27.5, 17.5])


def test_test_input(record):
    mapper = TopDownTestMapper(image_format="RGB")
    other = {**record["annotations"][0], "id": 12, "crop_box": [1.0, 2.0, 31.0, 32.0]}
    empty = {**record["annotations"][0], "keypoints": [0] * 15}
    result = mapper({**record, "annotations": [*record["annotations"], empty, other]})
    assert result["image"].shape == (3, 90, 120) and result["image"].dtype == torch.uint8
    instances = result["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[30, 20, 80, 70], [1, 2, 31, 32]]
    assert instances.instance_ids.tolist() == [11, 12] and "annotations" not in result
    assert len(mapper({**record, "annotations": []})["instances"]) == 0  # nobody there
    plain = {k: v for k, v in record.items() if k != "annotations"}
    assert "instances" not in mapper(plain)  # the image is the crop
    assert "instances" not in TopDownTestMapper(image_format="RGB", whole_image=True)(record)


def test_detections(record, tmp_path):
    path = tmp_path / "detections.json"
    detections = [
        {"image_id": 3, "bbox": [1, 2, 10, 20], "score": 0.4, "category_id": 1},
        {"image_id": 3, "bbox": [5, 6, 10, 20], "score": 0.9, "category_id": 1},
        {"image_id": 3, "bbox": [5, 6, 0, 20], "score": 0.3, "category_id": 1},
        {"image_id": 3, "bbox": [5, 6, 0, 0], "score": 0.9, "category_id": 1},
        {"image_id": 3, "bbox": [5, 6, -3, 20], "score": 0.9, "category_id": 1},
        {"image_id": 3, "bbox": [5, 6, 10, 20], "score": 0.1, "category_id": 1},
        {"image_id": 9, "bbox": [5, 6, 10, 20], "score": 0.9, "category_id": 1},
    ]
    path.write_text(json.dumps(detections))
    records = add_detections([record, {**record, "image_id": 4}], str(path), 0.2)
    mapper = TopDownTestMapper(image_format="RGB")
    instances = mapper(records[0])["instances"]
    assert instances.pred_boxes.tensor.tolist() == [[5, 6, 15, 26], [1, 2, 11, 22], [5, 6, 5, 26]]
    torch.testing.assert_close(instances.scores, torch.tensor([0.9, 0.4, 0.3]))
    assert len(mapper(records[1])["instances"]) == 0
    # Ids as text are the same ids; none of the images' is an error.
    path.write_text(json.dumps([{**d, "image_id": str(d["image_id"])} for d in detections]))
    assert len(add_detections([record], str(path), 0.2)[0]["detections"]) == 3
    with pytest.raises(DatasetError, match=r"image ids \(3, 9\) are none of the images' \(5\)"):
        add_detections([{**record, "image_id": 5}], str(path))
    path.write_text(json.dumps({"annotations": []}))
    with pytest.raises(DatasetError, match="COCO's result format"):
        add_detections([record], str(path))


def config() -> CfgNode:
    cfg = get_cfg()
    if "LANDMARKS" not in cfg.MODEL:
        cfg.MODEL.LANDMARKS = CfgNode({"INPUT_SIZE": [64, 48], "CROP": {"PADDING": 1.25}})
    cfg.MODEL.LANDMARKS.INPUT_SIZE = [64, 48]
    cfg.INPUT.MAPPER = "build_top_down_mapper"
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("shapes_val_landmarks",)
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 3
    cfg.SEED = 5
    return cfg


def test_loaders(tmp_path):
    cfg = config()
    batches = [next(iter(build_train_loader(cfg))) for _ in range(2)]
    assert [x["image"].shape for x in batches[0]] == [(3, 64, 48)] * 3
    for a, b in zip(*batches, strict=True):  # a function of the seed
        assert a["image"].equal(b["image"])
        assert a["instances"].gt_keypoints.tensor.equal(b["instances"].gt_keypoints.tensor)
    (sample,) = next(iter(build_test_loader(cfg, "shapes_val_landmarks")))
    assert sample["image"].shape == (3, 256, 256) and len(sample["instances"]) > 0
    path = tmp_path / "detections.json"
    detection = {"image_id": 0, "bbox": [1, 2, 3, 4], "score": 1.0}
    known = MetadataCatalog.get("shapes_val_landmarks").thing_dataset_id_to_contiguous_id
    other = {**detection, "bbox": [5, 5, 5, 5], "category_id": max(known) + 1}
    path.write_text(json.dumps([other, {**detection, "category_id": max(known)}]))
    cfg.INPUT.LANDMARKS.TEST_BOXES = str(path)
    (sample,) = next(iter(build_test_loader(cfg, "shapes_val_landmarks")))
    assert sample["instances"].pred_boxes.tensor.tolist() == [[1, 2, 4, 6]]


def test_every_setting_reaches_the_mapper():
    cfg = config()
    c = cfg.INPUT.LANDMARKS
    c.HALF_BODY_PROB, c.CUTOUT_PROB, c.COLOR_PROB, c.RECIPE = 0.1, 0.2, 0.3, "default"
    c.ROTATION, c.ROTATION_PROB, c.SCALE, c.SHIFT, c.FLIP_PROB = 11.0, 0.7, 0.35, 0.05, 0.25
    c.UPPER_BODY, c.HALF_BODY_MIN_POINTS, c.CROP_GEOMETRY = ["top", "mouth"], 5, "udp"
    cfg.MODEL.LANDMARKS.CROP.PADDING = 1.5
    mapper = TopDownMapper(cfg, True)
    g = mapper.geometry
    assert (g.rotation, g.rotation_prob, g.scale, g.shift, g.flip_prob) == (
        11,
        0.7,
        0.35,
        0.05,
        0.25,
    )
    assert (mapper.padding, mapper.size, g.geometry) == (1.5, (64, 48), "udp")
    assert (mapper.half_body_prob, mapper.cutout_prob, mapper.color_prob) == (0.1, 0.2, 0.3)
    assert mapper.upper.tolist() == [False, False, True, True, False, False, False, False]
    assert mapper.half_body_min_points == 5 and mapper.color.brightness == 32
    assert TopDownMapper(cfg, False).recipe == "none"
    with pytest.raises(ValueError, match="has no nose"):
        upper_body("shapes_val_landmarks", ["nose"])
    assert upper_body("shapes_val_landmarks") == [True] * 8


def test_flip_indices_need_names():
    name = "landmarks_test_flip"
    MetadataCatalog.get(name).set(keypoint_names=["a", "b"], keypoint_flip_map=[("a", "c")])
    with pytest.raises(DatasetError, match="unknown names"):
        flip_indices(name)
    MetadataCatalog.pop(name)
    with pytest.raises(DatasetError, match="no landmarks"):
        flip_indices("shapes_val")


def test_shapes_landmarks():
    records = DatasetCatalog.get("shapes_val_landmarks")
    metadata = MetadataCatalog.get("shapes_val_landmarks")
    assert len(metadata.keypoint_names) == 8 and metadata.evaluator_type == "landmarks"
    assert flip_indices("shapes_val_landmarks") == [1, 0, 2, 3, 5, 4, 7, 6]
    annotations = [r["annotations"][0] for r in instance_records(records)]
    assert len(annotations) > 400
    occlusion = np.array([a["occlusion"] for a in annotations])
    assert occlusion.min() == 0 and 0.4 < occlusion.max() < 0.5
    assert {a["attributes"]["occluded"] for a in annotations} == {True, False}
    for annotation in annotations:
        points = np.array(annotation["keypoints"]).reshape(8, 3)
        x0, y0, x1, y1 = annotation["bbox"]
        labelled = points[points[:, 2] > 0]
        assert ((labelled[:, :2] >= (x0 - 1, y0 - 1)) & (labelled[:, :2] <= (x1 + 1, y1 + 1))).all()
        if annotation["occlusion"] == 0:
            assert (labelled[:, 2] == 2).all()
    # Boxes hold the whole thing: beside the visible part's, they are never smaller.
    visible = {r["image_id"]: r["annotations"] for r in DatasetCatalog.get("shapes_val_keypoints")}
    areas = []
    for record in records:
        by_points = {tuple(a["keypoints"]): a for a in visible[record["image_id"]]}
        for annotation in record["annotations"]:
            other = by_points[tuple(annotation["keypoints"])]
            areas.append((annotation["area"], other["bbox"][2] * other["bbox"][3]))
    whole, seen = np.array(areas).T
    assert (whole > 0.9 * seen).all() and (whole > 1.3 * seen).mean() > 0.1


def test_picture_of_a_shape_shows_its_eyes():
    """The eyes' pupils are dark and their surroundings white."""
    records = instance_records(DatasetCatalog.get("shapes_val_landmarks"))
    mapper = TopDownMapper(
        size=(96, 96), flip_indices=flip_indices("shapes_val_landmarks"), recipe="none"
    )
    dark = []
    for record in records[:80]:
        if record["annotations"][0]["occlusion"] > 0:
            continue
        sample = mapper(record)
        grey = cv2.GaussianBlur(sample["image"].mean(0).numpy(), (0, 0), 1)
        x, y, _ = sample["instances"].gt_keypoints.tensor[0, 0].tolist()
        dark.append(
            grey[int(y), int(x)] < grey[int(y) - 5 : int(y) + 6, int(x) - 5 : int(x) + 6].mean()
        )
    assert len(dark) > 20 and np.mean(dark) > 0.9
