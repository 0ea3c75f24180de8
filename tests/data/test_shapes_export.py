"""`python -m d2ext.data.shapes`: files that COCO's and Detectron2's own code reads."""

import contextlib
import io
import json

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import (
    load_coco_json,
    register_coco_instances,
    register_coco_panoptic_separated,
)
from detectron2.data.datasets.coco_panoptic import load_coco_panoptic_json
from PIL import Image
from pycocotools import mask as mask_util
from pycocotools.coco import COCO

from d2ext.data.shapes import ShapesSet, VideoSet, load_shapes, shapes_metadata
from d2ext.data.shapes import export as export_module
from d2ext.data.shapes.__main__ import main

# One of these images has a crowd, which a test below sees to.
SHAPES = ShapesSet("val", 10, 128, 96, seed=106)
ARGUMENTS = ["--split", "val", "--num", "10", "--size", "128x96", "--seed", "106"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "coco"
    assert main([str(out), *ARGUMENTS]) == 0
    return out


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_layout(out):
    assert sorted(p.name for p in out.iterdir()) == [
        "annotations",
        "panoptic_stuff_val2017",
        "panoptic_val2017",
        "val2017",
    ]
    names = {f"{i:012d}" for i in range(10)}
    for folder, extension in (
        ("val2017", ".jpg"),
        ("panoptic_val2017", ".png"),
        ("panoptic_stuff_val2017", ".png"),
    ):
        assert {p.name for p in (out / folder).iterdir()} == {n + extension for n in names}


def test_images_are_the_scenes(out):
    for index in range(SHAPES.num):
        image = np.asarray(Image.open(out / "val2017" / f"{index:012d}.jpg")).astype(float)
        scene = SHAPES.frame(index).image
        # JPEG blurs the colours of the sensor noise; means stay.
        assert np.abs(image - scene).mean() < 10
        np.testing.assert_allclose(image.mean((0, 1)), scene.mean((0, 1)), atol=3)


def test_instances_load_as_coco(out):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(out / "annotations" / "instances_val2017.json"))
    assert sorted(coco.imgs) == list(range(10)) and 0 not in coco.anns
    crowds = 0
    for index in range(SHAPES.num):
        frame = SHAPES.frame(index)
        annotations = coco.imgToAnns[index]
        assert len(annotations) == len(frame.segments)
        for annotation, segment in zip(annotations, frame.segments, strict=True):
            mask = coco.annToMask(annotation)
            exact = frame.panoptic == segment.id
            assert (mask & exact).sum() / (mask | exact).sum() >= 0.98
            assert annotation["area"] == exact.sum()
            crowds += annotation["iscrowd"]
            assert isinstance(annotation["segmentation"], dict) == bool(annotation["iscrowd"])
    assert crowds > 0


def test_detectron2_loads_what_the_catalog_holds(out):
    annotations = out / "annotations"
    loaded = load_coco_json(
        str(annotations / "instances_val2017.json"), str(out / "val2017"), "exported_instances"
    )
    for ours, theirs in zip(load_shapes(SHAPES), loaded, strict=True):
        assert ours["annotations"] == theirs["annotations"]
        assert (ours["height"], ours["width"]) == (theirs["height"], theirs["width"])
    loaded = load_coco_panoptic_json(
        str(annotations / "panoptic_val2017.json"),
        str(out / "val2017"),
        str(out / "panoptic_val2017"),
        shapes_metadata("panoptic"),
    )
    for ours, theirs in zip(load_shapes(SHAPES, "panoptic"), loaded, strict=True):
        assert ours["segments_info"] == theirs["segments_info"]


