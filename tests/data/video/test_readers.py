"""Readers of videos: the forms that people bring, and what is wrong with them."""

import copy
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from d2ext.data import DatasetError
from d2ext.data.coco_json import read_coco_json
from d2ext.data.video.records import flatten
from d2ext.data.video.register import read_videos

HEIGHT, WIDTH = 24, 32


def mask_of(x, y, w, h):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    return mask


def rle_of(*box, compressed=True):
    rle = mask_util.encode(mask_of(*box))
    if compressed:
        return {"size": rle["size"], "counts": rle["counts"].decode()}
    flat = mask_of(*box).reshape(-1, order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    return {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *ends, flat.size]).tolist()}


def polygon_of(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def write_frames(folder, names, size=(HEIGHT, WIDTH)):
    for i, name in enumerate(names):
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        image = np.full((*size, 3), 20 * i, np.uint8)
        image[:, : size[1] // 2] += 9
        assert cv2.imwrite(str(path), image)


def write_json(path, content):
    path.write_text(json.dumps(content))
    return str(path)


CATEGORIES = [{"id": 3, "name": "pear"}, {"id": 1, "name": "apple"}]


def ytvis():
    """Two videos; of the first, every second frame is listed. All kinds of masks."""
    return {
        "videos": [
            {
                "id": i,
                "width": WIDTH,
                "height": HEIGHT,
                "length": len(names),
                "file_names": [f"{folder}/{name}" for name in names],
            }
            for i, folder, names in ((7, "a", ("0.jpg", "2.jpg", "10.jpg")), (8, "b", ("0.jpg",)))
        ],
        "annotations": [
            {
                "id": 5,
                "video_id": 7,
                "category_id": 3,
                "iscrowd": 0,
                "segmentations": [polygon_of(2, 3, 8, 6), None, rle_of(4, 3, 8, 6)],
                "bboxes": [[2, 3, 8, 6], None, [4, 3, 8, 6]],
                "areas": [48, None, 48],
            },
            {
                "id": 6,
                "video_id": 7,
                "category_id": 1,
                "iscrowd": 0,
                "segmentations": [None, rle_of(20, 10, 6, 6, compressed=False), None],
                "bboxes": [None, [20, 10, 6, 6], None],
                "areas": [None, 36, None],
            },
        ],
        "categories": CATEGORIES,
    }


def read(tmp_path, content, **others):
    return read_videos("test", write_json(tmp_path / "x.json", content), str(tmp_path), **others)


@pytest.fixture
def frames(tmp_path):
    """All frames of the videos of :func:`ytvis` as files, also those that it does not list."""
    write_frames(tmp_path, [*(f"a/{i}.jpg" for i in range(11)), "b/0.jpg"])
    return tmp_path


def masks(frame):
    result = {}
    for a in frame["annotations"]:
        mask = a["segmentation"]
        if isinstance(mask, list):
            mask = mask_util.merge(mask_util.frPyObjects(mask, HEIGHT, WIDTH))
        result[a["track_id"]] = (a["category_id"], mask_util.decode(mask))
    return result


def test_ytvis(frames):
    data = read(frames, ytvis())
    assert data.metadata["thing_classes"] == ["apple", "pear"]
    first, second = data.videos
    assert (first["video_id"], first["length"], second["length"]) == (7, 11, 1)
    names = [Path(f["file_name"]).name for f in first["frames"]]
    assert names == [f"{i}.jpg" for i in range(11)]  # 10 after 9
    index = {f["frame"]: f["json_index"] for f in first["frames"] if "json_index" in f}
    assert index == {0: 0, 2: 1, 10: 2}
    assert {f["frame"] for f in first["frames"] if "annotations" in f} == {0, 2, 10}
    assert second["frames"][0]["annotations"] == []
    expected = {
        0: {5: (1, mask_of(2, 3, 8, 6))},
        2: {6: (0, mask_of(20, 10, 6, 6))},
        10: {5: (1, mask_of(4, 3, 8, 6))},
    }
    for number, objects in expected.items():
        found = masks(first["frames"][number])
        assert found.keys() == objects.keys()
        for track, (category, mask) in objects.items():
            assert found[track][0] == category
            np.testing.assert_array_equal(found[track][1], mask)
    assert len({f["image_id"] for f in flatten(data.videos)}) == 12


def test_names_without_extension(frames):
    content = ytvis()
    content["videos"][0]["file_names"] = ["a/0", "a/2", "a/10"]
    shutil.move(frames / "a/2.jpg", frames / "a/2.png")
    first = read(frames, content).videos[0]
    assert Path(first["frames"][2]["file_name"]).name == "2.png"
    assert first["frames"][2]["json_index"] == 1 and first["length"] == 11


def test_a_folder_of_several_videos_has_no_other_frames(frames):
    content = ytvis()
    content["videos"][1]["file_names"] = ["a/5.jpg"]
    assert [v["length"] for v in read(frames, content).videos] == [3, 1]
    content = ytvis()
    content["videos"][0]["file_names"] = ["a/2.jpg", "a/0.jpg", "a/10.jpg"]  # an order of its own
    names = [Path(f["file_name"]).name for f in read(frames, content).videos[0]["frames"]]
    assert names == ["2.jpg", "0.jpg", "10.jpg"]


@pytest.mark.parametrize("annotations", ["absent", None, []])
def test_files_without_annotations(frames, annotations):
    content = {**ytvis(), "annotations": annotations}
    if annotations == "absent":
        del content["annotations"]
    data = read(frames, content)
    assert not any("annotations" in f for f in flatten(data.videos))
    assert sum("json_index" in f for f in flatten(data.videos)) == 4
    assert data.metadata["thing_classes"] == ["apple", "pear"]


def test_tracks_without_any_mask(frames):
    content = ytvis()
    for track in content["annotations"]:
        for key in ("segmentations", "bboxes", "areas"):
            track[key] = [None] * 3
    annotated = [f for f in flatten(read(frames, content).videos) if "annotations" in f]
    assert [f["annotations"] for f in annotated] == [[]] * 4


def test_tracks_of_boxes(frames):
    content = ytvis()
    for track in content["annotations"]:
        del track["segmentations"], track["areas"]
    frame = read(frames, content).videos[0]["frames"][0]
    (annotation,) = frame["annotations"]
    assert annotation["bbox"] == [2, 3, 8, 6] and "segmentation" not in annotation


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["videos"][1].update(id=7), "'id' occur repeatedly in 'videos': 7"),
        (
            lambda c: c["videos"][1].update(file_names=[]),
            "'file_names' that is not a list of the names",
        ),
        (
            lambda c: c["videos"][0].update(file_names=["a/0.jpg", "a/5.jpg", "a/5.jpg"]),
            "'file_names' that is not a list of different names",
        ),
        (lambda c: c["videos"][0].pop("height"), "videos have no 'height': id 7"),
        (lambda c: c["annotations"][0].update(video_id=9), "video_id that is not in 'videos'"),
        (lambda c: c["annotations"][0].update(category_id=9), "category_id that is not in"),
        (
            lambda c: c["annotations"][0].update(segmentations=[None]),
            r"'segmentations' of another length .*: id 5 \(1, video 3\)",
        ),
        (
            lambda c: c["annotations"][0]["segmentations"].__setitem__(
                2, {"size": [5, 5], "counts": [25]}
            ),
            "another height and width than their image: id 5, frame 2 of video 7",
        ),
        (
            lambda c: c["annotations"][0]["segmentations"].__setitem__(0, "text"),
            "'segmentation' that is not polygons",
        ),
        (lambda c: c.pop("categories"), "has no 'categories'"),
        (
            lambda c: c["videos"][0].update(file_names=["q/0.jpg", "q/1.jpg", "q/2.jpg"]),
            "are not in",
        ),
    ],
)
def test_what_is_wrong_is_said(frames, change, message):
    content = copy.deepcopy(ytvis())
    change(content)
    with pytest.raises(DatasetError, match=message):
        read(frames, content)


