"""Full label maps of panoptic annotations, and errors for annotations that are broken."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets.cityscapes_panoptic import load_cityscapes_panoptic
from PIL import Image

from d2ext.config import get_cfg
from d2ext.data import (
    AnnotationError,
    D2extDatasetMapper,
    DatasetError,
    ImageReadError,
    get_dataset_dicts,
)
from d2ext.data.panoptic import PanopticClasses, full_label_map, is_panoptic, panoptic_classes
from d2ext.data.sampler import sample_randomness
from tests.data.panoptic_files import id_to_rgb, paint_ids, save, write_cityscapes, write_panoptic

COCO = "coco_2017_train_panoptic_separated"


def make_cfg(name: str, **keys: Any) -> Any:
    cfg = get_cfg()
    cfg.INPUT.SEM_SEG_WITH_THINGS = True
    cfg.INPUT.AUGMENTATION.NAME = "none"
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.MODEL.MASK_ON = True
    cfg.DATASETS.TRAIN = (name,)
    for key, value in keys.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


@pytest.mark.real_data
@pytest.mark.usefixtures("real_data")
class TestRealCoco:
    def test_classes(self) -> None:
        classes = panoptic_classes(COCO)
        assert (len(classes.stuff), len(classes.things)) == (53, 80)
        assert classes.full[:2] == ["banner", "blanket"] and classes.full[53] == "person"
        # Ids of the file: 1 person, 92 banner, 200 rug.
        assert [classes.dataset_ids[i] for i in (1, 92, 200)] == [53, 0, classes.full.index("rug")]
        # The standard form has other contiguous ids and the same full labels.
        standard = panoptic_classes("coco_2017_train_panoptic")
        assert not standard.separated and standard.dataset_ids == classes.dataset_ids
        assert standard.things == classes.things

    def test_full_maps_agree_with_stuff_maps_and_instances(self) -> None:
        """The separated files hold the same in two halves."""
        cfg = make_cfg(COCO)
        records = get_dataset_dicts(cfg, [COCO], is_train=True)
        mapper = D2extDatasetMapper(cfg, True)
        reference = DatasetMapper(True, augmentations=[], image_format="BGR")
        for record in records[:12]:
            sample = mapper(record)
            full, stuff = sample["sem_seg"], reference(record)["sem_seg"]
            assert full.dtype == torch.int64
            assert torch.equal(torch.where(full < 53, full + 1, 0)[full != 255], stuff[full != 255])
            assert torch.equal(full == 255, stuff == 255)
            instances = sample["instances"]
            for mask, label in zip(instances.gt_masks.tensor, instances.gt_classes, strict=True):
                inside = full[mask]
                # Polygons of the instances' file keep an IoU of 0.99, less for thin things.
                assert (inside == 53 + label).float().mean() > 0.9

    def test_both_forms_of_the_data_set_give_the_same_map(self) -> None:
        maps = []
        for name in (COCO, "coco_2017_train_panoptic"):
            cfg = make_cfg(name)
            records = get_dataset_dicts(cfg, [name], is_train=True)
            (record,) = (r for r in records if r["image_id"] == 9)
            maps.append(D2extDatasetMapper(cfg, True)(record)["sem_seg"])
        assert torch.equal(maps[0], maps[1]) and len(maps[0].unique()) > 2


def test_shapes_agree_with_their_semantic_maps() -> None:
    cfg = make_cfg("shapes_val_panoptic")
    assert panoptic_classes("shapes_val_panoptic").full[:2] == ["sky", "water"]
    mapper = D2extDatasetMapper(cfg, True)
    # The semantic set has all classes, too, things before stuff.
    order = torch.tensor([*range(6, 14), *range(6)])
    pairs = zip(
        DatasetCatalog.get("shapes_val_panoptic")[:5],
        DatasetCatalog.get("shapes_val_semantic")[:5],
        strict=True,
    )
    for record, semantic in pairs:
        full = mapper(record)["sem_seg"]
        labels = torch.from_numpy(DatasetMapper(True, augmentations=[], image_format="RGB")(
            semantic)["sem_seg"].numpy())  # fmt: skip
        known = labels != 255
        assert torch.equal(full[known], order[labels[known]])
        assert (full[~known] == 255).all() and known.any()


def test_moves_with_the_image_and_pads_with_no_label() -> None:
    cfg = make_cfg("shapes_val_panoptic", INPUT__AUGMENTATION__NAME="ssd")
    cfg.INPUT.AUGMENTATION.SIZE = 200
    record = DatasetCatalog.get("shapes_val_panoptic")[1]
    mapper = D2extDatasetMapper(cfg, True)
    padded = 0
    for seed in range(6):
        with sample_randomness(0, seed):
            sample = mapper(record)
        full, instances = sample["sem_seg"], sample["instances"]
        assert full.shape == (200, 200)
        assert set(full.unique().tolist()) <= {*range(14), 255}
        padded += int((full == 255).sum() > 0.3 * full.numel())
        agree = [
            float((full[mask] == 6 + label).float().mean())
            for mask, label in zip(instances.gt_masks.tensor, instances.gt_classes, strict=True)
            if mask.sum() > 50
        ]
        assert min(agree, default=1) > 0.8
    assert padded > 0


def test_inference_reads_no_labels() -> None:
    cfg = make_cfg("shapes_val_panoptic")
    record = {**DatasetCatalog.get("shapes_val_panoptic")[0], "pan_seg_file_name": "absent.png"}
    cfg.DATASETS.TRAIN = ()  # nor does it ask for the classes
    assert "sem_seg" not in D2extDatasetMapper(cfg, False)(record)


@pytest.fixture
def cityscapes(tmp_path: Path) -> Iterator[str]:
    """A tiny tree loaded by Detectron2's own function, with its metadata."""
    write_cityscapes(tmp_path)
    name = f"test_cityscapes_{uuid.uuid4().hex}"
    meta = MetadataCatalog.get("cityscapes_fine_panoptic_train").as_dict()
    meta = {k: v for k, v in meta.items() if k != "name"}
    files = ("leftImg8bit/train", "gtFine/cityscapes_panoptic_train")
    paths = [str(tmp_path / file) for file in files]
    DatasetCatalog.register(
        name, lambda: load_cityscapes_panoptic(*paths, f"{paths[1]}.json", meta)
    )
    MetadataCatalog.get(name).set(**meta)
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def test_cityscapes(cityscapes: str) -> None:
    """Its segments have no ``isthing``, and its own label files name the same classes."""
    classes = panoptic_classes(cityscapes)
    assert (len(classes.stuff), len(classes.things), classes.separated) == (11, 8, False)
    assert classes.full[0] == "road" and classes.full[11] == "person"
    cfg = make_cfg(cityscapes)
    records = get_dataset_dicts(cfg, [cityscapes], is_train=True)
    with_things = D2extDatasetMapper(cfg, True)(records[0])["sem_seg"]
    cfg.INPUT.SEM_SEG_WITH_THINGS = False
    train_ids = D2extDatasetMapper(cfg, True)(records[0])["sem_seg"]
    assert torch.equal(with_things, train_ids)
    assert with_things.unique().tolist() == [0, 10, 11, 13, 255]


