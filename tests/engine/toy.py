"""A detector and a data set small enough to train for some steps within a test.

Each image is 16 x 16 with one bright rectangle; the model regresses it. Run as a program it is
`d2ext train` with both registered.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from PIL import Image
from torch import Tensor, nn

SIDE = 16
CLASSES = ("box",)
ROOT = Path(__file__).resolve().parents[2]


class Killed(BaseException):
    """Ends a training in the test's own process as a kill would: nothing handles it."""


@META_ARCH_REGISTRY.register()
class ToyDetector(nn.Module):
    """One box per image; losses are means over images. MODEL.RESNETS.STEM_OUT_CHANNELS: width.

    Environment variables name an iteration in which something happens to the process of the highest
    rank: TOY_KILL_AT, a SIGKILL; TOY_DEAF_AT, it ignores SIGINT from then on; TOY_RAISE_AT, an
    exception; TOY_INF_AT, an infinite loss (with a finite gradient); TOY_WAIT_AT, it does not go on.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        width = cfg.MODEL.RESNETS.STEM_OUT_CHANNELS
        norm = nn.BatchNorm2d(width) if cfg.MODEL.RESNETS.NORM == "BN" else nn.Identity()
        self.backbone = nn.Sequential(nn.Conv2d(3, width, 3, stride=2), norm, nn.ReLU())
        self.head = nn.Linear(width * 7 * 7, 4)
        # Random in training, so that a run depends on the generators' states.
        self.dropout = nn.Dropout(0.2 if cfg.MODEL.RESNETS.WIDTH_PER_GROUP > 1 else 0.0)
        self.register_buffer("pixel_mean", torch.tensor(100.0), persistent=False)
        self.to(cfg.MODEL.DEVICE)

    def forward(self, inputs: list[dict]) -> dict[str, Tensor] | list[dict]:
        images = torch.stack([x["image"].float() for x in inputs]).to(self.pixel_mean.device)
        features = self.backbone((images - self.pixel_mean) / 100)
        boxes = self.head(self.dropout(features.flatten(1)))
        if not self.training:
            results = []
            boxes = boxes.float() * SIDE
            boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
            for box, one_input in zip(boxes, inputs, strict=True):
                result = Instances((one_input["height"], one_input["width"]))
                result.pred_boxes = Boxes(box[None])
                result.scores = torch.ones(1)
                result.pred_classes = torch.zeros(1, dtype=torch.int64)
                results.append({"instances": result})
            return results
        last_rank = comm.get_rank() == comm.get_world_size() - 1
        now = {k for k, v in os.environ.items() if v == str(get_event_storage().iter) and last_rank}
        if "TOY_KILL_AT" in now:
            os.kill(os.getpid(), signal.SIGKILL)
        if "TOY_DEAF_AT" in now:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if "TOY_WAIT_AT" in now:
            time.sleep(1000)
        if "TOY_RAISE_AT" in now:
            raise LookupError("nothing there")
        target = torch.stack([x["instances"].gt_boxes.tensor[0] / SIDE for x in inputs])
        error = (boxes - target).abs()
        losses = {"loss_corner": error[:, :2].mean(), "loss_size": error[:, 2:].pow(2).mean()}
        if "TOY_INF_AT" in now:
            losses["loss_corner"] = losses["loss_corner"] + float("inf")
        return losses


def write_data(folder: Path, count: int = 12) -> Path:
    """Write ``count`` images and their COCO JSON; returns the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(count):
        x, y = (int(v) for v in random.integers(0, 8, 2))
        w, h = (int(v) for v in random.integers(4, 8, 2))
        pixels = random.integers(0, 100, (SIDE, SIDE, 3), dtype=np.uint8)
        pixels[y : y + h, x : x + w] += 120
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": i + 1, "file_name": f"{i}.png", "height": SIDE, "width": SIDE})
        annotations.append(
            {
                "id": i + 1,
                "image_id": i + 1,
                "category_id": 1,
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            }
        )
    path = folder / "toy.json"
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(CLASSES)]
    path.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    return path


def register(json_file: Path, name: str = "toy") -> None:
    """Register the written data, in place of an earlier registration."""
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {}, str(json_file), str(json_file.parent))


def start(
    json_file: Path,
    *arguments: str,
    starter: Sequence[str] = (sys.executable,),
    stdout: int | IO[str] = subprocess.PIPE,
    **environment: str,
) -> subprocess.Popen[str]:
    """Start this module as a program: a training on the written data, with train_net's arguments."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {"TOY_DATA": str(json_file), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*starter, __file__, *arguments],
        env={**os.environ, **variables, **environment},
        stdout=stdout,
        stderr=subprocess.STDOUT,
        text=True,
        # Of a job in the background shells ignore Ctrl-C, which programs inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait(process: subprocess.Popen[str], expected: int) -> str:
    """What the program printed; its exit status must be ``expected``."""
    output, _ = process.communicate(timeout=300)
    # The end: the beginning is the whole config, and long output is cut in its middle.
    assert process.returncode == expected, output[-4000:]
    return output


def train_rank(args: argparse.Namespace) -> None:
    """What each process of a training does; who has imported this module knows the toys."""
    from d2ext.tools import train

    train.main(args)


def options(output: Path, **more: object) -> list[str]:
    """Command-line options of a short training; keys of ``more`` have "__" for dots."""
    values = {
        "MODEL.META_ARCHITECTURE": "ToyDetector",
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 4,
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.RESNETS.WIDTH_PER_GROUP": 1,
        "DATASETS.TRAIN": "('toy',)",
        "DATASETS.TEST": "()",
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TRAIN": f"({SIDE},)",
        "INPUT.MIN_SIZE_TEST": SIDE,
        "SOLVER.IMS_PER_BATCH": 4,
        "SOLVER.MAX_ITER": 10,
        "SOLVER.STEPS": "(7,)",
        "SOLVER.WARMUP_ITERS": 3,
        "SOLVER.BASE_LR": 0.05,
        "SOLVER.LOG_PERIOD": 1,
        "SOLVER.CHECKPOINT_PERIOD": 1000,
        "SEED": 7,
        "OUTPUT_DIR": output,
    }
    values.update({key.replace("__", "."): value for key, value in more.items()})
    return [str(x) for pair in values.items() for x in pair]


def metrics(output: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.json, without what measures time."""
    lines = [json.loads(x) for x in (output / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in x.items() if "time" not in k and "eta" not in k} for x in lines]


def losses(output: Path) -> dict[int, float]:
    """Iteration -> total loss, of a run's metrics.json."""
    found = [(x["iteration"], x["total_loss"]) for x in metrics(output) if "total_loss" in x]
    assert len(dict(found)) == len(found), "an iteration was logged twice"
    return dict(found)


# In a spawned process this module is imported again under another name, hence not under __main__.
if "TOY_DATA" in os.environ:
    register(Path(os.environ["TOY_DATA"]))

if __name__ == "__main__":
    from d2ext.tools import train

    sys.exit(train.run())
