"""Whether DensePose's whole path, from an annotated photo to a surface, works: one person by heart.

    python scripts/densepose_person.py ANNOTATIONS IMAGES OUTPUT [KEY VALUE ...]

ANNOTATIONS is a COCO file of DensePose's form. A person without `dp_masks` gets one mask: the convex
hull of its points. The published R-50 model trains from random weights on these images as they are,
with group norms (there are no statistics to freeze) and AdamW. Then, in the annotated boxes at the
annotated points: the share of points whose part is right, by the fine segmentation alone, and the mean
error of U and of V in the annotated part's chart. This says that the path works, nothing about new
images.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask
import torch
from densepose_boxes import annotated  # the script beside this one
from detectron2.data import DatasetCatalog

from d2ext.data.densepose.annotations import FRAME, DensePoseAnnotations, SurfacePoints
from d2ext.data.densepose.register import register_densepose
from d2ext.data.image_io import read_image
from d2ext.engine.predictor import BatchPredictor
from d2ext.engine.run_folder import load_run
from d2ext.systems.densepose.targets import place_points
from d2ext.tools import train

_NAME = "densepose_person"
_RECIPE = """
MODEL.RESNETS.NORM GN MODEL.FPN.NORM GN MODEL.BACKBONE.FREEZE_AT 0 MODEL.RESNETS.STRIDE_IN_1X1 False
MODEL.ROI_DENSEPOSE_HEAD.DECODER_NORM GN MODEL.PIXEL_STD [58.0,58.0,58.0] MODEL.WEIGHTS ""
SOLVER.OPTIMIZER AdamW SOLVER.BASE_LR 0.0003 SOLVER.IMS_PER_BATCH 1 SOLVER.MAX_ITER 800 SOLVER.STEPS ()
SOLVER.LR_SCHEDULER_NAME WarmupCosineLR SOLVER.WARMUP_ITERS 20 SOLVER.CHECKPOINT_PERIOD 100000
INPUT.RANDOM_FLIP none INPUT.MIN_SIZE_TRAIN (480,) INPUT.MIN_SIZE_TEST 480 TEST.EVAL_PERIOD 0
"""


def with_masks(content: dict) -> dict:
    """The file with `dp_masks` for persons without: the hull of their points."""
    for person in content["annotations"]:
        if "dp_x" in person and "dp_masks" not in person:
            points = np.stack([person["dp_x"], person["dp_y"]], axis=1).round().astype(np.int32)
            hull = np.zeros((FRAME, FRAME), np.uint8)
            cv2.fillConvexPoly(hull, cv2.convexHull(points), 1)
            rle = pycocotools.mask.encode(np.asfortranarray(hull))
            person["dp_masks"] = [{"size": rle["size"], "counts": rle["counts"].decode()}]
    return content


@torch.no_grad()
def measure(predictor: BatchPredictor, record: dict) -> tuple[np.ndarray, np.ndarray]:
    """Whether each point's part is right, (K,), and errors of U and V, (K, 2)."""
    persons = [a for a in record["annotations"] if "dp_x" in a and not a.get("iscrowd", 0)]
    record = {**record, "annotations": persons}
    given = annotated(record)
    boxes = given.pred_boxes.tensor
    inputs = predictor.upload([read_image(record["file_name"], "BGR")], [given])
    detected = inputs[0]["instances"].to(predictor.device)
    surfaces = predictor.model.inference(inputs, [detected])[0]["instances"].pred_densepose.to(
        "cpu"
    )
    annotations = DensePoseAnnotations(
        [
            SurfacePoints(x=a["dp_x"], y=a["dp_y"], parts=a["dp_I"], u=a["dp_U"], v=a["dp_V"])
            for a in persons
        ]
    )
    points = place_points(annotations.points(), boxes, boxes, surfaces.fine_segm.shape[-1])
    part = points.points.parts
    predicted = points.sample(surfaces.fine_segm).argmax(dim=1)
    errors = [
        (points.sample(maps, part) - truth).abs()
        for maps, truth in ((surfaces.u, points.points.u), (surfaces.v, points.points.v))
    ]
    return (predicted == part).numpy(), torch.stack(errors, dim=1).numpy()


def main(arguments: list[str]) -> None:
    if len(arguments) < 3:
        sys.exit(__doc__)
    annotations, images, output = arguments[:3]
    Path(output).mkdir(parents=True, exist_ok=True)
    file = Path(output, "annotations.json")
    file.write_text(json.dumps(with_masks(json.loads(Path(annotations).read_text()))))
    register_densepose(_NAME, str(file), images)
    options = [*_RECIPE.split(), "DATASETS.TRAIN", f"('{_NAME}',)", "DATASETS.TEST", "()"]
    config = ["--config-file", "densepose/densepose_rcnn_R_50_FPN_s1x.yaml"]
    command = [*config, *options, "OUTPUT_DIR", output, *arguments[3:]]
    if train.run(command):
        sys.exit(1)
    predictor = BatchPredictor(load_run(output))
    right, errors = zip(*(measure(predictor, r) for r in DatasetCatalog.get(_NAME)), strict=True)
    share, (u, v) = np.concatenate(right).mean(), np.concatenate(errors).mean(axis=0)
    result = {"points": sum(map(len, right)), "right_parts": share, "u_error": u, "v_error": v}
    Path(output, "person.json").write_text(json.dumps({k: float(x) for k, x in result.items()}))
    print(
        f"{result['points']} points: {share:.1%} of the parts, mean error of U {u:.4f}, of V {v:.4f}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
