"""`shapes` through Detectron2's own mappers, loaders, evaluators and visualizer, unchanged."""

import contextlib
import copy
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.data.datasets.coco import load_coco_json
from detectron2.evaluation import COCOEvaluator, COCOPanopticEvaluator, SemSegEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.file_io import PathManager
from detectron2.utils.visualizer import Visualizer
from PIL import Image
from pycocotools import mask as mask_util

from d2ext.data.shapes import (
    DEFAULT_SETS,
    KEYPOINT_OKS_SIGMAS,
    TASKS,
    ShapesSet,
    VideoSet,
    catalog,
    load_shapes,
    register_shapes,
    shapes_metadata,
)
from d2ext.data.shapes.classes import THING_IDS
from d2ext.data.shapes.sets import set_from_name

# Small, and with all classes, a crowd and an image without things: the first test sees to it.
TINY = ShapesSet("val", 12, 128, 96, seed=26)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D2EXT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def names():
    names = dict(zip(TASKS, register_shapes(TINY, prefix="tiny"), strict=True))
    yield names
    for name in names.values():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def evaluate(evaluator, name, predict):
    """Results of an evaluator for what `predict` makes of each dict of a data set."""
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        evaluator.process([record], [predict(record)])
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluator.evaluate()


def true_instances(record, rng=None) -> dict:
    """The annotations of a dict with exact masks as a prediction; with `rng`, somewhat off."""
    annotations = [a for a in record["annotations"] if not a["iscrowd"]]
    instances = Instances((record["height"], record["width"]))
    masks = [mask_util.decode(a["segmentation"]).astype(bool) for a in annotations]
    if rng is not None:
        masks = [np.roll(mask, rng.integers(2, 6), axis=1) for mask in masks]
    masks = np.stack(masks) if masks else np.zeros((0, record["height"], record["width"]), bool)
    instances.pred_masks = torch.from_numpy(masks)
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    instances.pred_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    instances.pred_classes = torch.tensor([a["category_id"] for a in annotations], dtype=int)
    instances.scores = torch.full((len(annotations),), 0.9)
    if annotations and "keypoints" in annotations[0]:
        keypoints = torch.tensor([a["keypoints"] for a in annotations]).reshape(-1, 8, 3)
        keypoints[..., 2] = 1
        if rng is not None:
            keypoints[..., :2] += torch.from_numpy(rng.normal(0, 4, (len(annotations), 8, 2)))
        instances.pred_keypoints = keypoints
    return {"instances": instances}


def test_tiny_set_has_all_cases():
    frames = list(TINY.frames())
    segments = [segment for frame in frames for segment in frame.segments]
    assert {s.category for s in segments if s.layer >= 0} == set(range(8))
    assert any(s.layer < 0 for s in segments) and any(not frame.segments for frame in frames)


def test_default_names_are_registered():
    assert [(s.split, s.num) for s in DEFAULT_SETS] == [("train", 2000), ("val", 200)]
    for split in ("train", "val"):
        for suffix in ("", "_rle", "_keypoints", "_panoptic", "_semantic", "_video"):
            assert f"shapes_{split}{suffix}" in DatasetCatalog.list()
    assert len(DatasetCatalog.get("shapes_val")) == 200


def test_dicts_can_be_changed_by_their_reader(names):
    first = DatasetCatalog.get(names["keypoints"])
    before = copy.deepcopy(first)
    first[0]["annotations"].clear()
    first[1]["annotations"][0]["keypoints"][0] = -1
    assert DatasetCatalog.get(names["keypoints"]) == before


@pytest.mark.parametrize("task", ["instances", "rle"])
def test_instance_dicts_and_json_are_one(names, task):
    # The JSON file that the metadata name, read as COCO's, gives what the catalog gives.
    metadata = MetadataCatalog.get(names[task])
    loaded = load_coco_json(metadata.json_file, metadata.image_root, names[task])
    for record in loaded:
        for annotation in record["annotations"]:
            if task == "rle" and not annotation["iscrowd"]:  # JSON has no bytes
                mask = annotation["segmentation"]
                mask["counts"] = mask["counts"].encode()
    assert loaded == DatasetCatalog.get(names[task])
    assert metadata.thing_classes == shapes_metadata("instances")["thing_classes"]


