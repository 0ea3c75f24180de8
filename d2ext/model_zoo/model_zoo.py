"""Find the configs that come with d2ext and build models from them."""

from __future__ import annotations

import difflib
from pathlib import Path

import detectron2
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from torch import nn

from d2ext.config import ConfigError, get_cfg

# In a checkout this is a link to the repository's configs/; a wheel holds the files themselves.
_CONFIGS = Path(__file__).resolve().parent / "configs"
# Where the link is missing: a checkout made without support for symbolic links.
_CONFIGS_OF_CHECKOUT = Path(__file__).resolve().parent.parent.parent / "configs"
# Its module model_zoo needs pkg_resources, which setuptools no longer has.
_DETECTRON2_CONFIGS = Path(detectron2.__file__).parent / "model_zoo" / "configs"


def _config_root() -> Path:
    return _CONFIGS if _CONFIGS.is_dir() else _CONFIGS_OF_CHECKOUT


def available() -> list[str]:
    """The names of all configs that can be trained, sorted; bases are left out."""
    root = _config_root()
    files = (path for path in root.rglob("*.yaml") if not path.name.startswith(("Base", "_")))
    return sorted(path.relative_to(root).as_posix() for path in files)


def get_config_file(config_path: str) -> str:
    """The real path of a config that comes with d2ext.

    Args:
        config_path: file name relative to ``configs/``, e.g. ``"yolact/yolact_R_50_550.yaml"``.

    Raises:
        FileNotFoundError: there is no such config; the message names those closest to it.
    """
    root = _config_root()
    path = root / config_path
    # The name comes from a user: it may not lead out of the folder.
    inside = root.resolve() in path.resolve().parents
    if not (inside and path.is_file()):
        names = available()
        close = difflib.get_close_matches(config_path, names, n=3, cutoff=0.4) or names
        raise FileNotFoundError(
            f"d2ext has no config {config_path!r}. Names are relative to configs/, for example: "
            f"{', '.join(close)}."
        )
    return str(path)


def find_config_file(name: str) -> str:
    """Path of a config file, given as a path or as a name in d2ext's or Detectron2's model zoo.

    Args:
        name: such as ``"runs/own.yaml"``, ``"yolact/yolact_R_50_550.yaml"`` or
            ``"COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"``; empty (no file) stays empty.

    Raises:
        ConfigError: there is no such file.
    """
    if not name or PathManager.isfile(name):
        return name
    try:
        return get_config_file(name)
    except FileNotFoundError as error:
        of_detectron2 = _DETECTRON2_CONFIGS / name
        if of_detectron2.is_file():
            return str(of_detectron2)
        raise ConfigError(
            f"There is no config file {name!r}, neither as a path nor among Detectron2's. {error}"
        ) from error


def get_config(config_path: str, trained: bool = False) -> CfgNode:
    """The config of a model, with Detectron2's and d2ext's defaults filled in.

    Args:
        config_path: file name relative to ``configs/``.
        trained: exists for compatibility with ``detectron2.model_zoo``. d2ext distributes no weights,
            so ``True`` is an error: convert a published checkpoint with ``d2ext convert`` and set
            ``cfg.MODEL.WEIGHTS`` to the result.

    Raises:
        FileNotFoundError: there is no such config.
        ValueError: ``trained`` is True.
    """
    file = get_config_file(config_path)
    if trained:
        raise ValueError(
            f"d2ext distributes no trained weights for {config_path!r}. Convert the published "
            "checkpoint with d2ext convert and set cfg.MODEL.WEIGHTS to the result."
        )
    cfg = get_cfg()
    cfg.merge_from_file(file)
    return cfg


def get(config_path: str, trained: bool = False, device: str | None = None) -> nn.Module:
    """Build a model and load the weights that its config names (``MODEL.WEIGHTS``), if any.

    Args:
        config_path: file name relative to ``configs/``.
        trained: see :func:`get_config`.
        device: where to put the model, e.g. ``"cpu"`` or ``"cuda:1"``; default: ``"cuda"`` if
            PyTorch sees a GPU, otherwise ``"cpu"``.

    Returns:
        The model, in training mode as ``detectron2.model_zoo.get`` returns it.
    """
    cfg = get_config(config_path, trained)
    cfg.MODEL.DEVICE = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(cfg)
    if cfg.MODEL.WEIGHTS:
        DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    model.train()
    return model
