"""Lazy configs build what the YAML configs of the same names build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from d2ext import model_zoo

ROOT = Path(model_zoo.get_config_file("yolact/yolact_R_50_550.yaml")).parents[1]
NAMES = sorted(
    p.relative_to(ROOT).as_posix() for p in ROOT.glob("*/*.py") if p.parent.name != "common"
)
SIMPLE = (bool, int, float, str, type(None), torch.dtype)


def settings(value: Any) -> Any:
    """What can be compared of an object that is no module: its plain attributes, recursively."""
    if isinstance(value, (DictConfig, ListConfig)):
        value = OmegaConf.to_container(value)
    if isinstance(value, SIMPLE):
        return value
    if isinstance(value, (list, tuple)):
        return [settings(x) for x in value]
    if isinstance(value, dict) or type(value).__module__.startswith(("d2ext.", "detectron2.")):
        items = value.items() if isinstance(value, dict) else vars(value).items()
        return {key: settings(x) for key, x in items if not isinstance(x, nn.Module)}
    return type(value).__name__


def description(model: nn.Module) -> dict[str, Any]:
    """Each module's type and settings, each parameter's and buffer's shape."""
    shapes = {name: tuple(x.shape) for name, x in model.state_dict(keep_vars=True).items()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    modules = {
        name: {
            "type": type(module).__name__,
            **{k: settings(v) for k, v in vars(module).items() if not k.startswith("_")},
        }
        for name, module in model.named_modules()
    }
    return {"shapes": shapes, "trained": trained, **modules}


def test_every_system_has_one() -> None:
    systems = {name.split("/")[0] for name in model_zoo.available()} - {"baselines"}
    found = {name.split("/")[0] for name in NAMES}
    assert found == systems, "one YAML config of each system has a lazy config (.py) beside it"


@pytest.mark.parametrize("name", NAMES)
def test_lazy_config_builds_what_the_yaml_builds(name: str) -> None:
    cfg = LazyConfig.load(model_zoo.get_config_file(name))
    yaml = model_zoo.get(name.replace(".py", ".yaml"), device="cpu")
    lazy = instantiate(cfg.model).train()  # as model_zoo.get gives it
    expected = description(yaml)
    found = description(lazy)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == value, key
    if "pixel_mean" in dict(yaml.named_buffers()):
        assert torch.equal(lazy.pixel_mean, yaml.pixel_mean)
        assert torch.equal(lazy.pixel_std, yaml.pixel_std)
