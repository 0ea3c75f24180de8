"""The mapper: everything moves together, crowds stay apart, and bad input is a clear error."""

import copy
import logging

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.structures import BitMasks, BoxMode, PolygonMasks
from PIL import Image

from d2ext.config import get_cfg
from d2ext.data import AnnotationError, D2extDatasetMapper, ImageReadError
from d2ext.data.custom import apply_dataset_to_config
from d2ext.data.sampler import sample_randomness
from d2ext.model_zoo import get_config
from tests.data.scenes import COLORS, iou, object_at, paint_scene, write_image

KEYPOINT_SET = "test_dataset_mapper_points"
MetadataCatalog.get(KEYPOINT_SET).set(keypoint_names=["center"], keypoint_flip_map=[])


def make_cfg(**keys):
    cfg = get_cfg()
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.AUGMENTATION.NAME = "none"
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.MODEL.MASK_ON = True
    cfg.DATASETS.TRAIN = (KEYPOINT_SET,)
    for key, value in keys.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


@pytest.fixture
def record(tmp_path):
    scene = paint_scene()
    return {
        "file_name": write_image(tmp_path / "scene.png", scene.image),
        "height": 120,
        "width": 160,
        "image_id": 5,
        "annotations": copy.deepcopy(scene.polygon_annotations),
    }


@pytest.fixture
def rle_record(record):
    return {**record, "annotations": copy.deepcopy(paint_scene().rle_annotations)}


def test_agrees_with_detectron2(record):
    """On ordinary data and without augmentation the sample is what Detectron2's mapper gives."""
    cfg = make_cfg(MODEL__KEYPOINT_ON=True)
    mine = D2extDatasetMapper(cfg, True)(record)
    reference = DatasetMapper(
        True,
        augmentations=[],
        image_format="RGB",
        use_instance_mask=True,
        use_keypoint=True,
        instance_mask_format="bitmask",
        keypoint_hflip_indices=[0],
    )(record)
    assert set(mine) == {*reference, "crowd_instances"}
    assert mine["image_id"] == 5 and "annotations" not in mine
    assert (mine["image"] == reference["image"]).all() and mine["image"].dtype == torch.uint8
    a, b = mine["instances"], reference["instances"]
    assert set(a.get_fields()) == set(b.get_fields())
    assert (a.gt_boxes.tensor == b.gt_boxes.tensor).all()
    assert (a.gt_classes == b.gt_classes).all()
    assert (a.gt_masks.tensor == b.gt_masks.tensor).all()
    assert (a.gt_keypoints.tensor == b.gt_keypoints.tensor).all()


@pytest.mark.parametrize("kind", ["polygon", "polygon as bitmask", "rle"])
@pytest.mark.parametrize("seed", range(5))
def test_ssd_recipe_end_to_end(record, rle_record, kind, seed):
    """Boxes, masks and keypoints of the sample lie where the painted objects are."""
    cfg = make_cfg(
        INPUT__AUGMENTATION__NAME="ssd",
        INPUT__AUGMENTATION__SIZE=200,
        # Colours identify the objects here; the photometric part has tests of its own.
        INPUT__AUGMENTATION__PHOTOMETRIC_PROB=0.0,
        INPUT__MASK_FORMAT="polygon" if kind == "polygon" else "bitmask",
        MODEL__KEYPOINT_ON=True,
    )
    mapper = D2extDatasetMapper(cfg, True)
    with sample_randomness(0, seed):
        sample = mapper(rle_record if kind == "rle" else record)
    instances = sample["instances"]
    assert sample["image"].shape == (3, 200, 200) and sample["image"].dtype == torch.float32
    assert instances.image_size == (200, 200) and len(instances) > 0
    assert isinstance(instances.gt_masks, PolygonMasks if kind == "polygon" else BitMasks)
    masks = (
        BitMasks.from_polygon_masks(instances.gt_masks, 200, 200)
        if kind == "polygon"
        else instances.gt_masks
    )
    image = sample["image"].permute(1, 2, 0).numpy()
    for i, category in enumerate(instances.gt_classes.tolist()):
        painted = object_at(image, COLORS[category])
        assert painted.sum() > 0
        assert iou(painted, masks.tensor[i].numpy()) > 0.85
        x, y, visible = instances.gt_keypoints.tensor[i, 0].tolist()
        if visible:
            assert painted[min(int(y), 199), min(int(x), 199)]


