"""Own panoptic and semantic data: files in, batches and scores out; problems are clear errors."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BitMasks, Instances
from PIL import Image

from d2ext.config import get_cfg
from d2ext.data import DatasetError, build_train_loader, get_dataset_dicts
from d2ext.data.custom import (
    add_dataset_arguments,
    apply_dataset_to_config,
    check_config_against_data,
    load_dataset_yaml,
    register_from_arguments,
    register_own_dataset,
)
from d2ext.data.dataset_facts import _keys, follows_data
from d2ext.data.panoptic_json import check_panoptic_json
from d2ext.data.panoptic_to_detection import panoptic_to_detection
from d2ext.data.register_panoptic import register_cityscapes_folder
from d2ext.evaluation import build_evaluator
from tests.data.panoptic_files import id_to_rgb, paint_ids, save, write_cityscapes, write_panoptic


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("D2EXT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def name() -> Iterator[str]:
    """A fresh name; what gets registered under it is removed again."""
    name = f"test_own_{uuid.uuid4().hex}"
    yield name
    for known in DatasetCatalog.list():
        if known.startswith(name):
            DatasetCatalog.remove(known)
            MetadataCatalog.pop(known, None)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    result = {}
    for split, count in (("train", 3), ("val", 2)):
        write_panoptic(tmp_path / split, count)
        result[f"{split}_panoptic_json"] = str(tmp_path / split / "panoptic.json")
        result[f"{split}_panoptic_root"] = str(tmp_path / split / "panoptic")
        result[f"{split}_images"] = str(tmp_path / split / "images")
    return result


def panoptic_cfg() -> Any:
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.AUGMENTATION.NAME = "none"
    cfg.SOLVER.IMS_PER_BATCH = 3
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def test_from_files_to_batches(name: str, files: dict[str, str]) -> None:
    assert register_own_dataset(name, **files) == [f"{name}_train", f"{name}_val"]
    metadata = MetadataCatalog.get(f"{name}_val")
    assert metadata.thing_classes == ["apple", "pear"]  # in the order of the ids 3, 7
    assert metadata.stuff_classes == ["things", "sky", "grass"]  # 12, 40
    assert metadata.thing_colors == [(200, 0, 0), (200, 200, 0)]
    assert metadata.evaluator_type == "coco_panoptic_seg"
    cfg = panoptic_cfg()
    apply_dataset_to_config(cfg, name)
    assert [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST] == [f"{name}_train", f"{name}_val"]
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2 and cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3
    assert cfg.INPUT.MASK_FORMAT == "bitmask"
    check_config_against_data(cfg)
    (batch,) = itertools.islice(build_train_loader(cfg), 1)
    assert sorted(s["image_id"] for s in batch) == [10, 11, 12]
    for sample in batch:
        ids, _ = paint_ids(sample["image_id"] - 10)
        instances: Instances = sample["instances"]
        expected = [ids == i for i in (300, 301, 9_000_000)]
        assert instances.gt_classes.tolist() == [1, 1, 0]
        assert torch.equal(instances.gt_masks.tensor, torch.from_numpy(np.stack(expected)))
        assert sample["crowd_instances"].gt_classes.tolist() == [0]
        assert sample["crowd_instances"].gt_boxes.tensor.tolist() == [[40, 30, 58, 38]]
        stuff = np.select([ids == 0, ids == 1, ids == 70000], [255, 1, 2], 0)
        np.testing.assert_array_equal(sample["sem_seg"], stuff)


def test_full_label_maps(name: str, files: dict[str, str]) -> None:
    register_own_dataset(name, **files)
    cfg = panoptic_cfg()
    cfg.INPUT.SEM_SEG_WITH_THINGS = True
    apply_dataset_to_config(cfg, name)
    (batch,) = itertools.islice(build_train_loader(cfg), 1)
    ids, _ = paint_ids(batch[0]["image_id"] - 10)
    labels = [(0, 255), (1, 0), (70000, 1), (9_000_000, 2), (16_000_001, 2), (300, 3), (301, 3)]
    expected = np.select([ids == i for i, _ in labels], [label for _, label in labels], -1)
    np.testing.assert_array_equal(batch[0]["sem_seg"], expected)


def test_made_once_and_again_when_a_png_changes(files: dict[str, str], cache: Path) -> None:
    root = files["train_panoptic_root"]
    summary = check_panoptic_json(files["train_panoptic_json"], root, files["train_images"])
    first = panoptic_to_detection("some", summary, root)
    stamp = Path(first.json_file).stat().st_mtime_ns
    assert panoptic_to_detection("some", summary, root) == first
    assert Path(first.json_file).stat().st_mtime_ns == stamp
    os.utime(Path(root, "scene_1.png"), ns=(1, 1))
    second = panoptic_to_detection("some", summary, root)
    assert second != first and len(list((cache / "panoptic").iterdir())) == 2
    assert Path(second.json_file).read_text() == Path(first.json_file).read_text()


def test_many_images_are_shared_by_processes(
    files: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = files["train_panoptic_root"]
    summary = check_panoptic_json(files["train_panoptic_json"], root, files["train_images"])
    alone = panoptic_to_detection("alone", summary, root)
    monkeypatch.setattr("d2ext.data.panoptic_to_detection._PARALLEL_FROM", 1)
    shared = panoptic_to_detection("shared", summary, root)
    assert Path(shared.json_file).read_text() == Path(alone.json_file).read_text()


def test_again_is_harmless_but_other_files_are_not(name: str, files: dict[str, str]) -> None:
    register_own_dataset(name, **files)
    register_own_dataset(name, **files)
    files["val_images"] = files["train_images"]
    with pytest.raises(DatasetError, match="already registered with other files"):
        register_own_dataset(name, **files)


def test_default_root_and_given_instances(name: str, tmp_path: Path) -> None:
    """As COCO has it: PNGs in a folder named like the JSON file; own instances and stuff maps."""
    write_panoptic(tmp_path / "set")
    (tmp_path / "set/panoptic.json").rename(tmp_path / "set/annotations.json")
    (tmp_path / "set/panoptic").rename(tmp_path / "set/annotations")
    segmentation = [[5, 5, 20, 5, 20, 15, 5, 15]]
    instances = {
        "images": [
            {"id": 10 + i, "file_name": f"scene_{i}.jpg", "height": 40, "width": 60}
            for i in range(3)
        ],
        "annotations": [
            {
                "id": 1,
                "image_id": 11,
                "category_id": 7,
                "bbox": [5, 5, 15, 10],
                "iscrowd": 0,
                "area": 150,
                "segmentation": segmentation,
            }
        ],
        "categories": [{"id": 3, "name": "apple"}, {"id": 7, "name": "pear"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    arguments = {
        "train_panoptic_json": str(tmp_path / "set/annotations.json"),
        "train_images": str(tmp_path / "set/images"),
        "train_json": str(tmp_path / "instances.json"),
    }
    register_own_dataset(name, **arguments)
    records = {r["image_id"]: r for r in DatasetCatalog.get(f"{name}_train")}
    assert [len(records[i]["annotations"]) for i in (10, 11, 12)] == [0, 1, 0]
    assert records[11]["annotations"][0]["segmentation"] == segmentation
    assert Path(records[11]["sem_seg_file_name"]).is_file()
    cfg = panoptic_cfg()
    apply_dataset_to_config(cfg, name)
    assert cfg.INPUT.MASK_FORMAT == "polygon"
    instances["categories"][0]["name"] = "plum"
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    with pytest.raises(DatasetError, match=r"id 3: plum / apple.*leave out the instances"):
        register_own_dataset(f"{name}_b", **arguments)
    assert f"{name}_b_train" not in DatasetCatalog.list()


def test_images_with_only_void_crowd_or_stuff(name: str, tmp_path: Path) -> None:
    """They load and keep every field; the model decides what to learn of them."""
    content = write_panoptic(tmp_path / "set")
    for number, ids_left in enumerate(([], [16_000_001], [1, 70000])):
        ids, segments = paint_ids(number)
        ids[~np.isin(ids, ids_left)] = 0
        Image.fromarray(id_to_rgb(ids)).save(tmp_path / f"set/panoptic/scene_{number}.png")
        entry = content["annotations"][number]
        entry["segments_info"] = [s for s in segments if s["id"] in ids_left]
    save(tmp_path / "set", content)
    register_own_dataset(
        name,
        train_panoptic_json=str(tmp_path / "set/panoptic.json"),
        train_panoptic_root=str(tmp_path / "set/panoptic"),
        train_images=str(tmp_path / "set/images"),
    )
    for with_things, labels in (
        (False, [{255}, {0, 255}, {1, 2, 255}]),
        (True, [{255}, {2, 255}, {0, 1, 255}]),
    ):
        cfg = panoptic_cfg()
        cfg.INPUT.SEM_SEG_WITH_THINGS = with_things
        cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
        apply_dataset_to_config(cfg, name)
        (batch,) = itertools.islice(build_train_loader(cfg), 1)
        batch = sorted(batch, key=lambda s: s["image_id"])
        assert [set(s["sem_seg"].unique().tolist()) for s in batch] == labels
        assert [len(s["instances"]) for s in batch] == [0, 0, 0]
        assert [len(s["crowd_instances"]) for s in batch] == [0, 1, 0]
        assert all(s["instances"].has("gt_masks") for s in batch)


def right_output(record: dict[str, Any], num_semantic: int) -> dict[str, Any]:
    """What a perfect model says of an image."""
    with Image.open(record["pan_seg_file_name"]) as png:
        rgb = np.asarray(png).astype(np.int32)
    ids = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
    with Image.open(record["sem_seg_file_name"]) as png:
        labels = np.asarray(png).astype(np.int64)
    segments = [
        {k: s[k] for k in ("id", "category_id", "isthing")} for s in record["segments_info"]
    ]
    masks = [mask_util.decode(a["segmentation"]).astype(bool) for a in record["annotations"]]
    instances = Instances(ids.shape)
    instances.pred_masks = torch.from_numpy(np.stack(masks))
    instances.pred_boxes = BitMasks(instances.pred_masks).get_bounding_boxes()
    instances.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
    instances.scores = torch.ones(len(masks))
    known = torch.from_numpy(np.where(labels == 255, 0, labels))
    semantic = torch.nn.functional.one_hot(known, num_semantic).permute(2, 0, 1).float()
    return {
        "panoptic_seg": (torch.from_numpy(ids), segments),
        "instances": instances,
        "sem_seg": semantic,
    }


def test_evaluation(name: str, files: dict[str, str], tmp_path: Path) -> None:
    """All three evaluators run on what was made of PNGs and JSON."""
    register_own_dataset(name, **files)
    evaluator = build_evaluator(get_cfg(), f"{name}_val", str(tmp_path / "out"))
    evaluator.reset()
    for record in DatasetCatalog.get(f"{name}_val"):
        evaluator.process([record], [right_output(record, 3)])
    results = evaluator.evaluate()
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100)
    assert results["sem_seg"]["mIoU"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)


def test_cityscapes(name: str, tmp_path: Path) -> None:
    """Detectron2's Cityscapes has no instances among its panoptic data; the separated form does."""
    write_cityscapes(tmp_path)
    root = str(tmp_path / "gtFine/cityscapes_panoptic_train")
    image_root = tmp_path / "leftImg8bit/train"
    register_cityscapes_folder(f"{name}_train", str(image_root), f"{root}.json", root)
    cfg = panoptic_cfg()
    cfg.INPUT.SEM_SEG_WITH_THINGS = True
    apply_dataset_to_config(cfg, name)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 8 and cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 12
    cfg.SOLVER.IMS_PER_BATCH = 2
    (batch,) = itertools.islice(build_train_loader(cfg), 1)
    assert batch[0]["instances"].gt_classes.tolist() == [2, 2]
    assert batch[0]["crowd_instances"].gt_classes.tolist() == [0]
    assert batch[0]["sem_seg"].unique().tolist() == [0, 10, 11, 13, 255]
    assert batch[0]["image_id"].startswith("aachen_00000")
    evaluator = build_evaluator(get_cfg(), f"{name}_train", str(tmp_path / "out"))
    evaluator.reset()
    for record in DatasetCatalog.get(f"{name}_train"):
        evaluator.process([record], [right_output(record, 12)])
    results = evaluator.evaluate()
    assert results["panoptic_seg"]["PQ"] == pytest.approx(100)
    assert results["segm"]["AP"] == pytest.approx(100)
    assert results["sem_seg"]["mIoU"] == pytest.approx(100)
    next(image_root.rglob("*.png")).unlink()
    register_cityscapes_folder(f"{name}_val", str(image_root), f"{root}.json", root)
    with pytest.raises(DatasetError, match=r"1 of 2 images that.*aachen"):
        DatasetCatalog.get(f"{name}_val")


