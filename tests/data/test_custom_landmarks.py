"""Own landmark data from the command line and from YAML."""

import argparse
import json
import uuid

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2ext.config import get_cfg
from d2ext.data.custom import (
    add_dataset_arguments,
    apply_dataset_to_config,
    check_config_against_data,
    register_from_arguments,
    register_own_dataset,
)
from d2ext.data.errors import DatasetError


@pytest.fixture
def name():
    made = f"own_{uuid.uuid4().hex}"
    yield made
    for split in ("train", "val"):
        if f"{made}_{split}" in DatasetCatalog.list():
            DatasetCatalog.remove(f"{made}_{split}")
        MetadataCatalog.pop(f"{made}_{split}", None)


@pytest.fixture
def files(tmp_path):
    """``hand.json`` with three named points, ``cofw.json`` with 29, and an image."""
    Image.new("RGB", (60, 50)).save(tmp_path / "a.png")
    for stem, names in (("hand", ["wrist", "left_tip", "right_tip"]), ("cofw", [])):
        count = len(names) or 29
        content = {
            "images": [{"id": 1, "file_name": "a.png", "height": 50, "width": 60}],
            "annotations": [
                {
                    "id": 1,
                    "image_id": 1,
                    "category_id": 1,
                    "bbox": [5, 5, 20, 20],
                    "keypoints": [10, 10, 2] * count,
                }
            ],
            "categories": [{"id": 1, "name": "thing", "keypoints": names}],
        }
        (tmp_path / f"{stem}.json").write_text(json.dumps(content))
    return tmp_path


def parse(*arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_dataset_arguments(parser)
    return parser.parse_args([str(a) for a in arguments])


def test_command_line(name, files):
    args = parse(
        *("--dataset", name, "--landmarks", "custom"),
        *("--train-json", files / "hand.json", "--train-images", files),
        *("--val-json", files / "hand.json", "--val-images", files),
    )
    assert register_from_arguments(args) == name
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "LandmarkNet"
    cfg.MODEL.LANDMARKS.FLIP_INDICES = [1, 0]  # of the config's own data
    apply_dataset_to_config(cfg, name)
    assert (f"{name}_train",) == cfg.DATASETS.TRAIN and (f"{name}_val",) == cfg.DATASETS.TEST
    assert cfg.MODEL.LANDMARKS.NUM_KEYPOINTS == 3
    assert cfg.MODEL.LANDMARKS.FLIP_INDICES == [0, 2, 1]
    check_config_against_data(cfg)
    cfg.MODEL.LANDMARKS.NUM_KEYPOINTS = 16
    with pytest.raises(DatasetError, match=r"NUM_KEYPOINTS is 16, .* has 3 keypoints"):
        check_config_against_data(cfg)


def test_yaml(name, files):
    path = files / "data.yaml"
    text = f"name: {name}\nlandmarks: cofw\nval: {{json: cofw.json, images: .}}\n"
    path.write_text(text)
    assert register_from_arguments(parse("--dataset-yaml", path)) == name
    assert len(MetadataCatalog.get(f"{name}_val").keypoint_names) == 29
    assert len(DatasetCatalog.get(f"{name}_val")) == 1
    with pytest.raises(DatasetError, match="holds the whole data set"):
        register_from_arguments(parse("--dataset-yaml", path, "--landmarks", "cofw"))
    for change, message in (
        (text + "test: {}\n", "unknown keys: test"),
        (text.replace("images", "folder"), "'val' is incomplete"),
        (text.replace(f"name: {name}\n", ""), "has no 'name'"),
        (f"name: {name}\nlandmarks: cofw\n", "at least one part"),
    ):
        path.write_text(change)
        with pytest.raises(DatasetError, match=message):
            register_from_arguments(parse("--dataset-yaml", path))


def test_other_data_are_not_taken_for_landmarks(files):
    assert register_from_arguments(parse()) is None
    with pytest.raises(DatasetError, match="does not exist"):
        register_from_arguments(parse("--dataset-yaml", files / "none.yaml"))


def test_wrong_use(name, files):
    with pytest.raises(DatasetError, match="add --dataset NAME"):
        register_from_arguments(parse("--landmarks", "cofw"))
    with pytest.raises(DatasetError, match="at least one part"):
        register_from_arguments(parse("--landmarks", "cofw", "--dataset", name))
    with pytest.raises(DatasetError, match="image folder of its train"):
        register_own_dataset(name, "a.json", landmarks="cofw")
    cofw = json.loads((files / "cofw.json").read_text())
    cofw["categories"][0]["keypoints"] = [str(i) for i in range(29)]
    (files / "cofw.json").write_text(json.dumps(cofw))
    with pytest.raises(DatasetError, match="different landmarks"):
        register_own_dataset(
            name,
            landmarks="custom",
            train_json=str(files / "hand.json"),
            train_images=str(files),
            val_json=str(files / "cofw.json"),
            val_images=str(files),
        )
    assert f"{name}_train" not in DatasetCatalog.list()
    with pytest.raises(DatasetError, match="with no other annotation"):
        register_own_dataset(
            name, train_panoptic_json="a.json", train_images=str(files), landmarks="custom"
        )
