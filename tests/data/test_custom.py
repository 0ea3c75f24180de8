"""Own data: one call registers, checks and configures; every problem is a clear error."""

import argparse
import itertools
import uuid

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ext.config import get_cfg
from d2ext.data import DatasetError, build_test_loader, build_train_loader
from d2ext.data.custom import (
    add_dataset_arguments,
    apply_dataset_to_config,
    check_config_against_data,
    load_dataset_yaml,
    register_from_arguments,
    register_own_dataset,
)
from tests.data.coco_files import save, write_coco


@pytest.fixture
def name():
    """A fresh name; what gets registered under it is removed again."""
    name = f"test_custom_{uuid.uuid4().hex}"
    yield name
    for split in ("train", "val"):
        if f"{name}_{split}" in DatasetCatalog.list():
            DatasetCatalog.remove(f"{name}_{split}")
        MetadataCatalog.pop(f"{name}_{split}", None)


@pytest.fixture
def files(tmp_path):
    train = write_coco(tmp_path / "train")
    val = write_coco(tmp_path / "val", count=2)
    return {
        "train_json": train[0],
        "train_images": train[1],
        "val_json": val[0],
        "val_images": val[1],
    }


def make_cfg():
    cfg = get_cfg()
    if "YOLACT" not in cfg.MODEL:  # as its system adds it
        cfg.MODEL.YOLACT = CfgNode({"NUM_CLASSES": 80})
    cfg.MODEL.META_ARCHITECTURE = "YOLACT"
    cfg.MODEL.MASK_ON = True
    cfg.SOLVER.IMS_PER_BATCH = 3
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def test_from_files_to_batches(name, files):
    assert register_own_dataset(name, **files) == [f"{name}_train", f"{name}_val"]
    # Known before anything is loaded, in the order of the category ids.
    assert MetadataCatalog.get(f"{name}_val").thing_classes == ["apple", "pear", "fig"]
    assert MetadataCatalog.get(f"{name}_val").evaluator_type == "coco"
    cfg = make_cfg()
    cfg.DATASETS.TRAIN_JOINT = ("coco_2017_train",)
    apply_dataset_to_config(cfg, name)
    assert [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST] == [f"{name}_train", f"{name}_val"]
    assert cfg.DATASETS.TRAIN_JOINT == ()
    assert cfg.MODEL.YOLACT.NUM_CLASSES == 3
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 3 and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == get_cfg().MODEL.SEM_SEG_HEAD.NUM_CLASSES
    check_config_against_data(cfg)
    (batch,) = itertools.islice(build_train_loader(cfg), 1)
    assert sorted(s["image_id"] for s in batch) == [100, 101, 102]
    # Annotations are pear (7), apple (2), fig (9) → contiguous ids 1, 0, 2.
    assert all(s["instances"].gt_classes.tolist() == [1, 0, 2] for s in batch)
    assert len(list(build_test_loader(cfg, f"{name}_val"))) == 2


def test_again_is_harmless_but_other_files_are_not(name, files):
    register_own_dataset(name, **files)
    register_own_dataset(name, **files)
    with pytest.raises(DatasetError, match="already registered with other files"):
        register_own_dataset(name, files["val_json"], files["val_images"])


def test_one_part_is_enough(name, files):
    assert register_own_dataset(
        name, val_json=files["val_json"], val_images=files["val_images"]
    ) == [f"{name}_val"]
    cfg = make_cfg()
    apply_dataset_to_config(cfg, name)
    assert len(cfg.DATASETS.TRAIN) == 0 and list(cfg.DATASETS.TEST) == [f"{name}_val"]
    assert cfg.MODEL.YOLACT.NUM_CLASSES == 3


def test_incomplete_arguments(name, files):
    with pytest.raises(DatasetError, match="both the JSON file and the image folder"):
        register_own_dataset(name, files["train_json"])
    with pytest.raises(DatasetError, match="at least one part"):
        register_own_dataset(name)


def test_different_categories(name, tmp_path, files):
    other = [{"id": 7, "name": "pear"}, {"id": 2, "name": "orange"}, {"id": 9, "name": "fig"}]
    files["val_json"], files["val_images"], _ = write_coco(tmp_path / "other", 1, other)
    with pytest.raises(DatasetError, match="id 2: apple / orange"):
        register_own_dataset(name, **files)
    assert f"{name}_train" not in DatasetCatalog.list()


def test_unknown_name():
    with pytest.raises(DatasetError, match="neither 'nonsense_train' nor 'nonsense_val'"):
        apply_dataset_to_config(make_cfg(), "nonsense")


def test_keypoints(name, tmp_path):
    categories = [
        {
            "id": 1,
            "name": "face",
            "keypoints": ["nose", "left_eye", "right_eye"],
            "skeleton": [[1, 2], [1, 3]],
        }
    ]
    json_file, images, content = write_coco(tmp_path / "faces", 2, categories)
    for annotation in content["annotations"]:
        annotation["keypoints"] = [10, 10, 2, 20, 20, 2, 0, 0, 0]
    save(tmp_path / "faces", content)
    register_own_dataset(name, json_file, images)
    metadata = MetadataCatalog.get(f"{name}_train")
    assert metadata.keypoint_flip_map == [("left_eye", "right_eye")]
    assert [rule[:2] for rule in metadata.keypoint_connection_rules] == [
        ("nose", "left_eye"),
        ("nose", "right_eye"),
    ]
    cfg = make_cfg()
    cfg.MODEL.KEYPOINT_ON = True
    cfg.SOLVER.IMS_PER_BATCH = 2
    apply_dataset_to_config(cfg, name)
    assert cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS == 3
    assert len(cfg.TEST.KEYPOINT_OKS_SIGMAS) == 3
    (batch,) = itertools.islice(build_train_loader(cfg), 1)
    assert batch[0]["instances"].gt_keypoints.tensor.shape == (3, 3, 3)
    cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = 17
    with pytest.raises(DatasetError, match=r"NUM_KEYPOINTS is 17.*3 keypoints \(nose"):
        check_config_against_data(cfg)