def test_likely_mistakes_are_named(tmp_path):
    with pytest.raises(DatasetError, match="file of videos: give it as --train-video-json"):
        read_coco_json(write_json(tmp_path / "videos.json", ytvis()))
    vos = {"videos": {"0043f083b5": {"objects": {"1": {"category": "sedan", "frames": ["00000"]}}}}}
    with pytest.raises(DatasetError, match=r"meta\.json of YouTube-VOS"):
        read(tmp_path, vos)
    image = {"id": 1, "file_name": "x.jpg", "height": 2, "width": 2}
    images = {"images": [image], "annotations": [], "categories": CATEGORIES}
    with pytest.raises(DatasetError, match=r"COCO file of images.*--train-json"):
        read(tmp_path, images)
    for content in ({}, [], {"videos": []}, "text"):
        with pytest.raises(DatasetError, match="in no known form of videos"):
            read(tmp_path, content)
    with pytest.raises(DatasetError, match="leave out the semantic classes"):
        read(tmp_path, ytvis(), classes=["a"])
    with pytest.raises(DatasetError, match="does not exist"):
        read_videos("test", str(tmp_path / "none.json"), str(tmp_path))


def coco(first=0, **track):
    """Frames in any order; ids of videos are text in images, as some tools write them."""
    place = {2: (0, 0), 5: (1, 0), 4: (1, 1)}
    return {
        "videos": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}],
        "images": [
            {
                "id": i,
                "file_name": f"{'ab'[video]}/{number}.jpg",
                "height": HEIGHT,
                "width": WIDTH,
                "video_id": video,
                "frame_id": number + first,
            }
            for i, (video, number) in place.items()
        ],
        "annotations": [
            {"id": n, "image_id": i, "category_id": 3, "bbox": [2, 3, 4, 5], **track}
            for n, i in enumerate((4, 5), 1)
        ],
        "categories": CATEGORIES,
    }


