"""The values of the published recipes (tests/reference/densepose/NOTES.md), and of the small one."""

from __future__ import annotations

from typing import Any

import pytest
from detectron2.modeling import build_model

from d2ext import model_zoo
from d2ext.engine.optimizer import build_optimizer
from tests.systems.recipes import assert_recipe, under

NAMES = [
    x.removeprefix("densepose/densepose_rcnn_").removesuffix(".yaml")
    for x in model_zoo.available()
    if x.startswith("densepose/densepose_rcnn")
]
PYRAMID = ["p2", "p3", "p4", "p5"]
MODEL: dict[str, Any] = {"ANCHOR_GENERATOR.SIZES": [32, 64, 128, 256, 512]}
MODEL |= {"ANCHOR_GENERATOR.ASPECT_RATIOS": [0.5, 1, 2], "RPN.IN_FEATURES": [*PYRAMID, "p6"]}
MODEL |= {"RPN.PRE_NMS_TOPK_TRAIN": 2000, "RPN.PRE_NMS_TOPK_TEST": 1000}
MODEL |= {"RPN.POST_NMS_TOPK_TRAIN": 1000, "RPN.POST_NMS_TOPK_TEST": 1000}
MODEL |= {"ROI_HEADS.IN_FEATURES": PYRAMID, "ROI_HEADS.NUM_CLASSES": 1, "ROI_BOX_HEAD.NUM_FC": 2}
MODEL |= {"ROI_HEADS.SCORE_THRESH_TEST": 0.05, "ROI_HEADS.NMS_THRESH_TEST": 0.5}
MODEL |= {"ROI_BOX_HEAD.POOLER_RESOLUTION": 7, "ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2}
HEAD: dict[str, Any] = {"NUM_STACKED_CONVS": 8, "CONV_HEAD_DIM": 512, "CONV_HEAD_KERNEL": 3}
HEAD |= {"POOLER_RESOLUTION": 28, "POOLER_SAMPLING_RATIO": 2, "DECODER_ON": True}
HEAD |= {"DECODER_CONV_DIMS": 256, "DECONV_KERNEL": 4, "UP_SCALE": 2}
HEAD |= {"NUM_COARSE_SEGM_CHANNELS": 2, "FG_IOU_THRESHOLD": 0.7, "INDEX_WEIGHTS": 5}
HEAD |= {"PART_WEIGHTS": 1, "PART_MASK_WEIGHTS": 0, "PUBLISHED_GRID": True}
HEAD |= {"POINT_REGRESSION_WEIGHTS": 0.01}
HEAD |= {"UV_CONFIDENCE.EPSILON": 0.01, "SEGM_CONFIDENCE.EPSILON": 0.01}
LEGACY: dict[str, Any] = {"NUM_COARSE_SEGM_CHANNELS": 15, "POOLER_RESOLUTION": 14}
LEGACY |= {"DECODER_ON": False, "INDEX_WEIGHTS": 2, "PART_WEIGHTS": 0.3}
LEGACY |= {"POINT_REGRESSION_WEIGHTS": 0.1}
CSE: dict[str, Any] = {"EMBED_SIZE": 16, "EMBED_LOSS_WEIGHT": 0.6}
CSE |= {"EMBEDDING_DIST_GAUSS_SIGMA": 0.01, "GEODESIC_DIST_GAUSS_SIGMA": 0.01}
CSE |= {"PIX_TO_SHAPE_CYCLE_LOSS.WEIGHT": 0.0001, "SHAPE_TO_SHAPE_CYCLE_LOSS.WEIGHT": 0.025}
CSE |= {"PIX_TO_SHAPE_CYCLE_LOSS.NUM_PIXELS_TO_SAMPLE": 100}
CSE |= {"PIX_TO_SHAPE_CYCLE_LOSS.TEMPERATURE_PIXEL_TO_VERTEX": 0.05}
CSE |= {"PIX_TO_SHAPE_CYCLE_LOSS.TEMPERATURE_VERTEX_TO_PIXEL": 0.05}
CSE |= {"SHAPE_TO_SHAPE_CYCLE_LOSS.MAX_NUM_VERTICES": 4936}
CSE |= {"SHAPE_TO_SHAPE_CYCLE_LOSS.TEMPERATURE": 0.05}
SMPL = {"NUM_VERTICES": 27554, "FEATURE_DIM": 256}
SOLVER: dict[str, Any] = {"IMS_PER_BATCH": 16, "MOMENTUM": 0.9, "WEIGHT_DECAY": 1e-4, "GAMMA": 0.1}
SOLVER |= {"LR_FACTORS": [], "MAX_ITER": 130_000, "STEPS": (100_000, 120_000), "WARMUP_ITERS": 1000}
INPUT = {"FORMAT": "BGR", "MIN_SIZE_TRAIN": [*range(640, 801, 32)], "MAX_SIZE_TRAIN": 1333}
INPUT |= {"MIN_SIZE_TEST": 800, "MAX_SIZE_TEST": 1333, "RANDOM_FLIP": "horizontal"}


@pytest.mark.parametrize("name", NAMES)
def test_recipe(name: str) -> None:
    legacy, confident, cse = "legacy" in name, "WC" in name, "cse" in name
    head = HEAD | {"SEGM_CONFIDENCE.ENABLED": "M_" in name, "UV_CONFIDENCE.ENABLED": confident}
    head["NAME"] = "DensePoseDeepLabHead" if "_DL" in name else "DensePoseV1ConvXHead"
    if legacy:
        head |= LEGACY
    if confident:
        head["UV_CONFIDENCE.TYPE"] = "iid_iso" if "WC1" in name else "indep_aniso"
        head["POINT_REGRESSION_WEIGHTS"] = 0.0005
    if cse:
        head |= under("CSE", CSE) | under("CSE.EMBEDDERS.smpl_27554", SMPL)
        head["CSE.EMBED_LOSS_NAME"] = "SoftEmbeddingLoss" if "soft" in name else "EmbeddingLoss"
    norm = {"R_50_FPN_WC1M_s1x": 100}.get(name, 1 if cse else None)
    clip = {"ENABLED": confident or cse}
    if clip["ENABLED"]:
        clip |= {"CLIP_TYPE": "norm" if norm else "value", "CLIP_VALUE": norm or 1}
    solver = SOLVER | under("CLIP_GRADIENTS", clip) | {"BASE_LR": 0.002 if legacy else 0.01}
    solver["WARMUP_FACTOR"] = 0.025 if confident and "_DL" not in name else 0.1
    facts = under("MODEL", MODEL) | under("MODEL.ROI_DENSEPOSE_HEAD", head)
    facts |= under("SOLVER", solver) | under("INPUT", INPUT)
    facts["MODEL.RESNETS.DEPTH"] = int(name.split("_")[1])
    assert_recipe(f"densepose/densepose_rcnn_{name}.yaml", facts)


def test_there_are_thirty() -> None:
    assert len(NAMES) == 30


def test_small_recipe() -> None:
    """What the surfaces of `shapes` were found to need: each without its line gets fewer right."""
    head = {"NAME": "DensePoseUNetHead", "IN_FEATURES": ["image"], "PART_MASK_WEIGHTS": 1}
    facts = under("MODEL.ROI_DENSEPOSE_HEAD", head | {"PUBLISHED_GRID": False})
    assert_recipe("densepose/densepose_shapes.yaml", facts)
    cfg = model_zoo.get_config("densepose/densepose_shapes.yaml")
    optimizer = build_optimizer(cfg, build_model(cfg))
    rates = {group["lr"] / cfg.SOLVER.BASE_LR for group in optimizer.param_groups}
    assert rates == {1.0, 4.0}, "the branch learns faster than the boxes"
