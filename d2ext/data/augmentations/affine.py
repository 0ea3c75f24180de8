"""CenterNet's crop, zoom and letter box: one affine warp to a fixed size (arXiv 1904.07850)."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from fvcore.transforms.transform import HFlipTransform, Transform, TransformList

from d2ext.codecs.affine import affine_matrix
from d2ext.data.augmentations.base import LabelAwareAugmentation, WindowTransform
from d2ext.data.augmentations.geometry import random_center

_MODES = ("crop", "shift", "letterbox", "keep")


class WarpTransform(WindowTransform):
    """Affine map of pixel indices, with zeros where the source has nothing.

    Polygons and keypoints, for which the centre of the first pixel is 0.5, follow the image.

    Published quirk: boxes are moved by the same matrix, as if their sides were indices. Where the image
    shrinks or grows by a factor f, boxes and image part by (1 - f) / 2 pixels of the result.
    """

    def __init__(
        self,
        matrix: np.ndarray,
        w: int,
        h: int,
        new_w: int,
        new_h: int,
        ignore_label: int = 255,
        box_matrix: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            matrix: (2, 3), source to result
            w, h: size of the source, pixels
            new_w, new_h: size of the result, pixels
            ignore_label: value of new area in label maps; images and instance masks get 0
            box_matrix: (2, 3), of boxes; None: the same
        """
        super().__init__()
        matrix = np.asarray(matrix, dtype=np.float64)
        self._set_attributes(locals())

    def _warp(self, img: np.ndarray, interpolation: int, fill: float) -> np.ndarray:
        source = np.ascontiguousarray(img, dtype=np.uint8 if img.dtype == bool else None)
        size = (self.new_w, self.new_h)
        channels = 1 if img.ndim == 2 else img.shape[2]
        result = cv2.warpAffine(
            source, self.matrix, size, flags=interpolation, borderValue=[fill] * min(channels, 4)
        )
        return result.reshape(self.new_h, self.new_w, *img.shape[2:]).astype(img.dtype, copy=False)

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """(H, W, C) or (H, W), uint8 or float32 → (new_h, new_w, ...) of the same dtype."""
        return self._warp(img, cv2.INTER_LINEAR, 0)

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """Instance masks of 0 and 1: bilinear, rounded at one half."""
        warped = self._warp(segmentation.astype(np.float32), cv2.INTER_LINEAR, 0)
        return (warped > 0.5).astype(segmentation.dtype)

    def apply_labels(self, labels: np.ndarray) -> np.ndarray:
        """Label maps: the nearest label, and ``ignore_label`` outside the source."""
        # OpenCV warps no 64-bit integers; labels are exact in float64.
        exact = labels.dtype if labels.dtype in (np.uint8, np.int16, np.uint16) else np.float64
        warped = self._warp(labels.astype(exact), cv2.INTER_NEAREST, self.ignore_label)
        return warped.astype(labels.dtype)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """(N, 2) points (x, y), also outside the result."""
        return _move(self.matrix, coords - 0.5) + 0.5

    def apply_box(self, box: np.ndarray) -> np.ndarray:
        """(N, 4) XYXY → moved as indices and cut to the result; boxes outside it get zero area."""
        matrix = self.matrix if self.box_matrix is None else self.box_matrix
        corners = np.asarray(box).reshape(-1, 4)[:, [0, 1, 2, 1, 2, 3, 0, 3]]
        corners = _move(matrix, corners.reshape(-1, 4, 2))
        box = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        return np.clip(box, 0, np.array([self.new_w, self.new_h] * 2))


def _move(matrix: np.ndarray, indices: np.ndarray) -> np.ndarray:
    return indices @ matrix[:, :2].T + matrix[:, 2]


