"""`d2ext predict` with models that look into boxes: of a file, of a detector, or the whole image."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from d2ext.config import load_config
from d2ext.data.image_io import read_image
from d2ext.engine.predictor import BatchPredictor
from d2ext.engine.top_down import BoxFile, Detector
from d2ext.testing import NUM_KEYPOINTS, tiny_config
from d2ext.tools import predict
from d2ext.utils.video import VideoReader, video_writer


def write_config(folder: Path, architecture: str, **options: object) -> str:
    cfg = tiny_config(architecture)
    cfg.merge_from_list([x for pair in options.items() for x in pair])
    cfg.MODEL.WEIGHTS = str(folder / f"{architecture}.pth")
    cfg.DATASETS.TEST, cfg.DATASETS.TRAIN = (), ()
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    (folder / f"{architecture}.yaml").write_text(cfg.dump())
    return str(folder / f"{architecture}.yaml")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny LandmarkNet with random weights, whose landmarks all have a score."""
    folder = tmp_path_factory.mktemp("landmarks")
    return write_config(folder, "LandmarkNet", **{"MODEL.LANDMARKS.HEAD": "RegressionHead"})


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_config(tmp_path_factory.mktemp("detector"), "YOLACT")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8), (80, 60))
    assert cv2.imwrite(str(tmp_path / "7.png"), image)
    return tmp_path / "7.png"


def run(config: str, output: Path, *arguments: object) -> int:
    return predict.run(["--config-file", config, "--output", str(output), *map(str, arguments)])


def write_boxes(path: Path, entries: object) -> Path:
    path.write_text(json.dumps(entries))
    return path


def test_boxes_of_a_file(config: str, picture: Path, tmp_path: Path) -> None:
    boxes = [[5, 6, 30, 40], [40, 10, 30, 30], [1, 1, 70, 50]]
    entries = [
        {"image_id": 7, "bbox": box, "score": score, "category_id": 1}
        for box, score in zip(boxes, (0.9, 0.6, 0.2), strict=True)
    ]
    entries.append({"image_id": 8, "bbox": [0, 0, 5, 5], "score": 1.0})
    file = write_boxes(tmp_path / "boxes.json", entries)
    out = tmp_path / "out"
    arguments = ("--input", picture, "--boxes", file, "--confidence-threshold", 0.1)
    assert run(config, out, *arguments) == 0
    found = json.loads((out / "coco_results.json").read_text())
    assert [x["bbox"] for x in found] == boxes[:2]
    assert [x["score"] for x in found] == pytest.approx([0.9, 0.6])
    # What the model itself says of these boxes; COCO counts pixels, so 0.5 less.
    image = read_image(str(picture))
    instances = Instances((60, 80))
    instances.pred_boxes = Boxes(torch.tensor([[5.0, 6.0, 35.0, 46.0], [40.0, 10.0, 70.0, 40.0]]))
    expected = BatchPredictor(load_config(config))([image], [instances])[0]["instances"]
    for x, points in zip(found, expected.pred_keypoints, strict=True):
        values = torch.tensor(x["keypoints"]).view(NUM_KEYPOINTS, 3)
        torch.testing.assert_close(values[:, :2], points[:, :2] - 0.5, atol=1e-3, rtol=0)
    drawn = cv2.imread(str(out / "7.png"))
    assert (drawn != cv2.imread(str(picture))).any()


def test_whole_image_without_boxes(config: str, picture: Path, tmp_path: Path) -> None:
    assert run(config, tmp_path / "out", "--input", picture) == 0
    found = json.loads((tmp_path / "out/coco_results.json").read_text())
    assert [x["bbox"] for x in found] == [[0, 0, 80, 60]]


def test_image_without_a_box_has_no_instance(config: str, picture: Path, tmp_path: Path) -> None:
    file = write_boxes(tmp_path / "boxes.json", [])
    assert run(config, tmp_path / "out", "--input", picture, "--boxes", file) == 0
    assert json.loads((tmp_path / "out/coco_results.json").read_text()) == []


def test_boxes_of_a_detector(config: str, detector: str, picture: Path, tmp_path: Path) -> None:
    image = read_image(str(picture))
    predictor = BatchPredictor(load_config(detector))
    everything = predictor([image])[0]["instances"]
    middle = float(everything.scores.median())
    options = ("--detector", detector, "--box-threshold", middle, "--confidence-threshold", 0)
    assert run(config, tmp_path / "out", "--input", picture, *options) == 0
    found = json.loads((tmp_path / "out/coco_results.json").read_text())
    keep = everything.scores >= middle
    assert 0 < len(found) == int(keep.sum()) < len(everything)
    boxes = torch.tensor([x["bbox"] for x in found])
    expected = everything.pred_boxes.tensor[keep]
    torch.testing.assert_close(boxes[:, :2] + boxes[:, 2:], expected[:, 2:])
    # A landmark's score is 1 with this head: what remains is the detector's.
    assert [x["score"] for x in found] == pytest.approx(everything.scores[keep].tolist())

    one = int(everything.pred_classes[0])
    chosen = Detector(predictor, 0.0, [one])([1], [image])[0]
    assert len(chosen) == int((everything.pred_classes == one).sum()) < len(everything)
    assert (chosen.scores[:-1] >= chosen.scores[1:]).all()


