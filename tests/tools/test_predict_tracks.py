"""`d2ext predict` on videos with ids: colours, results in YouTube-VIS's form, folders of frames."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from torch import nn

from d2ext.data.video.panoptic_results import read_map
from d2ext.testing import tiny_config
from d2ext.tools import predict
from d2ext.tools.prediction_files import TrackWriter
from d2ext.utils.drawing import VideoDrawer, draw_tracked_panoptic, track_color
from d2ext.utils.video import VideoReader
from tests.engine import toy_video

SIZE = 48, 64


@META_ARCH_REGISTRY.register()
class BrightSquares(nn.Module):
    """A detector without memory: the connected bright regions of an image, in an order of chance."""

    def __init__(self, cfg: Any = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"instances": self._find(x["image"][0].numpy() > 128)} for x in batched_inputs]

    def _find(self, image: np.ndarray) -> Instances:
        count, labels = cv2.connectedComponents(image.astype(np.uint8))
        order = 1 + np.random.permutation(count - 1)
        masks = torch.from_numpy(np.stack([labels == i for i in order] or [image]))
        masks = masks[: len(order)]
        found = Instances(image.shape)
        boxes = [
            [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            for ys, xs in (np.nonzero(mask.numpy()) for mask in masks)
        ]
        found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        found.pred_masks, found.pred_classes = masks, torch.zeros(len(masks), dtype=torch.int64)
        found.scores = torch.rand(len(masks)) / 10 + 0.9
        return found


@META_ARCH_REGISTRY.register()
class PanopticSquare(toy_video.ToyVideo):
    """Its square is thing 300 before a stuff class."""

    def step(self, inputs: Any, memory: Any) -> Any:
        outputs, memory = super().step(inputs, memory)
        for output in outputs:
            ids = 7 - output["instances"].pred_masks[0].long() * 3
            info: list[dict[str, Any]] = [
                {"id": 4, "category_id": 0, "isthing": True, "track_id": 300, "score": 0.75},
                {"id": 7, "category_id": 2, "isthing": False},
            ]
            output["panoptic_seg"] = ids, info
        return outputs, memory


@pytest.fixture
def config(tmp_path: Path) -> str:
    return write_config(tmp_path, "BrightSquares")


def write_config(folder: Path, architecture: str) -> str:
    cfg = tiny_config("YOLACT")
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.WEIGHTS = architecture, ""
    cfg.DATASETS.TEST, cfg.DATASETS.TRAIN = ("coco_2017_val",), ()
    (folder / f"{architecture}.yaml").write_text(cfg.dump())
    return str(folder / f"{architecture}.yaml")


def write_frames(folder: Path, count: int = 6) -> Path:
    """Two squares that move apart; the second is gone in frames 2 and 3."""
    folder.mkdir()
    for i in range(count):
        image = np.zeros((*SIZE, 3), np.uint8)
        image[4:16, 20 - i : 32 - i] = 255
        if i not in (2, 3):
            image[28:44, 30 + i : 46 + i] = 255
        assert cv2.imwrite(str(folder / f"{i:03}.png"), image)
    return folder


def run(config: str, output: Path, *arguments: object) -> int:
    return predict.run(["--config-file", config, "--output", str(output), *map(str, arguments)])


TRACKED = ("--tracker", "NorfairTracker", "--video-results")


@pytest.mark.parametrize("batch", [1, 4])
def test_folder_with_ids(config: str, tmp_path: Path, batch: int) -> None:
    pytest.importorskip("norfair", reason="needs norfair-enough")
    folder = write_frames(tmp_path / "frames")
    (folder / "notes.txt").write_text("no image")
    options = (*TRACKED, "--batch-size", batch)
    assert run(config, tmp_path / "out", "--video-input", folder, *options) == 0
    drawn = [x.image for x in VideoReader(tmp_path / "out/frames.mp4")]
    assert len(drawn) == 6 and VideoReader(tmp_path / "out/frames.mp4").rate == 25
    images = json.loads((tmp_path / "out/frames_coco_images.json").read_text())["images"]
    assert [x["file_name"] for x in images] == [str(folder / f"{i:03}.png") for i in range(6)]
    tracks = json.loads((tmp_path / "out/frames_ytvis_results.json").read_text())
    assert len(tracks) == 2
    upper, lower = sorted(tracks, key=lambda x: x["bboxes"][0][1])
    for track in tracks:
        assert track["video_id"] == 1 and track["category_id"] == 1  # COCO's id of a person
        assert 0.9 <= track["score"] <= 1 and track["track_id"] in (1, 2)
    assert upper["bboxes"] == [[20 - i, 4, 12, 12] for i in range(6)]
    expected = [None if i in (2, 3) else [30 + i, 28, 16, 16] for i in range(6)]
    assert lower["bboxes"] == expected
    for box, rle in zip(lower["bboxes"], lower["segmentations"], strict=True):
        assert (box is None) == (rle is None)
        if box is not None:
            assert rle["size"] == list(SIZE) and mask_util.toBbox(rle).tolist() == box
    found = json.loads((tmp_path / "out/frames_coco_results.json").read_text())
    ids = {(x["image_id"], x["bbox"][1]): x["track_id"] for x in found}
    assert {ids[n, 4] for n in range(1, 7)} == {upper["track_id"]}
    assert {ids[n, 28] for n in (1, 2, 5, 6)} == {lower["track_id"]}


def test_model_with_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, folder = (
        write_config(tmp_path, toy_video.ToyVideo.__name__),
        write_frames(tmp_path / "frames"),
    )
    assert run(config, tmp_path / "out", "--video-input", folder, "--video-results") == 0
    (track,) = json.loads((tmp_path / "out/frames_ytvis_results.json").read_text())
    assert track["track_id"] == 7 and [box[2] for box in track["bboxes"]] == [9, 10, 11, 12, 13, 14]
    remembers = "remembers the frames before"
    for message, *options in (
        ("gives ids itself", "--tracker", "NorfairTracker"),
        (remembers, "--tile", 32),
        (remembers, "--batch-size", 2),
    ):
        assert run(config, tmp_path / "two", "--video-input", folder, *options) == 2
        assert message in capsys.readouterr().err


def test_panoptic_model(tmp_path: Path) -> None:
    config = write_config(tmp_path, PanopticSquare.__name__)
    folder = write_frames(tmp_path / "frames", 3)
    options = ("--video-input", folder, "--video-results")
    assert run(config, tmp_path / "out", *options) == 0
    content = json.loads((tmp_path / "out/frames_panoptic_video.json").read_text())
    images = json.loads((tmp_path / "out/frames_coco_images.json").read_text())["images"]
    assert content["images"] == images
    names = {c["id"]: c["name"] for c in content["categories"]}
    square = set()
    for t, entry in enumerate(content["annotations"]):
        assert entry["image_id"] == t + 1
        ids = read_map(tmp_path / "out/frames_panoptic_video" / entry["file_name"])
        (thing,) = (s for s in entry["segments_info"] if "track_id" in s)
        assert (thing["track_id"], thing["score"], thing["area"]) == (300, 0.75, 8 * (9 + t))
        assert names[thing["category_id"]] == "person"
        assert (ids[:8, : 9 + t] == thing["id"]).all() and (ids == thing["id"]).sum() == thing[
            "area"
        ]
        square.add(thing["id"])
    assert len(square) == 1
    drawn = next(iter(VideoReader(tmp_path / "out/frames.mp4"))).image
    assert drawn[:8, :8].std() > 0 and drawn.shape[:2] == SIZE
    # Without --video-results, or of a model without panoptic maps, there is no such file.
    assert run(config, tmp_path / "two", *options[:2]) == 0
    config = write_config(tmp_path, toy_video.ToyVideo.__name__)
    assert run(config, tmp_path / "three", *options) == 0
    assert not list(tmp_path.glob("t*/*panoptic*"))


def test_wrong_options(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_frames(tmp_path / "frames", 1)
    (tmp_path / "empty").mkdir()
    for options, message in (
        ((folder, "--video-results"), "add --tracker"),
        ((folder, "--tracker", "x"), "NorfairTracker"),
        ((tmp_path / "empty",), "no image in the folder"),
    ):
        assert run(config, tmp_path / "out", "--video-input", *options) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(config, tmp_path / "out", "--input", folder, "--video-results")
    assert "for videos" in capsys.readouterr().err


def test_broken_frame_of_a_folder(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("norfair", reason="needs norfair-enough")
    folder = write_frames(tmp_path / "frames")
    whole = (folder / "004.png").read_bytes()
    (folder / "004.png").write_bytes(whole[: len(whole) // 2])
    assert run(config, tmp_path / "out", "--video-input", folder, *TRACKED) == 1
    assert "1 frames" in capsys.readouterr().err
    tracks = json.loads((tmp_path / "out/frames_ytvis_results.json").read_text())
    assert [len(x["bboxes"]) for x in tracks] == [5, 5]


def test_interrupted_video_has_its_tracks(
    config: str, tmp_path: Path, interrupt_at: Callable[[int], None]
) -> None:
    pytest.importorskip("norfair", reason="needs norfair-enough")
    interrupt_at(3)
    folder = write_frames(tmp_path / "frames")
    assert run(config, tmp_path / "out", "--video-input", folder, *TRACKED) == 0
    tracks = json.loads((tmp_path / "out/frames_ytvis_results.json").read_text())
    assert [len(x["bboxes"]) for x in tracks] == [2, 2]


def test_class_and_score_of_a_track(tmp_path: Path) -> None:
    metadata = Metadata(name="x", thing_dataset_id_to_contiguous_id={10: 0, 20: 1})
    writer = TrackWriter(tmp_path, metadata)
    for frame, (category, score) in enumerate([(0, 0.4), (1, 0.9), (0, 0.3)]):
        instances = Instances(SIZE, pred_boxes=Boxes(torch.tensor([[1.0, 2, 4, 8]] * 2)))
        instances.pred_classes = torch.tensor([category] * 2)
        instances.scores = torch.tensor([score] * 2)
        instances.track_ids = torch.tensor([5, -1])
        instances.pred_masks = torch.zeros((2, *SIZE), dtype=torch.bool)
        writer.add(2 * frame, instances)
    writer.write(6)
    (track,) = json.loads((tmp_path / "ytvis_results.json").read_text())
    assert track["category_id"] == 20 and track["score"] == pytest.approx(1.6 / 3)
    assert track["bboxes"] == [[1, 2, 3, 6], None] * 3 and track["segmentations"] == [None] * 6


def test_colour_is_that_of_the_id() -> None:
    image = np.full((180, 360, 3), 128, dtype=np.uint8)
    drawer = VideoDrawer(Metadata(name="x", thing_classes=["thing"]))

    def colors(ids: list[int]) -> list[list[int]]:
        """Of the middles of squares, from left to right."""
        instances = Instances((180, 360))
        corners = [[15 + 120 * i, 15, 105 + 120 * i, 165] for i in range(len(ids))]
        instances.pred_boxes = Boxes(torch.tensor(corners).float())
        instances.scores, instances.pred_classes = (
            torch.ones(len(ids)),
            torch.zeros(len(ids)).long(),
        )
        instances.pred_masks = torch.zeros((len(ids), 180, 360), dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(instances.pred_masks, corners, strict=True):
            mask[y1:y2, x1:x2] = True
        instances.track_ids = torch.tensor(ids)
        drawn = drawer(image, {"instances": instances})
        return [drawn[150, 60 + 120 * i].tolist() for i in range(len(ids))]

    first = colors([3, 4, -1])
    assert colors([4, -1, 3]) == [first[1], first[2], first[0]]
    assert all(max(x) - min(x) > 50 for x in first[:2]) and first[0] != first[1]
    assert max(first[2]) - min(first[2]) < 3
    assert len({track_color(i) for i in range(1, 200)}) == 199


def test_panoptic_colour_is_that_of_the_track() -> None:
    names = {"thing_classes": ["car"], "stuff_classes": ["things", "road"]}
    metadata = Metadata(name="x", **names, stuff_colors=[(0, 0, 0), (10, 200, 90)])
    image = np.full((60, 120, 3), 128, dtype=np.uint8)

    def draw(tracks: list[int]) -> np.ndarray:
        ids = np.full((60, 120), 9)
        for i in range(len(tracks)):
            ids[5:55, 5 + 60 * i : 55 + 60 * i] = i + 1
        info: list[dict[str, Any]] = [{"id": 9, "category_id": 1, "isthing": False}]
        for i, track in enumerate(tracks, 1):
            info.append({"id": i, "category_id": 0, "isthing": True, "track_id": track})
        drawer = VideoDrawer(metadata)
        return drawer(image, {"panoptic_seg": (torch.from_numpy(ids), info)})

    def color(picture: np.ndarray, place: int) -> list[int]:
        return picture[10, 10 + 60 * place].tolist()

    first, second = draw([3, 4]), draw([4, 3])
    assert color(first, 0) == color(second, 1) != color(first, 1) == color(second, 0)
    # 0.55 of the colour and 0.45 of the image.
    expected = [0.45 * 128 + 0.55 * 255 * c for c in reversed(track_color(3))]
    assert np.abs(np.array(color(first, 0)) - expected).max() < 2
    assert np.abs(first[2, 2] - np.array([0.45 * 128 + 0.55 * c for c in (90, 200, 10)])).max() < 2
    # The number stands in the middle of the thing.
    assert (first[20:40, 5:55] != draw([11, 4])[20:40, 5:55]).any()
    assert (first[20:40, 15:45] > 230).all(axis=2).any()
    assert not (first[41:54, 8:52] > 230).all(axis=2).any()
    alone = draw_tracked_panoptic(image, np.zeros((60, 120), int), [], metadata)
    np.testing.assert_array_equal(alone, image)
