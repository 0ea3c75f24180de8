"""scripts/video_strip.py: ground truth above, predictions below, frame after frame."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from d2ext.utils.video import VideoReader
from tests.tools.test_predict_tracks import SIZE, write_config, write_frames

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/video_strip.py"


def test_strip_and_clip(tmp_path: Path) -> None:
    pytest.importorskip("norfair", reason="needs norfair-enough")
    specification = importlib.util.spec_from_file_location("video_strip", SCRIPT)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)

    folder, (height, width) = write_frames(tmp_path / "frames"), SIZE
    frames = []
    for i, file in enumerate(sorted(folder.iterdir())):
        box = [20 - i, 4, 12, 12]
        x, y, w, h = box
        annotation = {"bbox": box, "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "track_id": 90}
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        frame = {"file_name": str(file), "height": height, "width": width, "frame": i}
        # annotated every other frame
        frames.append(frame | ({} if i % 2 else {"annotations": [annotation]}))
    video = {"video_id": 1, "length": 6, "height": height, "width": width, "frames": frames}
    DatasetCatalog.register("strip_test", lambda: [video])
    MetadataCatalog.get("strip_test").set(thing_classes=["square"])
    try:
        module.main(
            [
                *("--config-file", write_config(tmp_path, "BrightSquares"), "--width", "64"),
                *("--dataset", "strip_test", "--output", str(tmp_path / "out"), "--columns", "3"),
                *("--tracker", "NorfairTracker"),
            ]
        )
    finally:
        DatasetCatalog.remove("strip_test")
        MetadataCatalog.remove("strip_test")
    strip = cv2.imread(str(tmp_path / "out/strip.png"))
    gap = module.GAP
    assert strip.shape == (2 * height + gap, 3 * width + 2 * gap, 3)

    def is_drawn(row: int, column: int) -> bool:
        """Whether the upper square has a colour."""
        y, x = row * (height + gap) + 10, column * (width + gap) + 26 - (0, 2, 5)[column]
        return bool(np.ptp(strip[y, x].astype(int)) > 30)

    assert [is_drawn(0, i) for i in range(3)] == [True, True, False]
    assert [is_drawn(1, i) for i in range(3)] == [True] * 3
    clip = [x.image for x in VideoReader(tmp_path / "out/clip.mp4")]
    assert len(clip) == 6 and clip[0].shape == (height, 2 * width + gap, 3)
    assert Image.open(tmp_path / "out/clip.gif").n_frames == 6
