"""What the reference tests of the detectors of corners share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances

from d2ext import model_zoo
from d2ext.checkpoint import convert_state_dict
from d2ext.data.augmentations.canvas import SquareCanvas
from d2ext.data.augmentations.resize import ResizeToSquare
from d2ext.systems.cornernet.model import CornerNet
from tests.reference.fixture import Fixture, draw_image

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
    """The fixture's images and boxes as the recipe without augmentation hands them over."""
    listed = fixture.manifest["inputs"].get("loss", fixture.manifest["inputs"])
    inputs = []
    for (height, width), seed, objects in zip(
        IMAGE_SIZES, seeds, listed["boxes_x1_y1_x2_y2_class"], strict=True
    ):
        image = draw_image(height, width, seed)
        boxes = np.array([o[:4] for o in objects], dtype=np.float32)
        for augmentation in (SquareCanvas(), ResizeToSquare(size)):
            transform = augmentation.get_transform(image)
            image, boxes = transform.apply_image(image), transform.apply_box(boxes)
        instances = Instances((size, size))
        instances.gt_boxes = Boxes(torch.from_numpy(boxes).float())
        instances.gt_classes = torch.tensor([o[4] - 1 for o in objects])
        inputs.append(
            {
                "image": torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))),
                "instances": instances,
            }
        )
    return inputs


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
