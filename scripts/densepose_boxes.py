"""How good surfaces are in the boxes that a model finds and in the annotated ones, each beside the mean
body in the same boxes.

    python scripts/densepose_boxes.py CONFIG [KEY VALUE ...]

CONFIG is a DensePose config of the model zoo or a file; MODEL.WEIGHTS, DATASETS.TEST and
DENSEPOSE_EVALUATION count. Prints GPS AP, AP50 and AP75, percent; k is 0.255 m for all points, unless
DENSEPOSE_EVALUATION.GPS_K says otherwise.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from tabulate import tabulate
from tqdm import tqdm

from d2ext.config import load_config, merge_options
from d2ext.data.image_io import read_image
from d2ext.engine.predictor import BatchPredictor
from d2ext.evaluation import build_evaluator
from d2ext.evaluation.gps import VERTEX_K
from d2ext.model_zoo import find_config_file


def annotated(record: dict[str, Any]) -> Instances:
    """The persons' boxes, as detections of score 1."""
    persons = [a for a in record["annotations"] if not a.get("iscrowd", 0)]
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in persons]
    return Instances(
        (record["height"], record["width"]),
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        pred_classes=torch.tensor([a["category_id"] for a in persons], dtype=torch.int64),
        scores=torch.ones(len(persons)),
    )


@torch.no_grad()
def compare(cfg: CfgNode, images: int | None = None) -> list[list[Any]]:
    """Rows of the table: what, AP, AP50, AP75.

    Args:
        images: how many of the data set; None: all
    """
    (name,) = cfg.DATASETS.TEST
    predictor = BatchPredictor(cfg)
    evaluators = [build_evaluator(cfg, name, f"{cfg.OUTPUT_DIR}/boxes_{i}") for i in range(2)]
    for evaluator in evaluators:
        evaluator.reset()
    records = DatasetCatalog.get(name)[:images]
    for record in tqdm(records):
        given = annotated(record)
        inputs = predictor.upload([read_image(record["file_name"], "BGR")], [given])
        boxes = inputs[0]["instances"].to(predictor.device)
        outputs = predictor.model(inputs), predictor.model.inference(inputs, [boxes])
        for evaluator, output in zip(evaluators, outputs, strict=True):
            evaluator.process([record], output)
    rows = []
    ids = [record["image_id"] for record in records]
    for what, evaluator in zip(("detected boxes", "annotated boxes"), evaluators, strict=True):
        results = evaluator.evaluate(ids)
        for task, whose in (("densepose_gps", ""), ("densepose_template", ", mean body")):
            metrics = results[task]
            rows.append([what + whose, *(metrics[key] for key in ("AP", "AP50", "AP75"))])
    return rows


def main(arguments: list[str]) -> None:
    if not arguments:
        sys.exit(__doc__)
    cfg = load_config(find_config_file(arguments[0]))
    cfg.DENSEPOSE_EVALUATION.GPS_K = VERTEX_K
    merge_options(cfg, arguments[1:])
    print(tabulate(compare(cfg), headers=["GPS", "AP", "AP50", "AP75"], floatfmt=".2f"))


if __name__ == "__main__":
    main(sys.argv[1:])
