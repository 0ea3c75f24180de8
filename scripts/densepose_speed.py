"""How fast DensePose predicts, and what its branch and its results cost, with random weights.

    python scripts/densepose_speed.py CONFIG [KEY VALUE ...]

One drawn image of 800 x 1067 pixels with five persons of 300 x 600 pixels in place of what is detected,
in bfloat16 by autocast on a GPU and in float32 on a CPU. Prints a line of JSON: milliseconds of
the whole way from the image on the host to parts, U and V in the boxes, of the branch (decoder, pooling,
head) and of the results (maps to boxes), images a second, and both shares of the whole.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances

from d2ext.codecs.densepose import charts_in_boxes
from d2ext.config import load_config, merge_options
from d2ext.engine.predictor import BatchPredictor
from d2ext.model_zoo import find_config_file
from d2ext.tools.model_benchmark import Clock

_SIZE = (800, 1067)
_BOXES = [[x, 100.0, x + 300, 700.0] for x in (0.0, 180.0, 360.0, 540.0, 720.0)]


@torch.inference_mode()
def measure(cfg: CfgNode, iterations: int = 30) -> dict[str, Any]:
    """The figures."""
    predictor = BatchPredictor(cfg)
    model, device = predictor.model, predictor.device
    image = np.random.default_rng(0).integers(0, 255, (*_SIZE, 3), np.uint8)
    persons = Instances(
        _SIZE,
        pred_boxes=Boxes(torch.tensor(_BOXES, device=device)),
        pred_classes=torch.zeros(len(_BOXES), dtype=torch.int64, device=device),
        scores=torch.ones(len(_BOXES), device=device),
    )
    heads = model.roi_heads
    # Random weights find nobody: where the detector ends, the persons come in.
    detect = heads._forward_box
    heads._forward_box = lambda *args: (detect(*args), [persons[:]])[1]
    inputs = predictor.upload([image])
    features = model.backbone(model.preprocess_image(inputs).tensor)

    def results(surfaces: Any) -> Any:
        return charts_in_boxes(surfaces, persons.pred_boxes.tensor)

    def whole() -> None:
        (output,) = model(predictor.upload([image]))
        results(output["instances"].pred_densepose)

    clock = Clock(device, iterations, 5)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        surfaces = heads.predict(features, [persons.pred_boxes])
        times = {
            "whole": clock.median(whole),
            "branch": clock.median(lambda: heads.predict(features, [persons.pred_boxes])),
            "results": clock.median(lambda: results(surfaces)),
        }
    return {
        "milliseconds": times,
        "images_per_second": 1e3 / times["whole"],
        "branch_share": times["branch"] / times["whole"],
        "results_share": times["results"] / times["whole"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def main(arguments: list[str]) -> None:
    if not arguments:
        sys.exit(__doc__)
    cfg = load_config(find_config_file(arguments[0]))
    merge_options(cfg, arguments[1:])
    print(json.dumps(measure(cfg)))


if __name__ == "__main__":
    main(sys.argv[1:])
