"""Boxes for models that look into boxes (landmarks): from a file, or from a detector."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from itertools import compress
from typing import Any

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from d2ext.config import ConfigError
from d2ext.data.landmarks.samples import in_categories
from d2ext.engine.predictor import BatchPredictor

__all__ = ["BoxFile", "BoxSource", "Detector"]


class BoxSource:
    """Gives each image the boxes to look into."""

    def __call__(self, image_ids: Sequence[int], images: Sequence[np.ndarray]) -> list[Instances]:
        """Boxes of images.

        Args:
            image_ids: ids of the images.
            images: H×W×3, BGR, uint8.

        Returns:
            for each image ``pred_boxes`` (n, 4) XYXY in its pixels, and ``scores`` (n,).
        """
        raise NotImplementedError


class BoxFile(BoxSource):
    """Boxes of a JSON list of detections in COCO's result form.

    Args:
        path: of the list; each entry has ``image_id``, ``bbox`` (x, y, width, height) and, as a rule,
            ``score`` (1 where it is missing) and ``category_id``. Other keys are ignored.
        threshold: boxes of a lower score are left out.
        categories: ids of the categories to look into, see
            :func:`~d2ext.data.landmarks.samples.in_categories`; None: all.

    Raises:
        ConfigError: no such file, or not such a list.
    """

    def __init__(
        self, path: str, threshold: float = 0.0, categories: Collection[int] | None = None
    ) -> None:
        try:
            with open(path, encoding="utf-8") as file:
                entries = json.load(file)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ConfigError(f"The boxes cannot be read from '{path}': {error}") from error
        if not isinstance(entries, list):
            raise ConfigError(f"'{path}' is no list of detections (COCO's result form).")
        self._found: dict[int, list[tuple[list[float], float]]] = {}
        read = [_read_entry(entry, path) for entry in entries]
        for image_id, box, score in compress(read, in_categories(entries, categories, path)):
            if score >= threshold:
                self._found.setdefault(image_id, []).append((box, score))

    def __call__(self, image_ids: Sequence[int], images: Sequence[np.ndarray]) -> list[Instances]:
        """None for an image that the file does not name."""
        return [
            _instances(image.shape, self._found.get(image_id, []))
            for image_id, image in zip(image_ids, images, strict=True)
        ]


def _read_entry(entry: Any, path: str) -> tuple[int, list[float], float]:
    """Image id, XYXY box and score of one detection."""
    try:
        x, y, width, height = (float(value) for value in entry["bbox"])
        return int(entry["image_id"]), [x, y, x + width, y + height], float(entry.get("score", 1))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"An entry of '{path}' is no detection with image_id, bbox (4 numbers) and score: "
            f"{str(entry)[:100]}"
        ) from error


def _instances(shape: Sequence[int], found: list[tuple[list[float], float]]) -> Instances:
    instances = Instances((shape[0], shape[1]))
    instances.pred_boxes = Boxes(torch.tensor([box for box, _ in found]).reshape(-1, 4))
    instances.scores = torch.tensor([score for _, score in found], dtype=torch.float32)
    return instances


class Detector(BoxSource):
    """Boxes that any detector of Detectron2 or d2ext finds.

    Args:
        predictor: runs the detector.
        threshold: boxes of a lower score are left out.
        classes: contiguous ids of the classes to look into; None: all.
    """

    def __init__(
        self,
        predictor: BatchPredictor,
        threshold: float = 0.5,
        classes: Sequence[int] | None = None,
    ) -> None:
        self._predictor = predictor
        self._threshold = threshold
        self._classes = classes

    def __call__(self, image_ids: Sequence[int], images: Sequence[np.ndarray]) -> list[Instances]:
        """Best first.

        Raises:
            ConfigError: the model detects no boxes.
        """
        result = []
        for output in self._predictor(images):
            if "instances" not in output or not output["instances"].has("pred_boxes"):
                raise ConfigError("The detector's output has no instances with boxes.")
            found = output["instances"]
            keep = found.scores >= self._threshold
            if self._classes is not None:
                wanted = torch.tensor(list(self._classes), device=found.pred_classes.device)
                keep &= torch.isin(found.pred_classes, wanted)
            order = found.scores.argsort(descending=True, stable=True)
            order = order[keep[order]]
            boxes = Instances(found.image_size)
            boxes.pred_boxes, boxes.scores = found.pred_boxes[order], found.scores[order]
            result.append(boxes)
        return result
