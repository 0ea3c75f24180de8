"""Own videos in one command: registered from files, looked at, trained and tested on."""

import argparse
import json
import logging

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ext.config import get_cfg
from d2ext.data import DatasetError, build_test_loader, build_train_loader
from d2ext.data import summary as summary_module
from d2ext.data.custom import (
    add_dataset_arguments,
    apply_dataset_to_config,
    check_config_against_data,
    load_dataset_yaml,
    register_from_arguments,
    register_own_dataset,
)
from d2ext.data.shapes import THING_CLASSES
from d2ext.data.shapes.__main__ import main
from d2ext.data.shapes.export_video import VIDEO_FORMATS

NAME = "test_own_videos"


@pytest.fixture(autouse=True)
def unregistered():
    yield
    from d2ext.data import custom

    custom._registered.pop(NAME, None)
    for split in ("train", "val"):
        if f"{NAME}_{split}" in DatasetCatalog.list():
            DatasetCatalog.remove(f"{NAME}_{split}")
        MetadataCatalog.pop(f"{NAME}_{split}", None)
        summary_module.forget(f"{NAME}_{split}")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folders = {}
    for form in VIDEO_FORMATS:
        folders[form] = tmp_path_factory.mktemp(form)
        for split, num in (("train", "3"), ("val", "2")):
            arguments = ["--split", split, "--num", num, "--length", "10", "--size", "64"]
            assert main([str(folders[form]), "--video", "--format", form, *arguments]) == 0
    return folders


def arguments_of(form, out, splits=("train", "val")):
    words = ["--dataset", NAME]
    for split in splits:
        folder = out / f"video_{split}"
        masks = form in ("davis", "mots")
        source = folder / "masks" if masks else out / f"annotations/video_{split}.json"
        words += [f"--{split}-video-json", source, f"--{split}-images", folder / "frames"]
        if form == "cityscapes_vps":
            words += [f"--{split}-panoptic-root", folder / "panoptic"]
    if form == "mots":
        words += ["--semantic-classes", out / "video_train/classes.txt"]
    return [str(word) for word in words]


def register(words):
    parser = argparse.ArgumentParser()
    add_dataset_arguments(parser)
    return register_from_arguments(parser.parse_args(words))


@pytest.mark.parametrize("form", VIDEO_FORMATS)
def test_one_command(exported, form):
    assert register(arguments_of(form, exported[form])) == NAME
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "YOLACT"
    apply_dataset_to_config(cfg, NAME)
    assert [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST] == [f"{NAME}_train", f"{NAME}_val"]
    classes = ["object"] if form == "davis" else list(THING_CLASSES)
    assert list(cfg.DATASETS.THING_CLASSES) == classes
    model = cfg.MODEL.YOLACT
    assert len(classes) == model.NUM_CLASSES
    assert cfg.INPUT.MASK_FORMAT == "bitmask"
    check_config_against_data(cfg)
    metadata = MetadataCatalog.get(f"{NAME}_val")
    assert metadata.video and metadata.image_root.endswith("frames")
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MAPPER = "ClipMapper"
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.DATALOADER.NUM_WORKERS = 0
    batch = next(iter(build_train_loader(cfg)))
    assert all(len(sample["instances"].gt_ids) and "reference" in sample for sample in batch)
    assert len(list(build_test_loader(cfg, f"{NAME}_val"))) == 20


def test_the_summary_counts_tracks(exported, tmp_path, caplog):
    out = exported["cityscapes_vps"]
    with caplog.at_level(logging.INFO, "d2ext"):
        register(arguments_of("cityscapes_vps", out, splits=("train",)))
    assert "annotated frames" in caplog.text
    summary_module.report([f"{NAME}_train"], str(tmp_path))
    content = json.loads((tmp_path / "dataset_summary.json").read_text())[f"{NAME}_train"]
    records = DatasetCatalog.get(f"{NAME}_train")
    tracks = {
        (video["video_id"], a["track_id"])
        for video in records
        for frame in video["frames"]
        for a in frame.get("annotations", ())
    }
    assert (content["videos"], content["images"], content["annotated"]) == (3, 30, 6)
    assert content["tracks"] == len(tracks) > 3
    assert content["checked"] == 30 and not content["unreadable"]


def test_yaml(exported, tmp_path):
    out = exported["ytvis"]
    (out / "data.yaml").write_text(
        f"name: {NAME}\n"
        "train: {video_json: annotations/video_train.json, images: video_train/frames}\n"
    )
    arguments = load_dataset_yaml(str(out / "data.yaml"))
    assert register_own_dataset(**arguments) == [f"{NAME}_train"]
    assert register_own_dataset(**arguments) == [f"{NAME}_train"]  # again is harmless


def test_parts_of_different_classes(exported, tmp_path):
    out = exported["coco"]
    content = json.loads((out / "annotations/video_val.json").read_text())
    content["categories"][0]["name"] = "other"
    (tmp_path / "val.json").write_text(json.dumps(content))
    words = arguments_of("coco", out)
    words[words.index("--val-video-json") + 1] = str(tmp_path / "val.json")
    with pytest.raises(DatasetError, match="different 'categories'"):
        register(words)
    assert f"{NAME}_train" not in DatasetCatalog.list()  # both or none


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w[:-2], "needs both the JSON file and the image folder"),
        (lambda w: [*w, "--train-json", "x.json"], "holds all annotations of the train part"),
        (lambda w: [*w, "--semantic-classes", "a,b"], "leave out the semantic classes"),
        (lambda w: [*w, "--format", "cvat"], "--format is for instances"),
        (lambda w: [*w, "--landmarks", "wflw"], "they go with no other annotation"),
        (
            lambda w: [*w, "--val-json", "x.json", "--val-images", "x"],
            "the same kind of annotation",
        ),
    ],
)
def test_contradictions(exported, change, message):
    with pytest.raises(DatasetError, match=message):
        register(change(arguments_of("ytvis", exported["ytvis"], splits=("train",))))


def test_missing_frames(exported, tmp_path, caplog):
    """A few are reported and left out; many are an error."""
    out = exported["ytvis"]
    content = json.loads((out / "annotations/video_val.json").read_text())
    for count, names in (
        (1, ["000000/000000.png"]),
        (9, [f"000000/00000{i}.png" for i in range(9)]),
    ):
        changed = json.dumps(content)
        for name in names:
            changed = changed.replace(name, f"none/{name}")
        (tmp_path / f"{count}.json").write_text(changed)
    words = arguments_of("ytvis", out, splits=("val",))
    words[words.index("--val-video-json") + 1] = str(tmp_path / "1.json")
    register(words)
    cfg = get_cfg()
    cfg.DATALOADER.NUM_WORKERS = 0
    seen = [(s["video_id"], s["is_first"]) for (s,) in build_test_loader(cfg, f"{NAME}_val")]
    assert len(seen) == 19 and [v for v, first in seen if first] == [0, 1]
    assert "no such file" in caplog.text
    words[words.index("--val-video-json") + 1] = str(tmp_path / "9.json")
    words[1] = f"{NAME}_other"
    with pytest.raises(DatasetError, match="9 of 20 images looked for are not in"):
        register(words)


def test_the_real_videos(real_data):
    folder = real_data / "video/davis"
    words = ["--train-video-json", folder / "ytvis.json", "--train-images", folder]
    register(["--dataset", NAME, *map(str, words)])
    content = summary_module._summaries[f"{NAME}_train"]
    assert (content.videos, content.images, content.annotated, content.tracks) == (2, 89, 89, 2)
    assert not content.warnings and content.checked == 89
