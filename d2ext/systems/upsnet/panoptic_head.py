"""UPSNet's parameter-free panoptic head (arXiv 1901.03784, section 3.3).

It computes one map of logits Z from the other heads' predictions for an image:

- X, the semantic logits, split into X_stuff (S channels) and X_thing (T channels);
- for each instance i its box B_i, its class C_i and its mask logits Y_i of 28×28.

====  ==========================================================================================
 Z    logits
====  ==========================================================================================
(1)   Z_j = X_stuff,j                                                      for the S stuff classes
(2)   X_mask,i = X_thing,C_i inside B_i, 0 outside                         semantic view of i
(3)   Y_mask,i = Y_i resized to B_i (bilinear), 0 outside                  mask view of i
(4)   Z_{S+i} = X_mask,i + Y_mask,i                                        for the n instances
(5)   Z_{S+n+1} = max_c X_thing,c - max_i X_mask,i                         unknown
====  ==========================================================================================

The paper has these equations in this order but without numbers; comments use the numbers here. A
pixel's class is the arg max of Z; the last channel becomes void.

Conventions of the published code: X_mask's box has columns int(x1)..round(x2) and rows likewise, both
ends included, rounded half to even; Y_mask's box is truncated and int(x2) - int(x1) + 1 wide. The two
may differ by a column or row. **An instance's channel is 0, not minus infinity, outside its box**: it
can win where everything else is negative.

:func:`panoptic_logits` is this definition, differentiable, for training at stride 4.
:func:`predict_panoptic` is for inference: masks are pruned, then the arg max is computed without storing
Z (:mod:`d2ext.layers.panoptic_fusion`).

Letters: H×W map, n instances, M = 28.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from d2ext.layers.panoptic_fusion import fuse_panoptic, paste_weights, prune_masks, whole_boxes


class PanopticLogits(NamedTuple):
    """The parts of Z, with the equation numbers of the module."""

    stuff: Tensor
    """(S, H, W), (1)."""
    semantic: Tensor
    """(n, H, W), (2)."""
    mask: Tensor
    """(n, H, W), (3)."""
    unknown: Tensor | None
    """(1, H, W), (5); None without unknown channel."""

    @property
    def joined(self) -> Tensor:
        """Z: (S + n [+ 1], H, W)."""
        parts = [self.stuff, self.semantic + self.mask]  # (4)
        return torch.cat(parts if self.unknown is None else [*parts, self.unknown])


def panoptic_logits(
    semantic: Tensor,
    boxes: Tensor,
    classes: Tensor,
    masks: Tensor,
    *,
    num_stuff: int,
    unknown: bool = True,
) -> PanopticLogits:
    """Z of one image, with all its temporaries: n maps of H×W for each of (2) to (4).

    Args:
        semantic: X, (S + T, H, W).
        boxes: B, (n, 4) inclusive, in cells of the map.
        classes: C, (n,) int64 in 0..T-1.
        masks: Y, (n, M, M), the logits of the instance's class.
        num_stuff: S.
        unknown: whether there is the channel (5).
    """
    height, width = semantic.shape[-2:]
    stuff, things = semantic[:num_stuff], semantic[num_stuff:]  # (1)
    ends = whole_boxes(boxes)
    columns = torch.arange(width, device=boxes.device)
    rows = torch.arange(height, device=boxes.device)
    x1, y1, x2, y2 = ends.semantic.unsqueeze(-1).unbind(1)
    inside_columns = (columns >= x1) & (columns <= x2)
    inside_rows = (rows >= y1) & (rows <= y2)
    inside = inside_rows[:, :, None] & inside_columns[:, None, :]
    views = torch.where(inside, things[classes], 0.0)  # (2)
    # (3): bilinear interpolation along one axis is a matrix; its rows outside the box are zero.
    weights_y = paste_weights(ends.mask[:, 1], ends.mask[:, 3], height, masks.shape[-2])
    weights_x = paste_weights(ends.mask[:, 0], ends.mask[:, 2], width, masks.shape[-1])
    pasted = weights_y @ masks.float() @ weights_x.transpose(1, 2)
    rest = None
    if unknown:  # (5)
        rest = things.amax(dim=0, keepdim=True)
        if len(boxes) > 0:
            rest = rest - views.amax(dim=0, keepdim=True)
    return PanopticLogits(stuff, views, pasted, rest)


class PanopticPrediction(NamedTuple):
    """The panoptic map of an image, at the size of the network input."""

    labels: Tensor
    """(H, W) int32: stuff 0..S-1, instance S + its index, S + number of instances: unknown."""
    semantic: Tensor
    """(H, W) int32 arg max of the semantic logits, 0..S+T-1."""
    keep: Tensor
    """(n',) int64: the candidates that became instances, in channel order."""
    classes: Tensor
    """(n',) int64 of the instances; -1 for the dummy used without candidates."""
    scores: Tensor
    """(n',)."""


@torch.no_grad()
def predict_panoptic(
    score: Tensor,
    boxes: Tensor,
    classes: Tensor,
    scores: Tensor,
    masks: Tensor,
    size: tuple[int, int],
    *,
    num_stuff: int,
    overlap_fraction: float = 0.3,
    unknown: bool = True,
    dummy: bool = True,
) -> PanopticPrediction:
    """Prune the candidates' masks and take the arg max of Z.

    Args:
        score: (S + T, h, w) semantic logits; interpolated to the map's size (bilinear).
        boxes: (n, 4) inclusive, in pixels of the map.
        classes: (n,) int64 in 0..T-1.
        scores: (n,).
        masks: (n, M, M) logits of the instance's class.
        size: (H, W) of the map, that of the padded network input.
        num_stuff: S.
        overlap_fraction: see :func:`d2ext.layers.panoptic_fusion.prune_masks`.
        unknown: whether there is the channel (5).
        dummy: without candidates, a channel of zeros stands for them, as published.
    """
    if len(boxes) == 0 and dummy:
        # As published: a dummy box of class 0 (background), which is a channel of zeros; where it wins,
        # that class is read as the last stuff class.
        boxes = score.new_zeros((1, 4), dtype=torch.float32)
        classes, scores = classes.new_full((1,), -1), boxes.new_ones(1)
        masks = boxes.new_full((1, *masks.shape[1:]), -1.0)
    keep = prune_masks(masks, boxes, classes, scores, size, overlap_fraction)
    masks = masks[keep]
    if len(keep) == 0 and len(boxes) > 0:
        # Published: the first candidate, without its mask.
        keep = keep.new_zeros(1)
        masks = boxes.new_zeros((1, *masks.shape[1:]))
    classes = classes[keep]
    labels, semantic = fuse_panoptic(
        score, boxes[keep], classes, masks, size, num_stuff=num_stuff, unknown=unknown
    )
    return PanopticPrediction(labels, semantic, keep, classes, scores[keep])
