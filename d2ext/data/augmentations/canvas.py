"""CornerNet's crop: a window of any size anywhere, zeros where the image has nothing
(arXiv 1808.01244, section 4.1; published code)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import NoOpTransform, Transform

from d2ext.data.augmentations.affine import PixelMirrorTransform
from d2ext.data.augmentations.base import LabelAwareAugmentation, WindowTransform
from d2ext.data.augmentations.geometry import random_center


class CanvasCropTransform(WindowTransform):
    """The window of ``new_w`` × ``new_h`` pixels whose centre pixel is (``center_x``, ``center_y``).

    The centre pixel of n pixels is number n // 2.

    Published quirk: of a window with an odd side, the last row or column stays zero even where the
    image goes on.
    """

    def __init__(
        self,
        w: int,
        h: int,
        center_x: int,
        center_y: int,
        new_w: int,
        new_h: int,
        ignore_label: int = 255,
    ) -> None:
        """
        Args:
            w, h: size of the image, pixels
            center_x, center_y: its pixel in the middle of the window
            new_w, new_h: size of the window, pixels
            ignore_label: value of new area in label maps; images and instance masks get 0
        """
        super().__init__()
        if not (0 <= center_x < w and 0 <= center_y < h and new_w > 0 and new_h > 0):
            raise ValueError(
                f"A window of {new_w}x{new_h} pixels around ({center_x}, {center_y}) does not fit "
                f"an image of {w}x{h}: the centre lies inside and the window is not empty."
            )
        left, top = center_x - new_w // 2, center_y - new_h // 2
        self._set_attributes(locals())

    def _crop(self, img: np.ndarray, value: float) -> np.ndarray:
        if img.shape[:2] != (self.h, self.w):
            raise ValueError(f"Expected an image of {self.h}x{self.w}, got shape {img.shape}.")
        window = np.full((self.new_h, self.new_w, *img.shape[2:]), value, dtype=img.dtype)
        x0, y0 = max(self.left, 0), max(self.top, 0)
        x1 = min(self.center_x + self.new_w // 2, self.w)
        y1 = min(self.center_y + self.new_h // 2, self.h)
        rows = slice(y0 - self.top, y1 - self.top)
        columns = slice(x0 - self.left, x1 - self.left)
        window[rows, columns] = img[y0:y1, x0:x1]
        return window

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """(H, W, C) or (H, W) → (new_h, new_w, ...); the dtype stays."""
        return self._crop(img, 0)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Instance masks: outside the image is 0."""
        return self._crop(segmentation, 0)

    def apply_labels(self, labels: np.ndarray) -> np.ndarray:
        """Label maps: outside the image is ``ignore_label``."""
        return self._crop(labels, self.ignore_label)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """(N, 2) points (x, y), also outside the window."""
        return coords - np.array([self.left, self.top])


class RandomCanvasCrop(LabelAwareAugmentation):
    """A square window of a random one of ``scales`` times ``size`` around a random pixel."""

    def __init__(
        self,
        size: int = 511,
        scales: Sequence[float] = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3),
        border: int = 128,
        ignore_label: int = 255,
    ) -> None:
        """
        Args:
            size: side of the network's input, pixels
            scales: one of them is drawn
            border: least distance of the window's centre from the image's edges, pixels; halved until
                it fits into both halves
            ignore_label: value of new area in label maps
        """
        super().__init__()
        if len(scales) == 0 or int(size * min(scales)) < 1:
            raise ValueError(
                f"INPUT.AUGMENTATION.CENTER_CROP.SCALES must leave at least one pixel of {size}: "
                f"{tuple(scales)}."
            )
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        h, w = image.shape[:2]
        side = int(self.size * float(np.random.choice(self.scales)))
        center_x, center_y = random_center(w, self.border), random_center(h, self.border)
        return CanvasCropTransform(
            w, h, center_x, center_y, side, side, ignore_label=self.ignore_label
        )


class SquareCanvas(LabelAwareAugmentation):
    """The image in the middle of a square as large as its longer side."""

    def __init__(self, ignore_label: int = 255) -> None:
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        h, w = image.shape[:2]
        side = max(h, w)
        return CanvasCropTransform(w, h, w // 2, h // 2, side, side, ignore_label=self.ignore_label)


class RandomPixelMirror(T.Augmentation):
    """With probability ``prob``, :class:`PixelMirrorTransform`."""

    def __init__(self, prob: float = 0.5) -> None:
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        # Published: mirrored where the number exceeds one half.
        if np.random.uniform() > 1 - self.prob:
            return PixelMirrorTransform(image.shape[1])
        return NoOpTransform()
