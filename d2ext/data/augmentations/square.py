"""Square crops, padding and resizing, as the published RetinaFace is trained (retinaface/NOTES.md)."""

from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import NoOpTransform, Transform

from d2ext.data.augmentations.base import LabelAwareAugmentation
from d2ext.data.augmentations.crop import CenterCropRuleTransform
from d2ext.data.augmentations.expand import ExpandTransform
from d2ext.data.augmentations.resize import BilinearResizeTransform

INTERPOLATIONS = (
    cv2.INTER_LINEAR,
    cv2.INTER_CUBIC,
    cv2.INTER_AREA,
    cv2.INTER_NEAREST,
    cv2.INTER_LANCZOS4,
)


class ClippingCropTransform(CenterCropRuleTransform):
    """A crop that moves points outside to its border."""

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        return np.clip(super().apply_coords(coords), 0, [self.w, self.h])


class RandomSquareCrop(T.Augmentation):
    """A square window, in which at least one instance (not a crowd) lies wholly; only instances whose
    box centre lies inside stay.

    After ``trials`` failures the image stays as it is. An image without any box is cropped freely.
    """

    def __init__(
        self,
        scales: Sequence[float] = (0.3, 0.45, 0.6, 0.8, 1.0),
        trials: int = 250,
        clip_points: bool = False,
    ) -> None:
        """
        Args:
            scales: side of the window over the image's short side, one of them is drawn
            trials: attempts
            clip_points: published fault: keypoints outside the window move to its border and are trained
                there, instead of becoming unlabelled
        """
        super().__init__()
        self._init(locals())

    def get_transform(
        self, image: np.ndarray, boxes: np.ndarray | None, crowd: np.ndarray, keep: np.ndarray
    ) -> Transform:
        """
        Args:
            image: H×W×C
            boxes: (N, 4) XYXY, pixels, or None
            crowd, keep: (N,) bool, see :class:`DetectionInput`
        """
        h, w = image.shape[:2]
        boxes = (np.zeros((0, 4)) if boxes is None else boxes)[keep & ~crowd]
        for _ in range(self.trials):
            side = max(int(np.random.choice(self.scales) * min(h, w)), 1)
            left, top = (np.random.randint(max(length - side, 1)) for length in (w, h))
            inside = (boxes[:, :2] >= (left, top)) & (boxes[:, 2:] <= (left + side, top + side))
            if len(boxes) == 0 or inside.all(axis=1).any():
                cls = ClippingCropTransform if self.clip_points else CenterCropRuleTransform
                return cls(left, top, side, side, orig_w=w, orig_h=h)
        return NoOpTransform()


class PadToSquare(LabelAwareAugmentation):
    """Pad at the right or bottom to a square."""

    def __init__(self, fill: Sequence[float]) -> None:
        """
        Args:
            fill: colour of new area, in the channel order of the image
        """
        super().__init__()
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        h, w = image.shape[:2]
        side = max(h, w)
        return NoOpTransform() if h == w else ExpandTransform(w, h, 0, 0, side, side, self.fill)


class InterpolatedResizeTransform(BilinearResizeTransform):
    """OpenCV's resize of the image with any of its interpolations; masks bilinear, labels nearest."""

    def __init__(self, h: int, w: int, new_h: int, new_w: int, interpolation: int) -> None:
        """
        Args:
            h, w: size of the image, pixels
            new_h, new_w: size of the result, pixels
            interpolation: OpenCV's number
        """
        super().__init__(h, w, new_h, new_w)
        self.interpolation = interpolation

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """(H, W, C) or (H, W), uint8 or float32 → (new_h, new_w, ...) of the same dtype."""
        return self._resize(img, self.interpolation)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        # Points at the border stay there: the quotient of equal numbers is exact.
        return coords * [self.new_w, self.new_h] / [self.w, self.h]


class RandomlyInterpolatedSquare(LabelAwareAugmentation):
    """Resize to ``size`` × ``size`` pixels with one of :data:`INTERPOLATIONS`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"The side must be at least one pixel, got {size}.")
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        h, w = image.shape[:2]
        interpolation = INTERPOLATIONS[np.random.randint(len(INTERPOLATIONS))]
        return InterpolatedResizeTransform(h, w, self.size, self.size, interpolation)