class TestConfigAgainstData:
    @pytest.fixture
    def cfg(self, name, files):
        register_own_dataset(name, **files)
        cfg = make_cfg()
        apply_dataset_to_config(cfg, name)
        return cfg

    def test_error_says_what_to_set(self, cfg, name):
        cfg.MODEL.YOLACT.NUM_CLASSES = 80
        with pytest.raises(
            DatasetError,
            match=rf"MODEL\.YOLACT\.NUM_CLASSES is 80.*{name}_train.*3 classes \(apple, pear, fig\)"
            r".*Set MODEL\.YOLACT\.NUM_CLASSES to 3",
        ):
            check_config_against_data(cfg)

    def test_other_systems_counts_do_not_matter(self, cfg):
        cfg.MODEL.RETINANET.NUM_CLASSES = 80
        check_config_against_data(cfg)
        cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
        with pytest.raises(DatasetError, match=r"MODEL\.RETINANET\.NUM_CLASSES"):
            check_config_against_data(cfg)

    def test_only_the_test_set_when_not_training(self, cfg):
        cfg.DATASETS.TRAIN = ("coco_2017_train",)
        with pytest.raises(DatasetError, match="coco_2017_train"):
            check_config_against_data(cfg)
        check_config_against_data(cfg, train=False)

    def test_test_set_counts(self, cfg):
        cfg.DATASETS.TEST = ("coco_2017_val",)
        with pytest.raises(DatasetError, match="coco_2017_val"):
            check_config_against_data(cfg, train=False)

    def test_semantic_classes(self):
        cfg = make_cfg()
        cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
        cfg.DATASETS.TRAIN = ("coco_2017_train_panoptic_separated",)
        check_config_against_data(cfg)
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
        with pytest.raises(DatasetError, match=r"SEM_SEG_HEAD\.NUM_CLASSES to 54"):
            check_config_against_data(cfg)

    def test_unregistered(self, cfg):
        cfg.DATASETS.TEST = ("nonsense",)
        with pytest.raises(DatasetError, match="'nonsense' is not registered"):
            check_config_against_data(cfg)


class TestYaml:
    def test_relative_to_the_file(self, tmp_path, name, files):
        path = tmp_path / "set.yaml"
        path.write_text(
            f"name: {name}\n"
            "train: {json: train/data.json, images: train}\n"
            f"val: {{json: {files['val_json']}, images: val}}\n"
        )
        arguments = load_dataset_yaml(str(path))
        assert register_own_dataset(**arguments) == [f"{name}_train", f"{name}_val"]
        assert len(DatasetCatalog.get(f"{name}_train")) == 3

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("train: {json: a, images: b}", "has no 'name'"),
            ("[1, 2]", "has no 'name'"),
            ("name: x\ntrain: {json: a}", "'train' is incomplete"),
            ("name: x\ntrian: {json: a, images: b}", "unknown keys: trian"),
            ("name: x\ntrain: {json: a, images: b, imgs: c}", "unknown keys: imgs"),
            ("name: [", "not valid YAML"),
        ],
    )
    def test_errors(self, tmp_path, text, message):
        (tmp_path / "set.yaml").write_text(text)
        with pytest.raises(DatasetError, match=message):
            load_dataset_yaml(str(tmp_path / "set.yaml"))
        with pytest.raises(DatasetError, match="does not exist"):
            load_dataset_yaml(str(tmp_path / "none.yaml"))


class TestArguments:
    def parse(self, *args):
        parser = argparse.ArgumentParser()
        add_dataset_arguments(parser)
        return register_from_arguments(parser.parse_args([str(a) for a in args]))

    def test_nothing(self):
        assert self.parse() is None

    def test_files(self, name, files):
        flags = [x for key, value in files.items() for x in (f"--{key.replace('_', '-')}", value)]
        assert self.parse("--dataset", name, *flags) == name
        assert f"{name}_val" in DatasetCatalog.list()
        with pytest.raises(DatasetError, match="--dataset NAME"):
            self.parse(*flags)

    def test_yaml(self, tmp_path, name, files):
        path = tmp_path / "set.yaml"
        path.write_text(f"name: {name}\ntrain: {{json: train/data.json, images: train}}\n")
        assert self.parse("--dataset-yaml", path) == name
        with pytest.raises(DatasetError, match="no other data"):
            self.parse("--dataset-yaml", path, "--dataset", name)

    def test_known_name(self):
        name = self.parse("--dataset", "coco_2017")
        cfg = make_cfg()
        cfg.MODEL.YOLACT.NUM_CLASSES = 3
        apply_dataset_to_config(cfg, name)
        assert cfg.DATASETS.TRAIN == ("coco_2017_train",)
        assert cfg.MODEL.YOLACT.NUM_CLASSES == 80