def test_built_in_separated_cityscapes_is_registered() -> None:
    name = "cityscapes_fine_panoptic_val_separated"
    metadata = MetadataCatalog.get(name)
    assert name in DatasetCatalog.list() and metadata.evaluator_type == "coco_panoptic_seg"
    assert metadata.thing_classes[:3] == ["person", "rider", "car"]
    assert metadata.stuff_classes[:2] == ["things", "road"]


def test_known_names_with_the_split_inside() -> None:
    cfg = panoptic_cfg()
    apply_dataset_to_config(cfg, "shapes_panoptic")
    assert cfg.DATASETS.TRAIN == ("shapes_train_panoptic",)
    assert cfg.DATASETS.TEST == ("shapes_val_panoptic",)
    assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 7 and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 8
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 54
    with pytest.raises(DatasetError, match=r"SEM_SEG_HEAD\.NUM_CLASSES is 54.*to 7 in"):
        check_config_against_data(cfg)


def test_a_system_counts_in_its_own_way(name: str, files: dict[str, str]) -> None:
    cfg = panoptic_cfg()
    cfg.MODEL.META_ARCHITECTURE = architecture = f"Counting_{uuid.uuid4().hex}"
    register_own_dataset(name, **files)

    @follows_data(architecture)
    def keys(facts: Any) -> dict[str, Any]:
        return {
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES": facts.full,
            "MODEL.ROI_HEADS.NUM_CLASSES": facts.things,
            "MODEL.RETINANET.NUM_CLASSES": facts.stuff,
        }

    try:
        apply_dataset_to_config(cfg, name)
        assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 4
        assert cfg.MODEL.RETINANET.NUM_CLASSES == cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 3
        with pytest.raises(DatasetError, match=r"is 3.*4 classes \(sky, grass, apple, pear\)"):
            check_config_against_data(cfg)
    finally:
        del _keys[architecture]


