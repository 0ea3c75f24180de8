"""The way of a user: files, training in stages, evaluation, prediction, each by its command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.utils.events import get_event_storage

from d2ext.checkpoint.io import load_untrusted
from d2ext.data import custom
from d2ext.data.shapes.__main__ import main as export
from d2ext.data.summary import forget
from d2ext.engine.predictor import BatchPredictor
from d2ext.engine.video_predictor import VideoPredictor
from d2ext.systems.yolact_edge.model import YolactEdge
from d2ext.testing import tiny_config
from d2ext.tools import predict, train
from d2ext.utils.video import VideoReader
from tests.engine import toy

NAME = "test_edge_path"
Train = Callable[..., Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of shapes in YouTube-VIS's form."""
    folder = tmp_path_factory.mktemp("clips")
    for split, num in (("train", "3"), ("val", "2")):
        arguments = ["--split", split, "--num", num, "--length", "7", "--size", "64"]
        assert export([str(folder), "--video", *arguments]) == 0
    return folder


@pytest.fixture(autouse=True)
def unregistered() -> Iterator[None]:
    yield
    custom._registered.pop(NAME, None)
    for name in (f"{NAME}_train", f"{NAME}_val"):
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
        forget(name)


def dataset(folder: Path, splits: tuple[str, ...] = ("train", "val")) -> list[str]:
    words: list[object] = ["--dataset", NAME]
    for split in splits:
        words += [f"--{split}-video-json", folder / f"annotations/video_{split}.json"]
        words += [f"--{split}-images", folder / f"video_{split}/frames"]
    return [str(word) for word in words]


def write_config(path: Path, num_classes: int | None = None) -> Path:
    cfg = tiny_config("YolactEdge")
    cfg.SEED = 3
    cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER, cfg.SOLVER.LOG_PERIOD = (), 4, 1
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS = 1e-3, 0
    cfg.DATASETS.TEST = ()
    if num_classes is not None:
        cfg.MODEL.YOLACT.NUM_CLASSES = num_classes
    path.write_text(cfg.dump())
    return path


@pytest.fixture
def run(files: Path, tmp_path: Path) -> Train:
    """``run(OUTPUT, KEY, value, ...)``: a training on the clips; the folder that it wrote."""
    config = write_config(tmp_path / "tiny.yaml")

    def start(
        output: str,
        *options: object,
        words: list[str] | None = None,
        extra: tuple[str, ...] = (),
        expected: int = 0,
    ) -> Path:
        words = dataset(files) if words is None else words
        arguments = ["--config-file", config, *words, *extra, "OUTPUT_DIR", tmp_path / output]
        assert train.run([str(x) for x in (*arguments, *options)]) == expected
        return tmp_path / output

    return start


IMAGE = ("MODEL.YOLACT_EDGE.STAGE", "image", "DATASETS.TEST", "()")
VIDEO = ("INPUT.MAPPER", "ClipMapper", "DATASETS.TEST", "()")
JOINT = (*VIDEO, "DATASETS.TRAIN_JOINT", "('shapes_train',)")


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_untrusted(str(output / "model_final.pth"))["model"]