def test_keypoint_dicts_and_json_are_one(names):
    metadata = MetadataCatalog.get(names["keypoints"])
    loaded = load_coco_json(metadata.json_file, metadata.image_root, "tiny_again")
    for ours, theirs in zip(DatasetCatalog.get(names["keypoints"]), loaded, strict=True):
        for a, b in zip(ours["annotations"], theirs["annotations"], strict=True):
            points, loaded_points = (np.reshape(x["keypoints"], (8, 3)) for x in (a, b))
            np.testing.assert_array_equal(points[:, 2], loaded_points[:, 2])
            labelled = points[:, 2] > 0
            np.testing.assert_allclose(loaded_points[labelled], points[labelled], atol=0.0051)


def test_instance_evaluation(names):
    rng = np.random.default_rng(0)
    for task in ("rle", "instances"):
        # Exact masks against exact masks, then against their polygons.
        predictions = {r["image_id"]: r for r in DatasetCatalog.get(names["rle"])}
        evaluator = COCOEvaluator(names[task], distributed=False)
        perfect = evaluate(
            evaluator, names[task], lambda r, p=predictions: true_instances(p[r["image_id"]])
        )
        assert perfect["bbox"]["AP"] == pytest.approx(100)
        assert perfect["segm"]["AP"] == pytest.approx(100, abs=0 if task == "rle" else 2)
        assert len([key for key in perfect["segm"] if key.startswith("AP-")]) == len(THING_IDS)
    moved = evaluate(evaluator, names["rle"], lambda record: true_instances(record, rng))
    assert 5 < moved["segm"]["AP"] < 70


def test_keypoint_evaluation(names):
    def predict(record, rng=None):
        record = copy.deepcopy(record)
        for annotation, exact in zip(
            record["annotations"], rle[record["image_id"]]["annotations"], strict=True
        ):
            annotation["segmentation"] = exact["segmentation"]
        return true_instances(record, rng)

    rle = {r["image_id"]: r for r in DatasetCatalog.get(names["rle"])}
    evaluator = COCOEvaluator(
        names["keypoints"], distributed=False, kpt_oks_sigmas=KEYPOINT_OKS_SIGMAS
    )
    perfect = evaluate(evaluator, names["keypoints"], predict)
    assert perfect["keypoints"]["AP"] == pytest.approx(100)
    rng = np.random.default_rng(0)
    noisy = evaluate(evaluator, names["keypoints"], lambda record: predict(record, rng))
    assert noisy["keypoints"]["AP"] < 80


def read(path: str) -> np.ndarray:
    with PathManager.open(path, "rb") as file:
        return np.asarray(Image.open(file))


@pytest.mark.parametrize("task", ["panoptic", "semantic"])
def test_semantic_evaluation(names, task):
    classes = len(MetadataCatalog.get(names[task]).stuff_classes)

    def predict(record, shift=0):
        labels = read(record["sem_seg_file_name"]).astype(int)
        labels = np.roll(np.where(labels == 255, 0, labels), shift, axis=1)
        return {
            "sem_seg": torch.nn.functional.one_hot(torch.from_numpy(labels), classes).permute(
                2, 0, 1
            )
        }

    # Detectron2's own loader of label maps fails with NumPy 2.
    evaluator = SemSegEvaluator(
        names[task],
        distributed=False,
        sem_seg_loading_fn=lambda name, dtype: utils.read_image(name, "L")[:, :, 0].astype(dtype),
    )
    perfect = evaluate(evaluator, names[task], predict)["sem_seg"]
    assert perfect["mIoU"] == pytest.approx(100)
    assert classes == (7 if task == "panoptic" else 14)
    assert sum(key.startswith("IoU-") for key in perfect) == classes
    assert evaluate(evaluator, names[task], lambda r: predict(r, 9))["sem_seg"]["mIoU"] < 90


def test_panoptic_evaluation(names):
    def predict(record, wrong=False):
        ids = read(record["pan_seg_file_name"]).astype(np.int64)
        ids = ids[..., 0] + 256 * ids[..., 1] + 65536 * ids[..., 2]
        infos = [
            {key: info[key] for key in ("id", "category_id", "isthing")}
            for info in record["segments_info"]
        ]
        if wrong:
            for info in infos:
                if info["isthing"] and info["category_id"] == 0:
                    info["category_id"] = 1
        return {"panoptic_seg": (torch.from_numpy(ids), infos)}

    evaluator = COCOPanopticEvaluator(names["panoptic"])
    perfect = evaluate(evaluator, names["panoptic"], predict)["panoptic_seg"]
    assert perfect["PQ"] == perfect["PQ_th"] == perfect["PQ_st"] == pytest.approx(100)
    wrong = evaluate(evaluator, names["panoptic"], lambda r: predict(r, True))["panoptic_seg"]
    assert wrong["PQ_st"] == pytest.approx(100) and wrong["PQ_th"] < 90


