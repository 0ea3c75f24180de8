"""Loaders on data sets of videos: annotated frames for training, all of them in order for a test."""

import itertools
import logging

import pytest

from d2ext.config import get_cfg
from d2ext.data import DatasetError, build_test_loader, build_train_loader, get_dataset_dicts
from d2ext.data.shapes import VideoSet, load_shapes, load_shapes_video
from d2ext.data.video.records import video_record

SHAPES = VideoSet("val", 3, 64, 64, length=5)


@pytest.fixture
def videos():
    return load_shapes_video(SHAPES)


def make_cfg(*names, workers=0):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = names
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.MODEL.MASK_ON = True
    cfg.SOLVER.IMS_PER_BATCH = 1
    cfg.DATALOADER.NUM_WORKERS = workers
    return cfg


def test_training_gets_annotated_frames(register, videos):
    for video in videos:
        for frame in video["frames"][1:]:
            del frame["annotations"]
    videos[2]["frames"][0]["annotations"] = []
    name = register(videos)
    cfg = make_cfg(name)
    assert [r["image_id"] for r in get_dataset_dicts(cfg, [name], is_train=True)] == [0, 5]
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert [r["image_id"] for r in get_dataset_dicts(cfg, [name], is_train=True)] == [0, 5, 10]
    seen = {s["image_id"] for (s,) in itertools.islice(build_train_loader(cfg), 9)}
    assert seen == {0, 5, 10}
    assert len(get_dataset_dicts(cfg, [name], is_train=False)) == 15


def test_images_and_videos_train_together(register, videos):
    images = register(load_shapes(SHAPES, "rle")[:4])
    name = register(videos)
    cfg = make_cfg(images, name)
    records = get_dataset_dicts(cfg, [images, name], is_train=True)
    assert ["video_id" in r for r in records] == [False] * 4 + [True] * 15


def test_images_that_name_a_video_are_images(register):
    name = register([{**r, "video_id": 3} for r in load_shapes(SHAPES, "rle")[:3]])
    assert len(list(build_test_loader(make_cfg(), name))) == 3


def test_videos_that_nobody_annotated(register, videos):
    for video in videos:
        for frame in video["frames"]:
            del frame["annotations"]
    name = register(videos)
    with pytest.raises(DatasetError, match=r"No frame of the videos .* is annotated"):
        build_train_loader(make_cfg(name))
    assert len(list(build_test_loader(make_cfg(), name))) == 15


def test_an_error_names_the_data_set(register, videos):
    videos[1]["frames"] = []
    name = register(videos)
    with pytest.raises(DatasetError, match=f"Data set '{name}': Video 1 has no frames"):
        build_test_loader(make_cfg(), name)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_test_sees_all_frames_in_order(register, videos, workers):
    batches = list(build_test_loader(make_cfg(workers=workers), register(videos)))
    assert {len(batch) for batch in batches} == {1}
    seen = [(s["video_id"], s["frame"], s["is_first"]) for (s,) in batches]
    assert seen == [(v, t, t == 0) for v in range(3) for t in range(5)]
    assert all("annotations" not in s and "instances" not in s for (s,) in batches)


def test_the_first_frame_that_can_be_read_is_the_first(register, videos, tmp_path, caplog):
    for video, times in ((0, [0]), (1, [0, 1, 3]), (2, range(5))):
        for time in times:
            videos[video]["frames"][time]["file_name"] = str(tmp_path / "none.jpg")
    with caplog.at_level(logging.INFO):
        batches = list(build_test_loader(make_cfg(), register(videos)))
    seen = [(s["video_id"], s["frame"], s["is_first"]) for (s,) in batches]
    assert seen == [
        (0, 1, True),
        (0, 2, False),
        (0, 3, False),
        (0, 4, False),
        (1, 2, True),
        (1, 4, False),
    ]
    assert "none.jpg': there is no such file" in caplog.text
    assert "6 of 7 images were evaluated" in caplog.text  # a file is told once


def test_processes_get_whole_videos(register, videos, monkeypatch):
    name = register(videos)
    seen = []
    for rank in range(2):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda r=rank: r)
        monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
        loader = build_test_loader(make_cfg(), name)
        seen.append([divmod(i, 5) for i in loader.sampler])
    assert seen[0] + seen[1] == [(v, t) for v in range(3) for t in range(5)]
    assert not {v for v, _ in seen[0]} & {v for v, _ in seen[1]}


def test_clips_of_one_frame_and_of_different_sizes(register):
    small, large = (load_shapes(VideoSet("val", 1, s, s, length=3), "rle") for s in (64, 96))
    for records in (small, large):
        for record in records:
            for i, annotation in enumerate(record["annotations"]):
                annotation["track_id"] = i
    for i, record in enumerate(large):
        record["image_id"] = 10 + i
        for annotation in record["annotations"]:
            annotation["track_id"] += 100
    name = register([video_record("one", small[:1]), video_record("two", [*small[1:], *large])])
    cfg = make_cfg(name)
    cfg.INPUT.MIN_SIZE_TEST = 0
    sizes = [(s["height"], tuple(s["image"].shape[1:])) for (s,) in build_test_loader(cfg, name)]
    assert sizes == [(64, (64, 64))] * 3 + [(96, (96, 96))] * 3
    assert len(get_dataset_dicts(cfg, [name], is_train=True)) == 6
