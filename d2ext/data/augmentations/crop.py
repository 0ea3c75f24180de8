"""Crops that cut boxes, polygons and masks alike, among them the random crop of SSD and YOLACT."""

from collections.abc import Sequence

import numpy as np
from detectron2.data import transforms as T
from fvcore.transforms.transform import CropTransform, NoOpTransform, Transform

from d2ext.data.augmentations.geometry import clip_polygon


class WindowCropTransform(CropTransform):
    """fvcore's ``CropTransform``; polygons are cut without the optional package shapely, and boxes
    are cut to the window, so that a later expansion does not bring lost parts back."""

    def apply_polygons(self, polygons: list[np.ndarray]) -> list[np.ndarray]:
        """List of (N, 2) polygons → those with area inside the window, cut exactly."""
        window = (self.x0, self.y0, self.x0 + self.w, self.y0 + self.h)
        clipped = [clip_polygon(p, window) for p in polygons]
        return [self.apply_coords(p) for p in clipped if len(p)]

    def apply_box(self, box: np.ndarray) -> np.ndarray:
        """(N, 4) XYXY → cut to the window; boxes outside it get zero area."""
        box = super().apply_box(box)
        return np.clip(box, 0, np.array([self.w, self.h, self.w, self.h]))


class CenterCropRuleTransform(WindowCropTransform):
    """A crop that keeps only instances whose box centre lies strictly inside the window."""

    def keeps(self, boxes: np.ndarray) -> np.ndarray:
        """(N, 4) XYXY before the crop → (N,) bool."""
        centers = 0.5 * (boxes[:, :2] + boxes[:, 2:])
        low = np.array([self.x0, self.y0])
        return ((centers > low) & (centers < low + [self.w, self.h])).all(axis=1)


class RandomCrop(T.RandomCrop):
    """Detectron2's ``RandomCrop`` that cuts polygons without the optional package shapely and takes
    at least one pixel of tiny images."""

    def get_crop_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the image → of the crop, pixels."""
        h, w = super().get_crop_size(image_size)
        return max(h, 1), max(w, 1)

    def get_transform(self, image: np.ndarray) -> Transform:
        tfm = super().get_transform(image)
        return WindowCropTransform(
            tfm.x0, tfm.y0, tfm.w, tfm.h, orig_w=image.shape[1], orig_h=image.shape[0]
        )


class RandomIoUCrop(T.Augmentation):
    """The random crop of SSD in the form that trained the published YOLACT models.

    One of these options is drawn with equal probability: no crop; a crop with a minimum overlap,
    one option per entry of ``min_ious``; any crop. A crop takes sides of ``scale`` times the
    image's, at a random place, and needs at least one instance (not a crowd) whose box centre lies
    inside; only such instances stay. After ``trials`` failures another option is drawn.

    Published quirk: the overlap test never rejects a crop, so all options but the first are the
    same (the code asks for the best IoU to exceed an infinite maximum as well).
    ``enforce_iou=True`` repairs it: the best IoU of window and boxes must reach the minimum.
    According to a comment in the published code, a repaired version trained much worse.

    An image without any box is cropped freely; one with nothing but crowds is left as it is.
    """

    def __init__(
        self,
        min_ious: Sequence[float] = (0.1, 0.3, 0.7, 0.9),
        scale: Sequence[float] = (0.3, 1.0),
        aspect_ratio: Sequence[float] = (0.5, 2.0),
        trials: int = 50,
        enforce_iou: bool = False,
    ) -> None:
        """
        Args:
            min_ious: the minimum overlaps among the options
            scale: smallest and largest side of a crop, as a fraction of the image's side
            aspect_ratio: smallest and largest height / width of a crop, in pixels
            trials: attempts per drawn option
            enforce_iou: reject crops below the option's overlap, unlike the published code
        """
        super().__init__()
        self._init(locals())
        # None: no crop. -inf: any crop.
        self._options: list[float | None] = [None, *min_ious, -np.inf]

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
        boxes, crowd = (np.zeros((0, 4)) if boxes is None else boxes)[keep], crowd[keep]
        if len(boxes) and crowd.all():
            return NoOpTransform()  # what repeated drawing would end with
        while True:
            min_iou = self._options[np.random.randint(len(self._options))]
            if min_iou is None:
                return NoOpTransform()
            for _ in range(self.trials):
                tfm = self._propose(w, h)
                if tfm is not None and self._accepts(tfm, boxes, crowd, min_iou):
                    return tfm

    def _propose(self, w: int, h: int) -> CenterCropRuleTransform | None:
        """A random window in whole pixels, or None if its shape is not allowed."""
        crop_w, crop_h = np.random.uniform(*self.scale) * w, np.random.uniform(*self.scale) * h
        low, high = self.aspect_ratio
        if not low <= crop_h / crop_w <= high:
            return None
        left, top = np.random.uniform(0, w - crop_w), np.random.uniform(0, h - crop_h)
        x0, y0, x1, y1 = int(left), int(top), int(left + crop_w), int(top + crop_h)
        if x1 <= x0 or y1 <= y0:
            return None
        return CenterCropRuleTransform(x0, y0, x1 - x0, y1 - y0, orig_w=w, orig_h=h)

    def _accepts(
        self, tfm: CenterCropRuleTransform, boxes: np.ndarray, crowd: np.ndarray, min_iou: float
    ) -> bool:
        if len(boxes) == 0:
            return True
        if self.enforce_iou and _window_iou(tfm, boxes).max() < min_iou:
            return False
        return bool((tfm.keeps(boxes) & ~crowd).any())


def _window_iou(tfm: CropTransform, boxes: np.ndarray) -> np.ndarray:
    """IoU (N,) of the crop window with (N, 4) boxes."""
    low = np.maximum(boxes[:, :2], [tfm.x0, tfm.y0])
    high = np.minimum(boxes[:, 2:], [tfm.x0 + tfm.w, tfm.y0 + tfm.h])
    intersection = (high - low).clip(min=0).prod(axis=1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    return intersection / (area + tfm.w * tfm.h - intersection)