def test_panoptic_dicts_agree(names):
    for record in DatasetCatalog.get(names["panoptic"]):
        infos = {info["id"]: info for info in record["segments_info"]}
        for annotation in record["annotations"]:
            info = infos.pop(annotation["segment_id"])
            assert info["isthing"] and info["category_id"] == annotation["category_id"]
            assert info["bbox"] == annotation["bbox"]
        assert all(not info["isthing"] and info["category_id"] > 0 for info in infos.values())
        sem_seg = read(record["sem_seg_file_name"])
        assert set(np.unique(sem_seg)) - {0, 255} == {i["category_id"] for i in infos.values()}


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_stock_training_mapper(names, mask_format):
    task = "rle" if mask_format == "bitmask" else "instances"
    mapper = DatasetMapper(
        True,
        augmentations=[T.RandomFlip(1.0)],
        image_format="BGR",
        use_instance_mask=True,
        instance_mask_format=mask_format,
    )
    for index, record in enumerate(DatasetCatalog.get(names[task])):
        frame = TINY.frame(index)
        mapped = mapper(record)
        expected = frame.image[:, ::-1, ::-1].transpose(2, 0, 1)
        np.testing.assert_array_equal(mapped["image"].numpy(), expected)
        things = [segment for segment in frame.segments if segment.layer >= 0]
        assert mapped["instances"].gt_classes.tolist() == [s.category for s in things]
        for box, segment in zip(mapped["instances"].gt_boxes, things, strict=True):
            height, width = segment.mask.shape
            right = TINY.width - segment.x0
            assert box.tolist() == [right - width, segment.y0, right, segment.y0 + height]


def test_stock_keypoint_mapper_flips_left_and_right(names):
    mapper = DatasetMapper(
        True,
        augmentations=[T.RandomFlip(1.0)],
        image_format="RGB",
        use_keypoint=True,
        keypoint_hflip_indices=utils.create_keypoint_hflip_indices(names["keypoints"]),
    )
    record = DatasetCatalog.get(names["keypoints"])[0]
    before = np.reshape([a["keypoints"] for a in record["annotations"]], (-1, 8, 3))
    after = mapper(record)["instances"].gt_keypoints.tensor.numpy()
    assert (before[:, :2, 2] > 0).all()
    np.testing.assert_allclose(after[:, 0, 0], TINY.width - before[:, 1, 0], rtol=1e-5)
    np.testing.assert_allclose(after[:, 0, 1], before[:, 1, 1], rtol=1e-5)


def test_loader_workers_see_the_same_images(names):
    mapper = DatasetMapper(False, augmentations=[], image_format="RGB")
    loader = build_detection_test_loader(
        DatasetCatalog.get(names["instances"]), mapper=mapper, num_workers=2
    )
    for index, (record,) in enumerate(loader):
        image = record["image"].numpy().transpose(1, 2, 0)
        np.testing.assert_array_equal(image, TINY.frame(index).image)


def test_visualizer_draws_all_tasks(names):
    for task in ("keypoints", "panoptic"):
        record = DatasetCatalog.get(names[task])[0]
        image = TINY.frame(0).image
        drawn = Visualizer(image, MetadataCatalog.get(names[task])).draw_dataset_dict(record)
        assert (drawn.get_image() != image).any()


def test_stock_config_reads_the_class_count(names):
    cfg = get_cfg()
    cfg.DATASETS.TEST = (names["instances"],)
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    assert metadata.evaluator_type == "coco"
    assert list(metadata.thing_dataset_id_to_contiguous_id.values()) == list(range(8))


# Paths


def test_paths_look_like_a_file_system():
    root = TINY.root
    assert PathManager.ls(root) == ["images", "panoptic", "sem_seg", "semantic", "annotations"]
    images = PathManager.ls(f"{root}/images")
    assert images[0] == "000000000000.bmp" and len(images) == TINY.num
    for path in (f"{root}/images/{images[-1]}", f"{root}/annotations/panoptic.json"):
        assert PathManager.exists(path) and PathManager.isfile(path) and not PathManager.isdir(path)
    for path in (root, f"{root}/", f"{root}/images"):
        assert PathManager.exists(path) and PathManager.isdir(path) and not PathManager.isfile(path)


