"""`d2ext predict`: pictures, videos and COCO results; broken files are skipped and told."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image

from d2ext.config import load_config
from d2ext.data.image_io import read_image
from d2ext.data.saved_metadata import class_metadata
from d2ext.engine.predictor import BatchPredictor
from d2ext.testing import tiny_config
from d2ext.tools import predict, prediction_files
from d2ext.utils import drawing
from d2ext.utils.drawing import PictureDrawer, VideoDrawer, name_classes, select
from d2ext.utils.video import VideoReader, video_writer


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """File of a tiny YOLACT's config, with weights."""
    folder = tmp_path_factory.mktemp("model")
    cfg = tiny_config("YOLACT")
    cfg.MODEL.WEIGHTS = str(folder / "weights.pth")
    cfg.DATASETS.TEST, cfg.DATASETS.TRAIN = (), ()
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    (folder / "config.yaml").write_text(cfg.dump())
    return str(folder / "config.yaml")


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def write(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)
    return path


def run(config: str, output: Path, *arguments: object) -> int:
    return predict.run(["--config-file", config, "--output", str(output), *map(str, arguments)])


def results(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    found = json.loads((folder / "coco_results.json").read_text())
    return found, json.loads((folder / "coco_images.json").read_text())


# Images


def test_results_are_the_model_s(config: str, tmp_path: Path) -> None:
    sizes = [(40, 60), (64, 48), (30, 30)]
    files = [
        write(tmp_path / f"in/{i:03}.png", photograph(*s, seed=i)) for i, s in enumerate(sizes, 7)
    ]
    predictor = BatchPredictor(load_config(config))
    outputs = [predictor([read_image(str(file))])[0]["instances"] for file in files]
    middle = float(torch.cat([instances.scores for instances in outputs]).median()) + 1e-5
    threshold = ("--confidence-threshold", middle)
    assert run(config, tmp_path / "one", "--input", tmp_path / "in", *threshold) == 0
    batched = ("--batch-size", 2, "--no-pictures")
    assert run(config, tmp_path / "two", "--input", *files, *threshold, *batched) == 0
    assert sorted(x.name for x in (tmp_path / "two").iterdir()) == [
        "coco_images.json",
        "coco_results.json",
    ]
    found, images = results(tmp_path / "one")
    again, _ = results(tmp_path / "two")
    expected = 0
    for number, file, instances in zip(range(7, 10), files, outputs, strict=True):
        image = read_image(str(file))
        assert {"id": number, "file_name": str(file), "height": image.shape[0]}.items() <= (
            images["images"][number - 7].items()
        )
        picture = cv2.imread(str(tmp_path / "one" / file.name))
        assert picture.shape == image.shape
        mine = [x for x in found if x["image_id"] == number]
        keep = instances.scores >= middle
        assert len(mine) == int(keep.sum())
        assert (picture != image).any() == (len(mine) > 0)
        for result, k in zip(mine, keep.nonzero()[:, 0].tolist(), strict=True):
            assert result["score"] == pytest.approx(float(instances.scores[k]), abs=1e-6)
            assert result["category_id"] == int(instances.pred_classes[k])
            x1, y1, x2, y2 = instances.pred_boxes.tensor[k].tolist()
            assert result["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1])
            mask = mask_util.decode(result["segmentation"]).astype(bool)
            assert (mask == instances.pred_masks[k].numpy()).all()
        expected += len(mine)
    assert len(found) == len(again) == expected
    assert 0 < expected < sum(len(instances) for instances in outputs)
    for one, other in zip(found, again, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
        assert one["image_id"] == other["image_id"]


def test_all_kinds_of_images(config: str, tmp_path: Path) -> None:
    folder, image = tmp_path / "in", photograph(20, 30)
    write(folder / "colour.jpg", image)
    write(folder / "grey.png", image[:, :, 0])
    write(folder / "deep.png", image[:, :, 0].astype(np.uint16) * 257)
    write(folder / "alpha.png", cv2.cvtColor(image, cv2.COLOR_BGR2BGRA))
    Image.fromarray(image).quantize(8).save(folder / "palette.gif")
    write(folder / "sub/dot.png", image[:1, :1])
    write(folder / "sub/line.tif", np.tile(image[:1], (1, 170, 1))[:, :5000])
    (folder / "notes.txt").write_text("no image")
    assert run(config, tmp_path / "out", "--input", folder, "--batch-size", 3) == 0
    shapes = {
        str(path.relative_to(tmp_path / "out")): cv2.imread(str(path)).shape
        for path in (tmp_path / "out").rglob("*.*g")
    }
    assert shapes == {
        "colour.jpg": (20, 30, 3),
        "grey.png": (20, 30, 3),
        "deep.png": (20, 30, 3),
        "alpha.png": (20, 30, 3),
        "palette.gif.png": (20, 30, 3),
        "sub/dot.png": (1, 1, 3),
        "sub/line.tif.png": (1, 5000, 3),
    }


def test_broken_files_are_skipped(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [write(tmp_path / f"in/{name}.png", photograph(20, 30)) for name in "ab"]
    whole = good[0].read_bytes()
    bad = {
        "cut.png": whole[: len(whole) // 2],
        "empty.jpg": b"",
        "text.jpg": b"this is no image",
    }
    for name, content in bad.items():
        (tmp_path / "in" / name).write_bytes(content)
    missing = tmp_path / "missing.png"
    status = run(
        *(config, tmp_path / "out", "--input", tmp_path / "in", missing),
        *("--confidence-threshold", 0, "--batch-size", 2),
    )
    assert status == 1
    told = [x for x in capsys.readouterr().err.splitlines() if x.startswith("skipped:")]
    assert len(told) == 4
    for name in (*bad, "missing.png"):
        assert any(name in line for line in told), name
    found, images = results(tmp_path / "out")
    assert [Path(x["file_name"]).name for x in images["images"]] == ["a.png", "b.png"]
    assert {x["image_id"] for x in found} == {x["id"] for x in images["images"]}
    assert sorted(x.name for x in (tmp_path / "out").glob("*.*g")) == ["a.png", "b.png"]


@pytest.mark.parametrize("entry", ["nothing/*.png", "empty", "missing.png"])
def test_no_input_is_an_error(
    config: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    entry: str,
) -> None:
    (tmp_path / "empty").mkdir()
    assert run(config, tmp_path / "out", "--input", tmp_path / entry) == 2
    assert "No image found" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_above_the_threshold(config: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.png", photograph(20, 30))
    arguments = ("--input", file, "--confidence-threshold", 1.0)
    assert run(config, tmp_path / "out", *arguments) == 0
    found, images = results(tmp_path / "out")
    assert found == [] and len(images["images"]) == 1
    assert (cv2.imread(str(tmp_path / "out/a.png")) == cv2.imread(str(file))).all()


def test_tiles_of_a_large_image(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "in/1.png", photograph(64, 150))
    arguments = ("--input", file, "--confidence-threshold", 0.1)
    assert run(config, tmp_path / "out", *arguments, "--tile", 64, "--tile-overlap", 0.3) == 0
    found, images = results(tmp_path / "out")
    assert (images["images"][0]["width"], images["images"][0]["height"]) == (150, 64)
    assert found and max(x["bbox"][0] + x["bbox"][2] for x in found) > 128
    for result in found:
        assert result["segmentation"]["size"] == [64, 150]
        x, y, w, h = result["bbox"]
        left, top, width, height = mask_util.toBbox(result["segmentation"])
        # masks are cropped at a resolution of 4 pixels
        assert width == 0 or (x - 8 <= left and left + width <= x + w + 8)
        assert width == 0 or (y - 8 <= top and top + height <= y + h + 8)
    with pytest.raises(SystemExit):
        run(config, tmp_path / "out", *arguments, "--tile", 64, "--draw", "heatmaps")
    assert "--tile goes neither" in capsys.readouterr().err
    # Without them it may be that not all fits.
    monkeypatch.setattr(predict, "available_memory", lambda: 10_000)
    assert run(config, tmp_path / "out2", *arguments) == 1
    assert "150x64 pixels with up to" in (error := capsys.readouterr().err) and "--tile" in error


def test_large_images_are_drawn_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "_MAX_PIXELS", 10_000)
    mask = torch.zeros(1, 200, 301, dtype=torch.bool)
    mask[0, 20:60, 120:180] = True
    instances = Instances((200, 301))
    instances.pred_boxes = Boxes(torch.tensor([[120.0, 20, 180, 60]]))
    instances.pred_masks, instances.pred_classes = mask, torch.tensor([0])
    instances.scores = torch.tensor([0.9])
    drawer = PictureDrawer(Metadata(name="large", thing_classes=["thing"]))
    picture = drawer(np.zeros((200, 301, 3), np.uint8), {"instances": instances})
    assert picture.shape == (67, 101, 3)
    assert [bool(picture[y, x].max() > 30) for y, x in ((13, 50), (13, 30), (50, 50))] == [1, 0, 0]


def test_output_that_is_one_file(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [write(tmp_path / f"{name}.png", photograph(20, 30)) for name in "ab"]
    assert run(config, tmp_path / "new/picture.jpg", "--input", files[0]) == 0
    assert sorted(x.name for x in (tmp_path / "new").iterdir()) == [
        "picture.jpg",
        "picture_coco_images.json",
        "picture_coco_results.json",
    ]
    assert run(config, tmp_path / "two.jpg", "--input", *files) == 2
    assert "name a folder" in capsys.readouterr().err
    assert run(config, tmp_path, "--input", files[0]) == 2
    assert "overwrite" in capsys.readouterr().err


def test_wrong_config_and_weights_are_errors(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.png", photograph(20, 30))
    for options, message in (
        (("MODEL.NO_SUCH_KEY", 1), "NO_SUCH_KEY"),
        (("MODEL.WEIGHTS", tmp_path / "none.pth"), "none.pth"),
        (("MODEL.YOLACT.NUM_CLASSES", 4), "class count"),
    ):
        status = run(config, tmp_path / "out", "--input", file, "--opts", *options)
        assert status == 2
        assert message in capsys.readouterr().err
    assert run("no/such.yaml", tmp_path / "out", "--input", file) == 2


def test_full_disk_leaves_nothing_half_written(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.png", photograph(40, 60))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    try:
        status = run(
            *(config, tmp_path / "out", "--input", file, "--no-pictures"),
            *("--confidence-threshold", 0),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1
    assert "cannot write" in capsys.readouterr().err
    # the list of images was short enough; of the results there is nothing, not even a part
    assert [x.name for x in (tmp_path / "out").iterdir()] == ["coco_images.json"]


def test_names_of_pictures_never_collide() -> None:
    names = [
        Path(x) for x in ("a.png", "a.png", "A.PNG", "a_2.png", "b.tif", "b.tif.png", "s/a.png")
    ]
    unique = [str(x) for x in prediction_files.unique_names(names)]
    assert unique == [
        "a.png",
        "a_2.png",
        "A_3.PNG",
        "a_2_2.png",
        "b.tif.png",
        "b.tif_2.png",
        "s/a.png",
    ]


def test_image_ids() -> None:
    assert prediction_files.image_ids([Path("x/000139.jpg"), Path("000285.png")]) == [139, 285]
    assert prediction_files.image_ids([Path("1.jpg"), Path("1.png")]) == [1, 2]
    assert prediction_files.image_ids([Path("7.jpg"), Path("b.png")]) == [1, 2]


def test_class_names(config: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.png", photograph(20, 30))
    (tmp_path / "names.txt").write_text("cat\ndog\ncow\n\n")
    arguments = ("--input", file, "--confidence-threshold", 0)
    names = ("--class-names", tmp_path / "names.txt")
    assert run(config, tmp_path / "out", *arguments, *names) == 0
    found, images = results(tmp_path / "out")
    assert found and [x["name"] for x in images["categories"]] == ["cat", "dog", "cow"]


def test_names_of_another_model_are_an_error(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.png", photograph(20, 30))
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    names = ("--class-names", tmp_path / "names.txt")
    assert run(config, tmp_path / "out", "--input", file, *names) == 2
    assert "NUM_CLASSES is 3, but 'class names' has 2 names (cat, dog)" in capsys.readouterr().err
    coco = ("--opts", "DATASETS.TEST", "('coco_2017_val',)")
    assert run(config, tmp_path / "out", "--input", file, *coco) == 2
    assert "'coco_2017_val' has 80 names" in capsys.readouterr().err


def test_class_names_of_the_data_set(tmp_path: Path) -> None:
    cfg = tiny_config("YOLACT")
    cfg.MODEL.YOLACT.NUM_CLASSES = 80
    cfg.DATASETS.TEST = ("no_such_set", "coco_2017_val")
    metadata = class_metadata(cfg)
    assert metadata.thing_classes[:2] == ["person", "bicycle"]
    more = name_classes(metadata, torch.tensor([81]))
    assert more.thing_classes[79:] == ["toothbrush", "class 80", "class 81"]
    assert more.thing_colors == metadata.thing_colors
    # results carry the data set's own category ids
    with ExitStack() as stack:
        writer = prediction_files.ResultWriter(stack, tmp_path, metadata)
        instances = boxes([[1, 1, 5, 5]], [79], [0.5], size=(8, 8))
        writer.write(1, "x.png", (8, 8, 3), {"instances": instances})
    found, images = results(tmp_path)
    assert found[0]["category_id"] == 90
    assert images["categories"][79] == {"id": 90, "name": "toothbrush"}


# Drawing


def boxes(
    corners: list[list[float]], classes: list[int], scores: list[float], size: tuple[int, int]
) -> Instances:
    """Instances whose masks fill their boxes."""
    instances = Instances(size)
    instances.pred_boxes = Boxes(torch.tensor(corners, dtype=torch.float32).reshape(-1, 4))
    instances.scores = torch.tensor(scores)
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    masks = torch.zeros((len(corners), *size), dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, corners, strict=True):
        mask[int(y1) : int(y2), int(x1) : int(x2)] = True
    instances.pred_masks = masks
    return instances


def test_scores_of_masks_decide_where_there_are_some() -> None:
    instances = boxes([[0, 0, 4, 4]] * 3, [0, 1, 2], [0.9, 0.8, 0.7], size=(8, 8))
    assert select(instances, 0.75).pred_classes.tolist() == [0, 1]
    instances.mask_scores = torch.tensor([0.1, 0.4, 0.6])
    chosen = select(instances, 0.4)
    assert chosen.pred_classes.tolist() == [2, 1]
    assert chosen.scores.tolist() == pytest.approx([0.6, 0.4])
    assert not chosen.has("mask_scores") and instances.has("mask_scores")


def test_pictures_are_the_same_from_run_to_run() -> None:
    image = photograph(60, 80)
    instances = boxes([[5, 5, 30, 40], [40, 10, 75, 50]], [0, 1], [0.9, 0.8], size=(60, 80))
    drawn = []
    for seed in (1, 2):
        np.random.seed(seed)
        drawn.append(PictureDrawer(Metadata())(image, {"instances": instances}))
        # and the program's own random numbers go on as if nothing had been drawn
        assert np.random.randint(1 << 30) == np.random.RandomState(seed).randint(1 << 30)
    assert drawn[0].shape == image.shape and drawn[0].dtype == np.uint8
    assert (drawn[0] == drawn[1]).all()
    changed = (drawn[0] != image).any(axis=2)
    assert changed[10:35, 10:25].all() and changed[20:40, 45:70].all()


def test_ten_thousand_detections(tmp_path: Path) -> None:
    count = 10_000
    corners = [[i % 24, i // 24 % 24, i % 24 + 6, i // 24 % 24 + 6] for i in range(count)]
    instances = boxes(
        corners, [i % 3 for i in range(count)], [1 - i / count for i in range(count)], size=(32, 32)
    )
    image = photograph(32, 32)
    drawer = PictureDrawer(Metadata(), max_drawn=3)
    assert drawer(image, {"instances": instances}).shape == image.shape
    best = PictureDrawer(Metadata())(image, {"instances": instances[:3]})
    assert (drawer(image, {"instances": instances}) == best).all()
    with ExitStack() as stack:
        writer = prediction_files.ResultWriter(stack, tmp_path, Metadata())
        writer.write(1, "x.png", image.shape, {"instances": instances})
    assert len(results(tmp_path)[0]) == count


def test_panoptic_and_semantic_outputs_are_drawn() -> None:
    metadata = Metadata(
        thing_classes=["thing"],
        stuff_classes=["things", "stuff"],
        thing_colors=[(255, 0, 0)],
        stuff_colors=[(0, 0, 0), (0, 255, 0)],
        thing_dataset_id_to_contiguous_id={1: 0},
    )
    image = np.full((60, 80, 3), 128, dtype=np.uint8)
    segments = torch.zeros((60, 80), dtype=torch.int32)
    segments[:, :40], segments[:, 40:] = 1, 2
    info = [
        {"id": 1, "isthing": True, "category_id": 0},
        {"id": 2, "isthing": False, "category_id": 1},
    ]
    output = {"panoptic_seg": (segments, info)}
    for drawer in (PictureDrawer(metadata), VideoDrawer(metadata)):
        drawn = drawer(image, output)
        green = drawn[5:15, 50:75].reshape(-1, 3).mean(axis=0)
        assert green[1] > green[0] + 50 and green[1] > green[2] + 50
        assert (drawn[:, :40] != image[:, :40]).any(axis=2).mean() > 0.9
    semantic = torch.zeros((2, 60, 80))
    semantic[1, :, 40:] = 1
    drawn = PictureDrawer(metadata)(image, {"sem_seg": semantic})
    assert drawn[5:15, 50:75, 1].mean() > 160 > 100 > drawn[5:15, 5:30, 1].mean()


def test_an_object_keeps_its_colour_in_a_video() -> None:
    drawer = VideoDrawer(Metadata())
    image = np.full((60, 80, 3), 128, dtype=np.uint8)
    colors = []
    for shift in range(3):
        # a newcomer first, so that the order of the instances is no help
        corners = [[5 + shift, 5, 45 + shift, 55], [50, 5, 78, 55]][:: -1 if shift == 2 else 1]
        instances = boxes(corners, [0, 0], [0.9, 0.8], size=(60, 80))
        drawn = drawer(image, {"instances": instances})
        colors.append((drawn[50, 20].tolist(), drawn[50, 70].tolist()))
    assert colors[0] == colors[1] == colors[2]
    assert colors[0][0] != colors[0][1]
    assert drawer(image, {"instances": instances[:0]}).tolist() == image.tolist()


# Video


def write_movie(
    path: Path, frames: int, *, rate: float = 29.97, size: tuple[int, int] = (48, 63)
) -> Path:
    with video_writer(path, rate) as add:
        for i in range(frames):
            add(photograph(*size, seed=i), None)
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv"])
def test_video(config: str, tmp_path: Path, suffix: str) -> None:
    movie = write_movie(tmp_path / f"in{suffix}", 7, size=(48, 62))
    output = tmp_path / "out" / f"drawn{suffix}"
    arguments = ("--video-input", movie, "--batch-size", 3, "--confidence-threshold", 0.3)
    assert run(config, output, *arguments) == 0
    assert sorted(x.name for x in output.parent.iterdir()) == [
        f"drawn{suffix}",
        "drawn_coco_images.json",
        "drawn_coco_results.json",
    ]
    reader = VideoReader(output)
    assert reader.rate == pytest.approx(29.97, abs=0.05)
    frames = [frame.image for frame in reader]
    assert [frame.shape for frame in frames] == [(48, 62, 3)] * 7
    originals = [frame.image for frame in VideoReader(movie)]
    assert all(np.abs(a.astype(int) - b).mean() > 2 for a, b in zip(frames, originals, strict=True))
    images = json.loads((output.parent / "drawn_coco_images.json").read_text())["images"]
    assert [x["id"] for x in images] == list(range(1, 8))
    assert images[3]["file_name"] == f"{movie}#4"
    found = json.loads((output.parent / "drawn_coco_results.json").read_text())
    assert {x["image_id"] for x in found} == set(range(1, 8))


def test_first_frames_of_a_video(config: str, tmp_path: Path) -> None:
    movie = write_movie(tmp_path / "in.mp4", 6)
    assert run(config, tmp_path / "out", "--video-input", movie, "--max-frames", 2) == 0
    assert len(list(VideoReader(tmp_path / "out/in.mp4"))) == 2
    assert (tmp_path / "out/in_coco_results.json").is_file()
    assert run(config, tmp_path / "two", "--video-input", movie, "--no-pictures") == 0
    names = sorted(x.name for x in (tmp_path / "two").iterdir())
    assert names == ["in_coco_images.json", "in_coco_results.json"]


def test_truncated_video(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is there is predicted on; that the rest is missing is told."""
    movie = write_movie(tmp_path / "in.avi", 12)
    whole = movie.read_bytes()
    movie.write_bytes(whole[: len(whole) // 2])
    assert run(config, tmp_path / "out.mp4", "--video-input", movie) == 1
    assert "damaged or missing" in capsys.readouterr().err
    assert 0 < len(list(VideoReader(tmp_path / "out.mp4"))) < 12


def test_no_video(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("this is no video")
    for name in ("missing.mp4", "empty.mp4", "text.mp4"):
        assert run(config, tmp_path / "out", "--video-input", tmp_path / name) == 2
        assert name in capsys.readouterr().err
    movie = write_movie(tmp_path / "in.mp4", 2)
    for output, message in ((movie, "overwrite"), (tmp_path / "out.webm", ".mp4")):
        assert run(config, output, "--video-input", movie) == 2
        assert message in capsys.readouterr().err
    assert run(config, tmp_path / "out", "--webcam", 97) == 2
    assert "camera 97" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_video_that_does_not_fit_on_the_disk(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"out\.avi"):
            write_movie(tmp_path / "out.avi", 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_video_is_finished(
    config: str, tmp_path: Path, interrupt_at: Callable[[int], None]
) -> None:
    movie = write_movie(tmp_path / "in.mp4", 9)
    interrupt_at(4)
    assert run(config, tmp_path / "out.mp4", "--video-input", movie) == 0
    assert len(list(VideoReader(tmp_path / "out.mp4"))) == 3


def test_interrupted_images_keep_their_results(
    config: str,
    tmp_path: Path,
    interrupt_at: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for i in range(5):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((40, 50, 3), 50 * i, np.uint8))
    interrupt_at(3)
    out = tmp_path / "out"
    assert run(config, out, "--input", tmp_path / "*.png") == 1
    assert "skipped: 3 images, for it was interrupted" in capsys.readouterr().err
    images = json.loads((out / "coco_images.json").read_text())["images"]
    assert [Path(image["file_name"]).name for image in images] == ["0.png", "1.png"]
    assert isinstance(json.loads((out / "coco_results.json").read_text()), list)
    assert sorted(x.name for x in out.glob("*.png")) == ["0.png", "1.png"]