def changed(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    """First word of the names of the parameters that differ or are new."""
    return {k.split(".")[0] for k in b if k not in a or not torch.equal(a[k], b[k])}


def test_files_to_tracks(run: Train, files: Path, tmp_path: Path) -> None:
    """The three stages, evaluation with a tracker, prediction with ids."""
    pytest.importorskip("norfair", reason="needs norfair-enough")
    image = run("image", *IMAGE)
    start = ("MODEL.WEIGHTS", image / "model_final.pth")
    flow = run(
        "flow",
        *("MODEL.YOLACT_EDGE.STAGE", "flow", "INPUT.MAPPER", "FlowPairMapper", *start),
        *("DATASETS.TRAIN", "('shapes_train_flow',)", "DATASETS.TEST", "()"),
    )
    assert changed(weights(image), weights(flow)) == {"flow_net", "refinement"}
    start = ("MODEL.WEIGHTS", flow / "model_final.pth")
    tracker = ("TEST.TRACKER", "NorfairTracker", "TEST.TRACKER_MIN_SCORE", 0.0)
    video = run("video", *VIDEO, *start, *tracker, "DATASETS.TEST", f"('{NAME}_val',)")
    assert changed(weights(flow), weights(video)) >= {"flow_net", "refinement", "head"}
    steps = {name.split("/")[0] for name in toy.metrics(video)[0] if "/" in name}
    assert steps == {"full", "carried"}

    results = json.loads((video / "results.json").read_text())
    assert set(results) == {"bbox", "segm", "segm_track"}
    assert results["segm"].keys() >= {"AP", *(f"AP-d{i}" for i in range(5))}
    assert "AP" in results["segm_track"]
    tracks = json.loads((video / "inference/results.json").read_text())
    assert tracks and all(len(track["segmentations"]) == 7 for track in tracks)

    folder = sorted((files / "video_val/frames").iterdir())[0]
    arguments = ["--config-file", video / "config.yaml", "--video-input", folder, "--video-results"]
    arguments += ["--output", tmp_path / "out", "--tracker", "NorfairTracker"]
    arguments += ["--confidence-threshold", "0", "--opts", "MODEL.WEIGHTS"]
    assert predict.run([str(x) for x in (*arguments, video / "model_final.pth")]) == 0
    tracks = json.loads((tmp_path / f"out/{folder.name}_ytvis_results.json").read_text())
    assert tracks and {len(track["segmentations"]) for track in tracks} == {7}
    assert len([x.image for x in VideoReader(tmp_path / f"out/{folder.name}.mp4")]) == 7


@pytest.mark.parametrize(
    "options",
    [(*IMAGE, *JOINT[-2:]), JOINT],
    ids=["image", "video"],
)
def test_resumed_training_is_the_same(
    run: Train, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    period = ("SOLVER.CHECKPOINT_PERIOD", 2)
    whole = run("whole", *options, *period)
    train_step = YolactEdge.forward

    def interrupted(self: YolactEdge, *args: Any, **kwargs: Any) -> Any:
        if get_event_storage().iter == 3:
            raise toy.Killed
        return train_step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(toy.Killed):
        patch.setattr(YolactEdge, "forward", interrupted)
        run("parts", *options, *period)
    parts = run("parts", *options, *period, extra=("--resume",))
    assert not changed(weights(whole), weights(parts))
    assert toy.metrics(whole) == toy.metrics(parts)


def test_two_processes_train_and_evaluate_as_one(run: Train) -> None:
    """Each has one image of a step, as each micro-batch; FIND_UNUSED_PARAMETERS is not set."""
    one = run("one", *JOINT, "SOLVER.ACCUMULATION_STEPS", 2)
    # Evaluates in the middle of the training, too.
    test = ("DATASETS.TEST", f"('{NAME}_val',)", "TEST.EVAL_PERIOD", 2)
    two = run("two", *JOINT, *test, extra=("--num-gpus", "2"))
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=name)
    alone = run(
        "alone", *JOINT, *test, "MODEL.WEIGHTS", two / "model_final.pth", extra=("--eval-only",)
    )
    results = [json.loads((x / "results.json").read_text()) for x in (two, alone)]
    np.testing.assert_equal(*results)


def test_mixed_precision_and_accumulation(run: Train) -> None:
    amp = ("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "bfloat16")
    start = ("MODEL.WEIGHTS", run("image", *IMAGE) / "model_final.pth")
    exact = toy.losses(run("exact", *JOINT, *start))
    rough = toy.losses(run("rough", *JOINT, *start, *amp, "SOLVER.ACCUMULATION_STEPS", 2))
    assert rough[0] == pytest.approx(exact[0], rel=0.2) and rough.keys() == exact.keys()


def test_weights_without_flow_net(run: Train, capsys: pytest.CaptureFixture[str]) -> None:
    image = run("image", *IMAGE)
    start = ("MODEL.WEIGHTS", image / "model_final.pth")
    run("video", *VIDEO, "SOLVER.MAX_ITER", 1, *start)
    assert "flow_net.reduce" in (image.parent / "video/log.txt").read_text()  # what is new
    run("evaluated", *start, extra=("--eval-only",), expected=2)
    assert "flow_net" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("DATASETS.TEST", "()"), 'set INPUT.MAPPER to "ClipMapper"'),
        ((*VIDEO, "MODEL.YOLACT_EDGE.STAGE", "flow"), "FlowPairMapper"),
        ((*JOINT, "MODEL.YOLACT_EDGE.STAGE", "flow"), "TRAIN_JOINT to ()"),
        ((*JOINT, "MODEL.META_ARCHITECTURE", "YOLACT"), "no step of this training of YOLACT"),
        ((*VIDEO, "MODEL.YOLACT.NUM_CLASSES", 3), "NUM_CLASSES to 8"),
        ((*VIDEO, "DATASETS.TRAIN_JOINT", "('coco_2017_val',)"), "their classes differ"),
    ],
)
def test_errors_before_the_first_iteration(
    run: Train, options: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = run("out", *options, expected=2)
    assert message in capsys.readouterr().err
    log = output / "log.txt"
    assert not log.exists() or "Starting training" not in log.read_text()


def write_broken(folder: Path) -> dict[str, Any]:
    """COCO with videos: one frame; frames of two sizes, without objects, an id of two classes, every
    fifth annotated; no object. Returns the content of the JSON."""
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": i, "name": name} for i, name in enumerate(("a", "b"), 1)],
    }
    boxes = {(1, 0): (1, 4), (2, 0): (1, 5), (2, 5): (1, 6), (2, 15): (2, 7)}
    for video, length in ((1, 1), (2, 16), (3, 3)):
        (folder / f"frames/{video}").mkdir(parents=True)
        for t in range(length):
            height, width = (48, 64) if t < 8 else (64, 48)
            number = len(content["images"]) + 1
            image = np.random.default_rng(number).integers(0, 90, (height, width, 3), np.uint8)
            entry = {"id": number, "file_name": f"{video}/{t:03}.png", "video_id": video}
            entry.update(frame_id=t, height=height, width=width, is_labeled=t % 5 == 0)
            content["images"].append(entry)
            if (video, t) in boxes:
                category, x = boxes[video, t]
                image[4:24, x : x + 20] = 200
                polygon = [x, 4, x + 20, 4, x + 20, 24, x, 24]
                content["annotations"].append(
                    {
                        **{
                            "id": len(content["annotations"]) + 1,
                            "image_id": number,
                            "track_id": 7,
                        },
                        **{"category_id": category, "bbox": [x, 4, 20, 20], "area": 400},
                        **{"iscrowd": 0, "segmentation": [polygon]},
                    }
                )
            assert cv2.imwrite(str(folder / "frames" / entry["file_name"]), image)
    return content


