"""Colour jitter with PCA lighting of CornerNet (arXiv 1808.01244) and CenterNet (arXiv 1904.07850).

The lighting noise along the principal components of ImageNet's colours is that of AlexNet.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import Transform

from d2ext.data.augmentations.base import PixelTransform

# Principal components (columns) of the colours of ImageNet in [0, 1] and their standard deviations; rows
# are blue, green, red (published code).
_COMPONENTS = np.array(
    [
        [-0.58752847, -0.69563484, 0.41340352],
        [-0.5832747, 0.00994535, -0.81221408],
        [-0.56089297, 0.71832671, 0.41158938],
    ]
)
_DEVIATIONS = np.array([0.2141788, 0.01817699, 0.00341571])
_TO_GREY = {"RGB": cv2.COLOR_RGB2GRAY, "BGR": cv2.COLOR_BGR2GRAY}
_CHANGES = ("brightness", "contrast", "saturation")


class ColorLightingTransform(PixelTransform):
    """Brightness, contrast and saturation in a given order, then an added colour.

    The grey image and its mean, towards which saturation and contrast draw, are those of the image
    before any change, whatever the order, as published. The result is float32 and is not clipped to
    [0, 255], as published. Coordinates do not change.
    """

    def __init__(
        self,
        brightness: float = 1.0,
        contrast: float = 1.0,
        saturation: float = 1.0,
        lighting: Sequence[float] | np.ndarray = (0.0, 0.0, 0.0),
        order: Sequence[str] = _CHANGES,
        image_format: str = "BGR",
    ) -> None:
        """
        Args:
            brightness: factor on every channel
            contrast: 1 keeps, 0 gives the mean grey level
            saturation: 1 keeps, 0 gives the grey image
            lighting: amounts of the three principal components that are added
            order: of "brightness", "contrast" and "saturation"
            image_format: ``"RGB"`` or ``"BGR"``
        """
        super().__init__()
        if image_format not in _TO_GREY:
            raise ValueError(
                f"Colour jitter needs INPUT.FORMAT 'RGB' or 'BGR', got '{image_format}'."
            )
        if sorted(order) != sorted(_CHANGES):
            raise ValueError(f"The order must hold each of {_CHANGES} once, got {tuple(order)}.")
        self._set_attributes(locals())

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """(H, W, 3), any dtype, [0, 255] → float32 of the same shape."""
        img = np.array(img, dtype=np.float32)
        grey = cv2.cvtColor(img, _TO_GREY[self.image_format])
        mean = float(grey.mean(dtype=np.float64))
        for change in self.order:
            factor = np.float32(getattr(self, change))
            img *= factor
            if change == "contrast":
                img += np.float32(mean * (1 - factor))
            elif change == "saturation":
                img += (grey * (1 - factor))[:, :, None]
        color = 255 * (_COMPONENTS @ (_DEVIATIONS * np.asarray(self.lighting, dtype=np.float64)))
        img += (color if self.image_format == "BGR" else color[::-1]).astype(np.float32)
        return img


class RandomColorLighting(T.Augmentation):
    """Brightness, contrast and saturation in random order, each by a uniform factor, then lighting
    with normally distributed amounts."""

    def __init__(
        self, jitter: float = 0.4, lighting: float = 0.1, image_format: str = "BGR"
    ) -> None:
        """
        Args:
            jitter: factors are uniform in [1 - jitter, 1 + jitter]
            lighting: standard deviation of the amount of each principal component
            image_format: ``"RGB"`` or ``"BGR"``
        """
        super().__init__()
        self._init(locals())
        ColorLightingTransform(image_format=image_format)  # complains about other formats

    def get_transform(self, image: np.ndarray) -> Transform:
        if image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"Expected an image with 3 channels, got shape {image.shape}.")
        order = [_CHANGES[i] for i in np.random.permutation(3)]
        factors = {change: 1 + np.random.uniform(-self.jitter, self.jitter) for change in order}
        return ColorLightingTransform(
            **factors,
            lighting=np.random.normal(0, self.lighting, 3),
            order=order,
            image_format=self.image_format,
        )
