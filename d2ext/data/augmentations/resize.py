"""Resizing: to a square as YOLACT does, and Detectron2's made safe for extreme shapes."""

import cv2
import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import NoOpTransform, Transform

from d2ext.data.augmentations.base import LabelAwareAugmentation


class BilinearResizeTransform(Transform):
    """Bilinear resize with half-pixel centres and without antialiasing (OpenCV's and PyTorch's
    default), also for uint8 images, where Detectron2's ``ResizeTransform`` smooths."""

    def __init__(self, h: int, w: int, new_h: int, new_w: int) -> None:
        """
        Args:
            h, w: size of the image, pixels
            new_h, new_w: size of the result, pixels
        """
        super().__init__()
        self._set_attributes(locals())

    def _resize(self, img: np.ndarray, interpolation: int) -> np.ndarray:
        if img.shape[:2] != (self.h, self.w):
            raise ValueError(f"Expected an image of {self.h}x{self.w}, got shape {img.shape}.")
        source = np.ascontiguousarray(img, dtype=np.uint8 if img.dtype == bool else None)
        result = cv2.resize(source, (self.new_w, self.new_h), interpolation=interpolation)
        # OpenCV drops a channel dimension of one.
        return result.reshape(self.new_h, self.new_w, *img.shape[2:]).astype(img.dtype, copy=False)

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """(H, W, C) or (H, W), uint8 or float32 → (new_h, new_w, ...) of the same dtype."""
        return self._resize(img, cv2.INTER_LINEAR)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Instance masks of 0 and 1: bilinear, rounded at one half, as published."""
        resized = self._resize(segmentation.astype(np.float32), cv2.INTER_LINEAR)
        return (resized > 0.5).astype(segmentation.dtype)

    def apply_labels(self, labels: np.ndarray) -> np.ndarray:
        """Label maps: the nearest label."""
        return self._resize(labels, cv2.INTER_NEAREST_EXACT)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords * np.array([self.new_w / self.w, self.new_h / self.h])


class ResizeToSquare(LabelAwareAugmentation):
    """Resize to ``size`` × ``size`` pixels, whatever the aspect ratio."""

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"The side must be at least one pixel, got {size}.")
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        h, w = image.shape[:2]
        return BilinearResizeTransform(h, w, self.size, self.size)


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's ``ResizeShortestEdge``, whose result has at least one pixel per side.

    A 1×5000 image with a longest side of 1333 would otherwise become 0 pixels high.
    """

    def get_transform(self, image: np.ndarray) -> Transform:
        tfm = super().get_transform(image)
        if isinstance(tfm, NoOpTransform):
            return tfm
        return T.ResizeTransform(tfm.h, tfm.w, max(tfm.new_h, 1), max(tfm.new_w, 1), tfm.interp)