def broken(folder: Path, content: dict[str, Any]) -> list[str]:
    """Words that name the content as both parts of the data set."""
    file = folder / "videos.json"
    file.write_text(json.dumps(content))
    words = ["--dataset", NAME]
    for split in ("train", "val"):
        words += [f"--{split}-video-json", str(file), f"--{split}-images", str(folder / "frames")]
    return words


TRACKED = ("TEST.TRACKER", "NorfairTracker", "TEST.TRACKER_MIN_SCORE", 0.0)
TEST = ("INPUT.MAPPER", "ClipMapper", "DATASETS.TEST", f"('{NAME}_val',)", *TRACKED)


@pytest.mark.parametrize(
    "kind", ["two classes", "one class", "nothing detected", "key frames alone"]
)
def test_videos_as_they_come(run: Train, tmp_path: Path, kind: str) -> None:
    """Numbers of the masks: of every distance, although a pass sees each annotated frame at one."""
    pytest.importorskip("norfair", reason="needs norfair-enough")
    content = write_broken(tmp_path)
    options: tuple[object, ...] = ("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    distances = {f"AP-d{i}" for i in range(5)}
    if kind == "one class":
        del content["categories"][1:]
        content["annotations"] = content["annotations"][:3]
    elif kind == "nothing detected":
        options += ("MODEL.YOLACT.TEST.SCORE_THRESH", 1.1)
    elif kind == "key frames alone":
        options += ("MODEL.YOLACT_EDGE.KEY_INTERVAL", 1)
        distances = {"AP-d0"}
    phases = ("MODEL.YOLACT_EDGE.TEST_ALL_PHASES", True)
    output = run("out", *TEST, *options, *phases, words=broken(tmp_path, content))
    assert np.isfinite(list(toy.losses(output).values())).all()
    results = json.loads((output / "results.json").read_text())
    for task in ("bbox", "segm"):
        found = results[task]
        assert {key for key in found if key.startswith("AP-d")} == distances
        assert np.isfinite([found[key] for key in ("AP", *distances)]).all()
    assert np.isfinite(results["segm_track"]["AP"])
    assert len(results["segm_track"]) > 12 and ("AP-b" in results["segm"]) == (kind != "one class")


def test_videos_without_masks_or_annotations(
    run: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("norfair", reason="needs norfair-enough")
    content = write_broken(tmp_path)
    image = run("image", *TEST, *IMAGE, words=broken(tmp_path, content))
    start = (*TEST, "MODEL.YOLACT_EDGE.STAGE", "image", "MODEL.WEIGHTS", image / "model_final.pth")
    names = [f"3/{t:03}.png" for t in range(3)]
    nothing = {key: [None] * 3 for key in ("segmentations", "bboxes", "areas")}
    track = {"id": 1, "video_id": 3, "category_id": 1, "iscrowd": 0, **nothing}
    videos = [{"id": 3, "file_names": names, "height": 48, "width": 64, "length": 3}]
    content = {"videos": videos, "categories": content["categories"], "annotations": [track]}

    def evaluate(output: str) -> Path:
        custom._registered.pop(NAME)
        for name in (f"{NAME}_train", f"{NAME}_val"):
            DatasetCatalog.remove(name)
            MetadataCatalog.pop(name)
            forget(name)
        words = broken(tmp_path, content)
        return run(output, *start, words=words, extra=("--eval-only",))

    output = evaluate("null")
    results = json.loads((output / "results.json").read_text())
    assert np.isnan(results["segm"]["AP"])  # not 0: there is no object to find
    del content["annotations"]  # the public form of validation sets
    output = evaluate("public")
    assert not (output / "results.json").exists()
    tracks = json.loads((output / "inference/results.json").read_text())
    assert tracks and all(len(track["segmentations"]) == 3 for track in tracks)
    assert (
        "has no annotations: there is nothing to compare with" in (output / "log.txt").read_text()
    )
    run("trained", *start, words=broken(tmp_path, content), expected=2)
    assert "is annotated" in capsys.readouterr().err


def test_unrelated_images_and_a_truncated_video(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A video model on images is one of single images; of a video what can be read counts."""
    cfg = tiny_config("YolactEdge")
    torch.manual_seed(0)
    predictor = BatchPredictor(cfg)
    torch.save(predictor.model.state_dict(), tmp_path / "model.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    random = np.random.default_rng(0)
    sizes = ((40, 80), (64, 64), (100, 30), (48, 64))
    images = [random.integers(0, 255, (*size, 3), np.uint8) for size in sizes]
    alone = [BatchPredictor(cfg)([image])[0]["instances"] for image in images]
    together = [x["instances"] for x in predictor(images)]
    detectron2 = DefaultPredictor(cfg)
    video = VideoPredictor(cfg)
    for i, (image, size) in enumerate(zip(images, sizes, strict=True)):
        for found in (together[i], detectron2(image)["instances"]):
            torch.testing.assert_close(found.scores, alone[i].scores, rtol=1e-4, atol=1e-5)
        assert video(image)["instances"].image_size == size  # who forgets reset() gets its frame
        video.reset()
        torch.testing.assert_close(video(image)["instances"].scores, alone[i].scores)

    (tmp_path / "tiny.yaml").write_text(cfg.dump())
    (tmp_path / "images").mkdir()
    for i, image in enumerate(images):
        assert cv2.imwrite(str(tmp_path / f"images/{i}.png"), image)

    def run(*arguments: object) -> int:
        common = ("--config-file", tmp_path / "tiny.yaml", "--output", tmp_path / "out")
        return predict.run([str(x) for x in (*common, "--confidence-threshold", 0, *arguments)])

    assert run("--input", tmp_path / "images", "--batch-size", 3) == 0
    results = json.loads((tmp_path / "out/coco_results.json").read_text())
    counts = [sum(x["image_id"] == i for x in results) for i in range(4)]
    assert counts == [len(x) for x in alone]

    file = tmp_path / "whole.avi"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"MJPG"), 25, (64, 48))
    for _ in range(20):
        writer.write(random.integers(0, 255, (48, 64, 3), np.uint8))
    writer.release()
    (tmp_path / "half.avi").write_bytes(file.read_bytes()[: int(0.6 * file.stat().st_size)])
    capsys.readouterr()
    assert run("--video-input", tmp_path / "half.avi") == 1
    count = len([x.image for x in VideoReader(tmp_path / "out/half.mp4")])
    assert 5 < count < 20 and f"{count} were predicted on" in capsys.readouterr().err


def test_real_clips(run: Train, real_data: Path, tmp_path: Path) -> None:
    """DAVIS registered by one command and evaluated with random weights; a real video with ids."""
    pytest.importorskip("norfair", reason="needs norfair-enough")
    davis, clip = real_data / "video/davis", real_data / "video/carphone_pristine.mp4"
    if not (davis / "ytvis.json").is_file() or not clip.is_file():
        pytest.skip("no video/davis or carphone_pristine.mp4")
    words = ["--dataset", NAME, "--val-video-json", str(davis / "ytvis.json")]
    words += ["--val-images", str(davis)]
    output = run("davis", *TEST, words=words, extra=("--eval-only",))
    results = json.loads((output / "results.json").read_text())
    assert results["segm"].keys() >= {"AP", "AP-car", "AP-dog", "AP-d0", "AP-d4"}
    assert np.isfinite(results["segm_track"]["AP"])
    tracks = json.loads((output / "inference/results.json").read_text())
    assert {len(track["segmentations"]) for track in tracks} == {40, 49}

    arguments = ("--config-file", tmp_path / "tiny.yaml", "--video-input", clip, "--max-frames", 12)
    options = ("--tracker", "NorfairTracker", "--video-results", "--confidence-threshold", 0.1)
    where = ("--output", tmp_path / "out")
    assert predict.run([str(x) for x in (*arguments, *options, *where)]) == 0
    tracks = json.loads((tmp_path / "out/carphone_pristine_ytvis_results.json").read_text())
    assert tracks and {len(track["segmentations"]) for track in tracks} == {12}
