"""Models of all systems, and their files."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge

from d2ext.export.files import later_path, metadata, write
from d2ext.export.graph import capture, export_form, exportable
from d2ext.modeling.meta_arch import MetaArch
from tests.export.models import lively_model

HEIGHT, WIDTH = 129, 190
CORNERS = ("TEST.MAX_DISTANCE", 9.0, "NUM_CLASSES", 1, "TEST.TOP_K", 40)
PLUS = ("MASK_RESCORING.ENABLED", True, "INPUT_SIZE", 256, "BOTTOM_UP", "build_resnet_dcn_backbone")


RESNET = ["MODEL.RETINAFACE.BOTTOM_UP", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 18]
RESNET += ["MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"], "MODEL.RESNETS.NORM", "BN"]
RESNET += ["MODEL.RETINAFACE.IN_FEATURES", ["res3", "res4", "res5"]]
RESNET += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64]


def keys(section: str, *pairs: Any) -> list[Any]:
    return [f"MODEL.{section}.{x}" if i % 2 == 0 else x for i, x in enumerate(pairs)]


# Two levels of the pyramid are enough, and few nodes are soon written.
PERSONS = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"]]
PERSONS += keys("FPN", "IN_FEATURES", ["res4", "res5"])
PERSONS += keys("ANCHOR_GENERATOR", "SIZES", [[32], [64], [128]])
PERSONS += keys("RPN", "IN_FEATURES", ["p4", "p5", "p6"], "PRE_NMS_TOPK_TEST", 40)
PERSONS += keys("ROI_HEADS", "IN_FEATURES", ["p4", "p5"])
PERSONS += ["TEST.DETECTIONS_PER_IMAGE", 6, "INPUT.MIN_SIZE_TEST", 90]
FRAMES = keys("UPSNET", "TEST.SCORE_THRESH", 0.15, "TEST.MIN_SIZE", 100)
FRAMES += ["MODEL.FLOW.NAME", "PyramidFlow", "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3"]]
FRAMES += keys("FPN", "IN_FEATURES", ["res2", "res3"])
FRAMES += keys("ANCHOR_GENERATOR", "SIZES", [[16], [32], [64]])
FRAMES += keys("RPN", "IN_FEATURES", ["p2", "p3", "p4"])
FRAMES += keys("ROI_HEADS", "IN_FEATURES", ["p2", "p3"])
FRAMES += keys("SEM_SEG_HEAD", "IN_FEATURES", ["p2", "p3"])
MESH = {"toy": {"TYPE": "vertex_direct", "NUM_VERTICES": 30, "INIT_FILE": ""}}
EMBEDDINGS = ("PREDICTOR_NAME", "DensePoseEmbeddingPredictor", "DECODER_ON", False)
EMBEDDINGS += ("CSE.EMBEDDERS", MESH)


ONE_STACK = keys("CORNERNET_HOURGLASS", "NUM_STACKS", 1)


class Case(NamedTuple):
    architecture: str
    options: list[Any]
    dynamic_batch: bool = False
    dynamic_size: bool = False
    bytes_in: bool = False
    formats: tuple[str, ...] = ("torch", "onnx")


CASES = {
    "yolact": Case("YOLACT", [], dynamic_batch=True),
    "yolact_plus": Case(
        "YOLACT",
        keys("YOLACT", *PLUS, "TEST.NMS", "cross_class_fast", "TEST.CROP", "after")
        + ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, False, False, True]],
        formats=("onnx",),
    ),
    "yolact_edge": Case(
        "YolactEdge",
        keys("YOLACT_EDGE", "KEY_INTERVAL", 3, "MIN_SIMILARITY", -0.9),
    ),
    "cornernet": Case(
        "CornerNet", keys("CORNERNET", *CORNERS) + ONE_STACK, True, True, formats=("onnx",)
    ),
    "triplets": Case(
        "CenterNetTriplets",
        keys("CENTERNET_TRIPLETS", *CORNERS, "TEST.FLIP", False) + ONE_STACK,
        formats=("torch",),
    ),
    "centernet": Case("CenterNet", keys("CENTERNET", "TEST.FLIP", True), formats=("onnx",)),
    "landmarks": Case("LandmarkNet", [], formats=("onnx",)),
    "upsnet": Case(
        "UPSNet",
        keys("UPSNET", "TEST.SCORE_THRESH", 0.15, "TEST.MIN_SIZE", 100),
        formats=("onnx",),
    ),
    "vpsnet": Case("VPSNet", FRAMES + keys("VPSNET", "MAX_OBJECTS", 20)),
    "vpsnet_track": Case(
        "VPSNet",
        FRAMES
        + keys("VPSNET", "FUSION", False, "PUBLISHED_DUMMY", True, "PUBLISHED_ID_LOOKUP", True),
        formats=("torch",),
    ),
    "densepose": Case(
        "DensePose",
        PERSONS + keys("ROI_BOX_HEAD", "CLS_AGNOSTIC_BBOX_REG", True),
        formats=("onnx",),
    ),
    "densepose_embeddings": Case(
        "DensePose", PERSONS + keys("ROI_DENSEPOSE_HEAD", *EMBEDDINGS), formats=("torch",)
    ),
    "retinaface": Case("RetinaFace", ["DATASETS.THING_CLASSES", ["a", "b", "c"]], bytes_in=True),
    "retinaface_resnet": Case("RetinaFace", RESNET, dynamic_size=True, formats=("onnx",)),
    "retinaface_mesh": Case(
        "RetinaFace", keys("RETINAFACE", "MESH.NUM_VERTICES", 12), formats=("torch",)
    ),
}


class Exported(NamedTuple):
    cfg: CfgNode
    model: MetaArch
    path: Callable[[str], str]
    """Format → a file of it."""
    formats: tuple[str, ...]


def export_case(case: Case, folder: Any) -> Exported:
    """The model of a case; its files are written when they are asked for."""
    cfg, trained = lively_model(case.architecture, case.options)
    model = exportable(cfg, trained)
    cfg.MODEL.WEIGHTS = str(folder / "model.pth")
    torch.save({"model": trained.state_dict()}, cfg.MODEL.WEIGHTS)
    form = export_form(model)
    size = form.size
    if form.multiple:
        canvas = getattr(model, "canvas", None)
        size = (HEIGHT, WIDTH) if canvas is None else canvas((HEIGHT, WIDTH), 1.0).size
    if form.sizes:  # that of the image, resized and padded
        short, most = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        if hasattr(model, "network_size"):
            shape = model.network_size((HEIGHT, WIDTH))
        else:
            shape = ResizeShortestEdge.get_output_shape(HEIGHT, WIDTH, short, most)
        size = tuple(-(-side // form.multiple) * form.multiple for side in shape)

    told = cfg.clone()
    told.MODEL.FLOW.WEIGHTS = cfg.MODEL.WEIGHTS  # which is in the file, and nobody else's matter

    @functools.cache
    def program(later: bool, onnx: bool) -> Any:
        own = form.later if later else form
        assert own is not None
        return capture(
            model,
            own,
            size,
            bytes_in=case.bytes_in,
            dynamic_batch=case.dynamic_batch,
            dynamic_size=case.dynamic_size,
            onnx=onnx,
            earlier=form,
        )

    def path(file_format: str) -> str:
        onnx = file_format == "onnx"
        if onnx:
            for package in ("onnxscript", "onnxruntime"):
                pytest.importorskip(package, reason="pip install d2ext[export]")
        name = str(folder / f"model{'.onnx' if onnx else '.pt2'}")
        for own, target in ((form, name), (form.later, later_path(name))):
            if own is not None and not os.path.exists(target):
                # Graphs differ by their NMS, that of boxes in fixed slots.
                graph = program(own is form.later, onnx and form.sizes)
                write(graph, target, file_format, metadata(told, own, graph, "cpu"))
        return name

    return Exported(cfg, model, path, case.formats)