Change = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["categories"][0].pop("isthing"), "1 categories have no 'isthing'"),
        (
            lambda c: c["categories"][0].update(isthing=2),
            r"'isthing' that is not 0 or 1: id 40 \(2\)",
        ),
        (lambda c: c["categories"][0].update(id=7), r"'id' occur repeatedly.*7 \(2 times\)"),
        (lambda c: [x.update(isthing=0) for x in c["categories"]], "no category is a thing"),
        (lambda c: [x.update(isthing=1) for x in c["categories"]], "no category is stuff"),
        (
            lambda c: c["annotations"][1]["segments_info"][2].update(area=3),
            r"Segment 300 of 'scene_1\.png' has \d+ pixels, its 'area' in the JSON file is 3",
        ),
        (lambda c: c["images"][0].pop("width"), "1 images have no 'width'"),
        (lambda c: c["images"].pop(0), r"image_id that is not in 'images'.*scene_0\.png"),
        (lambda c: c["annotations"][1].update(image_id=10), "'image_id' occur repeatedly"),
        (
            lambda c: c["annotations"][1]["segments_info"][0].update(category_id=5),
            r"not in 'categories': id 1 \(category_id 5\) of 'scene_1\.png'",
        ),
        (
            lambda c: c["annotations"][1]["segments_info"][0].update(id=300),
            r"repeatedly in 'segments': 300 \(2 times\) of 'scene_1\.png'",
        ),
        (
            lambda c: c["annotations"][0].update(file_name="gone.png"),
            r"1 of 3 PNGs are not in '.*panoptic': gone\.png",
        ),
        (
            lambda c: c["annotations"][2]["segments_info"].pop(),
            r"1 of 3 panoptic PNGs cannot be used.*scene_2\.png.*does not list: 16000001",
        ),
        (
            lambda c: c["images"][2].update(height=41),
            r"1 of 3 panoptic PNGs.*'scene_2\.png' has height and width \(40, 60\).*\(41, 60\)",
        ),
        (lambda c: c.update(annotations=[{"id": 1}]), "not a panoptic file.*--train-json"),
        (lambda c: c.update(categories={}), "malformed 'categories'"),
    ],
)
def test_problems(name: str, tmp_path: Path, change: Change, message: str) -> None:
    content = write_panoptic(tmp_path / "set")
    content = copy.deepcopy(content)
    change(content)
    save(tmp_path / "set", content)
    with pytest.raises(DatasetError, match=f"(?s){message}"):
        register_own_dataset(
            name,
            train_panoptic_json=str(tmp_path / "set/panoptic.json"),
            train_panoptic_root=str(tmp_path / "set/panoptic"),
            train_images=str(tmp_path / "set/images"),
        )
    assert f"{name}_train" not in DatasetCatalog.list()
    assert f"{name}_train" not in MetadataCatalog.list()


