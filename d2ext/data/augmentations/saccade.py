"""CornerNet-Saccade's crop: an object brought to a size that its attention map looks for
(arXiv 1904.08900; published code)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform, TransformList

from d2ext.data.augmentations.canvas import CanvasCropTransform
from d2ext.data.augmentations.resize import BilinearResizeTransform

# Longer sides (more than) of large, medium and small objects, and the smallest and largest side that one
# of them gets; the upper end is not drawn. Pixels (published code).
_SIDES = ((96.0, 96, 255), (32.0, 32, 97), (0.0, 16, 33))
# A crop may be centred on its object up to this many pixels (not included; published code).
_CENTER_JITTER = 15
# An object of a pixel would make images of 20,000 pixels.
_MAX_SIDE = 4096


class ScaleTransform(BilinearResizeTransform):
    """Resize by a factor; as published, sides are cut to whole pixels and coordinates are not."""

    def __init__(self, h: int, w: int, factor: float) -> None:
        """
        Args:
            h, w: size of the image, pixels
            factor: new side / side
        """
        super().__init__(h, w, max(1, int(h * factor)), max(1, int(w * factor)))
        self.factor = factor

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords * self.factor


class ContentCropTransform(CanvasCropTransform):
    """A window that cuts boxes to the image's part in it, at the last pixel's index, as published."""

    reports_visible_shares = True

    def apply_box(self, box: np.ndarray) -> np.ndarray:
        """(N, 4) XYXY → cut; boxes outside get zero area."""
        low = np.array([max(-self.left, 0), max(-self.top, 0)])
        x1 = min(self.center_x + self.new_w // 2, self.w)
        y1 = min(self.center_y + self.new_h // 2, self.h)
        high = np.array([x1 - self.left, y1 - self.top]) - 1
        shifted = np.asarray(box, dtype=np.float64) - [self.left, self.top] * 2
        return np.clip(shifted, np.tile(low, 2), np.tile(np.maximum(high, low), 2))


class RandomObjectCrop(T.Augmentation):
    """Scale a random object to a random size of its group, and cut a square that holds it.

    Groups are the objects of more than 96, more than 32 and fewer pixels in their longer side. Half of
    the crops are centred on the object, give or take some pixels, the others hold it anywhere. Without
    objects, the scale is a random one of ``scales`` and the place any.
    """

    def __init__(
        self,
        size: int = 255,
        scales: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1),
    ) -> None:
        """
        Args:
            size: side of the crop, pixels
            scales: for images without objects
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray, boxes: np.ndarray, crowd: np.ndarray) -> Transform:
        """
        Args:
            image: (h, w, C)
            boxes: (N, 4) XYXY, pixels, or None
            crowd: (N,) bool
        """
        h, w = image.shape[:2]
        boxes = np.zeros((0, 4)) if boxes is None else np.asarray(boxes, dtype=np.float64)[~crowd]
        boxes = np.clip(boxes, 0, [w - 1, h - 1] * 2)
        boxes = boxes[((boxes[:, 2:] - boxes[:, :2]) > 0).all(axis=1)]
        box = boxes[np.random.randint(len(boxes))] if len(boxes) else None
        if box is None:
            factor = float(np.random.choice(self.scales))
        else:
            longer = float((box[2:] - box[:2]).max())
            low, high = next((low, high) for limit, low, high in _SIDES if longer > limit)
            # The object fits into the crop, however small that is.
            low, high = min(low, self.size - 1), min(high, self.size)
            factor = np.random.randint(low, high) / longer
        factor = min(factor, _MAX_SIDE / max(h, w))
        scale = ScaleTransform(h, w, factor)
        centered = bool(np.random.uniform() > 0.5)
        x0, y0, x1, y1 = (None,) * 4 if box is None else box * factor
        center_x = self._center(scale.new_w, x0, x1, centered)
        center_y = self._center(scale.new_h, y0, y1, centered)
        window = ContentCropTransform(
            scale.new_w, scale.new_h, center_x, center_y, self.size, self.size
        )
        return TransformList([scale, window])

    def _center(self, length: int, low: float | None, high: float | None, centered: bool) -> int:
        """The middle pixel of the crop along a side; the object lies in [low, high]."""
        if length <= self.size:
            return length // 2
        if low is None or high is None:
            return int(np.random.randint(0, length - self.size + 1)) + self.size // 2
        if centered:
            middle = (low + high) // 2
            first = max(middle - np.random.randint(0, _CENTER_JITTER), 0)
            last = min(middle + np.random.randint(0, _CENTER_JITTER), length - 1)
            return int(np.random.randint(int(first), int(last) + 1))
        first, last = max(high - self.size, 0), min(length - self.size, low)
        return int(np.random.randint(int(first), int(last) + 1)) + self.size // 2