def test_instances_with_centre_outside_the_crop_are_dropped(record):
    cfg = make_cfg(
        INPUT__AUGMENTATION__NAME="ssd",
        INPUT__AUGMENTATION__EXPAND_PROB=0.0,
        INPUT__AUGMENTATION__CROP_SCALE=[0.3, 0.45],
    )
    mapper = D2extDatasetMapper(cfg, True)
    counts = []
    for seed in range(10):
        with sample_randomness(0, seed):
            counts.append(len(mapper(record)["instances"]))
    assert min(counts) >= 1 and min(counts) < 5
    # Parts of dropped objects are in the image, but the model is not told about them.
    record["annotations"][1]["iscrowd"] = 1
    with sample_randomness(0, int(np.argmin(counts))):
        sample = mapper(record)
    assert len(sample["instances"]) + len(sample["crowd_instances"]) < 5


def test_same_seed_same_sample(record):
    mapper = D2extDatasetMapper(make_cfg(INPUT__AUGMENTATION__NAME="ssd"), True)
    images = []
    for position in (1, 1, 2):
        with sample_randomness(7, position):
            images.append(mapper(record)["image"])
    assert torch.equal(images[0], images[1])
    assert images[0].shape != images[2].shape or not torch.equal(images[0], images[2])


@pytest.mark.parametrize("arrays", [False, True])
def test_input_is_not_modified(record, arrays):
    annotation = record["annotations"][0]
    if arrays:  # which in-place arithmetic could reach
        annotation["segmentation"] = [np.array(annotation["segmentation"][0])]
        annotation["keypoints"] = np.array(annotation["keypoints"])
        annotation["bbox"] = np.array(annotation["bbox"])
    before = copy.deepcopy(record)
    cfg = make_cfg(INPUT__AUGMENTATION__NAME="ssd", MODEL__KEYPOINT_ON=True)
    D2extDatasetMapper(cfg, True)(record)
    assert record.keys() == before.keys()
    assert str(record) == str(before)


def test_integer_polygons_are_not_truncated(record):
    record["annotations"] = [
        {
            "bbox": [1, 1, 4, 4],
            "bbox_mode": BoxMode.XYWH_ABS,
            "category_id": 0,
            "segmentation": [[1, 1, 5, 1, 5, 5, 1, 5]],
        }
    ]
    cfg = make_cfg(INPUT__AUGMENTATION__NAME="default", INPUT__MASK_FORMAT="polygon")
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (180,), "none"
    sample = D2extDatasetMapper(cfg, True)(record)
    assert sample["instances"].gt_masks.polygons[0][0].tolist() == [
        1.5, 1.5, 7.5, 1.5, 7.5, 7.5, 1.5, 7.5
    ]  # fmt: skip


def test_detectron2s_crop_without_shapely(record):
    cfg = make_cfg(INPUT__AUGMENTATION__NAME="default", INPUT__MASK_FORMAT="polygon")
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE = True, "relative"
    cfg.INPUT.CROP.SIZE, cfg.INPUT.MIN_SIZE_TRAIN = [0.5, 0.5], (60,)
    with sample_randomness(0, 0):
        sample = D2extDatasetMapper(cfg, True)(record)
    instances = sample["instances"]
    assert sample["image"].shape == (3, 60, 80) and len(instances)
    # Boxes are recomputed from the cut masks, as in Detectron2.
    assert torch.equal(instances.gt_boxes.tensor, instances.gt_masks.get_bounding_boxes().tensor)


