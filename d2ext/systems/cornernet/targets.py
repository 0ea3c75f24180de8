"""Annotations → targets of CornerNet and CornerNet-Saccade.

Corner targets come from :mod:`d2ext.codecs.corners`; Saccade adds attention and ignores some objects
(arXiv 1904.08900, section 3).

Letters: B images, C classes, H×W cells of the corner maps, L attention maps of 2^(L-1), ..., 2, 1 times
the corner maps' stride, coarsest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2ext.codecs.canvas import centered
from d2ext.codecs.corners import CornerTargets, encode_corners
from d2ext.modeling.meta_arch import image_size


def read_boxes(
    batched_inputs: list[dict[str, Any]], size: tuple[int, int], device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Boxes (n, 4) in pixels of a canvas of ``size`` (height, width), and classes (n,), of each image.

    As published, boxes are clipped to the last pixel's index; those outside lose their area.
    """
    boxes, classes = [], []
    for inputs in batched_inputs:
        instances, (height, width) = inputs["instances"], image_size(inputs)
        left, top = centered((height, width), size).corner
        x, y = (
            instances.gt_boxes.tensor.to(device, non_blocking=True).unflatten(1, (2, 2)).unbind(2)
        )
        corners = [x.clamp(0, width - 1) - left, y.clamp(0, height - 1) - top]
        boxes.append(torch.stack(corners, dim=2).flatten(1))
        classes.append(instances.gt_classes.to(device, non_blocking=True))
    return boxes, classes


class SaccadeTargets(NamedTuple):
    """Targets of a batch."""

    corners: CornerTargets
    """Around corners of objects that are neither positive nor negative, ``valid`` is False."""
    attention: list[Tensor]
    """L maps (B, 1, h, w) float32, 1 at the objects' centres and 0 elsewhere."""


def encode_saccade(
    boxes: Sequence[Tensor],
    classes: Sequence[Tensor],
    shares: Sequence[Tensor],
    *,
    num_classes: int,
    input_size: tuple[int, int],
    output_size: tuple[int, int],
    attention_ranges: Sequence[Sequence[float]],
    min_overlap: float = 0.5,
    min_side: int = 16,
    min_share: float = 0.5,
) -> SaccadeTargets:
    """Objects of a batch → targets.

    An object whose longer side is below ``min_side`` (in whole pixels between its truncated
    coordinates, as published), or of which at most ``min_share`` is visible, is not a positive: cells
    under its Gaussians are left out of the loss. Attention is trained on every object.

    Args:
        boxes: for each image (n, 4) XYXY in pixels of the input, clipped to its content.
        classes: for each image (n,) int64.
        shares: for each image (n,), how much of the object's box is inside.
        input_size, output_size: (height, width) of the input in pixels, of the corner maps in cells.
        attention_ranges: for each level, coarsest first, the smallest and largest longer side of its
            objects in pixels, both included.
        min_overlap: see :func:`encode_corners`.
    """
    positive_boxes, ignored_boxes = [], []
    for box, share in zip(boxes, shares, strict=True):
        sides = box[:, 2:].trunc() - box[:, :2].trunc()
        positive = ((sides.amax(dim=1) >= min_side) & (share > min_share))[:, None]
        # A box without area leaves its slot empty.
        positive_boxes.append(box * positive)
        ignored_boxes.append(box * ~positive)

    def encode(selected: list[Tensor]) -> CornerTargets:
        return encode_corners(
            selected,
            classes,
            num_classes=num_classes,
            input_size=input_size,
            output_size=output_size,
            min_overlap=min_overlap,
        )

    corners, ignored = encode(positive_boxes), encode(ignored_boxes)
    corners = corners._replace(
        top_left=corners.top_left._replace(valid=ignored.top_left.heat == 0),
        bottom_right=corners.bottom_right._replace(valid=ignored.bottom_right.heat == 0),
    )
    attention = []
    levels = len(attention_ranges)
    for level, (low, high) in enumerate(attention_ranges):
        factor = 2 ** (levels - 1 - level)
        size = tuple(-(-cells // factor) for cells in output_size)
        stride = factor * -(-input_size[0] // output_size[0])
        attention.append(
            torch.stack([_attention_target(box, size, stride, low, high) for box in boxes])
        )
    return SaccadeTargets(corners, attention)


def _attention_target(
    boxes: Tensor, size: tuple[int, ...], stride: int, low: float, high: float
) -> Tensor:
    """(1, h, w): 1 at the centre of each box (n, 4) whose longer side lies in [low, high]."""
    target = boxes.new_zeros((1, *size))
    sides = boxes[:, 2:] - boxes[:, :2]
    longer = sides.amax(dim=1)
    selected = ((longer >= low) & (longer <= high) & (sides > 0).all(dim=1)).float()
    cells = ((boxes[:, :2] + boxes[:, 2:]) / 2 / stride).long()
    index = cells[:, 1].clamp(0, size[0] - 1) * size[1] + cells[:, 0].clamp(0, size[1] - 1)
    target.view(-1).scatter_reduce_(0, index, selected, "amax")
    return target
