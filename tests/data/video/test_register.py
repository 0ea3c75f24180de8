"""Built-in names of data sets of videos, Cityscapes-VPS, relabelled images, FlyingChairs."""

import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2ext.config import get_cfg
from d2ext.data import DatasetError
from d2ext.data.dataset_dicts import load_dataset
from d2ext.data.shapes.video import flow_bytes
from d2ext.data.video import register as register_module
from d2ext.data.video.flow_pairs import flow_pairs
from d2ext.data.video.register import register_relabelled
from d2ext.evaluation import COCOEvaluator, build_evaluator
from tests.data.video.test_readers import (
    write_frames,
    ytvis,
)


@pytest.mark.parametrize(
    "name, json_file, images",
    [
        ("ytvis_2019_train", "ytvis_2019/train.json", "ytvis_2019/train"),
        ("ytvis_2019_val", "ytvis_2019/valid.json", "ytvis_2019/valid"),
        ("ytvis_2021_train", "ytvis_2021/train/instances.json", "ytvis_2021/train"),
        ("ytvis_2022_val", "ytvis_2022/val/instances.json", "ytvis_2022/val"),
    ],
)
def test_builtin_youtube_vis(builtin, name, json_file, images):
    with pytest.raises(DatasetError, match=f"Data set '{name}' is not there.*{json_file}"):
        load_dataset(name)
    images = builtin / images / "JPEGImages"
    write_frames(images, [*(f"a/{i}.jpg" for i in range(11)), "b/0.jpg"])
    (builtin / json_file).parent.mkdir(exist_ok=True)
    (builtin / json_file).write_text(json.dumps(ytvis()))
    assert [v["length"] for v in load_dataset(name)] == [11, 1]
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["apple", "pear"] and metadata.evaluator_type == "ytvis"
    assert metadata.json_file == str(builtin / json_file) and metadata.image_root == str(images)
    load_dataset(name)[0].clear()
    assert load_dataset(name)[0]  # a copy


def test_published_pairs_of_classes():
    pairs = register_module.YTVIS_2019_FROM_COCO
    assert len(pairs) == 19 and len(set(pairs.values())) == 19
    assert set(pairs.values()) <= set(MetadataCatalog.get("coco_2017_train").thing_classes)
    assert pairs["sedan"] == "car" and "mouse" not in pairs


def test_relabelled_images(real_data, tmp_path):
    target = "test_relabelled_target"
    MetadataCatalog.get(target).thing_classes = ["sedan", "yeti", "person"]
    name = "test_relabelled"
    register_relabelled(name, "coco_2017_val", target, {"sedan": "car", "person": "person"})
    try:
        records = load_dataset(name)
        original = {r["image_id"]: r for r in load_dataset("coco_2017_val")}
        classes = MetadataCatalog.get("coco_2017_val").thing_classes
        table = {classes.index("car"): 0, classes.index("person"): 2}
        wanted = {
            i: [table[a["category_id"]] for a in r["annotations"] if a["category_id"] in table]
            for i, r in original.items()
        }
        assert {r["image_id"]: [a["category_id"] for a in r["annotations"]] for r in records} == {
            i: categories for i, categories in wanted.items() if categories
        }
        assert MetadataCatalog.get(name).thing_classes == ["sedan", "yeti", "person"]
        assert isinstance(build_evaluator(get_cfg(), name, str(tmp_path)), COCOEvaluator)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
        MetadataCatalog.pop(target, None)
    register_relabelled(name, "coco_2017_val", "shapes_val", {"sedan": "car"})
    try:
        with pytest.raises(DatasetError, match="no classes sedan of shapes_val"):
            load_dataset(name)
    finally:
        DatasetCatalog.remove(name)


def write_chairs(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(1, count + 1):
        for part in ("img1", "img2"):
            Image.new("RGB", (6, 4)).save(folder / f"{i:05d}_{part}.ppm")
        (folder / f"{i:05d}_flow.flo").write_bytes(flow_bytes(np.zeros((4, 6, 2))))


def test_flying_chairs(builtin):
    folder = builtin / "FlyingChairs_release/data"
    with pytest.raises(DatasetError, match="There are no pairs"):
        load_dataset("flying_chairs_train")
    write_chairs(folder, 40)
    train, val = (load_dataset(f"flying_chairs_{split}") for split in ("train", "val"))
    assert len(train) == 39 and [r["image_id"] for r in val] == [35]
    assert Path(val[0]["file_name"]).name == "00036_img1.ppm"
    assert Path(val[0]["reference"]["file_name"]).name == "00036_img2.ppm"
    assert Path(val[0]["flow_file_name"]).name == "00036_flow.flo"
    split = folder.parent / "FlyingChairs_train_val.txt"
    split.write_text("".join("2\n" if i in (0, 7) else "1\n" for i in range(40)))
    assert [r["image_id"] for r in load_dataset("flying_chairs_val")] == [0, 7]
    assert len(load_dataset("flying_chairs_train")) == 38
    split.write_text("1\n2\n")
    with pytest.raises(DatasetError, match="a line for each of 40 pairs"):
        load_dataset("flying_chairs_train")
    (folder / "00003_flow.flo").unlink()
    with pytest.raises(DatasetError, match=r"1 of 40 pairs .* lack a file: 00003"):
        flow_pairs(str(folder))