class TestCrowds:
    def test_stay_apart(self, rle_record):
        rle_record["annotations"][2]["iscrowd"] = 1
        sample = D2extDatasetMapper(make_cfg(), True)(rle_record)
        assert sample["instances"].gt_classes.tolist() == [0, 1, 3, 4]
        crowds = sample["crowd_instances"]
        assert crowds.gt_classes.tolist() == [2]
        assert crowds.gt_boxes.tensor.tolist() == [rle_record["annotations"][2]["bbox"]]
        assert set(crowds.get_fields()) == {"gt_boxes", "gt_classes"}

    @pytest.mark.parametrize(
        "config",
        [
            "centernet/centernet_dla34_512.yaml",
            "cornernet/cornernet_saccade_255.yaml",
            "centernet_triplets/centernet_triplets_hourglass104_511.yaml",
        ],
    )
    def test_train_like_others_in_published_configs(self, config, rle_record):
        rle_record["annotations"][2]["iscrowd"] = 1
        cfg = get_config(config)
        cfg.DATASETS.TRAIN = (KEYPOINT_SET,)
        cfg.INPUT.AUGMENTATION.NAME = "none"
        sample = D2extDatasetMapper(cfg, True)(rle_record)
        assert sample["instances"].gt_classes.tolist() == [0, 1, 2, 3, 4]
        assert len(sample["crowd_instances"]) == 0
        # own data: as annotated
        apply_dataset_to_config(cfg, "shapes")
        cfg.INPUT.AUGMENTATION.NAME = "none"
        sample = D2extDatasetMapper(cfg, True)(rle_record)
        assert len(sample["instances"]) == 4 and len(sample["crowd_instances"]) == 1
        assert not cfg.TEST.PUBLISHED_ROUNDING

    @pytest.mark.parametrize("name", ["none", "default", "ssd"])
    @pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
    def test_only_crowds(self, rle_record, name, mask_format):
        for annotation in rle_record["annotations"]:
            annotation["iscrowd"] = 1
        cfg = make_cfg(INPUT__AUGMENTATION__NAME=name, INPUT__MASK_FORMAT=mask_format)
        sample = D2extDatasetMapper(cfg, True)(rle_record)
        assert len(sample["instances"]) == 0 and len(sample["crowd_instances"]) == 5
        assert set(sample["instances"].get_fields()) == {"gt_boxes", "gt_classes", "gt_masks"}

    def test_uncompressed_rle_crowd_with_the_model_wanting_polygons(self, record):
        mask = paint_scene().masks[0]
        counts = [int(c) for c in _uncompressed_counts(mask)]
        record["annotations"][0] = {
            "segmentation": {"size": [120, 160], "counts": counts},
            "iscrowd": 1,
            "category_id": 0,
        }
        cfg = make_cfg(INPUT__MASK_FORMAT="polygon")
        sample = D2extDatasetMapper(cfg, True)(record)
        ys, xs = np.nonzero(mask)
        assert sample["crowd_instances"].gt_boxes.tensor[0].tolist() == [
            xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
        ]  # fmt: skip


def _uncompressed_counts(mask):
    flat = np.concatenate([[False], mask.reshape(-1, order="F"), [not mask[-1, -1]]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], edges]))


