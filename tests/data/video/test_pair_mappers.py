"""Pairs of frames under one augmentation: pixels, ids and flow still belong together after it."""

import itertools
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import BitMasks
from detectron2.utils.file_io import PathManager
from PIL import Image

from d2ext.config import ConfigError, get_cfg
from d2ext.data import DatasetError, build_test_loader, build_train_loader
from d2ext.data.build import build_mapper
from d2ext.data.errors import AnnotationError, SampleError
from d2ext.data.sampler import sample_randomness
from d2ext.data.shapes import VideoSet, load_shapes_flow, load_shapes_video
from d2ext.data.shapes.video import SEEN
from d2ext.data.video.flow import read_flow
from d2ext.data.video.records import flatten, video_record

SHAPES = VideoSet("train", 6, 128, 160, seed=3)
RECIPES = ("ssd", "default", "centernet", "cornernet", "upsnet", "vpsnet", "none")


@pytest.fixture
def clips(register):
    return register(load_shapes_video(SHAPES))


def make_cfg(*names, recipe="ssd", mapper="ClipMapper", flow=True, workers=0):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = names
    cfg.INPUT.MAPPER = mapper
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.AUGMENTATION.NAME = recipe
    cfg.INPUT.AUGMENTATION.SIZE = 160
    cfg.INPUT.MIN_SIZE_TRAIN = (96, 160)
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.INPUT.VIDEO.FLOW = flow
    cfg.MODEL.MASK_ON = True
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.DATALOADER.NUM_WORKERS = workers
    return cfg


