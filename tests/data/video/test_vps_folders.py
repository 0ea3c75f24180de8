"""Cityscapes-VPS and VIPER below DETECTRON2_DATASETS: from the files to a pair of frames."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from PIL import Image

from d2ext.config import get_cfg
from d2ext.data import (
    DatasetError,
    build_test_loader,
    build_train_loader,
    panoptic_to_detection,
)
from d2ext.data.dataset_dicts import load_dataset
from d2ext.data.dataset_facts import dataset_facts
from d2ext.data.panoptic import panoptic_classes
from d2ext.data.video.cityscapes_vps import CATEGORIES, read_train
from tests.data.video.test_readers import (
    HEIGHT,
    WIDTH,
    rle_of,
    write_frames,
    write_json,
    write_masks,
)

SIZE = {"height": HEIGHT, "width": WIDTH}


def labels_at(time):
    """Road below, sky above, a car (and in the first frame another one) and a person without mask."""
    labels = np.zeros((HEIGHT, WIDTH), np.uint8)
    labels[:12] = 10
    labels[2:6, 2 + time : 8 + time] = 13
    labels[14:20, 20:26] = 13 if time == 0 else 0
    labels[20:23, 2:6] = 11
    labels[0, 0] = 255
    return labels


def stem_of(clip, number, time):
    """As published: the second number counts over all clips, the last one is Cityscapes' own."""
    return f"{clip:04d}_{number:04d}_frankfurt_000000_{1000 * clip + time:06d}"


def boxes_at(time):
    return ((7, (2 + time, 2, 6, 4)), (9, (20, 14, 6, 6)))[: 2 - time]


def instances_of(images, times):
    """``times``: of the images."""
    annotations = [
        {
            "image_id": image["id"],
            "category_id": 13,
            "inst_id": inst,
            "iscrowd": 0,
            "segmentation": rle_of(*box),
        }
        for image, time in zip(images, times, strict=True)
        for inst, box in boxes_at(time)
    ]
    annotations = [{"id": i + 1, **a} for i, a in enumerate(annotations)]
    categories = [{"id": 13, "name": "car"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_panoptic(folder, json_file, images, times, categories=CATEGORIES):
    """COCO's panoptic form: colours of things constant over a clip, of stuff those of the class."""
    folder.mkdir(parents=True)
    annotations = []
    for image, time in zip(images, times, strict=True):
        labels = labels_at(time).astype(int)
        ids = np.where(labels == 0, 256, np.where(labels == 10, 65535 + 1, 0))
        for inst, (x, y, w, h) in boxes_at(time):
            ids[y : y + h, x : x + w] = 255 + inst
        name = image["file_name"].replace("_leftImg8bit", "_final_mask")
        rgb = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], 2).astype(np.uint8)
        Image.fromarray(rgb).save(folder / name)
        things = {255 + inst: 13 for inst, _ in boxes_at(time)}
        segments = [
            {"id": i, "category_id": c, "iscrowd": 0, "area": int((ids == i).sum())}
            for i, c in ({256: 0, 65536: 10} | things).items()
        ]
        annotations.append({"image_id": image["id"], "file_name": name, "segments_info": segments})
    content = {"images": images, "annotations": annotations, "categories": list(categories)}
    write_json(json_file, content)


def images_of(clips, numbers_and_times, ending="_leftImg8bit.png"):
    return [
        {"id": 10000 * clip + time, "file_name": stem_of(clip, number, time) + ending, **SIZE}
        for clip in clips
        for number, time in numbers_and_times
    ]


@pytest.fixture
def vps(builtin, monkeypatch):
    """Two clips for training of two frames, one for validation and one test clip of six frames."""
    monkeypatch.setenv("D2EXT_CACHE", str(builtin / "cache"))
    root = builtin / "cityscapes_vps"
    images = images_of((3, 4), ((13, 0), (14, 1)))
    for image, time in zip(images, (0, 1, 0, 1), strict=True):
        stem = image["file_name"].removesuffix("_leftImg8bit.png")
        write_frames(root / "train/img", [f"{stem}_newImg8bit.png"])
        write_masks(root / "train/labelmap", {f"{stem}_gtFine_color.png": labels_at(time)})
    write_json(root / "instances_train_city_vps_rle.json", instances_of(images, (0, 1, 0, 1)))
    dense = [(100 + time, time) for time in range(6)]
    for part, clip in (("val", 5), ("test", 6)):
        names = [i["file_name"] for i in images_of([clip], dense, "_newImg8bit.png")]
        write_frames(root / part / "img_all", names)
    annotated = images_of([5], ((25, 0), (26, 1)))
    write_panoptic(
        root / "val/panoptic_video", root / "panoptic_gt_val_city_vps.json", annotated, (0, 1)
    )
    # In the list the order is that of nothing.
    listed = images_of([6], dense, "_newImg8bit.png")[::-1]
    write_json(root / "im_all_info_test_city_vps.json", {"images": listed, "annotations": []})
    return root