class PixelMirrorTransform(HFlipTransform):
    """Horizontal mirror that treats the coordinates of boxes as indices: x → width - 1 - x.

    Published quirk: COCO's boxes are not indices, so mirrored boxes lie one pixel too far left (and may
    begin at -1). Keypoints are indices in COCO, and half a pixel more in Detectron2, so that for them
    Detectron2's x → width - x is the published map; polygons follow the image.
    """

    def apply_box(self, box: np.ndarray) -> np.ndarray:
        """(N, 4) XYXY → mirrored, one pixel left of the image's own mirror."""
        return super().apply_box(box) - np.array([1.0, 0.0, 1.0, 0.0])


class RandomAffineWarp(LabelAwareAugmentation):
    """CenterNet's geometric augmentation: mirror and one affine warp, mostly to a fixed size.

    - "crop": a window of a random one of ``scales`` times the longer side, its centre uniform in the
      image at least ``border`` pixels from the edges (halved until it fits into both halves);
    - "shift": a window of the longer side around the centre, moved and zoomed by clipped normal
      numbers;
    - "letterbox": that window itself, unmoved, as in testing with fixed resolution;
    - "keep": the image's own pixels in the middle of the next larger divisible size, as in testing with
      kept resolution.

    Published quirk: a rotation turns the image and its keypoints, not the boxes.
    """

    def __init__(
        self,
        size: Sequence[int] = (512, 512),
        mode: str = "crop",
        scales: Sequence[float] = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3),
        border: int = 128,
        shift: float = 0.1,
        zoom: float = 0.4,
        flip_prob: float = 0.5,
        rotate_prob: float = 0.0,
        rotate: float = 0.0,
        divisibility: int = 32,
        ignore_label: int = 255,
    ) -> None:
        """
        Args:
            size: (height, width) of the result, pixels; not of "keep"
            mode: "crop", "shift", "letterbox" or "keep"
            scales: of "crop"
            border: of "crop", pixels
            shift: of "shift": the standard deviation of the centre over the longer side; cut at two
            zoom: of "shift": the standard deviation of the factor on the window; cut at one
            flip_prob: probability of a mirror image
            rotate_prob: probability of a rotation
            rotate: its standard deviation, degrees; cut at two
            divisibility: of "keep": the result's sides are multiples of it
            ignore_label: value of new area in label maps
        """
        super().__init__()
        if mode not in _MODES:
            raise ValueError(f'INPUT.AUGMENTATION.AFFINE.MODE is one of {_MODES}, not "{mode}".')
        if min(size) < 1:
            raise ValueError(f"The result needs at least one pixel a side, got {tuple(size)}.")
        self._init(locals())

    def get_transform(self, image: np.ndarray) -> Transform:
        h, w = image.shape[:2]
        (new_h, new_w), center, side = self.size, np.array([w / 2, h / 2]), float(max(h, w))
        if self.mode == "crop":
            side *= float(np.random.choice(self.scales))
            places = [random_center(w, self.border), random_center(h, self.border)]
            center = np.array(places, dtype=np.float64)
        elif self.mode == "shift":
            moves = np.clip(np.random.normal(0, 1, 2) * self.shift, -2 * self.shift, 2 * self.shift)
            center = center + side * moves
            side *= float(np.clip(np.random.normal(0, 1) * self.zoom, -self.zoom, self.zoom) + 1)
        elif self.mode == "keep":
            # As published, a side that is divisible already grows, too.
            new_h, new_w = ((x // self.divisibility + 1) * self.divisibility for x in (h, w))
            center, side = np.array([w // 2, h // 2]), float(new_w)
        angle = 0.0
        if self.rotate_prob > 0 and np.random.uniform() < self.rotate_prob:
            angle = self.rotate * float(np.clip(np.random.normal(0, 1), -2, 2))
        steps: list[Transform] = []
        if np.random.uniform() < self.flip_prob:
            steps.append(PixelMirrorTransform(w))
            center[0] = w - 1 - center[0]
        matrix = affine_matrix(center, side, (new_w, new_h), angle)
        upright = affine_matrix(center, side, (new_w, new_h)) if angle else None
        steps.append(WarpTransform(matrix, w, h, new_w, new_h, self.ignore_label, upright))
        return TransformList(steps)
