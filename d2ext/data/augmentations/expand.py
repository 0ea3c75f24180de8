"""Expansion: the image becomes a part of a larger canvas, so that objects become smaller (SSD)."""

from collections.abc import Sequence

import cv2
import numpy as np
from fvcore.transforms.transform import NoOpTransform, Transform

from d2ext.data.augmentations.base import LabelAwareAugmentation


class ExpandTransform(Transform):
    """Put the image at (``left``, ``top``) of a ``new_w`` × ``new_h`` canvas."""

    def __init__(
        self,
        w: int,
        h: int,
        left: int,
        top: int,
        new_w: int,
        new_h: int,
        fill: Sequence[float],
        ignore_label: int = 255,
    ) -> None:
        """
        Args:
            w, h: size of the image, pixels
            left, top: where its corner goes, pixels
            new_w, new_h: size of the canvas, pixels
            fill: colour of the canvas, one value per channel of the image
            ignore_label: value of the canvas in label maps; instance masks get 0
        """
        super().__init__()
        if left < 0 or top < 0 or left + w > new_w or top + h > new_h:
            raise ValueError(
                f"An image of {w}x{h} at ({left}, {top}) does not fit into {new_w}x{new_h}."
            )
        self._set_attributes(locals())

    def _pad(self, img: np.ndarray, value: float | Sequence[float]) -> np.ndarray:
        img = np.asarray(img)
        canvas = np.empty((self.new_h, self.new_w, *img.shape[2:]), dtype=img.dtype)
        bottom, right = self.top + self.h, self.left + self.w
        color = np.rint(value) if img.dtype.kind in "ui" else value
        for band in (
            canvas[: self.top],
            canvas[bottom:],
            canvas[self.top : bottom, : self.left],
            canvas[self.top : bottom, right:],
        ):
            band[...] = color
        canvas[self.top : bottom, self.left : right] = img
        return canvas

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """(H, W, C) or (H, W) → (new_h, new_w, ...); the dtype stays."""
        if img.ndim == 3 and img.dtype == np.float32 and img.shape[2] == len(self.fill) <= 4:
            # The same as _pad, about three times as fast.
            right = self.new_w - self.left - self.w
            bottom = self.new_h - self.top - self.h
            value = [float(v) for v in self.fill]
            canvas = cv2.copyMakeBorder(
                np.ascontiguousarray(img),
                *(self.top, bottom, self.left, right),
                cv2.BORDER_CONSTANT,
                value=value,
            )
            return canvas.reshape(self.new_h, self.new_w, -1)
        return self._pad(img, self.fill if img.ndim == 3 else float(np.mean(self.fill)))

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Instance masks: the canvas is 0."""
        return self._pad(segmentation, 0)

    def apply_labels(self, labels: np.ndarray) -> np.ndarray:
        """Label maps: the canvas is ``ignore_label``."""
        return self._pad(labels, self.ignore_label)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords + np.array([self.left, self.top])


class RandomExpand(LabelAwareAugmentation):
    """With probability ``prob``, expand both sides by one factor from ``ratio``."""

    def __init__(
        self,
        ratio: Sequence[float] = (1.0, 4.0),
        fill: Sequence[float] = (103.94, 116.78, 123.68),
        prob: float = 0.5,
        ignore_label: int = 255,
    ) -> None:
        """
        Args:
            ratio: smallest and largest factor on the sides, ≥ 1
            fill: colour of the canvas, in the channel order of the image
            prob: probability of an expansion
            ignore_label: value of new area in label maps
        """
        super().__init__()
        if min(ratio) < 1:
            raise ValueError(f"Expansion factors must be at least 1, got {tuple(ratio)}.")
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        if np.random.uniform() >= self.prob:
            return NoOpTransform()
        h, w = image.shape[:2]
        ratio = np.random.uniform(*self.ratio)
        new_h, new_w = int(h * ratio), int(w * ratio)
        left = int(np.random.uniform(0, w * ratio - w))
        top = int(np.random.uniform(0, h * ratio - h))
        fill = list(self.fill)[: image.shape[2] if image.ndim == 3 else 1]
        return ExpandTransform(
            *(w, h, min(left, new_w - w), min(top, new_h - h), new_w, new_h),
            fill=fill,
            ignore_label=self.ignore_label,
        )
