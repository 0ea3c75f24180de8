"""Photometric distortion of the SSD family (Liu et al., arXiv 1512.02325), as YOLACT uses it."""

from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform

from d2ext.data.augmentations.base import PixelTransform

_TO_HSV = {"RGB": cv2.COLOR_RGB2HSV, "BGR": cv2.COLOR_BGR2HSV}
_FROM_HSV = {"RGB": cv2.COLOR_HSV2RGB, "BGR": cv2.COLOR_HSV2BGR}


class PhotometricTransform(PixelTransform):
    """Brightness, then contrast and HSV changes in one of two orders. Coordinates do not change.

    The result is float32 and is not clipped to [0, 255], as published: a bright area that is made
    brighter keeps its texture. Hue is in degrees, as OpenCV has it for floats; SSD code that works on
    bytes counts it in half degrees (0..179), so its 18 is 36 here.
    """

    def __init__(
        self,
        brightness: float = 0.0,
        contrast: float = 1.0,
        saturation: float = 1.0,
        hue: float = 0.0,
        contrast_first: bool = True,
        image_format: str = "BGR",
    ) -> None:
        """
        Args:
            brightness: added to every channel, in grey levels of [0, 255]
            contrast: factor on every channel
            saturation: factor on HSV saturation
            hue: added to HSV hue, in degrees
            contrast_first: contrast before saturation and hue, or after them
            image_format: ``"RGB"`` or ``"BGR"``
        """
        super().__init__()
        if image_format not in _TO_HSV:
            raise ValueError(
                f"Photometric distortion needs INPUT.FORMAT 'RGB' or 'BGR', got '{image_format}'."
            )
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """(H, W, 3), any dtype, [0, 255] → float32 of the same shape."""
        img = np.ascontiguousarray(img, dtype=np.float32) + np.float32(self.brightness)
        if self.contrast_first:
            img *= np.float32(self.contrast)
        if self.saturation != 1.0 or self.hue != 0.0:
            # For float32, OpenCV's hue is in degrees [0, 360) and saturation a ratio.
            hue, saturation, value = cv2.split(cv2.cvtColor(img, _TO_HSV[self.image_format]))
            saturation *= np.float32(self.saturation)
            hue += np.float32(self.hue)
            hue -= np.float32(360) * np.floor(hue * np.float32(1 / 360))
            img = cv2.cvtColor(cv2.merge((hue, saturation, value)), _FROM_HSV[self.image_format])
        if not self.contrast_first:
            img *= np.float32(self.contrast)
        return img


class RandomPhotometricDistortion(T.Augmentation):
    """Each of brightness, contrast, saturation and hue changes with probability ``prob``."""

    def __init__(
        self,
        brightness: float = 32.0,
        contrast: Sequence[float] = (0.5, 1.5),
        saturation: Sequence[float] = (0.5, 1.5),
        hue: float = 18.0,
        prob: float = 0.5,
        image_format: str = "BGR",
    ) -> None:
        """
        Args:
            brightness: largest change, grey levels
            contrast, saturation: smallest and largest factor
            hue: largest change, degrees
            prob: of each change
            image_format: ``"RGB"`` or ``"BGR"``
        """
        super().__init__()
        self._init(locals())
        PhotometricTransform(image_format=image_format)  # complains about other formats

    def get_transform(self, image: np.ndarray) -> Transform:
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"Expected an image with 3 channels, got shape {image.shape}.")
        return PhotometricTransform(
            brightness=self._choose((-self.brightness, self.brightness), 0.0),
            contrast=self._choose(self.contrast, 1.0),
            saturation=self._choose(self.saturation, 1.0),
            hue=self._choose((-self.hue, self.hue), 0.0),
            contrast_first=np.random.uniform() < 0.5,
            image_format=self.image_format,
        )

    def _choose(self, bounds: Sequence[float], neutral: float) -> float:
        """A uniform number from [low, high] with probability ``prob``, otherwise ``neutral``."""
        change, value = np.random.uniform(), np.random.uniform(bounds[0], bounds[1])
        return float(value) if change < self.prob else neutral