@pytest.mark.parametrize("parallel_from", [1, 256])
def test_train(vps, monkeypatch, parallel_from):
    monkeypatch.setattr(panoptic_to_detection, "_PARALLEL_FROM", parallel_from)
    videos = load_dataset("cityscapes_vps_train")
    metadata = MetadataCatalog.get("cityscapes_vps_train")
    assert metadata.thing_classes[:3] == ["person", "rider", "car"]
    assert len(metadata.stuff_classes) == 12 and metadata.evaluator_type == "video_panoptic_seg"
    assert [(v["video_id"], v["length"]) for v in videos] == [(3, 2), (4, 2)]
    for video in videos:
        tracks = []
        for time, frame in enumerate(video["frames"]):
            boxes = {a["track_id"]: a["bbox"] for a in frame["annotations"]}
            assert next(iter(boxes.values())) == [2 + time, 2, 6, 4]
            assert {a["category_id"] for a in frame["annotations"]} == {2}
            tracks.append(list(boxes))
            stuff = [s["category_id"] for s in frame["segments_info"] if not s["isthing"]]
            assert stuff == [1, 11]  # road, sky; the person has no instance and is void
            sem_seg = np.asarray(Image.open(frame["sem_seg_file_name"]))
            assert sem_seg[0, 0] == 255 and (sem_seg[20:23, 2:6] == 255).all()
            assert sem_seg[3, 4] == 0 and sem_seg[0, 9] == 11 and sem_seg[23, 9] == 1
        assert tracks[1] == tracks[0][:1] and len(tracks[0]) == 2
    # From the cache; a label map that changes counts.
    path = sorted((vps / "train/labelmap").iterdir())[0]
    write_masks(path.parent, {path.name: np.full((HEIGHT, WIDTH), 8)})
    assert load_dataset("cityscapes_vps_train") == videos
    changed = read_train("cityscapes_vps_train", str(vps)).videos
    stuff = [s for s in changed[0]["frames"][0]["segments_info"] if not s["isthing"]]
    assert [s["category_id"] for s in stuff] == [9]


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_full_label_map_has_train_ids(vps, split):
    """So a published model's "joint" numbering and ours ("separated") say the same classes."""
    name = f"cityscapes_vps_{split}"
    videos = load_dataset(name)
    classes = panoptic_classes(name)
    assert dict(classes.dataset_ids) == {i: i for i in range(19)} and classes.separated
    assert classes.full[10:12] == ["sky", "person"] and len(classes.full) == 19
    facts = dataset_facts(name)
    assert (len(facts.stuff), len(facts.things)) == (11, 8)
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (name,)
    cfg.INPUT.MAPPER = "ClipMapper"
    cfg.INPUT.AUGMENTATION.NAME = "none"
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.INPUT.SEM_SEG_WITH_THINGS = True
    cfg.INPUT.VIDEO.REFERENCES = "annotated"
    cfg.INPUT.VIDEO.REFERENCE_OFFSETS = [-1, 1]
    cfg.MODEL.MASK_ON = True
    cfg.SOLVER.IMS_PER_BATCH = 1
    cfg.DATALOADER.NUM_WORKERS = 0
    for (sample,) in itertools.islice(build_train_loader(cfg), 4):
        reference = sample["reference"]
        assert {sample["frame"], reference["frame"]} == {0, 1}
        for one in (sample, reference):
            expected = labels_at(one["frame"])
            expected[expected == 11] = 255  # without instance
            assert one["sem_seg"].tolist() == expected.tolist()
        ids = [set(one["instances"].gt_ids.tolist()) for one in (sample, reference)]
        assert ids[0] < ids[1] or ids[1] < ids[0]
    assert len(videos) == (2 if split == "train" else 1)