@pytest.fixture
def coco_frames(tmp_path):
    write_frames(tmp_path, ["a/0.jpg", "b/0.jpg", "b/1.jpg"])
    return tmp_path


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    "track",
    [{"track_id": 8}, {"instance_id": 8}, {"attributes": {"track_id": 8, "keyframe": True}}],
)
def test_coco_with_videos(coco_frames, first, track):
    data = read(coco_frames, coco(first, **track))
    assert [[f["image_id"] for f in v["frames"]] for v in data.videos] == [[2], [5, 4]]
    assert [[len(f["annotations"]) for f in v["frames"]] for v in data.videos] == [[0], [1, 1]]
    (annotation,) = data.videos[1]["frames"][1]["annotations"]
    assert annotation["track_id"] == 8 and annotation["category_id"] == 1
    assert data.metadata["evaluator_type"] == "ytvis" and "mask_format" not in data.metadata
    assert "json_index" not in data.videos[1]["frames"][0]


def test_cvat_names_no_video(coco_frames):
    content = coco(attributes={"track_id": 2})
    del content["videos"]
    for image in content["images"]:
        del image["video_id"], image["frame_id"]
    videos = read(coco_frames, content).videos
    assert {v["video_id"]: [f["image_id"] for f in v["frames"]] for v in videos} == {
        "a": [2],
        "b": [5, 4],
    }


def test_tracks_named_by_text(coco_frames):
    content = coco()
    for annotation, track in zip(content["annotations"], ("x", "y"), strict=True):
        annotation["track_id"] = track
    frames = read(coco_frames, content).videos[1]["frames"]
    assert {a["track_id"] for f in frames for a in f["annotations"]} == {1, 2}