def test_video_with_a_detector(config: str, detector: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    movie = tmp_path / "in.mp4"
    with video_writer(movie, 25.0) as add:
        for _ in range(3):
            add(cv2.resize(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8), (64, 48)), None)
    options = ("--detector", detector, "--box-threshold", 0.0, "--batch-size", 2)
    assert run(config, tmp_path / "out.mp4", "--video-input", movie, *options) == 0
    assert len(list(VideoReader(tmp_path / "out.mp4"))) == 3
    file = write_boxes(tmp_path / "boxes.json", [{"image_id": 3, "bbox": [5, 6, 30, 40]}])
    options = ("--boxes", file, "--no-pictures")
    assert run(config, tmp_path / "two.mp4", "--video-input", movie, *options) == 0
    found = json.loads((tmp_path / "two_coco_results.json").read_text())
    assert [(x["image_id"], x["bbox"]) for x in found] == [(3, [5, 6, 30, 40])]


def test_boxes_follow_the_resized_image(picture: Path, tmp_path: Path) -> None:
    """With INPUT.MIN_SIZE_TEST the model sees another size; boxes and landmarks belong to the image."""
    cfg = load_config(write_config(tmp_path, "LandmarkNet"))
    instances = Instances((60, 80))
    instances.pred_boxes = Boxes(torch.tensor([[5.0, 6.0, 35.0, 46.0]]))
    image = read_image(str(picture))
    cfg.INPUT.MIN_SIZE_TEST = 120
    predictor = BatchPredictor(cfg)
    inputs = predictor.upload([image], [instances])[0]
    assert inputs["image"].shape[-2:] == inputs["instances"].image_size == (120, 160)
    assert inputs["instances"].pred_boxes.tensor.tolist() == [[10.0, 12.0, 70.0, 92.0]]
    assert instances.pred_boxes.tensor.tolist() == [[5.0, 6.0, 35.0, 46.0]]
    found = predictor([image], [instances])[0]["instances"]
    assert found.pred_boxes.tensor.tolist() == [[5.0, 6.0, 35.0, 46.0]]
    with pytest.raises(ValueError, match="zip"):
        predictor.upload([image, image], [instances])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ('{"a": 1}', "no list"),
        ('[{"image_id": 1, "bbox": [1, 2, 3]}]', "no detection"),
        ('[{"image_id": 1, "bbox": [1, 2, 3, "x"]}]', "no detection"),
        ('[{"bbox": [1, 2, 3, 4]}]', "no detection"),
        ("[5]", "no detection"),
    ],
)
def test_files_that_hold_no_boxes(
    config: str,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
    message: str,
) -> None:
    (tmp_path / "boxes.json").write_text(content)
    options = ("--input", picture, "--boxes", tmp_path / "boxes.json")
    assert run(config, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err


def test_detectors_that_are_not_there(
    config: str,
    detector: str,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for options, message in (
        (("--boxes", tmp_path / "none.json"), "none.json"),
        (("--detector", "no/such.yaml"), "no/such.yaml"),
        (("--detector", detector, "--detector-weights", "none.pth"), "none.pth"),
        (("--detector", detector, "--detector-classes", "unicorn"), "unicorn"),
    ):
        assert run(config, tmp_path / "out", "--input", picture, *options) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(config, tmp_path / "out", "--input", picture, "--detector-weights", "x.pth")
    assert "belong to --detector" in capsys.readouterr().err


def test_boxes_of_other_categories_are_not_looked_into(
    config: str, picture: Path, tmp_path: Path
) -> None:
    boxes = [{"image_id": 7, "bbox": [5, 6, 30, 40], "category_id": c} for c in (1, 35, 1)]
    file = write_boxes(tmp_path / "b.json", boxes)
    image = [np.zeros((50, 60, 3), np.uint8)]
    assert [len(BoxFile(str(file), 0, own)([7], image)[0]) for own in ({1: 0}, None)] == [2, 3]
    # COCO's people have category 1, as the names of the config's data set say.
    MetadataCatalog.get("tiny_people").thing_classes = ["person"]
    options = ("--boxes", file, "--no-pictures", "--confidence-threshold", 0)
    arguments = (config, tmp_path / "out", "--input", picture, *options, "--opts")
    assert run(*arguments, "DATASETS.TEST", "('tiny_people',)") == 0
    MetadataCatalog.pop("tiny_people")
    assert len(json.loads((tmp_path / "out/coco_results.json").read_text())) == 2


def test_entries_without_a_score(tmp_path: Path) -> None:
    file = write_boxes(tmp_path / "b.json", [{"image_id": 3, "bbox": [5, 6, 30, 40]}])
    found = BoxFile(str(file), 0.9)([3, 4], [np.zeros((50, 60, 3), np.uint8)] * 2)
    assert [len(x) for x in found] == [1, 0] and found[0].scores.tolist() == [1]
    assert found[0].image_size == (50, 60)