class TestUselessAnnotations:
    """They are dropped, said once, and the rest of the image trains."""

    @pytest.mark.parametrize(
        "change",
        [
            {"bbox": [10, 10, 10, 30]},
            {"bbox": [10, 10, 5, 30]},
            {"bbox": [10, 10, float("nan"), 30]},
            {"segmentation": [[10, 10, 20, 20]]},
            {"segmentation": [[10, 10, 20, 20, 30, 30]]},  # three points on a line
            {"segmentation": [[10, 10, 20, 20, 30]]},  # odd count
            {"segmentation": {"size": [120, 160], "counts": [120 * 160]}},
            {"bbox": None, "segmentation": None},
        ],
    )
    def test_dropped(self, record, change):
        record["annotations"][1].update(change)
        sample = D2extDatasetMapper(make_cfg(), True)(record)
        assert sample["instances"].gt_classes.tolist() == [0, 2, 3, 4]
        assert torch.isfinite(sample["instances"].gt_boxes.tensor).all()

    def test_said_once(self, record, caplog, monkeypatch):
        monkeypatch.setattr("d2ext.data.dataset_mapper._dropped_logged", False)
        record["annotations"][1]["bbox"] = [10, 10, 10, 30]
        mapper = D2extDatasetMapper(make_cfg(), True)
        with caplog.at_level(logging.WARNING):
            mapper(record), mapper(record)
        (message,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert "scene.png" in message and "1 (box without area or not finite)" in message

    def test_one_bad_polygon_among_good_ones(self, record):
        record["annotations"][0]["segmentation"].append([1, 1, 2, 2])
        cfg = make_cfg(INPUT__MASK_FORMAT="polygon")
        sample = D2extDatasetMapper(cfg, True)(record)
        assert [len(p) for p in sample["instances"].gt_masks.polygons] == [1] * 5

    @pytest.mark.parametrize("kind", ["polygon", "rle"])
    def test_missing_boxes_come_from_the_mask(self, record, rle_record, kind):
        record = rle_record if kind == "rle" else record
        expected = [a.pop("bbox") for a in record["annotations"]]
        for annotation in record["annotations"]:
            annotation.pop("bbox_mode")
        sample = D2extDatasetMapper(make_cfg(), True)(record)
        boxes = sample["instances"].gt_boxes.tensor.numpy()
        # A thin corner of a polygon need not have a pixel of its own.
        np.testing.assert_allclose(boxes, expected, atol=0 if kind == "rle" else 2.0)

    def test_image_without_annotations(self, record):
        record["annotations"] = []
        for name in ("none", "ssd"):
            cfg = make_cfg(INPUT__AUGMENTATION__NAME=name, MODEL__KEYPOINT_ON=True)
            instances = D2extDatasetMapper(cfg, True)(record)["instances"]
            assert len(instances) == 0
            assert len(instances.gt_masks) == 0 and len(instances.gt_keypoints) == 0


def test_annotation_without_keypoints_among_others(record):
    record["annotations"][0].pop("keypoints")
    instances = D2extDatasetMapper(make_cfg(MODEL__KEYPOINT_ON=True), True)(record)["instances"]
    assert instances.gt_keypoints.tensor[:, 0, 2].tolist() == [0, 2, 2, 2, 2]


class TestErrorsNameTheFile:
    def test_missing_mask(self, record):
        record["annotations"][0].pop("segmentation")
        with pytest.raises(AnnotationError, match=r"scene\.png.*MASK_ON"):
            D2extDatasetMapper(make_cfg(), True)(record)
        sample = D2extDatasetMapper(make_cfg(MODEL__MASK_ON=False), True)(record)
        assert len(sample["instances"]) == 5 and not sample["instances"].has("gt_masks")

    def test_rle_where_polygons_are_wanted(self, rle_record):
        with pytest.raises(AnnotationError, match=r"INPUT\.MASK_FORMAT: bitmask"):
            D2extDatasetMapper(make_cfg(INPUT__MASK_FORMAT="polygon"), True)(rle_record)

    def test_mask_of_another_size(self, record):
        rle = mask_util.encode(np.asfortranarray(np.ones((9, 9), np.uint8)))
        record["annotations"][0]["segmentation"] = rle
        with pytest.raises(AnnotationError, match=r"scene\.png.*\[9, 9\]"):
            D2extDatasetMapper(make_cfg(), True)(record)

    def test_image_of_another_size(self, record):
        record["width"] = 161
        with pytest.raises(AnnotationError, match=r"scene\.png"):
            D2extDatasetMapper(make_cfg(), True)(record)

    def test_unreadable_image(self, record, tmp_path):
        (tmp_path / "scene.png").write_bytes(b"")
        with pytest.raises(ImageReadError, match=r"scene\.png"):
            D2extDatasetMapper(make_cfg(), False)(record)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1)])
