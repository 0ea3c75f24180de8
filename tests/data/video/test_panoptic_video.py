"""Panoptic clips of one's own: what says clip and frame, and what is wrong with such files."""

import copy
import itertools
import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2ext.config import get_cfg
from d2ext.data import DatasetError, build_train_loader, custom
from d2ext.data import summary as summary_module
from d2ext.data.video.register import read_videos
from tests.data.video.test_readers import HEIGHT, WIDTH, write_frames, write_json

CATEGORIES = [
    {"id": 1, "name": "sky", "isthing": 0},
    {"id": 2, "name": "road", "isthing": 0},
    {"id": 3, "name": "car", "isthing": 1},
    {"id": 4, "name": "dog", "isthing": 1},
]
# Ids at the borders of the bytes: sky, road, a car, and a dog that is in some frames only.
SKY, ROAD, CAR, DOG = 255, 256, 65535, 65536


def map_at(time):
    """A quarter is void."""
    ids = np.full((HEIGHT, WIDTH), ROAD)
    ids[: HEIGHT // 4] = SKY
    ids[-HEIGHT // 4 :] = 0
    ids[8:12, 2 + time : 8 + time] = CAR
    if time % 2 == 0:
        ids[13:17, 20:24] = DOG
    return ids


def write_png(path, ids):
    rgb = np.stack([ids & 255, ids >> 8 & 255, ids >> 16], 2).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb).save(path)


def clips(lengths=(3, 1)):
    """Clips ``a``, ``b``, ... by ``video_id`` and ``frame_id``; every frame is annotated."""
    images, annotations = [], []
    for clip, length in enumerate(lengths):
        for time in range(length):
            number = len(images) + 1
            name = f"{'abc'[clip]}/{10 * time + 7}.png"
            image = {"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH}
            images.append({**image, "video_id": f"clip {clip}", "frame_id": 10 * time + 7})
            segments = [
                {"id": i, "category_id": c}
                for i, c in ((SKY, 1), (ROAD, 2), (CAR, 3), (DOG, 4))
                if (map_at(time) == i).any()
            ]
            annotations.append({"image_id": number, "file_name": name, "segments_info": segments})
    categories = copy.deepcopy(CATEGORIES)
    return {"images": images[::-1], "annotations": annotations, "categories": categories}


def write_clips(folder, content):
    """The images, with another ending than in the file, and the PNGs."""
    for image in content["images"]:
        write_png(folder / f"videos/{image['file_name']}", map_at((image["frame_id"] - 7) // 10))
    write_frames(folder, [i["file_name"].replace(".png", ".jpg") for i in content["images"][::-1]])
    return content


def read(tmp_path, content):
    return read_videos("test", write_json(tmp_path / "videos.json", content), str(tmp_path))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("D2EXT_CACHE", str(tmp_path / "cache"))


def test_by_video_id_and_frame_id(tmp_path):
    content = write_clips(tmp_path, clips())
    del content["annotations"][1]  # the second frame: listed, not annotated
    first, second = read(tmp_path, content).videos
    assert [(v["video_id"], v["length"]) for v in (first, second)] == [("clip 0", 3), ("clip 1", 1)]
    assert [f["image_id"] for f in first["frames"]] == [1, 2, 3]
    assert ["annotations" in f for f in first["frames"]] == [True, False, True]
    assert [f["file_name"][-8:] for f in first["frames"]] == ["/a/7.jpg", "a/17.jpg", "a/27.jpg"]
    for time in (0, 2):
        annotations = first["frames"][time]["annotations"]
        boxes = {a["track_id"]: (a["category_id"], a["bbox"]) for a in annotations}
        assert boxes == {CAR: (0, [2 + time, 8, 6, 4]), DOG: (1, [20, 13, 4, 4])}


def test_track_ids_of_segments(tmp_path):
    """Ids of segments are then of one frame alone, and tracks may be text."""
    content = write_clips(tmp_path, clips())
    for annotation in content["annotations"]:
        for segment in annotation["segments_info"]:
            if segment["id"] >= CAR:
                segment["track_id"] = {CAR: "mine", DOG: "hers"}[segment["id"]]
    ids = map_at(2)
    ids[ids == CAR] = 9
    write_png(tmp_path / "videos/a/27.png", ids)
    content["annotations"][2]["segments_info"][2]["id"] = 9
    first, _ = read(tmp_path, content).videos
    tracks = [[a["track_id"] for a in f["annotations"]] for f in first["frames"]]
    assert tracks[0] == tracks[2] and tracks[1] == tracks[0][:1] and len(set(tracks[0])) == 2
    things = [s["track_id"] for s in first["frames"][0]["segments_info"] if s["isthing"]]
    assert things == tracks[0]
    del content["annotations"][0]["segments_info"][2]["track_id"]
    with pytest.raises(DatasetError, match=r"have no 'track_id', which others have: 65535 of 'a/7"):
        read(tmp_path, content)


def test_an_id_of_two_categories_is_two_tracks(tmp_path, caplog):
    content = write_clips(tmp_path, clips())
    content["annotations"][2]["segments_info"][2]["category_id"] = 4
    content["annotations"][2]["segments_info"][3]["category_id"] = 2  # stuff has no track
    first, _ = read(tmp_path, content).videos
    tracks = [{a["category_id"]: a["track_id"] for a in f["annotations"]} for f in first["frames"]]
    assert tracks[0] == {0: CAR, 1: DOG} and tracks[1] == {0: CAR}
    assert tracks[2].keys() == {1} and tracks[2][1] not in (CAR, DOG)
    segments = {s["id"]: s for s in first["frames"][2]["segments_info"]}
    assert segments[CAR]["track_id"] == tracks[2][1] and "track_id" not in segments[DOG]
    assert "tracks of several categories share ids (65535)" in caplog.text


def test_number_0_of_a_class_is_told(tmp_path, caplog):
    content = write_clips(tmp_path, clips((1,)))
    (annotation,) = content["annotations"]
    ids = map_at(0)
    ids[ids == CAR], ids[ids == DOG] = 3002, 4000
    write_png(tmp_path / "videos/a/7.png", ids)
    annotation["segments_info"][2]["id"], annotation["segments_info"][3]["id"] = 3002, 4000
    (video,) = read(tmp_path, content).videos
    assert "1 segments of things in" in caplog.text and "4000 of 'a/7.png'" in caplog.text
    assert [a["iscrowd"] for a in video["frames"][0]["annotations"]] == [0, 0]
    caplog.clear()
    annotation["segments_info"][3]["iscrowd"] = 1
    (video,) = read(tmp_path, content).videos
    assert [a["iscrowd"] for a in video["frames"][0]["annotations"]] == [0, 1]
    assert "segments of things" not in caplog.text


def drop_segment(content, folder):
    content["annotations"][1]["segments_info"].pop()


def add_segment(content, folder):
    content["annotations"][1]["segments_info"].append({"id": 99, "category_id": 4})


def palette(content, folder):
    Image.open(folder / "videos/a/17.png").convert("P").save(folder / "videos/a/17.png")


def alpha(content, folder):
    Image.open(folder / "videos/a/17.png").convert("RGBA").save(folder / "videos/a/17.png")


def other_size(content, folder):
    write_png(folder / "videos/a/17.png", map_at(1)[:-2])


def whole_frame_of_other_size(content, folder):
    other_size(content, folder)
    image = next(i for i in content["images"] if i["id"] == 2)
    image["height"] -= 2


def same_image(content, folder):
    content["images"][0]["file_name"] = content["images"][1]["file_name"]


def same_png(content, folder):
    content["annotations"][0]["file_name"] = content["annotations"][1]["file_name"]


def same_frame(content, folder):
    content["images"][1]["frame_id"] = content["images"][2]["frame_id"]


def no_frame_id(content, folder):
    del content["images"][1]["frame_id"]


def names_alone(content, folder):
    for image in content["images"]:
        del image["video_id"], image["frame_id"]


def segment_0(content, folder):
    content["annotations"][0]["segments_info"][3]["id"] = 0


def nobody(content, folder):
    content["annotations"] = []


def no_png(content, folder):
    (folder / "videos/a/17.png").unlink()


@pytest.mark.parametrize(
    "change, message",
    [
        (drop_segment, r"1 of 4 panoptic PNGs .*a/17\.png' has pixels .* does not list: 65535"),
        (add_segment, r"1 of 4 panoptic PNGs .*a/17\.png' has no pixel of segments .*: 99"),
        (palette, "a/17.png' has mode P and size"),
        (alpha, "a/17.png' has mode RGBA and size"),
        (other_size, r"a/17\.png' has height and width \(22, 32\), the JSON file says \(24, 32\)"),
        (whole_frame_of_other_size, "1 frames have another height and width than others .*'a/17"),
        (same_image, "1 files are named by several images: 'a/27.jpg'"),
        (same_png, "1 files are named by several annotations: 'a/17.png'"),
        (same_frame, "1 frames have several images: frame 17 of clip clip 0"),
        (no_frame_id, "1 of 4 images of .* lack 'video_id' or 'frame_id'.*: id 3"),
        (names_alone, r"names 4 of 4 files which do not begin .*give all images 'video_id'"),
        (segment_0, "'id' that is not a number from 1 to 16777215"),
        (nobody, "videos.json' annotates nothing"),
        (no_png, "1 of 4 PNGs are not in"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, change, message):
    content = write_clips(tmp_path, clips())
    change(content, tmp_path)
    with pytest.raises(DatasetError, match=message):
        read(tmp_path, content)


@pytest.fixture
def registered(tmp_path):
    name = "test_panoptic_video"
    source = write_json(tmp_path / "videos.json", write_clips(tmp_path, clips()))
    custom.register_own_dataset(name, train_video_json=source, train_images=str(tmp_path))
    yield name
    custom._registered.pop(name)
    DatasetCatalog.remove(f"{name}_train")
    MetadataCatalog.pop(f"{name}_train", None)
    summary_module.forget(f"{name}_train")


def test_one_command(registered, tmp_path):
    """The summary, what the model is told, and pairs of frames; a clip of one frame is its own."""
    summary_module.report([f"{registered}_train"], str(tmp_path))
    content = json.loads((tmp_path / "dataset_summary.json").read_text())[f"{registered}_train"]
    assert (content["videos"], content["annotated"], content["tracks"]) == (2, 4, 4)
    assert content["void"] == pytest.approx(0.25)
    assert summary_module._summaries[f"{registered}_train"].rows()["void"] == "25.0 %"
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = "UPSNet"
    custom.apply_dataset_to_config(cfg, registered)
    assert (cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.UPSNET.NUM_STUFF) == (2, 2)
    assert cfg.INPUT.MASK_FORMAT == "bitmask" and cfg.MODEL.UPSNET.CATEGORY_IDS == "separated"
    cfg.INPUT.MAPPER = "ClipMapper"
    cfg.INPUT.AUGMENTATION.NAME = "none"
    cfg.INPUT.SEM_SEG_WITH_THINGS = True
    cfg.INPUT.VIDEO.REFERENCES = "annotated"
    cfg.INPUT.VIDEO.REFERENCE_OFFSETS = [-1, 1]
    cfg.MODEL.MASK_ON = True
    cfg.SOLVER.IMS_PER_BATCH = 1
    cfg.DATALOADER.NUM_WORKERS = 0
    pairs = set()
    for (sample,) in itertools.islice(build_train_loader(cfg), 30):
        pairs.add((sample["video_id"], sample["frame"], sample["reference"]["frame"]))
        for one in (sample, sample["reference"]):
            ids = map_at(one["frame"])
            labels = np.full_like(ids, 255)
            for label, segment in enumerate((SKY, ROAD, CAR, DOG)):
                labels[ids == segment] = label
            assert one["sem_seg"].tolist() == labels.tolist()
            masks = dict(
                zip(one["instances"].gt_ids.tolist(), one["instances"].gt_masks, strict=True)
            )
            assert masks.keys() == {i for i in (CAR, DOG) if (ids == i).any()}
            assert all((mask.numpy() == (ids == i)).all() for i, mask in masks.items())
    assert pairs == {("clip 0", t, r) for t, r in ((0, 1), (1, 0), (1, 2), (2, 1))} | {
        ("clip 1", 0, 0)
    }
