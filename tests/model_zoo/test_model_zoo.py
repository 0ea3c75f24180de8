"""d2ext.model_zoo: every config loads under its name, wrong names are explained."""

from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.solver import build_lr_scheduler

from d2ext import model_zoo
from d2ext.config import ConfigError, load_config
from d2ext.data.augmentations import build_augmentations
from d2ext.engine.optimizer import build_optimizer

DEMO = "yolact/yolact_R_18_shapes.yaml"
ROOT = Path(__file__).resolve().parent.parent.parent


def test_available_names_every_config_of_the_checkout() -> None:
    files = {
        path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.yaml")
    }
    bases = {name for name in files if Path(name).name.startswith(("Base", "_"))}
    assert model_zoo.available() == sorted(files - bases)
    assert DEMO in model_zoo.available()


@pytest.mark.parametrize("name", model_zoo.available())
def test_every_config_merges_into_the_defaults(name: str) -> None:
    cfg = model_zoo.get_config(name)
    assert isinstance(cfg, CfgNode)
    # Merging fails on unknown keys; what is left to see is that the file took effect.
    detectron2_s = name.startswith(("baselines/", "densepose/"))
    assert detectron2_s or cfg.MODEL.META_ARCHITECTURE != "GeneralizedRCNN"
    assert ("cuda" if torch.cuda.is_available() else "cpu") == cfg.MODEL.DEVICE


@pytest.mark.parametrize("name", model_zoo.available())
def test_every_recipe_can_begin(name: str) -> None:
    """What only training reads of a config: optimizer, clipping, schedule, augmentation."""
    cfg = model_zoo.get_config(name)
    model = torch.nn.Linear(2, 1)
    # Names of parameters of the real model.
    cfg.SOLVER.LR_FACTORS = []
    optimizer = build_optimizer(cfg, model)
    build_lr_scheduler(cfg, optimizer)
    model(torch.full((1, 2), 1e4)).sum().backward()
    optimizer.step()
    # NOTES.md: clipped by the norm of all gradients, at 35.
    if name.startswith("vpsnet/vpsnet_") and "shapes" not in name:
        assert model.weight.grad is not None
        assert model.weight.grad.norm() == pytest.approx(35.0, rel=1e-3)
    assert build_augmentations(cfg, is_train=True)


def test_get_builds_the_model_of_the_config(tmp_path: Path) -> None:
    model = model_zoo.get(DEMO, device="cpu")
    assert type(model).__name__ == "YOLACT"
    assert model.training
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_wrong_name_is_answered_with_the_closest() -> None:
    with pytest.raises(FileNotFoundError, match=r"yolact/yolact_R_18_shapes\.yaml"):
        model_zoo.get_config_file("yolact/yolact_R18_shapes.yaml")


@pytest.mark.parametrize("name", ["../pyproject.toml", "/etc/hostname", "", "yolact"])
def test_only_configs_are_found(name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no config"):
        model_zoo.get_config_file(name)


def test_trained_weights_are_refused_with_the_way_to_get_them() -> None:
    with pytest.raises(ValueError, match="d2ext convert"):
        model_zoo.get_config(DEMO, trained=True)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        (DEMO, "YOLACT"),
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml", "GeneralizedRCNN"),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "RetinaNet"),  # holds a tag that runs code
    ],
)
def test_config_files_by_name(name: str, architecture: str) -> None:
    path = model_zoo.find_config_file(name)
    assert path.endswith(name)
    assert architecture == load_config(path).MODEL.META_ARCHITECTURE


def test_config_files_by_path(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.touch()
    assert model_zoo.find_config_file(str(path)) == str(path)
    assert model_zoo.find_config_file("") == ""
    with pytest.raises(ConfigError, match=r"no config file .*yolact/yolact_R_50_550\.yaml"):
        model_zoo.find_config_file("yolact/yolact_R_51_550.yaml")