@pytest.mark.parametrize(
    "path, message",
    [
        ("shapes://", "no name of a set"),
        (f"{TINY.root}/../x", "no such file"),
        ("shapes://val/000.png", "val-200-256x256-seed0"),
        (f"{TINY.root}/images/000000000012.bmp", "holds 12 pictures"),
        (f"{TINY.root}/images/000000000000.png", "begins with 000000000000.bmp"),
        (f"{TINY.root}/masks/000000000000.png", "sem_seg"),
        (f"{TINY.root}/flow/000000000000.flo", "no such file"),
        ("shapes://val-0-64x64-seed0/images/000000000000.bmp", "at least one image"),
        ("shapes://val-5-16x64-seed0/images/000000000000.bmp", "32 x 32"),
    ],
)
def test_unknown_paths(path, message):
    assert not PathManager.exists(path)
    for use in (PathManager.get_local_path, PathManager.open):
        with pytest.raises(FileNotFoundError, match=message):
            use(path)
    with pytest.raises(FileNotFoundError):
        PathManager.ls(path)


def test_paths_are_read_only():
    with pytest.raises(PermissionError, match="read-only"):
        PathManager.open(f"{TINY.root}/images/000000000000.bmp", "wb")


def test_local_copies(cache, monkeypatch):
    path = f"{TINY.root}/sem_seg/000000000004.png"
    local = Path(PathManager.get_local_path(path))
    assert local.is_relative_to(cache)
    with PathManager.open(path, "rb") as file:
        assert local.read_bytes() == file.read()
    folder = Path(PathManager.get_local_path(f"{TINY.root}/semantic"))
    assert sorted(os.listdir(folder)) == PathManager.ls(f"{TINY.root}/semantic")
    np.testing.assert_array_equal(
        np.asarray(Image.open(folder / "000000000002.png")), TINY.frame(2).semantic
    )
    # No traces of the temporary files, and a second request is served from the cache.
    assert not [name for name in os.listdir(folder.parent) if name.startswith(".")]
    stamp = local.stat().st_mtime_ns
    assert PathManager.get_local_path(path) == str(local) and local.stat().st_mtime_ns == stamp


def test_local_copies_without_a_writable_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("D2EXT_CACHE")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    local = PathManager.get_local_path(f"{TINY.root}/sem_seg/000000000001.png")
    assert os.path.getsize(local) and not Path(local).is_relative_to(tmp_path)


def test_text_files_open_as_text():
    with PathManager.open(f"{TINY.root}/annotations/panoptic.json", "r") as file:
        assert file.read(1) == "{"


# Sets


@pytest.mark.parametrize(
    "shapes", [TINY, ShapesSet("test_2", 3), VideoSet("train", 2, 64, 96, 5, length=7)]
)
def test_sets_have_names(shapes):
    assert set_from_name(shapes.name) == shapes


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"split": "a/b"}, "letters, digits"),
        ({"num": 0}, "at least one"),
        ({"height": 8}, "32 x 32"),
        ({"seed": -1}, "negative"),
    ],
)
def test_bad_sets(fields, message):
    with pytest.raises(ValueError, match=message):
        ShapesSet(**{"split": "val", "num": 1, **fields})


def test_frames_out_of_range():
    with pytest.raises(IndexError, match="images 0 to 11"):
        TINY.frame(12)


def test_a_larger_set_begins_with_the_smaller_one():
    small, large = ShapesSet("val", 2, 64, 64), ShapesSet("val", 3, 64, 64)
    for index in range(2):
        np.testing.assert_array_equal(small.frame(index).image, large.frame(index).image)
    assert [r["annotations"] for r in load_shapes(small)] == [
        r["annotations"] for r in load_shapes(large)[:2]
    ]


def test_unknown_task():
    for use in (lambda: load_shapes(TINY, "depth"), lambda: shapes_metadata("depth")):
        with pytest.raises(ValueError, match="choose from instances"):
            use()


@pytest.mark.parametrize("task", TASKS)
def test_annotations_of_the_default_sets_are_cached(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D2EXT_CACHE", str(tmp_path))
    few = ShapesSet("few", 5)
    monkeypatch.setattr(catalog, "DEFAULT_SETS", (few,))
    drawn = catalog._draw(few, task)
    catalog._load.cache_clear()
    assert load_shapes(few, task) == drawn
    monkeypatch.setattr(catalog, "_draw", None)
    catalog._load.cache_clear()
    cached = load_shapes(few, task)
    assert cached == drawn
    for annotation in cached[0].get("annotations", ()):
        assert isinstance(annotation["bbox_mode"], BoxMode)
    catalog._load.cache_clear()
