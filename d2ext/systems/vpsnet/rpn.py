"""VPSNet's region proposal network: UPSNet's with other anchors, sampling and clipping of deltas.

Boxes are in "end behind" form (``upsnet/boxes.py``), pixels of the network input.

Letters: A anchors, G objects, R regions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.anchor_generator import (
    ANCHOR_GENERATOR_REGISTRY,
    BufferList,
    DefaultAnchorGenerator,
)
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

from d2ext.systems.upsnet.rpn import UPSNetRPN

# Bound of the deltas of width and height, on both sides (vpsnet/NOTES.md, Proposals).
MAX_LOG_SCALE = math.log(1000 / 16)


@ANCHOR_GENERATOR_REGISTRY.register()
class RoundedAnchorGenerator(DefaultAnchorGenerator):
    """Anchors whose corners, with the last pixel included, are rounded to pixels.

    ``MODEL.ANCHOR_GENERATOR.SIZES`` counts as stride times scale (published: 8 strides). They are
    centred on the stride's first cell of pixels and are here in "end behind" form; ``OFFSET`` must be 0.
    """

    def _calculate_anchors(
        self, sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[Sequence[float]]
    ) -> BufferList:
        levels = zip(self.strides, sizes, aspect_ratios, strict=True)
        return BufferList([rounded_anchors(*level) for level in levels])


def rounded_anchors(stride: int, sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """(len(ratios) * len(sizes), 4) float32 anchors of a level's first cell; see above."""
    anchors = []
    for ratio in ratios:
        for size in sizes:
            sides = torch.tensor([size / ratio**0.5, size * ratio**0.5])
            low = 0.5 * (stride - 1) - 0.5 * (sides - 1)
            high = 0.5 * (stride - 1) + 0.5 * (sides - 1)
            anchors.append(torch.cat([low.round(), high.round() + 1]))
    return torch.stack(anchors)


def assign(objects: Boxes, boxes: Boxes, minimum: float) -> tuple[Tensor, Tensor]:
    """Each box's object: the one of highest IoU, or one whose best box it is.

    Args:
        objects: G boxes.
        boxes: R boxes.
        minimum: an object takes the boxes that overlap it most (all of equal ones) if their IoU is at
            least this, and keeps them unless a later object takes them, too.

    Returns:
        (R,) int64 the object (0 without objects); (R,) float32 the highest IoU with any object, infinite
        where an object took the box
    """
    iou = pairwise_iou(objects, boxes)
    if len(objects) == 0 or len(boxes) == 0:
        best = torch.zeros(len(boxes), dtype=torch.int64, device=iou.device)
        return best, iou.new_zeros(len(boxes))
    highest, best = iou.max(dim=0)
    most = iou.amax(dim=1, keepdim=True)
    taken = (iou == most) & (most >= minimum)
    number = torch.arange(1, len(objects) + 1, device=iou.device)[:, None]
    last = (taken * number).amax(dim=0)
    best = torch.where(last > 0, last - 1, best)
    return best, highest.masked_fill(last > 0, torch.inf)


@PROPOSAL_GENERATOR_REGISTRY.register()
class VPSNetRPN(UPSNetRPN):
    """UPSNet's with three published differences:

    - an object's best anchors are positive only above the lower IoU threshold, and negatives are drawn
      from what is left;
    - both losses are divided by the number of sampled anchors;
    - deltas of width and height are bounded below, too.
    """

    def _label(self, objects: Boxes, anchors: Boxes) -> tuple[Tensor, Tensor]:
        negative_iou, positive_iou = self.anchor_matcher.thresholds[1:3]
        best, highest = assign(objects, anchors, negative_iou)
        label = torch.full_like(best, -1)
        label[highest < negative_iou] = 0
        label[highest >= positive_iou] = 1
        self._subsample_labels(label)
        return label, best

    def _class_loss_divisor(self, sampled: Tensor) -> Tensor | int:
        return sampled.sum().clamp(min=1)

    def decode(self, anchors: Tensor, deltas: Tensor) -> Tensor:
        """See the base class."""
        sides = (
            deltas[..., i : i + 1].clamp(min=-MAX_LOG_SCALE * self.box2box_transform.weights[i])
            for i in (2, 3)
        )
        return super().decode(anchors, torch.cat([deltas[..., :2], *sides], dim=-1))
