"""Detectron2's own models, by their names in its model zoo: on own data, on `shapes`, in every tool."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from detectron2.config import CfgNode

from d2ext.config import load_config, merge_options
from d2ext.data.custom import apply_dataset_to_config, register_own_dataset
from d2ext.data.shapes.export import export_images
from d2ext.data.shapes.sets import ShapesSet
from d2ext.engine import Trainer
from d2ext.engine.predictor import BatchPredictor
from d2ext.model_zoo import find_config_file

REPOSITORY = Path(__file__).resolve().parents[2]
MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
TINY: dict[str, Any] = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.FPN.OUT_CHANNELS": 16,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "INPUT.MIN_SIZE_TRAIN": (96,),
    "INPUT.MIN_SIZE_TEST": 96,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 1e-4,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.STEPS": (),
    "TEST.DETECTIONS_PER_IMAGE": 5,
    "SEED": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`shapes` as anybody's files."""
    folder = tmp_path_factory.mktemp("own")
    export_images(ShapesSet("all", 4, 96, 96), folder)
    return folder


def register(folder: Path, annotations: str) -> str:
    """Data of a user: ``annotations`` is instances, person_keypoints or panoptic."""
    name = f"detectron2_{annotations}"
    key = "panoptic_json" if annotations == "panoptic" else "json"
    files = {"images": str(folder / "all2017")}
    files[key] = str(folder / f"annotations/{annotations}_all2017.json")
    if annotations == "panoptic":
        files["panoptic_root"] = str(folder / "panoptic_all2017")
    register_own_dataset(
        name, **{f"{split}_{k}": v for split in ("train", "val") for k, v in files.items()}
    )
    return name


def value_of(cfg: CfgNode, key: str) -> Any:
    for word in key.split("."):
        cfg = cfg[word]
    return cfg


@pytest.mark.parametrize(
    ("config", "annotations", "counts", "results"),
    [
        (
            "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
            "instances",
            {"MODEL.ROI_HEADS.NUM_CLASSES": 8},
            ["bbox"],
        ),
        (MASK_RCNN, "instances", {"MODEL.ROI_HEADS.NUM_CLASSES": 8}, ["bbox", "segm"]),
        (
            "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
            "person_keypoints",
            {"MODEL.ROI_HEADS.NUM_CLASSES": 1, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": 8},
            ["bbox", "keypoints"],
        ),
        (
            "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
            "panoptic",
            {"MODEL.ROI_HEADS.NUM_CLASSES": 8, "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 7},
            ["bbox", "segm", "sem_seg", "panoptic_seg"],
        ),
        (
            "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
            "instances",
            {"MODEL.RETINANET.NUM_CLASSES": 8},
            ["bbox"],
        ),
    ],
)
def test_own_data(
    folder: Path,
    tmp_path: Path,
    config: str,
    annotations: str,
    counts: dict[str, int],
    results: list[str],
) -> None:
    cfg = load_config(find_config_file(config))
    apply_dataset_to_config(cfg, register(folder, annotations))
    options = {**TINY, "OUTPUT_DIR": str(tmp_path)}
    merge_options(cfg, [x for pair in options.items() for x in pair])
    assert {key: value_of(cfg, key) for key in counts} == counts
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    assert list(trainer.train() or {}) == results
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    (output,) = BatchPredictor(cfg)([np.zeros((64, 80, 3), np.uint8)])
    assert output["instances"].image_size == (64, 80)
    assert ("panoptic_seg" in output) == ("panoptic_seg" in results)


@pytest.mark.parametrize(
    ("tool", "arguments", "written"),
    [
        ("train_net", "--dataset shapes {tiny} OUTPUT_DIR {out}", "model_final.pth"),
        ("visualize_data", "--dataset shapes --num 1 --output-dir {out} {tiny}", "montage.png"),
        (
            "demo",
            "--input {image} --confidence-threshold 0.9 --output {out} --opts {tiny} "
            "MODEL.ROI_HEADS.NUM_CLASSES 8",
            "*.jpg",
        ),
        (
            "benchmark",
            "--device cpu --image {image} --iters 1 --warmup 1 --output {out}/b.json --opts {tiny}",
            "b.json",
        ),
    ],
)
def test_tools(folder: Path, tmp_path: Path, tool: str, arguments: str, written: str) -> None:
    options = {**TINY, "DATASETS.TRAIN": ("shapes_val",), "DATASETS.TEST": ()}
    words = ["model"] if tool == "benchmark" else []
    for word in ["--config-file", MASK_RCNN, *arguments.split()]:
        if word == "{tiny}":
            words += [str(x) for pair in options.items() for x in pair]
        else:
            words.append(word.format(image=folder / "all2017/000000000000.jpg", out=tmp_path))
    spec = importlib.util.spec_from_file_location(tool, REPOSITORY / f"tools/{tool}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = getattr(module, "run", None) or module.main
    assert run(words) == 0
    assert list(tmp_path.glob(written))
