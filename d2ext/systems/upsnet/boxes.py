"""UPSNet's box conventions in Detectron2's arithmetic.

The published code counts pixels: a box (x1, y1, x2, y2) includes its last column and row and is
x2 - x1 + 1 wide, in IoU, NMS, coding, clipping and masks. Written with its end *behind* the last pixel,
(x1, y1, x2 + 1, y2 + 1), it has Detectron2's width x2 - x1, and areas, overlaps, NMS and box coding of
Detectron2 give the published numbers. This "end behind" form is what ``proposal_boxes`` and
``pred_boxes`` hold; :func:`inclusive` gives the published one.

Only four things differ and are defined here: clipping (the first pixel of a box stays inside the
image), RoIAlign (uses the inclusive corners), the pyramid level of a box, and the anchors' rounding.

Letters: R boxes, L levels, C channels, s side of the pooled grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.anchor_generator import (
    ANCHOR_GENERATOR_REGISTRY,
    BufferList,
    DefaultAnchorGenerator,
)
from detectron2.structures import Boxes
from torch import Tensor, nn
from torchvision.ops import roi_align

from d2ext.modeling.region_slots import pool_by_level


def inclusive(boxes: Tensor, pixel: float = 1.0) -> Tensor:
    """Boxes (..., 4) with their end behind the last pixel → boxes that include it.

    Args:
        pixel: side of a pixel, in the boxes' unit.
    """
    # Not minus a tensor of numbers: copying it to a GPU would wait for all earlier work.
    return torch.cat([boxes[..., :2], boxes[..., 2:] - pixel], dim=-1)


def end_behind(boxes: Tensor, pixel: float = 1.0) -> Tensor:
    """Inverse of :func:`inclusive`."""
    return torch.cat([boxes[..., :2], boxes[..., 2:] + pixel], dim=-1)


def clip(boxes: Tensor, height: int | Tensor, width: int | Tensor) -> Tensor:
    """Clip "end behind" boxes (..., 4): first and last pixel within the image, so that none is empty."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack(
        [
            x1.clamp(min=0).clamp(max=width - 1),
            y1.clamp(min=0).clamp(max=height - 1),
            x2.clamp(min=1).clamp(max=width),
            y2.clamp(min=1).clamp(max=height),
        ],
        dim=-1,
    )


def image_scale(network: tuple[int, int], original: tuple[int, int]) -> float | None:
    """The factor by which an image was resized, from its sizes (height, width); None if there is no
    single factor for both sides (a crop, or a changed aspect ratio).

    Sides are rounded to whole pixels, so the shorter one, which is exact when resizing by the short
    side, is tried first.
    """
    pairs = sorted(zip(network, original, strict=True), key=lambda pair: pair[1])
    for after, before in pairs:
        factor = after / before
        if all(abs(b * factor - a) <= 0.5 + 1e-6 for a, b in pairs):
            return factor
    return None


@ANCHOR_GENERATOR_REGISTRY.register()
class DetectronAnchorGenerator(DefaultAnchorGenerator):
    """Anchors with Detectron's rounding, which Detectron2 dropped.

    ``MODEL.ANCHOR_GENERATOR.SIZES`` counts as stride times scale (published: 8 strides). Widths and
    heights of the aspect ratios are rounded for one stride, then scaled; anchors are centred on the
    stride's first cell of pixels and are here in "end behind" form. ``OFFSET`` must be 0.
    """

    def _calculate_anchors(
        self, sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[Sequence[float]]
    ) -> BufferList:
        levels = zip(self.strides, sizes, aspect_ratios, strict=True)
        return BufferList([detectron_anchors(*level) for level in levels])


def detectron_anchors(stride: int, sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """(len(ratios) * len(sizes), 4) float32 anchors of a level's first cell; see above."""
    centre = 0.5 * (stride - 1)
    anchors = []
    for ratio in ratios:
        width = round((stride * stride / ratio) ** 0.5)
        for size in sizes:
            sides = (width * size / stride, round(width * ratio) * size / stride)
            left, top = (centre - 0.5 * (side - 1) for side in sides)
            anchors.append([left, top, left + sides[0], top + sides[1]])
    return torch.tensor(anchors)


class PyramidRoIAlign(nn.Module):
    """RoIAlign of each box on the pyramid level of its size, by the published conventions.

    ``aligned=False``, two samples per cell side, corners of the inclusive box times the level's scale;
    level = floor(2 + log2(sqrt(width · height) / 224 + 1e-6)) counted from stride 4, clamped to the
    existing levels.

    Args:
        size: s.
        strides: of the levels, finest (4) first.
        sampling_ratio: samples per cell side.
    """

    def __init__(self, size: int, strides: Sequence[int], sampling_ratio: int = 2) -> None:
        super().__init__()
        self.size = size
        self.strides = list(strides)
        self.sampling_ratio = sampling_ratio

    def levels(self, boxes: Tensor) -> Tensor:
        """(R, 4) "end behind" boxes → (R,) int64 index of the level."""
        sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        level = (2 + torch.log2(sides / 224 + 1e-6)).floor().to(torch.int64)
        return level.clamp(0, len(self.strides) - 1)

    def forward(self, features: Sequence[Tensor], box_lists: Sequence[Boxes]) -> Tensor:
        """Pool.

        Args:
            features: L maps (B, C, h, w), finest first.
            box_lists: boxes of each of the B images, "end behind".

        Returns:
            (R, C, s, s), images in order.
        """
        boxes = torch.cat([x.tensor for x in box_lists])
        images = [x.tensor.new_full((len(x),), i) for i, x in enumerate(box_lists)]
        return self.pool(features, boxes, torch.cat(images))

    def pool(self, features: Sequence[Tensor], boxes: Tensor, images: Tensor) -> Tensor:
        """The same of boxes (R, 4) and the index of each one's image (R,)."""
        rois = torch.cat([images[:, None].to(boxes.dtype), inclusive(boxes)], dim=1)
        if len(self.strides) == 1:
            return self._pool(features[0], rois, self.strides[0])
        levels = self.levels(boxes)
        return pool_by_level(
            features, rois, levels, self.size, lambda x, own, i: self._pool(x, own, self.strides[i])
        )

    def _pool(self, feature: Tensor, rois: Tensor, stride: int) -> Tensor:
        # The CPU kernel has no bfloat16; the result goes back to the feature's dtype.
        rois = rois.to(feature.dtype) if feature.dtype == torch.float64 else rois.float()
        values = feature if feature.dtype == rois.dtype else feature.float()
        return self._align(values, rois, stride).to(feature.dtype)

    def _align(self, feature: Tensor, rois: Tensor, stride: int) -> Tensor:
        """Pool regions (R, 5), each an image's index and an inclusive box, from one level."""
        return roi_align(feature, rois, self.size, 1.0 / stride, self.sampling_ratio, aligned=False)