@pytest.mark.parametrize("named", ["_final_mask", "_newImg8bit"])
def test_val(vps, named):
    """Annotated frames and all frames are numbered differently; Cityscapes' number is the same. The file
    may name the PNGs otherwise, as evaluation must know."""
    path = vps / "panoptic_gt_val_city_vps.json"
    path.write_text(path.read_text().replace("_final_mask", named))
    (video,) = load_dataset("cityscapes_vps_val")
    assert (video["video_id"], video["length"]) == (5, 6)
    assert ["annotations" in f for f in video["frames"]] == [True, True, *[False] * 4]
    for time, frame in enumerate(video["frames"]):
        assert stem_of(5, 100 + time, time) + "_newImg8bit.png" in frame["file_name"]
    first, second = video["frames"][:2]
    assert (first["image_id"], second["image_id"]) == (50000, 50001)
    assert {a["track_id"]: a["bbox"] for a in first["annotations"]} == {
        262: [2, 2, 6, 4],
        264: [20, 14, 6, 6],
    }
    assert [a["track_id"] for a in second["annotations"]] == [262]
    assert first["pan_seg_file_name"].endswith("_final_mask.png")
    metadata = MetadataCatalog.get("cityscapes_vps_val")
    if named == "_final_mask":  # the published file itself
        assert metadata.panoptic_json == str(vps / "panoptic_gt_val_city_vps.json")
    content = json.loads(Path(metadata.panoptic_json).read_text())
    for annotation in content["annotations"]:
        assert Path(metadata.panoptic_root, annotation["file_name"]).is_file()


def test_test(vps):
    """Images without annotations, in order, under the ids of their list."""
    (video,) = load_dataset("cityscapes_vps_test")
    assert [f["image_id"] for f in video["frames"]] == [60000 + t for t in range(6)]
    facts = dataset_facts("cityscapes_vps_test")
    assert facts.things[0] == "person" and (len(facts.stuff), len(facts.things)) == (11, 8)
    assert (video["video_id"], video["height"], video["width"]) == (6, HEIGHT, WIDTH)
    cfg = get_cfg()
    cfg.DATALOADER.NUM_WORKERS = 0
    seen = [s for (s,) in build_test_loader(cfg, "cityscapes_vps_test")]
    assert [(s["frame"], s["is_first"]) for s in seen] == [(t, t == 0) for t in range(6)]
    with pytest.raises(DatasetError, match=r"No frame of the videos .* is annotated"):
        cfg.DATASETS.TRAIN = ("cityscapes_vps_test",)
        build_train_loader(cfg)


@pytest.mark.parametrize(
    "split, gone, message",
    [
        ("train", "train/labelmap", "labelmap' does not exist .made of train/inst"),
        ("train", "instances_train_city_vps_rle.json", "does not exist .in the download"),
        ("val", "panoptic_gt_val_city_vps.json", r"not in the download: .*panoptic_labels\.sh"),
        ("val", "val/img_all", r"img_all' does not exist .*on request.*fetch_city_images\.py"),
        ("test", "test/img_all", "img_all' does not exist"),
    ],
)
def test_who_makes_what_is_missing(vps, split, gone, message):
    path = vps / gone
    (shutil.rmtree if path.is_dir() else type(path).unlink)(path)
    with pytest.raises(
        DatasetError, match=f"'cityscapes_vps_{split}' is not complete: .*{message}"
    ):
        load_dataset(f"cityscapes_vps_{split}")


