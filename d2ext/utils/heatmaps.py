"""Pictures of keypoint detectors' heat maps, corners and centres over the image.

The protocol, for any model:

- The model has a method ``heatmaps(batched_inputs) -> list[dict[str, Tensor]]`` (:class:`SeesHeatmaps`).
  For each input it returns maps by name, each (height, width) of the output (``height`` and ``width`` of
  the input, else the image's): confidence in 0..1, the maximum over classes.
  :func:`d2ext.codecs.heatmaps.maps_on_image` resamples maps to the image. :data:`COLORS` has the
  colours of known names; others get the remaining colours.
- Fields of its ``Instances`` say which points to draw: with ``top_left_scores`` and
  ``bottom_right_scores`` the corners of boxes; ``centers`` (N, 2), x, y in pixels; ``pred_keypoints``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import cv2
import numpy as np
from detectron2.structures import Instances
from torch import Tensor

# Name of a map → its colour, red, green, blue.
COLORS = {
    "centers": (255, 40, 40),
    "top_left": (60, 160, 255),
    "bottom_right": (255, 200, 0),
    "joints": (60, 220, 90),
    "attention": (220, 80, 255),
}
_OTHERS = ((0, 220, 220), (255, 120, 0), (160, 120, 255), (200, 200, 80))
# Brightness of the image below the maps, so that they are visible on bright images.
_DIMMED = 0.6


@runtime_checkable
class SeesHeatmaps(Protocol):
    """A model that can show its heat maps."""

    def heatmaps(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
        """See the module."""


def overlay_heatmaps(image: np.ndarray, maps: Mapping[str, Tensor]) -> np.ndarray:
    """Colour an image (H×W×3, RGB, uint8) where maps (H, W) are high; a new image.

    The opacity is the square root of the map, so that weak peaks are visible too.
    """
    result = image.astype(np.float32) * _DIMMED
    others = iter(_OTHERS)
    for name, heat in maps.items():
        color = COLORS.get(name) or next(others, _OTHERS[0])
        if tuple(heat.shape) != image.shape[:2]:
            raise ValueError(
                f"The heat map '{name}' has height and width {tuple(heat.shape)}, the image "
                f"{image.shape[:2]}."
            )
        strength = np.sqrt(np.clip(heat.float().cpu().numpy(), 0, 1))[:, :, None]
        result = result * (1 - strength) + np.array(color, dtype=np.float32) * strength
    return result.clip(0, 255).astype(np.uint8)


def draw_points(image: np.ndarray, instances: Instances) -> np.ndarray:
    """Mark corners, centres and joints of instances on an image (H×W×3, RGB, uint8); a new image."""
    result = np.ascontiguousarray(image).copy()
    size = max(3, round(min(image.shape[:2]) / 80))
    if instances.has("top_left_scores"):
        for x1, y1, x2, y2 in _whole(instances.pred_boxes.tensor):
            _corner(result, (x1, y1), size, COLORS["top_left"])
            _corner(result, (x2, y2), -size, COLORS["bottom_right"])
    if instances.has("centers"):
        for point in _whole(instances.centers):
            for thickness, color in ((3, (0, 0, 0)), (1, COLORS["centers"])):
                cv2.drawMarker(result, tuple(point), color, cv2.MARKER_CROSS, 2 * size, thickness)
    if instances.has("pred_keypoints"):
        for point in _whole(instances.pred_keypoints[..., :2].flatten(0, 1)):
            cv2.circle(result, tuple(point), max(2, size // 2), COLORS["joints"], -1)
    return result


def _whole(values: Tensor) -> list[list[int]]:
    """Coordinates as OpenCV takes them: whole, and small enough for its integers."""
    return values.float().nan_to_num(0.0).round().clamp(-30000, 30000).int().cpu().tolist()


def _corner(image: np.ndarray, point: tuple[int, int], arm: int, color: tuple[int, ...]) -> None:
    """An angle at ``point`` whose arms go right and down, or left and up for a negative ``arm``."""
    x, y = point
    for thickness, shade in ((4, (0, 0, 0)), (2, color)):
        cv2.line(image, (x, y), (x + 2 * arm, y), shade, thickness)
        cv2.line(image, (x, y), (x, y + 2 * arm), shade, thickness)