def test_registration_with_detectron2(out):
    register_coco_instances(
        "exported",
        shapes_metadata("instances"),
        str(out / "annotations" / "instances_val2017.json"),
        str(out / "val2017"),
    )
    register_coco_panoptic_separated(
        "exported",
        shapes_metadata("panoptic"),
        str(out / "val2017"),
        str(out / "panoptic_val2017"),
        str(out / "annotations" / "panoptic_val2017.json"),
        str(out / "panoptic_stuff_val2017"),
        str(out / "annotations" / "instances_val2017.json"),
    )
    try:
        assert len(DatasetCatalog.get("exported")) == 10
        for index, record in enumerate(DatasetCatalog.get("exported_separated")):
            np.testing.assert_array_equal(
                np.asarray(Image.open(record["sem_seg_file_name"])), SHAPES.frame(index).sem_seg
            )
    finally:
        for name in ("exported", "exported_separated", "exported_stuffonly"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_keypoints_load_as_coco(out):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(out / "annotations" / "person_keypoints_val2017.json"))
    (category,) = coco.cats.values()
    assert len(category["keypoints"]) == 8 and len(category["skeleton"]) == 7
    assert max(max(bone) for bone in category["skeleton"]) == 8
    for annotation in coco.anns.values():
        keypoints = np.reshape(annotation["keypoints"], (8, 3))
        assert annotation["num_keypoints"] == (keypoints[:, 2] > 0).sum()
        assert keypoints[:, 0].max() <= 95.5 and keypoints[:, 1].max() <= 127.5


def test_existing_files_are_kept_unless_asked(out, capsys):
    before = content(out)
    assert main([str(out), "--num", "1"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert content(out) == before
    # Another split goes beside it, and can be replaced.
    for num, extra in (("2", []), ("1", ["--overwrite"])):
        assert main([str(out), "--split", "train", "--num", num, "--size", "64", *extra]) == 0
        assert len(list((out / "train2017").iterdir())) == int(num)
        assert {k: v for k, v in content(out).items() if "train" not in k} == before


def test_failure_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    written = []

    def full(image):
        written.append(image)
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        return b""

    monkeypatch.setattr(export_module, "encode_jpeg", full)
    assert main([str(tmp_path / "out"), "--num", "5", "--size", "64"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert content(tmp_path) == {} and len(written) == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--size", "12"], "32 x 32"),
        (["--size", "axb"], "HEIGHTxWIDTH"),
        (["--num", "0"], "at least one"),
        (["--split", "a/b"], "letters"),
        (["--video", "--length", "1"], "two frames"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as raised:
        main([str(tmp_path / "out"), *arguments])
    assert raised.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_out_is_a_file(tmp_path, capsys):
    (tmp_path / "out").touch()
    assert main([str(tmp_path / "out"), "--num", "1"]) == 1
    assert "is a file" in capsys.readouterr().err


def test_video(tmp_path):
    arguments = ["--video", "--split", "val", "--num", "2", "--length", "4", "--size", "64x96"]
    assert main([str(tmp_path), *arguments]) == 0
    shapes = VideoSet("val", 2, 64, 96, length=4)
    tracks = json.loads((tmp_path / "annotations" / "video_val.json").read_text())
    assert [video["length"] for video in tracks["videos"]] == [4, 4]
    folder = tmp_path / "video_val"
    for video in tracks["videos"]:
        clip = shapes.clip(video["id"])
        for time, name in enumerate(video["file_names"]):
            image = np.asarray(Image.open(folder / "frames" / name))
            np.testing.assert_array_equal(image, clip.frames[time].image)
            masks = {}
            for track in tracks["annotations"]:
                if track["video_id"] == video["id"] and track["segmentations"][time]:
                    masks[track["track_id"]] = mask_util.decode(track["segmentations"][time])
            expected = {
                s.number: clip.frames[time].panoptic == s.id for s in clip.frames[time].segments
            }
            assert masks.keys() == expected.keys()
            for number, mask in masks.items():
                np.testing.assert_array_equal(mask, expected[number])
            flow = folder / "flow" / f"{video['id']:06d}_{time:06d}_to_{time + 1:06d}.flo"
            assert flow.exists() == (time < 3)
            if time < 3:
                moved = clip.flow(time, time + 1)
                np.testing.assert_array_equal(cv2.readOpticalFlow(str(flow)), moved)
    before = content(tmp_path)
    assert main([str(tmp_path), *arguments, "--format", "davis"]) == 1  # --overwrite
    assert content(tmp_path) == before