def test_frames_of_different_sizes(coco_frames):
    content = coco(track_id=8)
    write_frames(coco_frames, ["b/1.jpg"], (40, 50))
    content["images"][2].update(height=40, width=50)
    frames = read(coco_frames, content).videos[1]["frames"]
    assert [(f["height"], f["width"]) for f in frames] == [(HEIGHT, WIDTH), (40, 50)]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["annotations"][0].pop("track_id"), "annotations have no 'track_id': id 1"),
        (lambda c: c["images"][0].pop("video_id"), "images have no 'video_id': id 2"),
        (
            lambda c: c["images"][1].update(frame_id=1),
            "values of 'frame_id' occur repeatedly in 'images of video 1': 1",
        ),
        (lambda c: c["images"][1].pop("frame_id"), "images of video 1 have no 'frame_id': id 5"),
        (lambda c: c["videos"].append({"id": 9}), "have no image: id 9"),
        (lambda c: c["annotations"][0].update(image_id=5), "several annotations of one track: 8"),
    ],
)
def test_coco_files_that_cannot_be_used(coco_frames, change, message):
    content = coco(track_id=8)
    change(content)
    with pytest.raises(DatasetError, match=message):
        read(coco_frames, content)


def test_crowds_need_no_track(coco_frames):
    content = coco(track_id=8)
    content["annotations"].append(
        {"id": 3, "image_id": 4, "category_id": 3, "bbox": [9, 9, 4, 4], "iscrowd": 1}
    )
    annotations = read(coco_frames, content).videos[1]["frames"][1]["annotations"]
    assert [(a["track_id"], a["iscrowd"]) for a in annotations] == [(8, 0), (9, 1)]


@pytest.mark.parametrize(
    "name, images",
    [("posetrack18_keypoints.json", "images"), ("original/test_posetrack18_val.json", ".")],
)
def test_posetrack(real_data, name, images):
    folder = real_data / "landmarks/posetrack18"
    data = read_videos("posetrack", str(folder / name), str(folder / images))
    assert data.metadata["evaluator_type"] == "video_keypoints"
    assert len(data.metadata["keypoint_names"]) == 17
    tracks = [{a["track_id"] for a in f["annotations"]} for v in data.videos for f in v["frames"]]
    assert len(data.videos) == 2 and sum(map(len, tracks)) == 12


def write_masks(folder, maps, dtype=np.uint8):
    for name, labels in maps.items():
        Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels.astype(dtype)).save(Path(folder, name))


def test_davis_masks(tmp_path):
    write_frames(tmp_path / "images", [*(f"x/{i}.jpg" for i in range(3)), "y/0.jpg"])
    two = mask_of(2, 2, 5, 5) + 2 * mask_of(12, 8, 6, 6).astype(int) + 255 * mask_of(30, 0, 2, 24)
    maps = {
        "x/0.png": two,
        "x/2.png": 2 * mask_of(14, 8, 6, 6),
        "y/0.png": 255 * mask_of(1, 1, 9, 9),
    }
    write_masks(tmp_path / "masks", maps)
    data = read_videos("test", str(tmp_path / "masks"), str(tmp_path / "images"))
    first, second = data.videos
    assert (first["video_id"], second["video_id"]) == ("x", "y")
    assert ["annotations" in f for f in first["frames"]] == [True, False, True]
    assert {(f["height"], f["width"]) for f in first["frames"]} == {(HEIGHT, WIDTH)}
    for frame, boxes in ((0, {1: (2, 2, 5, 5), 2: (12, 8, 6, 6)}), (2, {2: (14, 8, 6, 6)})):
        found = masks(first["frames"][frame])
        assert found.keys() == boxes.keys()  # 255 is void
        for track, box in boxes.items():
            np.testing.assert_array_equal(found[track][1], mask_of(*box))
            (annotation,) = (
                a for a in first["frames"][frame]["annotations"] if a["track_id"] == track
            )
            assert annotation["bbox"] == list(box)
    assert list(masks(second["frames"][0])) == [255]  # the one object
    assert data.metadata["thing_classes"] == ["object"]
    named = read_videos("t", str(tmp_path / "masks"), str(tmp_path / "images"), classes=["car"])
    assert named.metadata["thing_classes"] == ["car"]


