"""Annotations → targets of YOLACT's losses (yolact/NOTES.md §5 and §6).

Letters: n objects and c crowds of an image, H×W pixels of the image.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from detectron2.structures import BitMasks, PolygonMasks
from torch import Tensor
from torch.nn import functional as F

# A cell of a resized mask belongs to the object above this (yolact/NOTES.md §6).
MASK_THRESHOLD = 0.5


class YOLACTTargets(NamedTuple):
    """Objects of one image, on the network input."""

    boxes: Tensor
    """(n, 4) corner form, relative to the input (0..1), sides > 0."""
    classes: Tensor
    """(n,) int64, from 0."""
    masks: Tensor
    """(n, H, W) of any float dtype, 0 or 1, of any size."""
    crowd_boxes: Tensor
    """(c, 4) as ``boxes``."""


def read_targets(inputs: dict[str, Any], device: torch.device) -> YOLACTTargets:
    """Targets of one image; objects without area are left out.

    Args:
        inputs: ``image``, ``instances`` with ``gt_boxes``, ``gt_classes``, ``gt_masks``, and optionally
            ``crowd_instances`` with ``gt_boxes``, which are not trained on.

    Raises:
        ValueError: instances without masks.
    """
    instances = inputs["instances"].to(device)
    height, width = inputs["image"].shape[-2:]
    scale = torch.tensor([width, height, width, height], device=device)
    boxes = instances.gt_boxes.tensor.float() / scale
    if len(boxes) > 0 and not instances.has("gt_masks"):
        raise ValueError(
            "YOLACT trains on masks and these instances have none: the annotations need "
            "`segmentation`, and MODEL.MASK_ON must be True so that the mapper keeps it."
        )
    masks = torch.zeros((0, height, width), device=device)
    if len(boxes) > 0:
        masks = instances.gt_masks
        if isinstance(masks, PolygonMasks):
            masks = BitMasks.from_polygon_masks(masks, height, width).to(device)
        masks = masks.tensor.float()
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    crowd = boxes.new_zeros((0, 4))
    if "crowd_instances" in inputs:
        crowd = inputs["crowd_instances"].gt_boxes.tensor.to(device).float() / scale
    return YOLACTTargets(boxes[keep], instances.gt_classes[keep], masks[keep], crowd)


def resize_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """(n, H, W) → (n, *size), 0 or 1: bilinear without antialiasing, thresholded."""
    if len(masks) == 0:
        return masks.new_zeros((0, *size))
    resized = F.interpolate(masks[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    return (resized > MASK_THRESHOLD).to(masks.dtype)