@pytest.mark.parametrize("name", ["ssd", "default"])
def test_extreme_images(tmp_path, shape, name):
    h, w = shape
    record = {
        "file_name": write_image(tmp_path / "a.png", np.full((h, w, 3), 9, np.uint8)),
        "annotations": [
            {
                "bbox": [0, 0, w, h],
                "bbox_mode": BoxMode.XYXY_ABS,
                "category_id": 0,
                "segmentation": [[0, 0, w, 0, w, h, 0, h]],
            }
        ],
    }
    for position in range(5):
        with sample_randomness(0, position):
            sample = D2extDatasetMapper(make_cfg(INPUT__AUGMENTATION__NAME=name), True)(record)
        assert min(sample["image"].shape) >= 1
        assert (sample["height"], sample["width"]) == shape
        assert torch.isfinite(sample["image"].float()).all()


class TestSemSeg:
    def test_follows_the_image(self, record, tmp_path):
        scene = paint_scene()
        labels = np.zeros((120, 160), np.uint8)
        for i, mask in enumerate(scene.masks):
            labels[mask] = i + 1
        Image.fromarray(labels).save(tmp_path / "labels.png")
        record["sem_seg_file_name"] = str(tmp_path / "labels.png")
        cfg = make_cfg(INPUT__AUGMENTATION__NAME="ssd", INPUT__AUGMENTATION__PHOTOMETRIC_PROB=0.0)
        mapper = D2extDatasetMapper(cfg, True)
        seen, ignored = 0, 0
        for position in range(6):
            with sample_randomness(0, position):
                sample = mapper(record)
            sem_seg = sample["sem_seg"].numpy()
            assert sem_seg.dtype == np.int64 and sem_seg.shape == (550, 550)
            assert set(np.unique(sem_seg)) <= {0, 1, 2, 3, 4, 5, 255}
            image = sample["image"].permute(1, 2, 0).numpy()
            for i, color in enumerate(COLORS):
                painted = object_at(image, color)
                if painted.sum() > 500:
                    seen += 1
                    assert iou(painted, sem_seg == i + 1) > 0.9
            ignored += (sem_seg == 255).sum()
        assert seen >= 10 and ignored > 0

    def test_of_another_size(self, record, tmp_path):
        Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "labels.png")
        record["sem_seg_file_name"] = str(tmp_path / "labels.png")
        with pytest.raises(AnnotationError, match=r"scene\.png.*\(5, 5\)"):
            D2extDatasetMapper(make_cfg(), True)(record)

    def test_labels_that_are_no_class(self, record, tmp_path):
        """A loss would stop at them, on a GPU without a word."""
        labels = np.zeros((120, 160), np.uint8)
        labels[0, :2] = 255, 7
        Image.fromarray(labels).save(tmp_path / "labels.png")
        record["sem_seg_file_name"] = str(tmp_path / "labels.png")
        name = "mapper_stuff"
        MetadataCatalog.get(name).stuff_classes = ["a", "b"]
        cfg = make_cfg()
        cfg.DATASETS.TRAIN = (name,)
        with pytest.raises(AnnotationError, match=r"labels\.png' has labels 7, .* no class"):
            D2extDatasetMapper(cfg, True)(record)
        MetadataCatalog.pop(name)
        MetadataCatalog.get(name).stuff_classes = [str(i) for i in range(8)]
        assert D2extDatasetMapper(cfg, True)(record)["sem_seg"].max() == 255
        MetadataCatalog.pop(name)


def test_inference_leaves_the_image_at_its_size(record):
    cfg = make_cfg(INPUT__AUGMENTATION__NAME="ssd")
    cfg.INPUT.MIN_SIZE_TEST = 0
    sample = D2extDatasetMapper(cfg, False)(record)
    assert set(sample) == {"file_name", "height", "width", "image_id", "image"}
    np.testing.assert_array_equal(sample["image"].permute(1, 2, 0), paint_scene().image)