def test_mots_masks(tmp_path):
    write_frames(tmp_path / "images", [f"0002/{i:06d}.png" for i in range(2)])
    both = 1005 * mask_of(2, 2, 5, 5).astype(int) + 2005 * mask_of(12, 8, 6, 6).astype(int)
    maps = {"0002/000000.png": both + 10000 * mask_of(25, 0, 5, 9), "0002/000001.png": 0 * both}
    write_masks(tmp_path / "masks", maps, np.uint16)
    data = read_videos("test", str(tmp_path / "masks"), str(tmp_path / "images"))
    assert data.metadata["thing_classes"] == ["car", "pedestrian"]
    frames = data.videos[0]["frames"]
    assert {t: c for t, (c, _) in masks(frames[0]).items()} == {1005: 0, 2005: 1}
    assert frames[1]["annotations"] == []
    maps["0002/000001.png"] = 3001 * mask_of(2, 2, 5, 5).astype(int)
    write_masks(tmp_path / "masks", maps, np.uint16)
    with pytest.raises(
        DatasetError, match=r"value 3001, an object of class 3 .*--semantic-classes"
    ):
        read_videos("test", str(tmp_path / "masks"), str(tmp_path / "images"))


def test_masks_that_cannot_be_used(tmp_path):
    for folder in ("masks", "images"):
        (tmp_path / folder).mkdir()
    arguments = ("test", str(tmp_path / "masks"), str(tmp_path / "images"))
    with pytest.raises(DatasetError, match="no masks"):
        read_videos(*arguments)
    write_masks(tmp_path / "masks", {"x/0.png": mask_of(1, 1, 5, 5)})
    with pytest.raises(DatasetError, match=r"1 of 1 masks in .* have no image"):
        read_videos(*arguments)
    write_frames(tmp_path / "images", ["x/0.jpg"])
    (tmp_path / "masks/x/0.png").write_bytes(b"broken")
    with pytest.raises(DatasetError, match=r"x/0\.png"):
        read_videos(*arguments)
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "masks/x/0.png")
    with pytest.raises(DatasetError, match="one channel"):
        read_videos(*arguments)


def test_the_real_videos(real_data):
    """Two forms of the same masks."""
    folder = real_data / "video/davis"
    data = read_videos("davis", str(folder / "ytvis.json"), str(folder))
    assert [(v["length"], len(v["frames"])) for v in data.videos] == [(40, 40), (49, 49)]
    for video in data.videos:
        for frame in video["frames"]:
            (annotation,) = frame["annotations"]
            png = Path(frame["file_name"].replace("/images/", "/masks/")).with_suffix(".png")
            expected = np.asarray(Image.open(png)) > 0
            assert (mask_util.decode(annotation["segmentation"]) > 0).tolist() == expected.tolist()
            assert frame["json_index"] == frame["frame"]


def test_the_real_masks(real_data, tmp_path):
    for name in ("car-shadow", "libby"):
        for kind in ("images", "masks"):
            (tmp_path / kind).mkdir(exist_ok=True)
            (tmp_path / kind / name).symlink_to(real_data / "video/davis" / name / kind)
    data = read_videos("davis", str(tmp_path / "masks"), str(tmp_path / "images"))
    reference = read_videos(
        "davis", str(real_data / "video/davis/ytvis.json"), str(real_data / "video/davis")
    )
    for ours, theirs in zip(data.videos, reference.videos, strict=True):
        for a, b in zip(ours["frames"], theirs["frames"], strict=True):
            assert Path(a["file_name"]).name == Path(b["file_name"]).name
            (mask,), (other,) = masks_of(a), masks_of(b)
            assert (mask == other).all()


def masks_of(frame):
    return [mask_util.decode(a["segmentation"]) for a in frame["annotations"]]
