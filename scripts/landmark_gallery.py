"""Pictures of landmark predictions beside the ground truth, in one file.

docs/images/landmarks.png shows models that learned a few images by heart, on these same images, whose
photos it leaves out (--points-only): most may not be redistributed. It was made by::

    D=../shared/data/landmarks
    for SET in mpii coco 300w wflw; do
        python tools/train_net.py --config-file landmarks/hourglass_2stack_overfit.yaml \\
            --dataset $SET --landmarks $SET \\
            --train-json $D/$SET/${SET}_keypoints.json --train-images $D/$SET/images \\
            --val-json $D/$SET/${SET}_keypoints.json --val-images $D/$SET/images \\
            OUTPUT_DIR output/landmarks_$SET SOLVER.MAX_ITER 250
    done
    python scripts/landmark_gallery.py docs/images/landmarks.png --points-only --width 1000 --data $D \\
        --model mpii output/landmarks_mpii --model coco output/landmarks_coco \\
        --model 300w output/landmarks_300w --model wflw output/landmarks_wflw

A model's folder holds ``config.yaml`` and ``model_final.pth``, as training leaves them.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.visualizer import Visualizer

from d2ext.config import load_config
from d2ext.data import DataError, read_image
from d2ext.data.landmarks import TopDownTestMapper, register_landmarks
from d2ext.data.landmarks.geometry import pad_box
from d2ext.data.landmarks.samples import usable_annotations
from d2ext.data.landmarks.transforms import AffineCropTransform, crop_transform
from d2ext.engine.predictor import BatchPredictor
from d2ext.evaluation import LandmarkEvaluator

# Side of the picture of one instance, pixels; enlarged from what may be a small face.
SIDE = 380
# What is shown about an instance: its box times this.
MARGIN = 1.3


def load_gallery() -> ModuleType:
    """``scripts/gallery.py``, which lies beside this file."""
    path = Path(__file__).with_name("gallery.py")
    specification = importlib.util.spec_from_file_location("gallery", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def draw_landmarks(
    image: np.ndarray, points: np.ndarray, transform: AffineCropTransform, metadata: Any
) -> np.ndarray:
    """The part of an image about an instance with its landmarks, (SIDE, SIDE, 3) uint8 RGB.

    Args:
        image: (H, W, 3) RGB
        points: (K, 3) x, y and what the visualizer takes for certainty, in the image
        transform: image to picture
    """
    crop = transform.apply_image(image, cv2.INTER_CUBIC)
    mapped = np.concatenate([transform.apply_coords(points[:, :2]), points[:, 2:]], axis=1)
    visualizer = Visualizer(crop, metadata, scale=1.0)
    # Landmarks alone: `overlay_instances` writes the class beside them.
    for row in mapped[None]:
        visualizer.draw_and_connect_keypoints(torch.from_numpy(row))
    return np.asarray(visualizer.output.get_image())


def draw_model(
    cfg: CfgNode, name: str, title: str, count: int, points_only: bool = False
) -> list[np.ndarray]:
    """Pairs of pictures, truth and prediction, of up to ``count`` instances of a data set.

    Args:
        points_only: on plain grey in place of the image.
    """
    gallery = load_gallery()
    predictor = BatchPredictor(cfg)
    mapper = TopDownTestMapper(cfg)
    evaluator = LandmarkEvaluator(name, ["pck"])
    evaluator.reset()
    metadata = MetadataCatalog.get(name)
    pictures = []
    for record in DatasetCatalog.get(name):
        one_input = mapper(record)
        with torch.no_grad():
            output = predictor.model([one_input])[0]
        evaluator.process([one_input], [output])
        found = output["instances"].pred_keypoints.cpu().double().numpy()
        image = read_image(record["file_name"], "RGB")
        if points_only:
            image = np.full_like(image, 225)
        for annotation, points in zip(usable_annotations(record), found, strict=True):
            box = pad_box(np.array(annotation["bbox"]), (SIDE, SIDE), MARGIN)
            transform = crop_transform(box, (SIDE, SIDE))
            truth = np.array(annotation["keypoints"], dtype=np.float64).reshape(-1, 3)
            guess = points.copy()
            guess[:, 2] = 1.0  # all: the network says where, not whether
            pair = [draw_landmarks(image, p, transform, metadata) for p in (truth, guess)]
            captions = (f"{title}: ground truth", "predicted (learned by heart)")
            panels = [gallery.panel(p, c) for p, c in zip(pair, captions, strict=True)]
            pictures.append(np.concatenate(panels, axis=1))
    results = evaluator.evaluate()["landmarks"]
    print(f"{title}: {len(pictures)} instances, PCK@0.1 {results['PCK@0.1']:.2f} %")
    return pictures[:count]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="picture to write; its suffix is the format")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of KIND/KIND_keypoints.json"
    )
    parser.add_argument(
        "--model",
        nargs=2,
        action="append",
        required=True,
        metavar=("KIND", "DIR"),
        help="kind of landmarks, and the folder of a training with them; may be repeated",
    )
    parser.add_argument("--count", type=int, default=2, help="instances of each model (2)")
    parser.add_argument(
        "--points-only", action="store_true", help="without the photos, which have their own terms"
    )
    parser.add_argument("--width", type=int, default=1500, help="of the picture, pixels")
    parser.add_argument(
        "--device", default="", help="default: that of the training, if it is there"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    gallery = load_gallery()
    pictures = []
    try:
        for kind, folder in args.model:
            cfg = load_config(str(Path(folder) / "config.yaml"))
            cfg.MODEL.WEIGHTS = str(Path(folder) / "model_final.pth")
            if args.device or not torch.cuda.is_available():
                cfg.MODEL.DEVICE = args.device or "cpu"
            name = f"gallery_{kind}"
            root = args.data / kind
            register_landmarks(
                name, kind, str(root / f"{kind}_keypoints.json"), str(root / "images")
            )
            cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
            pictures += draw_model(cfg, name, kind, args.count, args.points_only)
    except (DataError, FileNotFoundError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    gallery.write_picture(args.output, gallery.montage(pictures, args.width))
    return 0


if __name__ == "__main__":
    sys.exit(main())
