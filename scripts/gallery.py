"""Pictures of predictions beside ground truth, for the scripts of `make`.

As a program it joins pictures; README.md's one is made by::

    python scripts/gallery.py docs/images/demo.jpg output/demo/pictures/*.png --first 6 --width 1200
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.structures import BoxMode, Instances
from torchvision.ops import nms

from d2ext.utils.drawing import write_picture
from d2ext.utils.visualizer import Visualizer

# Sizes in pixels. Small images are enlarged before drawing, so that labels do not hide the objects.
PANEL_SIDE = 480
CAPTION_HEIGHT = 34
GAP = 8
MONTAGE_WIDTH = 1800
# Predictions drawn per image, best first: more hide the image.
MAX_DRAWN = 40
# Of two predictions whose boxes overlap more, the better one is drawn.
DUPLICATE_IOU = 0.5


def evenly_spread(dataset: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most ``count`` annotated entries, from first to last."""
    annotated = [entry for entry in dataset if entry.get("annotations")] or dataset
    step = max(len(annotated) / count, 1.0)
    return [annotated[int(i * step)] for i in range(min(count, len(annotated)))]


def panel(picture: np.ndarray, caption: str) -> np.ndarray:
    """A captioned picture (H, W, 3), uint8 RGB."""
    bar = np.full((CAPTION_HEIGHT, picture.shape[1], 3), 255, np.uint8)
    origin = (6, CAPTION_HEIGHT - 11)
    cv2.putText(bar, caption, origin, cv2.FONT_HERSHEY_SIMPLEX, 0.6, (40, 40, 40), 1, cv2.LINE_AA)
    return np.concatenate([bar, picture])


def without_duplicates(instances: Instances, score_threshold: float) -> Instances:
    """Those above a score, best first, each of a thing of its own whatever its class."""
    kept = instances[instances.scores >= score_threshold].to("cpu")
    return kept[nms(kept.pred_boxes.tensor, kept.scores, DUPLICATE_IOU)][:MAX_DRAWN]


def draw_pair(
    entry: dict[str, Any], predictions: Instances, metadata: Any, score_threshold: float
) -> np.ndarray:
    """Ground truth (left) and the predictions above a score (right), uint8 RGB; one colour a class."""
    image = read_image(entry["file_name"], "RGB")
    annotations = entry["annotations"]
    boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in annotations]
    kept = without_duplicates(predictions, score_threshold)
    left = draw_objects(
        image,
        metadata,
        np.array(boxes).reshape(-1, 4),
        [x["segmentation"] for x in annotations],
        [x["category_id"] for x in annotations],
        [""] * len(annotations),
    )
    right = draw_objects(
        image,
        metadata,
        kept.pred_boxes.tensor.numpy(),
        list(kept.pred_masks.numpy()),
        kept.pred_classes.tolist(),
        [f" {score:.0%}" for score in kept.scores.tolist()],
    )
    left = panel(left, f"ground truth: {len(annotations)}")
    right = panel(right, f"predicted: {len(kept)}")
    gap = np.full((left.shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def draw_objects(
    image: np.ndarray,
    metadata: Any,
    boxes: np.ndarray,
    masks: list[Any],
    classes: list[int],
    notes: list[str],
) -> np.ndarray:
    """Boxes and masks with the names of their classes and notes."""
    scale = max(PANEL_SIDE / max(image.shape[:2]), 0.25)
    visualizer = Visualizer(image, metadata, scale)
    visualizer.overlay_instances(
        boxes=boxes,
        masks=masks,
        labels=[metadata.thing_classes[c] + note for c, note in zip(classes, notes, strict=True)],
        assigned_colors=[np.array(metadata.thing_colors[c]) / 255 for c in classes],
    )
    return np.asarray(visualizer.output.get_image())


def montage(pictures: list[np.ndarray], total_width: int = MONTAGE_WIDTH) -> np.ndarray:
    """Pictures (uint8 RGB, any sizes) in a grid on white, ``total_width`` pixels wide."""
    # Pairs are about twice as wide as they are high: the whole then comes near to 4:3.
    columns = max(1, round(math.sqrt(len(pictures) * 2 / 3)))
    width = (total_width - (columns + 1) * GAP) // columns
    cells = [
        cv2.resize(p, (width, round(p.shape[0] * width / p.shape[1])), interpolation=cv2.INTER_AREA)
        for p in pictures
    ]
    rows = []
    for start in range(0, len(cells), columns):
        row = cells[start : start + columns]
        strip = np.full((max(c.shape[0] for c in row) + GAP, total_width, 3), 255, np.uint8)
        for column, cell in enumerate(row):
            left = GAP + column * (width + GAP)
            strip[: cell.shape[0], left : left + width] = cell
        rows.append(strip)
    top = np.full((GAP, total_width, 3), 255, np.uint8)
    return np.concatenate([top, *rows])


def write_gallery(
    cfg: CfgNode, dataset_name: str, folder: Path, *, count: int = 12, score_threshold: float = 0.3
) -> list[Path]:
    """Predict on ``count`` images of a data set with ``cfg.MODEL.WEIGHTS`` and draw them.

    Returns:
        The files written: one picture per image in ``folder/pictures``, and last the montage
        ``folder/montage.png``.
    """
    predictor = DefaultPredictor(cfg)
    metadata = MetadataCatalog.get(dataset_name)
    pictures_folder = folder / "pictures"
    pictures, files = [], []
    entries = evenly_spread(DatasetCatalog.get(dataset_name), count)
    for number, entry in enumerate(entries, start=1):
        # DefaultPredictor takes BGR whatever the model's own order is.
        predictions = predictor(read_image(entry["file_name"], "BGR"))["instances"]
        pictures.append(draw_pair(entry, predictions, metadata, score_threshold))
        files.append(pictures_folder / f"{number:02d}_{entry['image_id']}.png")
        write_picture(files[-1], pictures[-1][:, :, ::-1])
    files.append(folder / "montage.png")
    write_picture(files[-1], montage(pictures)[:, :, ::-1])
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description="Join pictures to one.")
    parser.add_argument("output", type=Path, help="file to write; its suffix chooses the format")
    parser.add_argument("pictures", type=Path, nargs="+")
    parser.add_argument("--first", type=int, help="how many of the pictures to take; default: all")
    parser.add_argument("--width", type=int, default=MONTAGE_WIDTH, help="pixels")
    args = parser.parse_args()
    pictures = [read_image(str(path), "RGB") for path in args.pictures[: args.first]]
    write_picture(args.output, montage(pictures, args.width)[:, :, ::-1])


if __name__ == "__main__":
    main()
