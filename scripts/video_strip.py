"""A video of a data set with its ground truth and what a model predicts, as pictures for the docs.

    python scripts/video_strip.py --config-file CONFIG --dataset NAME --output docs/images/ \\
        --tracker NorfairTracker --opts MODEL.WEIGHTS model_final.pth

Writes strip.png (above the ground truth, below the predictions; a few frames of the video), clip.mp4
and clip.gif (the two side by side, all frames). Objects have the colour of their id.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import annotations_to_instances
from detectron2.structures import Instances
from PIL import Image

from d2ext import VideoPredictor
from d2ext.config import add_options_argument, load_config
from d2ext.data.image_io import read_image
from d2ext.model_zoo import find_config_file
from d2ext.utils.drawing import VideoDrawer, reduced
from d2ext.utils.video import DEFAULT_RATE, video_writer

GAP = 6  # pixels between pictures


def ground_truth(frame: dict[str, Any], numbers: dict[int, int]) -> dict[str, Any]:
    """The annotations of a frame, as a model's output; nothing where it is not annotated.

    Args:
        numbers: track id → the id that is shown, from 1; new ones are added.
    """
    annotations = [x for x in frame.get("annotations", []) if not x.get("iscrowd")]
    if not annotations:
        return {}
    size = frame["height"], frame["width"]
    has_masks = all(x.get("segmentation") for x in annotations)
    if not has_masks:
        annotations = [{k: v for k, v in x.items() if k != "segmentation"} for x in annotations]
    known = annotations_to_instances(annotations, size, "bitmask")
    instances = Instances(size, pred_boxes=known.gt_boxes, pred_classes=known.gt_classes)
    instances.scores = torch.ones(len(known))
    if has_masks:
        instances.pred_masks = known.gt_masks.tensor
    if known.has("gt_keypoints"):
        instances.pred_keypoints = known.gt_keypoints.tensor
    ids = [numbers.setdefault(x["track_id"], len(numbers) + 1) for x in annotations]
    instances.track_ids = torch.tensor(ids)
    return {"instances": instances}


def draw_video(
    video: dict[str, Any],
    predict: Callable[[np.ndarray], dict[str, Any]],
    metadata: Any,
    width: int,
    annotations: bool = True,
) -> list[list[np.ndarray]]:
    """Of each frame two pictures (BGR) of one size: ground truth and predictions.

    Args:
        width: about how wide, pixels. Frames are made smaller before drawing, for legible labels.
        annotations: False: the frames themselves instead of the ground truth.
    """
    drawers = [VideoDrawer(metadata) for _ in range(2)]
    numbers: dict[int, int] = {}
    pairs: list[list[np.ndarray]] = []
    for frame in video["frames"]:
        image = read_image(frame["file_name"], "BGR")
        factor = max(1, round(image.shape[1] / width))
        outputs = ground_truth(frame, numbers) if annotations else {}, predict(image)
        pair = [draw(*reduced(image, x, factor)) for draw, x in zip(drawers, outputs, strict=True)]
        size = (pairs or [pair])[0][0].shape[1::-1]
        pairs.append([cv2.resize(picture, size) for picture in pair])
    return pairs


def join(pictures: list[np.ndarray], axis: int) -> np.ndarray:
    """Pictures in a row (axis 1) or column (0), a white gap between."""
    shape = list(pictures[0].shape)
    shape[axis] = GAP
    gap = np.full(shape, 255, np.uint8)
    return np.concatenate([y for x in pictures for y in (gap, x)][1:], axis=axis)


def with_palette(picture: np.ndarray) -> Image.Image:
    """BGR → a picture of a third of the bytes."""
    return Image.fromarray(picture[:, :, ::-1]).quantize(128)


def write_pictures(pairs: list[list[np.ndarray]], folder: Path, columns: int, every: int) -> None:
    """Write strip.png, clip.mp4 and clip.gif."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = np.linspace(0, len(pairs) - 1, min(columns, len(pairs))).round().astype(int)
    strip = join([join([pairs[i][row] for i in steps], 1) for row in range(2)], 0)
    with_palette(strip).save(folder / "strip.png")
    frames = [join(pair, 1) for pair in pairs]
    with video_writer(folder / "clip.mp4", DEFAULT_RATE) as add:
        for frame in frames:
            add(frame, None)
    first, *others = [with_palette(x) for x in frames[::every]]
    milliseconds = round(1000 * every / DEFAULT_RATE)
    first.save(
        folder / "clip.gif", save_all=True, append_images=others, duration=milliseconds, loop=0
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--config-file", required=True, help="a path, or a name in the model zoo")
    add("--dataset", required=True, help="name of a registered video data set")
    add("--output", type=Path, required=True, help="folder")
    add("--video", type=int, default=0, help="its place in the data set (0)")
    add("--columns", type=int, default=6, help="frames in the strip (6)")
    add("--every", type=int, default=1, metavar="N", help="clip.gif: each N-th frame only (1)")
    add("--width", type=int, default=320, help="of a picture, about, pixels (320)")
    add("--tracker", default="", help="for models that give no ids: NorfairTracker")
    add("--confidence-threshold", type=float, default=0.3, help="draw from this score on (0.3)")
    help_text = (
        "the frames themselves instead of the ground truth, of which panoptic clips have little"
    )
    add("--no-annotations", dest="annotations", action="store_false", help=help_text)
    add_options_argument(parser)
    args = parser.parse_args(arguments)
    cfg = load_config(find_config_file(args.config_file), args.opts)
    predict = VideoPredictor(cfg, tracker=args.tracker, threshold=args.confidence_threshold)
    video = DatasetCatalog.get(args.dataset)[args.video]
    metadata = MetadataCatalog.get(args.dataset)
    pairs = draw_video(video, predict, metadata, args.width, args.annotations)
    write_pictures(pairs, args.output, args.columns, args.every)


if __name__ == "__main__":
    main()