def _palette(labels):
    image = Image.fromarray(labels)
    image.putpalette([7, 8, 9] * 256)
    return image


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda labels: None, "1 of 4 images .* have no label map"),
        (lambda labels: Image.fromarray(np.stack([labels] * 3, 2)), "expected one channel"),
        (lambda labels: Image.merge("LA", [Image.fromarray(labels)] * 2), "expected one channel"),
        (lambda labels: Image.fromarray(labels[1:]), "has height and width"),
        (
            lambda labels: Image.fromarray(labels.astype(np.uint16) * 1000),
            r"has labels 10000, 11000, 13000.*no label maps",
        ),
        (_palette, None),  # indices, whatever their colours
        (lambda labels: Image.fromarray(labels.astype(np.uint16)), None),
    ],
)
def test_kinds_of_label_maps(vps, make, message):
    path = sorted((vps / "train/labelmap").iterdir())[0]
    image = make(labels_at(0))
    path.unlink() if image is None else image.save(path)
    if message is None:
        labels = load_dataset("cityscapes_vps_train")[0]["frames"][0]["sem_seg_file_name"]
        assert np.asarray(Image.open(labels))[23, 9] == 1
        return
    with pytest.raises(DatasetError, match=message):
        load_dataset("cityscapes_vps_train")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: a.pop("inst_id"), "1 annotations have no 'inst_id' or no mask in .*: id 2"),
        (lambda a: a.update(category_id=0), r"1 annotations are of no thing \(11 person.*: id 2"),
    ],
)
def test_instances_that_cannot_be_used(vps, change, message):
    path = vps / "instances_train_city_vps_rle.json"
    content = json.loads(path.read_text())
    content["categories"].append({"id": 0, "name": "road"})
    change(content["annotations"][1])
    path.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=message):
        load_dataset("cityscapes_vps_train")


VIPER = [
    {"id": 0, "name": "sky", "isthing": 0},
    {"id": 10, "name": "mobile_barrier", "isthing": 0},
    {"id": 13, "name": "person", "isthing": 1},
]


@pytest.fixture
def viper(builtin, monkeypatch):
    monkeypatch.setenv("D2EXT_CACHE", str(builtin / "cache"))
    root = builtin / "viper_vps"
    images = [
        {"id": i, "file_name": f"{clip:03d}_{i:05d}.png", **SIZE}
        for clip, i in ((1, 1), (1, 2), (2, 3), (2, 4))
    ]
    write_frames(root / "val_day/img", [i["file_name"] for i in images])
    folder = root / "val_day/panoptic_video"
    json_file = root / "viper_panoptic_val_day_video.json"
    write_panoptic(folder, json_file, images, (0, 1, 0, 1), VIPER)
    return root, images


def test_viper(viper):
    root, images = viper
    first, second = load_dataset("viper_vps_val")
    assert (first["video_id"], first["length"], second["length"]) == (1, 2, 2)
    metadata = MetadataCatalog.get("viper_vps_val")
    assert metadata.stuff_classes == ["things", "sky", "mobile_barrier"]
    assert metadata.thing_classes == ["person"] and metadata.vpq_left_out == ["mobile_barrier"]
    with pytest.raises(DatasetError, match=r"train/img' does not exist .*on request"):
        load_dataset("viper_vps_train")
    # As Cityscapes-VPS has it.
    write_frames(root / "train/img", [i["file_name"] for i in images])
    for image, time in zip(images, (0, 1, 0, 1), strict=True):
        labels = labels_at(time)
        labels[labels == 11] = 255
        write_masks(root / "train/labelmap", {image["file_name"]: labels})
    content = instances_of(images, (0, 1, 0, 1))
    content["categories"] = VIPER[2:]
    write_json(root / "instances_train_05_viper_coco.json", content)
    videos = load_dataset("viper_vps_train")
    assert [len(f["annotations"]) for v in videos for f in v["frames"]] == [2, 1, 2, 1]
    assert MetadataCatalog.get("viper_vps_train").vpq_left_out == ["mobile_barrier"]


def test_viper_categories_that_are_no_labels(viper):
    root, images = viper
    path = root / "viper_panoptic_val_day_video.json"
    path.write_text(path.read_text().replace('"category_id": 13', '"category_id": 255'))
    path.write_text(path.read_text().replace('"id": 13, "name"', '"id": 255, "name"'))
    for folder in ("img", "labelmap"):
        write_frames(root / "train" / folder, [i["file_name"] for i in images])
    write_json(root / "instances_train_05_viper_coco.json", instances_of(images, (0, 1, 0, 1)))
    with pytest.raises(DatasetError, match="ids 255 cannot be labels"):
        load_dataset("viper_vps_train")


def test_viper_in_the_panoptic_form(viper):
    root, _ = viper
    shutil.copytree(root / "val_day", root / "train")
    files = [root / f"viper_panoptic_{part}_day_video.json" for part in ("val", "train")]
    shutil.copy(*files)
    tracks = [
        [{a["track_id"] for a in f["annotations"]} for v in load_dataset(name) for f in v["frames"]]
        for name in ("viper_vps_val", "viper_vps_train")
    ]
    assert tracks[0] == tracks[1] == [{262, 264}, {262}] * 2
