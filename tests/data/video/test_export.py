"""`shapes`' clips written in each form that people have, and read back: the same records."""

import pytest
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util

from d2ext.data.image_io import read_image
from d2ext.data.shapes import THING_CLASSES, VideoSet, load_shapes_video
from d2ext.data.shapes.__main__ import main
from d2ext.data.shapes.export_video import VIDEO_FORMATS
from d2ext.data.video.register import read_videos

SIZE, NUM, LENGTH = 64, 3, 10


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folders = {}
    for form in VIDEO_FORMATS:
        out = tmp_path_factory.mktemp(form)
        arguments = ["--num", str(NUM), "--length", str(LENGTH), "--size", str(SIZE)]
        assert main([str(out), "--video", "--format", form, *arguments]) == 0
        folders[form] = out
    return folders


def read(form, out):
    folder = out / "video_val"
    classes = (folder / "classes.txt").read_text().split("\n")[:-1] if form == "mots" else None
    source = folder / "masks" if form in ("davis", "mots") else out / "annotations/video_val.json"
    panoptic = str(folder / "panoptic") if form == "cityscapes_vps" else None
    return read_videos(
        f"exported_{form}",
        str(source),
        str(folder / "frames"),
        panoptic_root=panoptic,
        classes=classes,
    )


def tracks(frame, form):
    """Track → class, mask, box of a frame."""
    result = {}
    for a in frame["annotations"]:
        # The forms whose pixels hold both have both in the track's id.
        track = a["track_id"] % 1000 if form in ("mots", "cityscapes_vps") else a["track_id"]
        mask = a["segmentation"]
        if isinstance(mask, list):
            mask = mask_util.merge(mask_util.frPyObjects(mask, SIZE, SIZE))
        box = BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
        result[track] = (a["category_id"], mask_util.decode(mask).tobytes(), list(box))
    return result


@pytest.mark.parametrize("form", VIDEO_FORMATS)
def test_read_back(exported, form):
    every = 5 if form == "cityscapes_vps" else 1
    shapes = VideoSet("val", NUM, SIZE, SIZE, length=LENGTH, every=every)
    exact = VideoSet("val", NUM, SIZE, SIZE, length=LENGTH)
    data = read(form, exported[form])
    assert len(data.videos) == NUM
    count = 0
    for ours, theirs in zip(load_shapes_video(exact), data.videos, strict=True):
        assert [theirs[k] for k in ("length", "height", "width")] == [LENGTH, SIZE, SIZE]
        for time, (a, b) in enumerate(zip(ours["frames"], theirs["frames"], strict=True)):
            assert b["frame"] == time and b["video_id"] == theirs["video_id"]
            assert (read_image(a["file_name"]) == read_image(b["file_name"])).all()
            index = ours["video_id"] * LENGTH + time
            assert ("annotations" in b) == shapes.is_annotated(index)
            if "annotations" not in b:
                continue
            expected, found = tracks(a, "ytvis"), tracks(b, form)
            if form == "davis":  # has no classes
                expected = {t: (0, *rest) for t, (_, *rest) in expected.items()}
                found = {t: (0, *rest) for t, (_, *rest) in found.items()}
            assert found == expected
            count += len(found)
            assert b.get("json_index") == (time if form == "ytvis" else None)
    assert count > 15
    assert data.metadata["video"] and data.metadata["mask_format"] == "bitmask"
    assert data.metadata["thing_classes"] == (
        ["object"] if form == "davis" else list(THING_CLASSES)
    )
    evaluator = "video_panoptic_seg" if form == "cityscapes_vps" else "ytvis"
    assert data.metadata["evaluator_type"] == evaluator


def test_panoptic_clips_are_those_of_the_catalog(exported):
    shapes = VideoSet("val", NUM, SIZE, SIZE, length=LENGTH, every=5)
    data = read("cityscapes_vps", exported["cityscapes_vps"])
    for ours, theirs in zip(load_shapes_video(shapes, "panoptic"), data.videos, strict=True):
        for a, b in zip(ours["frames"], theirs["frames"], strict=True):
            assert ("segments_info" in b) == ("segments_info" in a)
            if "segments_info" not in a:
                continue
            for name in ("pan_seg_file_name", "sem_seg_file_name"):
                assert (read_image(a[name], "RGB") == read_image(b[name], "RGB")).all()
            keys = ("id", "category_id", "isthing", "iscrowd")
            segments = [[[s[k] for k in keys] for s in f["segments_info"]] for f in (a, b)]
            assert segments[0] == segments[1]
            things = {s["id"]: s["track_id"] for s in b["segments_info"] if s["isthing"]}
            assert things == {x["segment_id"]: x["track_id"] for x in b["annotations"]}
            assert {t % 1000 for t in things.values()} == {x["track_id"] for x in a["annotations"]}
