"""Every landmark head on `shapes` with the same backbone, data, optimizer and budget.

Errors are NME: the mean distance of a thing's landmarks, in percent of the square root of its box's
area.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import nn

from d2ext.data import build_test_loader
from d2ext.evaluation import LandmarkEvaluator
from d2ext.tools.compare.comparison import COMPARISONS, Arm, Comparison, Plot, Series

_HEADS = {
    "heatmap_gaussian": "heat maps, Gaussian",
    "heatmap_cauchy": "heat maps, Cauchy",
    "integral": "integral (soft-argmax)",
    "simcc": "SimCC",
    "regression": "coordinate regression",
}
# Bins of the naturally occluded share of a thing. In the first it counts as visible, from the third
# on as occluded.
OCCLUSION_BINS = ((0.0, 0.02), (0.02, 0.1), (0.1, 0.2), (0.2, 0.3), (0.3, 0.5))
# Shares of a thing's box that are painted over.
CUTOUTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)
_NME = "NME, % of the box"


@COMPARISONS.register()
def landmark_heads() -> Comparison:
    """The configs are configs/landmarks/<head>_shapes.yaml."""
    return Comparison(
        summary="heat maps, integral, SimCC and regression of landmarks: error, occlusion",
        arms={name: Arm(t, f"landmarks/{name}_shapes.yaml") for name, t in _HEADS.items()},
        columns={
            "landmarks/NME": "NME %",
            "median": "median %",
            "visible": "NME % visible",
            "occluded": "NME % occluded",
            "failures": "NME > 10 %",
        },
        overrides=("SOLVER.MAX_ITER", "900"),
        evaluations=8,
        measure=measure,
        plots={
            "hidden": Plot("share hidden by other things or the border, %", _NME, log=True),
            "painted": Plot("share of the box painted over, %", _NME, log=True),
            "errors": Plot(_NME, "things at or below, %"),
        },
    )


def measure(cfg: CfgNode, model: nn.Module) -> tuple[dict[str, float], Series]:
    """The distribution of errors, and how they grow with the hidden share of a thing."""
    (name,) = cfg.DATASETS.TEST
    evaluator = LandmarkEvaluator(name, ["nme"], distributed=False)
    batches = list(build_test_loader(cfg, name))
    plain = instance_errors(model, batches, evaluator)
    results = {"median": float(np.median(plain)), "failures": float(100 * (plain > 10).mean())}
    shares = 100 * (np.arange(len(plain)) + 1) / len(plain)
    series: Series = {
        "errors": [(float(e), float(s), 0.0) for e, s in zip(np.sort(plain), shares, strict=True)],
        "painted": [
            _point(share, instance_errors(model, batches, evaluator, share)) for share in CUTOUTS
        ],
    }
    # Only `shapes` knows how much of a thing is hidden.
    hidden = np.array([a.get("occlusion", math.nan) for a in evaluator.annotations])
    groups = {(low, high): plain[(low <= hidden) & (hidden < high)] for low, high in OCCLUSION_BINS}
    series["hidden"] = [_point(sum(bin) / 2, e) for bin, e in groups.items() if len(e)]
    for key, selected in (
        ("visible", hidden < OCCLUSION_BINS[0][1]),
        ("occluded", hidden >= OCCLUSION_BINS[2][0]),
    ):
        if selected.any():
            results[key] = float(plain[selected].mean())
    return results, series


def _point(share: float, errors: np.ndarray) -> tuple[float, float, float]:
    spread = float(errors.std() / math.sqrt(len(errors)))
    return round(100 * share, 2), float(errors.mean()), spread


@torch.no_grad()
def instance_errors(
    model: nn.Module,
    batches: list[list[dict[str, Any]]],
    evaluator: LandmarkEvaluator,
    cutout: float = 0.0,
) -> np.ndarray:
    """(N,) NME of each instance, in percent.

    Args:
        cutout: share of each instance's box that is painted over, see :func:`paint_over`.
    """
    evaluator.reset()
    for batch in batches:
        if cutout > 0:
            batch = [paint_over(one_input, cutout) for one_input in batch]
        evaluator.process(batch, model(batch))
    logging.disable(logging.INFO)  # the table of each evaluation would hide the rest
    try:
        evaluator.evaluate()
    finally:
        logging.disable(logging.NOTSET)
    assert evaluator.instance_nme is not None
    return 100 * evaluator.instance_nme


def paint_over(one_input: dict[str, Any], share: float) -> dict[str, Any]:
    """A copy of a test input with a rectangle of one colour in each instance's box.

    Args:
        share: of the box's area. The place is random and depends on the instance alone.
    """
    image = one_input["image"].clone()
    height, width = image.shape[1:]
    instances = one_input["instances"]
    boxes, keys = instances.gt_boxes.tensor.tolist(), instances.instance_ids.tolist()
    for (x0, y0, x1, y1), key in zip(boxes, keys, strict=True):
        rng = np.random.default_rng([one_input["image_id"], key])
        w, h = (x1 - x0) * math.sqrt(share), (y1 - y0) * math.sqrt(share)
        left, top = rng.uniform(0, 1, 2) * (x1 - x0 - w, y1 - y0 - h) + (x0, y0)
        color = torch.from_numpy(rng.integers(0, 256, 3).astype(np.uint8))
        columns = slice(*(min(max(round(v), 0), width) for v in (left, left + w)))
        rows = slice(*(min(max(round(v), 0), height) for v in (top, top + h)))
        image[:, rows, columns] = color[:, None, None]
    return {**one_input, "image": image}