def test_instances_without_stuff_are_refused() -> None:
    assert not is_panoptic(MetadataCatalog.get("shapes_val"))
    assert is_panoptic(MetadataCatalog.get("shapes_val_panoptic"))
    cfg = make_cfg("shapes_val")
    with pytest.raises(DatasetError, match=r"'shapes_val' is not a panoptic one.*stuff_classes"):
        get_dataset_dicts(cfg, ["shapes_val"], is_train=True)


def test_more_classes_than_labels() -> None:
    name = f"test_many_{uuid.uuid4().hex}"
    ids = {i: i for i in range(256)}
    MetadataCatalog.get(name).set(
        thing_classes=[str(i) for i in ids],
        stuff_classes=["things"],
        thing_dataset_id_to_contiguous_id=ids,
        stuff_dataset_id_to_contiguous_id={0: 0},
    )
    with pytest.raises(DatasetError, match=r"256 classes.*at most 255"):
        panoptic_classes(name)
    MetadataCatalog.remove(name)


# Separated: stuff sky (12) and grass (40) are 1 and 2, things apple (3) and pear (7) are 0 and 1.
META = {
    "thing_classes": ["apple", "pear"],
    "stuff_classes": ["things", "sky", "grass"],
    "thing_dataset_id_to_contiguous_id": {3: 0, 7: 1},
    "stuff_dataset_id_to_contiguous_id": {0: 0, 12: 1, 40: 2},
}


@pytest.fixture
def own(tmp_path: Path) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """A separated data set whose dicts lack the panoptic files: name, folder, the JSON's content."""
    content = write_panoptic(tmp_path)
    name = f"test_panoptic_{uuid.uuid4().hex}"
    records = [
        {"file_name": str(tmp_path / "images" / i["file_name"]), "image_id": i["id"]}
        for i in content["images"]
    ]
    DatasetCatalog.register(name, lambda: copy.deepcopy(records))
    MetadataCatalog.get(name).set(
        panoptic_json=str(tmp_path / "panoptic.json"),
        panoptic_root=str(tmp_path / "panoptic"),
        **META,
    )
    yield name, tmp_path, content
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def load(name: str) -> list[dict[str, Any]]:
    cfg = make_cfg(name)
    mapper = D2extDatasetMapper(cfg, True)
    return [mapper(record) for record in get_dataset_dicts(cfg, [name], is_train=True)]


