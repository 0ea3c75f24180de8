"""What d2ext's augmentations share: their input, and how label maps are treated."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform, TransformList

from d2ext.data.augmentations.geometry import clip_polygon


@runtime_checkable
class DropsInstances(Protocol):
    """A transform after which some instances no longer count as annotated."""

    def keeps(self, boxes: np.ndarray) -> np.ndarray:
        """(N,) bool: which of the (N, 4) XYXY boxes, in pixels *before* the transform, stay."""


@runtime_checkable
class ReportsVisibleShares(Protocol):
    """A transform after which training wants to know how much of each box is left."""

    reports_visible_shares: bool


class PixelTransform(Transform):
    """Base of transforms that change pixels, not places: coordinates, masks and labels stay."""

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        return segmentation


class WindowTransform(Transform):
    """Base of transforms whose result is a window of ``new_w`` × ``new_h`` pixels: boxes and polygons
    are cut to it, so that a later expansion does not bring lost parts back."""

    new_w: int
    new_h: int

    def apply_box(self, box: np.ndarray) -> np.ndarray:
        """(N, 4) XYXY → cut to the window; boxes outside it get zero area."""
        return np.clip(super().apply_box(box), 0, np.array([self.new_w, self.new_h] * 2))

    def apply_polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        """List of (N, 2) polygons → those with area inside the window, cut exactly."""
        window = (0.0, 0.0, float(self.new_w), float(self.new_h))
        clipped = [clip_polygon(self.apply_coords(p), window) for p in polygons]
        return [p for p in clipped if len(p)]


class DetectionInput(T.AugInput):
    """Detectron2's ``AugInput`` that also knows which annotations are crowds and which are left.

    Attributes:
        image: H×W×C, uint8 or float32 in [0, 255]
        boxes: (N, 4) float XYXY in pixels, or None
        crowd: (N,) bool, the annotation is a crowd region; N = 0 without ``boxes``
        keep: (N,) bool, False once a transform has dropped the instance
        sem_seg: H×W labels, or None
    """

    def __init__(
        self,
        image: np.ndarray,
        *,
        boxes: np.ndarray | None = None,
        crowd: np.ndarray | None = None,
        sem_seg: np.ndarray | None = None,
    ) -> None:
        super().__init__(image, boxes=boxes, sem_seg=sem_seg)
        count = 0 if boxes is None else len(boxes)
        self.sem_seg: np.ndarray | None
        self.crowd = np.zeros(count, dtype=bool) if crowd is None else crowd
        self.keep = np.ones(count, dtype=bool)

    def transform(self, tfm: Transform) -> None:
        """Apply ``tfm`` to image, boxes and labels, and note which instances it drops."""
        for step in tfm.transforms if isinstance(tfm, TransformList) else [tfm]:
            if self.boxes is not None and isinstance(step, DropsInstances):
                self.keep = self.keep & step.keeps(self.boxes)
            super().transform(step)

    def replay(self, tfm: Transform) -> None:
        """Apply what augmentations gave for another image, as they would have."""
        if isinstance(tfm, TransformList):
            for step in tfm.transforms:
                self.replay(step)
            return
        labels, self.sem_seg = self.sem_seg, None
        self.transform(tfm)
        if labels is not None:
            self.sem_seg = _apply_to_labels(tfm, labels)


def _apply_to_labels(tfm: Transform, labels: np.ndarray) -> np.ndarray:
    apply: Any = getattr(tfm, "apply_labels", tfm.apply_segmentation)
    return apply(labels)


class LabelAwareAugmentation(T.Augmentation):
    """Base of augmentations whose transform treats label maps and instance masks differently.

    Detectron2 has one method, ``apply_segmentation``, for both. Here it means instance masks
    (0 and 1; new area is 0), and the transform has ``apply_labels`` for label maps (never
    interpolated; new area is the ignore label), which is what ``sem_seg`` of the input receives.
    """

    def __call__(self, aug_input: T.AugInput) -> Transform:
        labels = aug_input.sem_seg
        aug_input.sem_seg = None
        tfm = super().__call__(aug_input)
        if labels is not None:
            aug_input.sem_seg = _apply_to_labels(tfm, labels)
        return tfm