def train_samples(cfg, count):
    batches = itertools.islice(build_train_loader(cfg), -(-count // 2))
    return [sample for batch in batches for sample in batch][:count]


def warped(sample, flow):
    """The reference as the flow says the target looks, (H, W, 3) float32."""
    image = sample["reference"]["image"].permute(1, 2, 0).numpy().astype(np.float32)
    y, x = np.indices(image.shape[:2], dtype=np.float32)
    return cv2.remap(image, x + flow[0], y + flow[1], cv2.INTER_LINEAR)


def untransformed(sample):
    """The flow of the files, cut or padded to the sample's size: not transformed."""
    height, width = sample["image"].shape[1:]
    flow = read_flow(sample["flow_file_name"].format(frame=sample["reference"]["frame"]))
    return np.resize(flow.transpose(2, 0, 1), (2, height, width))


@pytest.mark.parametrize("recipe", RECIPES)
def test_flow_still_leads_to_the_reference(clips, recipe, monkeypatch):
    """Points that both frames show have one colour: the target's, and where the flow leads."""
    cfg = make_cfg(clips, recipe=recipe)
    mapper = build_mapper(cfg, is_train=True)
    made = []
    original = type(mapper).map
    monkeypatch.setattr(type(mapper), "map", lambda *a: made.append(original(*a)) or made[-1])
    samples = train_samples(cfg, 24)
    errors = []
    for number, sample in enumerate(samples):
        if sample["reference"]["frame"] == sample["frame"]:
            continue
        _, transforms = next(m for m in made if m[0]["image"] is sample["image"])
        name = sample["occlusion_file_name"].format(frame=sample["reference"]["frame"])
        with PathManager.open(name, "rb") as file:
            seen = (np.asarray(Image.open(file)) == SEEN).astype(np.uint8)
        seen = cv2.erode(transforms.apply_segmentation(seen), np.ones((5, 5)), borderValue=0) > 0
        flow, valid = sample["flow"].numpy(), sample["flow_valid"].numpy()
        assert flow.dtype == np.float32 and valid.dtype == bool, number
        if (seen & valid).sum() < 500:
            continue
        target = cv2.GaussianBlur(sample["image"].permute(1, 2, 0).numpy(), (5, 5), 0)
        errors.append(
            [
                np.abs(cv2.GaussianBlur(warped(sample, f), (5, 5), 0) - target)[seen & valid].mean()
                for f in (flow, np.zeros_like(flow), -flow, flow[::-1], untransformed(sample))
            ]
        )
    assert len(errors) >= 12
    errors = np.mean(errors, axis=0)
    others = errors[1:] if recipe != "none" else errors[1:-1]
    assert errors[0] < 0.5 * others.min(), errors
    if recipe == "none":
        assert errors[-1] == pytest.approx(errors[0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_ids_still_fit_their_masks(clips, recipe):
    """A track's mask of the target, moved by the flow, covers its mask of the reference."""
    hits, others, tracks = 0, 0, 0
    for sample in train_samples(make_cfg(clips, recipe=recipe), 24):
        instances, reference = sample["instances"], sample["reference"]["instances"]
        assert instances.gt_ids.dtype == torch.int64
        of_reference = dict(zip(reference.gt_ids.tolist(), reference.gt_masks.tensor, strict=True))
        height, width = instances.image_size
        for track, mask in zip(instances.gt_ids.tolist(), instances.gt_masks.tensor, strict=True):
            if track not in of_reference:
                continue
            y, x = np.nonzero(mask.numpy() & sample["flow_valid"].numpy())
            flow = sample["flow"].numpy()[:, y, x]
            x, y = np.floor(x + 0.5 + flow[0]), np.floor(y + 0.5 + flow[1])
            inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
            x, y = x[inside].astype(int), y[inside].astype(int)
            if len(x) < 50:
                continue
            tracks += 1
            hits += of_reference[track].numpy()[y, x].mean()
            wrong = [m.numpy()[y, x].mean() for t, m in of_reference.items() if t != track]
            others += max(wrong, default=0)
    assert tracks > 30
    assert hits / tracks > 0.85 and others / tracks < 0.1


def test_ids_are_those_of_the_annotations(clips):
    sample = train_samples(make_cfg(clips, recipe="none"), 1)[0]
    video = load_shapes_video(SHAPES)[sample["video_id"]]
    for one in (sample, sample["reference"]):
        annotations = video["frames"][one["frame"]]["annotations"]
        assert one["instances"].gt_ids.tolist() == [a["track_id"] for a in annotations]
        assert one["file_name"] == video["frames"][one["frame"]]["file_name"]


def test_references_are_uniform_and_inside_of_the_video(clips):
    cfg = make_cfg(clips, recipe="none", flow=False)
    mapper = build_mapper(cfg, is_train=True)
    frames = [f for v in load_shapes_video(SHAPES) for f in v["frames"]]
    frames = [{**f, "video_length": 12} for f in frames]
    mapper.samples(frames, [clips])
    assert not hasattr(mapper, "frames")

    def offsets(number, count=400):
        with sample_randomness(0, number):
            drawn = [mapper._draw_reference(frames[number]) for _ in range(count)]
        assert all(d is None or d["video_id"] == frames[number]["video_id"] for d in drawn)
        return Counter(0 if d is None else d["frame"] - frames[number]["frame"] for d in drawn)

    assert offsets(12) == {0: 400}  # the first frame of the second clip: itself
    assert offsets(13) == {-1: 400}
    assert set(offsets(15)) == {-3, -2}
    counts = offsets(20)
    assert set(counts) == {-5, -4, -3, -2} and min(counts.values()) > 70
    mapper.reference_offsets = (-1, 1)
    assert set(offsets(12)) == {0, 1} and set(offsets(23)) == {-1, 0}
    mapper.reference_offsets = (3, 3)
    assert offsets(22) == {1: 400} and offsets(23) == {0: 400}


def test_annotated_references(register):
    """Every third frame is annotated: the neighbour among them, before or after, never itself."""
    videos = load_shapes_video(SHAPES)[:3]
    for video, kept in zip(videos, ({1, 4, 7, 10}, {5}, {0, 3}), strict=True):
        for frame in video["frames"]:
            if frame["frame"] not in kept:
                del frame["annotations"]
    videos[2]["frames"][3]["annotations"] = []  # annotated, without any object
    cfg = make_cfg(register(videos), flow=False)
    cfg.INPUT.VIDEO.REFERENCES = "annotated"
    cfg.INPUT.VIDEO.REFERENCE_OFFSETS = [-1, 1]
    cfg.SEED = 5
    seen = Counter()
    samples = train_samples(cfg, 80)
    for sample in samples:
        reference = sample["reference"]
        assert reference["video_id"] == sample["video_id"]
        assert len(reference["instances"].gt_ids) == len(reference["instances"])
        seen[sample["video_id"], sample["frame"], reference["frame"]] += 1
    assert set(seen) == {
        *((0, t, r) for t, r in ((1, 4), (4, 1), (4, 7), (7, 4), (7, 10), (10, 7))),
        *((1, 5, 5), (2, 0, 3)),  # one annotated frame: its own reference
    }
    assert min(seen.values()) > 2
    for sample, again in zip(samples[:20], train_samples(cfg, 20), strict=True):
        assert sample["reference"]["file_name"] == again["reference"]["file_name"]
    (later,) = train_samples(cfg, 41)[40:]
    batch = next(iter(build_train_loader(cfg, start_iter=20)))
    torch.testing.assert_close(batch[0]["reference"]["image"], later["reference"]["image"])
    cfg.INPUT.VIDEO.REFERENCE_OFFSETS = [2, 2]
    pairs = {(s["frame"], s["reference"]["frame"]) for s in train_samples(cfg, 40)}
    assert {(1, 7), (4, 10), (7, 10), (10, 10)} < pairs
    cfg.INPUT.VIDEO.REFERENCES = "labelled"
    with pytest.raises(ConfigError, match=r"REFERENCES is 'labelled'; known are"):
        build_mapper(cfg, is_train=True)


def test_one_annotated_frame_a_video_is_told(register, caplog):
    videos = load_shapes_video(SHAPES)[:2]
    for video in videos:
        for frame in video["frames"][1:]:
            del frame["annotations"]
    cfg = make_cfg(register(videos), flow=False)
    for references, told in (("any", False), ("annotated", True)):
        cfg.INPUT.VIDEO.REFERENCES = references
        caplog.clear()
        with caplog.at_level("WARNING"):
            train_samples(cfg, 2)
        assert ("so that nothing moves" in caplog.text) == told


def test_the_stream_does_not_depend_on_workers(clips):
    one, two = (train_samples(make_cfg(clips, workers=workers), 6) for workers in (0, 2))
    for a, b in zip(one, two, strict=True):
        assert a["file_name"] == b["file_name"]
        assert a["reference"]["file_name"] == b["reference"]["file_name"]
        torch.testing.assert_close(a["reference"]["image"], b["reference"]["image"])
        torch.testing.assert_close(a["flow"], b["flow"])
    later = next(iter(build_train_loader(make_cfg(clips), start_iter=2)))
    torch.testing.assert_close(later[1]["reference"]["image"], one[5]["reference"]["image"])


def test_images_are_videos_of_one_frame(register, clips):
    images = DatasetCatalog.get("shapes_val_rle")[:6]
    name = register(images)
    for sample in train_samples(make_cfg(name, clips, flow=True), 12):
        if "video_id" in sample:
            continue
        assert sample["reference"]["image"] is sample["image"] and sample["reference"]["frame"] == 0
        assert (sample["flow"] == 0).all() and sample["flow_valid"].any()
        ids = sample["instances"].gt_ids.tolist()
        assert len(set(ids)) == len(ids)


def test_an_image_that_a_video_has_too(register, clips):
    frame = load_shapes_video(SHAPES)[0]["frames"][0]
    image = {k: frame[k] for k in ("file_name", "height", "width", "image_id", "annotations")}
    for sample in train_samples(make_cfg(register([image]), clips, flow=False), 200):
        if "video_id" not in sample:
            assert sample["reference"]["image"] is sample["image"]
            break
    else:
        pytest.fail("The image was left out.")


@pytest.mark.parametrize("flow", [False, True])
def test_images_alone_are_told(register, clips, flow, caplog):
    name = register(DatasetCatalog.get("shapes_val_rle")[:2])
    for names, told in (((name,), True), ((name, clips), False)):
        caplog.clear()
        with caplog.at_level("WARNING"):
            train_samples(make_cfg(*names, flow=flow), 2)
        assert ("so that nothing moves" in caplog.text) == told


def test_clips_of_one_frame(register):
    frames = load_shapes_video(SHAPES)[0]["frames"][:2]
    name = register([video_record(i, [frame]) for i, frame in enumerate(frames)])
    for sample in train_samples(make_cfg(name), 4):
        assert sample["frame"] == sample["reference"]["frame"] == 0
        assert (sample["flow"] == 0).all()
        assert (sample["reference"]["instances"].gt_ids == sample["instances"].gt_ids).all()


def test_a_reference_need_not_be_annotated(register):
    videos = load_shapes_video(SHAPES)
    for video in videos:
        for frame in video["frames"][:-1]:
            del frame["annotations"]
    samples = train_samples(make_cfg(register(videos)), 6)
    assert {s["frame"] for s in samples} == {11}
    assert all(s["reference"]["frame"] in range(6, 10) for s in samples)
    assert all("instances" in s and "instances" not in s["reference"] for s in samples)


def test_panoptic_clips(register):
    cfg = make_cfg("shapes_train_video_panoptic", recipe="ssd", flow=False)
    cfg.INPUT.MASK_FORMAT = "polygon"
    cfg.INPUT.SEM_SEG_WITH_THINGS = True
    cfg.INPUT.VIDEO.REFERENCE_OFFSETS = [-5, -4]
    references = []
    for sample in train_samples(cfg, 12):
        assert sample["sem_seg"].shape == sample["image"].shape[1:]
        references.append("sem_seg" in sample["reference"])
        assert references[-1] == ("instances" in sample["reference"])
    assert set(references) == {True, False}
    cfg.INPUT.VIDEO.REFERENCE_OFFSETS = [-1, 1]
    cfg.INPUT.VIDEO.REFERENCES = "annotated"
    hits = []
    for sample in train_samples(cfg, 12):
        reference = sample["reference"]
        assert abs(sample["frame"] - reference["frame"]) == 5
        for one in (sample, reference):
            assert one["sem_seg"].shape == one["image"].shape[1:]
            assert len(one["instances"].gt_ids) == len(one["instances"])
            masks = one["instances"].gt_masks
            masks = BitMasks.from_polygon_masks(masks, *one["sem_seg"].shape).tensor
            for mask, category in zip(masks, one["instances"].gt_classes, strict=True):
                if mask.sum() > 50:  # 6 classes of stuff come first
                    hits.append((one["sem_seg"][mask] == 6 + category).float().mean())
    assert len(hits) > 30 and np.mean(hits) > 0.9


def test_flow_that_is_not_there(register):
    videos = load_shapes_video(SHAPES)
    for video in videos:
        for frame in video["frames"]:
            if video["video_id"] > 0:
                del frame["flow_file_name"]
    for sample in train_samples(make_cfg(register(videos)), 12):
        if sample["video_id"] > 0 and sample["reference"]["frame"] != sample["frame"]:
            assert not sample["flow_valid"].any() and (sample["flow"] == 0).all()
    none = register(videos[1:])
    with pytest.raises(DatasetError, match=r"no frame of .* has optical flow"):
        build_train_loader(make_cfg(none))


def test_frames_of_different_sizes(register):
    """A reference has the target's size; where the video has no such frame, the target is its own."""
    small, large = (load_shapes_video(VideoSet("train", 1, s, s, length=4))[0] for s in (64, 96))
    others = [{**f, "image_id": 10 + i} for i, f in enumerate(large["frames"][:2])]
    frames = [*small["frames"], *others]
    name = register([video_record(0, [{**f, "video_id": 0} for f in frames])])
    cfg = make_cfg(name, recipe="none", flow=False)
    cfg.INPUT.VIDEO.REFERENCE_OFFSETS = [-3, -1]
    seen = set()
    for sample in train_samples(cfg, 24):
        assert sample["image"].shape == sample["reference"]["image"].shape
        seen.add((sample["frame"], sample["reference"]["frame"]))
    assert {r for t, r in seen if t == 4} == {4} and {r for t, r in seen if t == 5} == {4}


@pytest.mark.parametrize("references", ["any", "annotated"])
def test_a_reference_that_cannot_be_read_is_reported(register, tmp_path, references):
    """Once, whatever number of samples it would belong to."""
    videos = load_shapes_video(SHAPES)
    broken = videos[0]["frames"][3:5]
    for frame in broken:
        frame["file_name"] = str(tmp_path / f"{frame['image_id']}.jpg")
    cfg = make_cfg(register(videos), flow=False)
    cfg.INPUT.VIDEO.REFERENCES = references
    loader = build_train_loader(cfg)
    samples = [s for batch in itertools.islice(loader, 100) for s in batch]
    used = {s[k]["file_name"] if k else s["file_name"] for s in samples for k in ("", "reference")}
    assert not used & {f["file_name"] for f in broken}
    assert loader.bad_samples.keys() == {f["file_name"] for f in broken}
    assert all("no such file" in bad.reason for bad in loader.bad_samples.values())
    assert len({s["frame"] for s in samples if s["video_id"] == 0}) >= 8


def test_in_a_test_frames_are_single(clips):
    cfg = make_cfg(clips)
    batch = next(iter(build_test_loader(cfg, clips)))
    assert "reference" not in batch[0] and batch[0]["is_first"] is True


def test_offsets_in_the_wrong_order(clips):
    cfg = make_cfg(clips)
    cfg.INPUT.VIDEO.REFERENCE_OFFSETS = [2, -2]
    with pytest.raises(ConfigError, match="REFERENCE_OFFSETS"):
        build_mapper(cfg, is_train=True)


def test_flow_pairs():
    cfg = make_cfg("shapes_train_flow", mapper="FlowPairMapper")
    cfg.INPUT.AUGMENTATION.EXPAND_PROB = 0.0
    errors = []
    for sample in train_samples(cfg, 12):
        target = sample["image"].permute(1, 2, 0).numpy()
        flow, valid = sample["flow"].numpy(), sample["flow_valid"].numpy()
        errors.append(
            [np.abs(warped(sample, f) - target)[valid].mean() for f in (flow, 0 * flow, -flow)]
        )
    errors = np.mean(errors, axis=0)
    assert errors[0] < 0.7 * errors[1:].min(), errors


def test_the_real_pair(register, real_data):
    folder = real_data / "flow/RubberWhale"
    record = {
        "file_name": str(folder / "frame10.png"),
        "image_id": 0,
        "reference": {"file_name": str(folder / "frame11.png")},
        "flow_file_name": str(folder / "flow10.flo"),
    }
    cfg = make_cfg(register([record]), mapper="FlowPairMapper", recipe="none")
    sample = train_samples(cfg, 1)[0]
    assert sample["image"].dtype == torch.uint8 and sample["flow_valid"].float().mean() > 0.98
    target = sample["image"].permute(1, 2, 0).numpy().astype(float)
    valid = sample["flow_valid"].numpy()
    right, none = (
        np.abs(warped(sample, f) - target)[valid].mean()
        for f in (sample["flow"].numpy(), np.zeros((2, 388, 584), np.float32))
    )
    assert right < 0.5 * none


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.pop("flow_file_name"), "no flow_file_name"),
        (lambda r: r.pop("reference"), "no reference"),
        (lambda r: r["reference"].update(file_name="none.png"), "no such file"),
    ],
)
def test_broken_pairs(change, message):
    record = load_shapes_flow(SHAPES)[0]
    change(record)
    mapper = build_mapper(make_cfg("shapes_train_flow", mapper="FlowPairMapper"), is_train=True)
    with pytest.raises(SampleError, match=message):
        mapper(record)


def test_pairs_of_different_sizes(tmp_path):
    mapper = build_mapper(make_cfg("shapes_train_flow", mapper="FlowPairMapper"), is_train=True)
    record = load_shapes_flow(SHAPES)[0]
    Image.new("RGB", (50, 40)).save(tmp_path / "small.png")
    record["reference"] = {"file_name": str(Path(tmp_path) / "small.png")}
    with pytest.raises(AnnotationError, match=r"small\.png"):
        mapper(record)
    record = load_shapes_flow(SHAPES)[0]
    record["flow_file_name"] = load_shapes_flow(VideoSet("train", 1, 64, 64))[0]["flow_file_name"]
    with pytest.raises(AnnotationError, match="optical flow of"):
        mapper(record)


def test_frames_of_a_test_have_the_flow_to_the_frame_before(clips):
    """In pixels of the resized image; the first one has none, and an image is a first one."""
    cfg = make_cfg(recipe="default")
    cfg.INPUT.MIN_SIZE_TEST = 64  # half the size
    mapper = build_mapper(cfg, is_train=False)
    frames = flatten(DatasetCatalog.get(clips))[:2]
    first, second = map(mapper, frames)
    assert first["flow"].shape == (2, 64, 80)
    assert not first["flow"].any()
    flow = read_flow(frames[1]["flow_file_name"].format(frame=0)).transpose(2, 0, 1)
    expected = flow[:, 1::2, 1::2] / 2
    np.testing.assert_allclose(second["flow"], expected, atol=1e-5)
    assert second["flow_valid"].all() and np.abs(flow).max() > 1
    assert "flow" not in build_mapper(make_cfg(flow=False), is_train=False)(frames[1])
    alone = {k: v for k, v in frames[1].items() if k not in ("frame", "flow_file_name")}
    assert not mapper(alone)["flow"].any()
    unknown = {k: v for k, v in frames[1].items() if k != "flow_file_name"}
    assert "flow" not in mapper(unknown)
