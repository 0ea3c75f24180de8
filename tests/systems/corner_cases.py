"""What the reference tests of the detectors of corners share."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from fvcore.transforms.transform import Transform

from d2ext import model_zoo
from d2ext.checkpoint import convert_state_dict
from d2ext.systems.cornernet.model import CornerNet
from tests.reference.fixture import Fixture, draw_image
from tests.systems.fixture_files import classes, coco_annotation, load_batch, write_coco

IMAGE_SIZES = ((180, 240), (120, 160))


def build_with_weights(config: str, system: str, fixture: Fixture) -> CornerNet:
    """The model of a config with the fixture's weights, in inference mode."""
    cfg = model_zoo.get_config(config)
    with torch.device("meta"):
        model = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    model = model.to_empty(device="cpu")
    for name in ("pixel_mean", "pixel_std"):
        setattr(model, name, torch.tensor(cfg.MODEL[name.upper()]).view(-1, 1, 1))
    published = {k: torch.from_numpy(v) for k, v in fixture.state_dict().items()}
    model.load_state_dict(convert_state_dict(system, published), strict=True, assign=True)
    return model.eval()


def squared_inputs(fixture: Fixture, seeds: tuple[int, int], size: int) -> list[dict[str, Any]]:
    """The fixture's images and boxes, from files through the recipe without augmentation."""
    listed = fixture.manifest["inputs"].get("loss", fixture.manifest["inputs"])
    images = [draw_image(*shape, seed) for shape, seed in zip(IMAGE_SIZES, seeds, strict=True)]
    return load_boxes(images, listed["boxes_x1_y1_x2_y2_class"], size)


def load_boxes(
    images: list[np.ndarray],
    objects: list[list[list[float]]],
    size: int,
    transforms: list[list[Transform]] | None = None,
) -> list[dict[str, Any]]:
    """Images (BGR) and their boxes x1, y1, x2, y2, class (from 1), through the training loader; see
    :func:`load_batch`."""
    cfg = model_zoo.get_config("cornernet/cornernet_hourglass104_511.yaml")
    augmentation = cfg.INPUT.AUGMENTATION
    augmentation.SIZE, augmentation.CROP_ENABLED, augmentation.FLIP_PROB = size, False, 0.0
    augmentation.COLOR_JITTER = augmentation.LIGHTING = 0.0
    annotations = [[coco_annotation(x[:4], int(x[4]) - 1) for x in listed] for listed in objects]
    with tempfile.TemporaryDirectory() as folder:
        files = write_coco(Path(folder), images, annotations, classes(5))
        return load_batch(cfg, files, transforms)


def assert_detections(actual: np.ndarray, expected: np.ndarray) -> None:
    """Rows class, x1, y1, x2, y2, score, one to one in any order."""
    assert actual.shape == expected.shape
    tolerance = np.array([0.1, 0.05, 0.05, 0.05, 0.05, 1e-4])
    equal = (np.abs(actual[:, None] - expected[None]) <= tolerance).all(axis=2)
    left = np.ones(len(actual), dtype=bool)
    for j in range(len(expected)):
        partners = np.flatnonzero(equal[:, j] & left)
        assert len(partners), f"No detection is like {expected[j]}."
        left[partners[0]] = False
