"""Resizing: to a square as YOLACT does, by a factor as UPSNet and VPSNet do, and Detectron2's made safe
for extreme shapes."""

import cv2
import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import NoOpTransform, Transform

from d2ext.codecs.image_scale import axis_scales, scaled_size, short_side_scale
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


class ScaleTransform(Transform):
    """Resize both sides by a factor, as ``cv2.resize(image, None, fx=scale, fy=scale)`` of floats: half
    pixel centres, no antialiasing, no rounding to bytes; masks and labels nearest."""

    def __init__(self, h: int, w: int, scale: float) -> None:
        """
        Args:
            h, w: size of the image, pixels
            scale: the factor, see :func:`~d2ext.codecs.image_scale.scaled_size`
        """
        super().__init__()
        self._set_attributes(locals())

    def _resize(self, img: np.ndarray, interpolation: int) -> np.ndarray:
        if img.shape[:2] != (self.h, self.w):
            raise ValueError(f"Expected an image of {self.h}x{self.w}, got shape {img.shape}.")
        fy, fx = axis_scales((self.h, self.w), self.scale)
        result = cv2.resize(
            np.ascontiguousarray(img), None, fx=fx, fy=fy, interpolation=interpolation
        )
        # OpenCV drops a channel dimension of one.
        return result.reshape(*scaled_size((self.h, self.w), self.scale), *img.shape[2:])

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """(H, W, C) or (H, W), uint8 or float32 → float32 of the new size."""
        return self._resize(img.astype(np.float32), cv2.INTER_LINEAR)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Instance masks and label maps: nearest."""
        # OpenCV has no nearest resize of bool and 64-bit integers; labels are exact in float64.
        result = self._resize(segmentation.astype(np.float64), cv2.INTER_NEAREST)
        return result.astype(segmentation.dtype)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return coords * self.scale


class ScaleShortestEdge(T.ResizeShortestEdge):
    """Detectron2's ``ResizeShortestEdge``, by a factor (:class:`ScaleTransform`)."""

    def get_transform(self, image: np.ndarray) -> Transform:
        lengths = self.short_edge_length
        if self.is_range:
            short = np.random.randint(lengths[0], lengths[1] + 1)
        else:
            short = np.random.choice(lengths)
        h, w = image.shape[:2]
        return ScaleTransform(h, w, short_side_scale((h, w), int(short), self.max_size))


class RandomScale(T.Augmentation):
    """VPSNet's resize: by a factor that is uniform in a range, whatever the size of the image."""

    def __init__(self, scales: tuple[float, float]) -> None:
        """
        Args:
            scales: smallest and largest factor on both sides
        """
        super().__init__()
        if not 0 < scales[0] <= scales[1]:
            raise ValueError(
                "INPUT.AUGMENTATION.RESIZE_SCALE is the smallest and the largest factor, not "
                f"{tuple(scales)}."
            )
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        h, w = image.shape[:2]
        return ScaleTransform(h, w, float(np.random.uniform(*self.scales)))