def test_every_label(own: tuple[str, Path, dict[str, Any]]) -> None:
    name, _, _ = own
    labels = {0: 255, 1: 0, 70000: 1, 9_000_000: 2, 16_000_001: 2, 300: 3, 301: 3}
    for number, sample in enumerate(load(name)):
        ids, _ = paint_ids(number)
        expected = np.vectorize(labels.__getitem__)(ids)
        np.testing.assert_array_equal(sample["sem_seg"].numpy(), expected)


def first_entry(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        change(content["annotations"][0])

    return edit


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first_entry(lambda a: a["segments_info"].pop(3)), r"does not list: 301\."),
        (first_entry(lambda a: a["segments_info"][2].update(id=5)), "does not list: 300"),
        (
            first_entry(lambda a: a["segments_info"].append({"id": 8, "category_id": 7})),
            r"has no pixel of segments that its JSON entry lists: 8\.",
        ),
        (first_entry(lambda a: a.update(file_name="none.png")), r"no such file"),
    ],
)
def test_broken_annotation_is_an_error_that_names_the_file(
    own: tuple[str, Path, dict[str, Any]], change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    name, folder, content = own
    change(content)
    save(folder, content)
    with pytest.raises((AnnotationError, ImageReadError), match=rf"(?s)\.png'.*{message}"):
        load(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            first_entry(lambda a: a["segments_info"][0].update(category_id=99)),
            "1 segments.*not in 'categories'.*99",
        ),
        (lambda c: c["annotations"].pop(1), r"1 images.*have no entry.*image id 11"),
        (lambda c: c["annotations"][1].pop("segments_info"), "no 'segments_info'"),
        (first_entry(lambda a: a["segments_info"][3].update(id=300)), "300.*2 times.*scene_0"),
        (first_entry(lambda a: a["segments_info"][0].update(id=0)), "from 1 to 16777215.*scene_0"),
    ],
)
def test_broken_file_is_an_error_before_training(
    own: tuple[str, Path, dict[str, Any]], change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    name, folder, content = own
    change(content)
    save(folder, content)
    with pytest.raises(DatasetError, match=message):
        get_dataset_dicts(make_cfg(name), [name], is_train=True)


def test_missing_or_malformed_json(own: tuple[str, Path, dict[str, Any]]) -> None:
    name, folder, _ = own
    cfg = make_cfg(name)
    save(folder, "{")
    with pytest.raises(DatasetError, match="not valid JSON"):
        get_dataset_dicts(cfg, [name], is_train=True)
    (folder / "panoptic.json").unlink()
    with pytest.raises(DatasetError, match=r"panoptic\.json' does not exist"):
        get_dataset_dicts(cfg, [name], is_train=True)


def test_broken_png(own: tuple[str, Path, dict[str, Any]]) -> None:
    name, folder, _ = own
    png = folder / "panoptic/scene_0.png"
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(png)
    with pytest.raises(ImageReadError, match=r"scene_0\.png' has mode L.*R \+ 256 G"):
        load(name)
    png.write_bytes(png.read_bytes()[:40])
    with pytest.raises(ImageReadError, match=r"scene_0\.png"):
        load(name)
    ids, _ = paint_ids(0)
    Image.fromarray(id_to_rgb(ids[:39])).save(png)
    with pytest.raises(AnnotationError, match=r"scene_0\.jpg'.*\(39, 60\).*\(40, 60\)"):
        load(name)


def test_dicts_of_the_catalog_need_the_loader(own: tuple[str, Path, dict[str, Any]]) -> None:
    name, _, _ = own
    mapper = D2extDatasetMapper(make_cfg(name), True)
    with pytest.raises(AnnotationError, match="get_dataset_dicts"):
        mapper(DatasetCatalog.get(name)[0])


def test_category_of_a_dict_that_is_no_class() -> None:
    record = copy.deepcopy(DatasetCatalog.get("shapes_val_panoptic")[0])
    record["segments_info"][0]["category_id"] = 77
    classes: PanopticClasses = panoptic_classes("shapes_val_panoptic")
    with pytest.raises(AnnotationError, match="category 77, which is not among the 14 classes"):
        full_label_map(record, classes)