def test_images_without_annotation_are_left_out(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = write_panoptic(tmp_path / "set")
    content["annotations"].pop(1)
    save(tmp_path / "set", content)
    register_own_dataset(
        name,
        train_panoptic_json=str(tmp_path / "set/panoptic.json"),
        train_panoptic_root=str(tmp_path / "set/panoptic"),
        train_images=str(tmp_path / "set/images"),
    )
    assert "1 images without annotation are left out: image id 11" in caplog.text
    assert [r["image_id"] for r in DatasetCatalog.get(f"{name}_train")] == [10, 12]


def test_different_categories(name: str, tmp_path: Path, files: dict[str, str]) -> None:
    content = json.loads(Path(files["val_panoptic_json"]).read_text())
    content["categories"][3]["isthing"] = 0  # apples are stuff there
    Path(files["val_panoptic_json"]).write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"id 3: apple \(thing\) / apple \(stuff\)"):
        register_own_dataset(name, **files)
    assert not {f"{name}_train", f"{name}_val"} & set(DatasetCatalog.list())


class TestArguments:
    @pytest.mark.parametrize(
        ("drop", "message"),
        [
            ("train_images", "--train-panoptic-json, --train-panoptic-root and --train-images"),
            ("train_panoptic_json", "needs both the JSON file and the image folder"),
        ],
    )
    def test_incomplete(self, name: str, files: dict[str, str], drop: str, message: str) -> None:
        del files[drop]
        with pytest.raises(DatasetError, match=message):
            register_own_dataset(name, **files)

    def test_mixed_kinds(self, name: str, files: dict[str, str]) -> None:
        del files["val_panoptic_root"]
        files["val_json"] = files.pop("val_panoptic_json")
        with pytest.raises(DatasetError, match=r"train part .* is for panoptic, the val part for"):
            register_own_dataset(name, **files)
        with pytest.raises(DatasetError, match="takes its classes from the JSON file"):
            del files["val_json"], files["val_images"]
            register_own_dataset(name, **files, semantic_classes=["a"])

    def test_command_line(self, name: str, files: dict[str, str]) -> None:
        parser = argparse.ArgumentParser()
        add_dataset_arguments(parser)
        words = [w for k, v in files.items() for w in (f"--{k.replace('_', '-')}", v)]
        assert register_from_arguments(parser.parse_args(["--dataset", name, *words])) == name
        assert f"{name}_val" in DatasetCatalog.list()

    def test_yaml(self, name: str, tmp_path: Path, files: dict[str, str]) -> None:
        path = tmp_path / "set.yaml"
        path.write_text(
            f"name: {name}\n"
            "train: {panoptic_json: train/panoptic.json, panoptic_root: train/panoptic, "
            "images: train/images}\n"
        )
        arguments = load_dataset_yaml(str(path))
        assert register_own_dataset(**arguments) == [f"{name}_train"]


