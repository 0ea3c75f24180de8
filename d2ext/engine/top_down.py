"""Boxes for top-down models (landmarks): from a file, or from a detector."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from d2ext.config import ConfigError
from d2ext.data.coco_results import read_coco_results
from d2ext.engine.predictor import BatchPredictor

__all__ = ["BoxFile", "BoxSource", "Detector", "WithMargins"]


class BoxSource:
    """Gives the boxes of each image that are cropped."""

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
        path, threshold, categories: see :func:`~d2ext.data.coco_results.read_coco_results`.

    Raises:
        ConfigError: no such file, or not such a list.
    """

    def __init__(
        self, path: str, threshold: float = 0.0, categories: Collection[int] | None = None
    ) -> None:
        self._detections: dict[int, list[tuple[list[float], float]]] = {}
        try:
            for image_id, detections in read_coco_results(path, threshold, categories).items():
                self._detections.setdefault(int(image_id), []).extend(detections)
        except (OSError, ValueError, TypeError) as error:  # DatasetError among them
            raise ConfigError(f"The boxes cannot be read from '{path}': {error}") from error

    def __call__(self, image_ids: Sequence[int], images: Sequence[np.ndarray]) -> list[Instances]:
        """No boxes for an image that is not in the file."""
        return [
            _instances(image.shape, self._detections.get(image_id, []))
            for image_id, image in zip(image_ids, images, strict=True)
        ]


def _instances(shape: Sequence[int], detections: list[tuple[list[float], float]]) -> Instances:
    instances = Instances((shape[0], shape[1]))
    instances.pred_boxes = Boxes(torch.tensor([box for box, _ in detections]).reshape(-1, 4))
    instances.scores = torch.tensor([score for _, score in detections], dtype=torch.float32)
    return instances


class Detector(BoxSource):
    """Boxes from any detector of Detectron2 or d2ext.

    Args:
        predictor: runs the detector.
        threshold: boxes of a lower score are left out.
        classes: contiguous ids of the classes to use; None: all.
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
            detections = output["instances"]
            keep = detections.scores >= self._threshold
            if self._classes is not None:
                wanted = torch.tensor(list(self._classes), device=detections.pred_classes.device)
                keep &= torch.isin(detections.pred_classes, wanted)
            order = detections.scores.argsort(descending=True, stable=True)
            order = order[keep[order]]
            boxes = Instances(detections.image_size)
            boxes.pred_boxes, boxes.scores = detections.pred_boxes[order], detections.scores[order]
            result.append(boxes)
        return result


class WithMargins(BoxSource):
    """Boxes of another source, larger or smaller: data sets disagree about where an object ends.

    Args:
        source: gives the boxes.
        margins: left, top, right and bottom, in widths and heights of the box; negative ones cut.
    """

    def __init__(self, source: BoxSource, margins: Sequence[float]) -> None:
        left, top, right, bottom = margins
        self._source, self._outward = source, (-left, -top, right, bottom)

    def __call__(self, image_ids: Sequence[int], images: Sequence[np.ndarray]) -> list[Instances]:
        """As the source's."""
        result = self._source(image_ids, images)
        for instances in result:
            boxes = instances.pred_boxes.tensor
            sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
            instances.pred_boxes = Boxes(boxes + sides * boxes.new_tensor(self._outward))
        return result
