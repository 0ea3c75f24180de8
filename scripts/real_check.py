"""A few training steps and an evaluation on real COCO images, on the CPU (`make real-check`).

It shows that the built-in data sets ``coco_2017_train`` and ``coco_2017_val`` work from files to
drawn masks. The model stays untrained: its average precision is near zero and means nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ANNOTATIONS = "coco/annotations/instances_{}2017.json"


def find_data() -> Path:
    """The folder that holds ``coco/`` in the official layout."""
    for candidate in (os.environ.get("DETECTRON2_DATASETS"), ROOT.parent / "shared" / "data"):
        if candidate and all(
            (Path(candidate) / ANNOTATIONS.format(s)).exists() for s in ("train", "val")
        ):
            return Path(candidate).resolve()
    sys.exit(
        "No real images: set DETECTRON2_DATASETS to the folder that holds coco/, with "
        f"{ANNOTATIONS.format('train')}, {ANNOTATIONS.format('val')} and the images beside them."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "real-check")
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--size", type=int, default=256, help="side of the network's input, pixels")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="changes to the config")
    args = parser.parse_args()
    # Detectron2 reads it when it is imported.
    os.environ["DETECTRON2_DATASETS"] = str(find_data())

    from detectron2.utils.logger import setup_logger
    from gallery import write_gallery

    from d2ext import model_zoo
    from d2ext.engine import Trainer

    cfg = model_zoo.get_config("yolact/yolact_R_50_550.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.YOLACT.INPUT_SIZE = args.size
    # From random weights batch norm has to be trained, whatever the batch size.
    cfg.MODEL.YOLACT.MIN_IMAGES_TO_TRAIN_BN = 0
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.SOLVER.MAX_ITER = args.iterations
    cfg.SOLVER.STEPS = ()
    cfg.SOLVER.LOG_PERIOD = 1
    cfg.TEST.EVAL_PERIOD = 0
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.OUTPUT_DIR = str(args.output)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in ("fvcore", "detectron2", "d2ext"):
        setup_logger(str(args.output), name=name)

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    results = trainer.train() or {}
    losses = {
        name: float(x.latest()) for name, x in trainer.storage.histories().items() if "loss" in name
    }

    drawing = cfg.clone()
    drawing.defrost()
    drawing.MODEL.WEIGHTS = str(args.output / "model_final.pth")
    files = write_gallery(drawing, cfg.DATASETS.TEST[0], args.output, count=6, score_threshold=0.0)
    print(f"\nlast losses: {', '.join(f'{name} {value:.3f}' for name, value in losses.items())}")
    print(f"mask AP of the (untrained) model: {results.get('segm', {}).get('AP', math.nan):.2f}")
    print(f"pictures: {files[-1]}")
    return 0 if losses and all(map(math.isfinite, losses.values())) and "segm" in results else 1


if __name__ == "__main__":
    sys.exit(main())