class TestSemantic:
    CLASSES = ("soil", "crop", "weed")

    @pytest.fixture
    def folders(self, tmp_path: Path) -> dict[str, str]:
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir()
        for i in range(3):
            labels = np.random.RandomState(i).randint(0, 3, (20, 30)).astype(np.uint8)
            labels[0] = 255
            Image.fromarray(labels).save(tmp_path / f"labels/{i}.png")
            Image.fromarray(id_to_rgb(labels * 1000)).save(tmp_path / f"images/{i}.jpg")
        return {
            "train_images": str(tmp_path / "images"),
            "train_sem_seg": str(tmp_path / "labels"),
        }

    def test_from_files_to_scores(self, name: str, tmp_path: Path, folders: dict[str, str]) -> None:
        register_own_dataset(name, **folders, semantic_classes=self.CLASSES)
        cfg = panoptic_cfg()
        cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
        apply_dataset_to_config(cfg, name)
        assert cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 3
        check_config_against_data(cfg)
        (batch,) = itertools.islice(build_train_loader(cfg), 1)
        assert {v for s in batch for v in s["sem_seg"].unique().tolist()} == {0, 1, 2, 255}
        evaluator = build_evaluator(cfg, f"{name}_train", str(tmp_path / "out"))
        evaluator.reset()
        for record in get_dataset_dicts(cfg, [f"{name}_train"], is_train=False):
            labels = np.asarray(Image.open(record["sem_seg_file_name"])).astype(np.int64)
            known = torch.from_numpy(np.where(labels == 255, 0, labels))
            semantic = torch.nn.functional.one_hot(known, 3).permute(2, 0, 1)
            evaluator.process([record], [{"sem_seg": semantic}])
        assert evaluator.evaluate()["sem_seg"]["mIoU"] == pytest.approx(100)
        with pytest.raises(ValueError, match=r"sem_seg has 2 channels.*3 semantic classes"):
            evaluator.process([record], [{"sem_seg": semantic[:2]}])

    def test_command_line(self, name: str, tmp_path: Path, folders: dict[str, str]) -> None:
        (tmp_path / "names.txt").write_text("soil\ncrop\n\nweed\n")
        parser = argparse.ArgumentParser()
        add_dataset_arguments(parser)
        words = [w for k, v in folders.items() for w in (f"--{k.replace('_', '-')}", v)]
        for i, classes in enumerate(("soil, crop,weed", str(tmp_path / "names.txt"))):
            options = ["--dataset", f"{name}_{i}", *words, "--semantic-classes", classes]
            register_from_arguments(parser.parse_args(options))
            metadata = MetadataCatalog.get(f"{name}_{i}_train")
            assert metadata.stuff_classes == list(self.CLASSES)

    def test_yaml(self, name: str, tmp_path: Path, folders: dict[str, str]) -> None:
        path = tmp_path / "set.yaml"
        path.write_text(
            f"name: {name}\nclasses: [soil, crop, weed]\n"
            "train: {sem_seg: labels, images: images}\n"
        )
        assert register_own_dataset(**load_dataset_yaml(str(path))) == [f"{name}_train"]
        path.write_text(f"name: {name}\nclasses: soil\ntrain: {{sem_seg: labels, images: images}}")
        with pytest.raises(DatasetError, match="'classes' is not a list"):
            load_dataset_yaml(str(path))

    @pytest.mark.parametrize(
        ("classes", "message"),
        [
            (None, "--semantic-classes"),
            (("a", "b"), r"has labels 2, but data set .* 2 classes 0 to 1 \(a, b\)"),
            (("a", "b", "a"), "a repeatedly"),
            ((), "got none"),
        ],
    )
    def test_classes(self, name: str, folders: dict[str, str], classes: Any, message: str) -> None:
        with pytest.raises(DatasetError, match=message):
            register_own_dataset(name, **folders, semantic_classes=classes)

    def test_pairs(self, name: str, tmp_path: Path, folders: dict[str, str]) -> None:
        (tmp_path / "labels/1.png").unlink()
        with pytest.raises(DatasetError, match=r"1 pictures have no label map.*: 1"):
            register_own_dataset(name, **folders, semantic_classes=self.CLASSES)
        (tmp_path / "images/1.jpg").unlink()
        (tmp_path / "images/2.jpg").unlink()
        with pytest.raises(DatasetError, match=r"1 label maps have no picture.*: 2"):
            register_own_dataset(name, **folders, semantic_classes=self.CLASSES)
        folders["train_sem_seg"] += "x"
        with pytest.raises(DatasetError, match=r"no folder.*labelsx"):
            register_own_dataset(name, **folders, semantic_classes=self.CLASSES)
