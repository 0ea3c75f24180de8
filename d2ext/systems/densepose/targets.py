"""Annotations → what the losses compare with: which proposals train, where their points lie on the maps,
and the coarse segmentation of their pixels.

Letters: R regions (proposals that train) of all images, K points in them, S side of the maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.layers import nonzero_tuple
from detectron2.modeling.roi_heads import select_foreground_proposals
from detectron2.structures import Instances
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor

from d2ext.data.densepose.annotations import FRAME, AnnotatedPoints, DensePoseAnnotations


class GridPoints(NamedTuple):
    """The K points that lie in their region, and the cells of the region's map around each."""

    points: AnnotatedPoints
    """``person`` is the region."""
    low: Tensor
    """(2, K) int64: column and row of the cell above and left of the point."""
    high: Tensor
    """(2, K) int64: of the cell below and right."""
    weight: Tensor
    """(2, K) of the high cell, of 1."""

    def select(self, keep: Tensor) -> GridPoints:
        """The points of a mask."""
        points = AnnotatedPoints(*(x[keep] for x in self.points))
        return GridPoints(points, self.low[:, keep], self.high[:, keep], self.weight[:, keep])

    def sample(self, maps: Tensor, channel: Tensor | None = None) -> Tensor:
        """Bilinear samples of maps (R, C, S, S) at the points: (K, C), or of one channel each: (K,)."""
        region = self.points.person
        (x0, y0), (x1, y1), (right, lower) = self.low, self.high, self.weight
        # All corners in one look-up, whose gradient is one map instead of four.
        rows, columns = torch.stack([y0, y0, y1, y1]), torch.stack([x0, x1, x0, x1])
        if channel is None:
            right, lower = right[:, None], lower[:, None]
            a, b, c, d = maps.movedim(1, -1)[region, rows, columns].float()
        else:
            a, b, c, d = maps[region, channel, rows, columns].float()
        return (1 - lower) * ((1 - right) * a + right * b) + lower * ((1 - right) * c + right * d)


class DensePoseTargets(NamedTuple):
    """What the losses of a batch compare with."""

    points: GridPoints
    coarse: Tensor | None
    """(R, S, S) int64 coarse part, or 1 for all of a person; None if a region has no mask."""
    boxes: Tensor
    """(R, 4) XYXY of the regions."""
    masks: Tensor | None
    """(R, S, S) bool: instance masks, for the losses that ask for them; None: there are none."""
    mesh_names: tuple[str, ...]
    """What ``points.points.mesh`` counts."""


def select_proposals(
    proposals: Sequence[Instances], *, num_classes: int, iou_threshold: float, with_masks: bool
) -> list[Instances]:
    """The proposals that train: foreground, well on their person, who is annotated.

    Args:
        proposals: of each image, with ``gt_classes``, ``gt_boxes`` and, where an image has annotated
            persons, ``gt_densepose``
        num_classes: of the box head
        iou_threshold: IoU of a proposal and its person's box, above which it trains
        with_masks: persons with nothing but an instance mask, ``gt_masks``, train too
    """
    foreground, _ = select_foreground_proposals(list(proposals), num_classes)
    selected = []
    for x in foreground:
        if not x.has("gt_densepose") and not (with_masks and x.has("gt_masks")):
            selected.append(x[:0])  # an image without persons has no such fields
            continue
        keep = matched_pairwise_iou(x.proposal_boxes, x.gt_boxes) > iou_threshold
        if not (with_masks and x.has("gt_masks")):
            keep &= x.gt_densepose.has_points
        selected.append(x[nonzero_tuple(keep)[0]])
    return selected


def annotations_of(proposals: Sequence[Instances]) -> DensePoseAnnotations:
    """``gt_densepose`` of the R proposals of all images; without points where an image has none."""
    device = proposals[0].proposal_boxes.device
    return DensePoseAnnotations.cat(
        [
            x.gt_densepose
            if x.has("gt_densepose")
            else DensePoseAnnotations([None] * len(x)).to(device)
            for x in proposals
        ]
    )


@torch.no_grad()
def encode_targets(
    proposals: Sequence[Instances],
    side: int,
    *,
    trained_by_masks: bool = False,
    with_masks: bool = False,
    published_grid: bool = True,
) -> DensePoseTargets:
    """Targets of the proposals of :func:`select_proposals`.

    Args:
        proposals: of each image, R together
        side: S
        trained_by_masks: the coarse target is the instance mask, ``gt_masks``, not the annotated parts
        with_masks: give ``masks``
        published_grid: see :func:`place_points`

    Raises:
        ValueError: masks are asked for, and an image has none
    """
    annotations = annotations_of(proposals)
    boxes = torch.cat([x.proposal_boxes.tensor for x in proposals])
    persons = torch.cat(
        [x.gt_boxes.tensor if x.has("gt_boxes") else x.proposal_boxes.tensor for x in proposals]
    )
    masks = _instance_masks(proposals, side) if trained_by_masks or with_masks else None
    coarse: Tensor | None
    if trained_by_masks:
        coarse = None if masks is None else masks.long()
    elif annotations.has_masks.all():
        coarse = resample_masks(
            annotations.masks, persons, boxes, side, published_grid=published_grid
        ).long()
    else:
        coarse = None
    points = place_points(annotations.points(), persons, boxes, side, published_grid=published_grid)
    return DensePoseTargets(points, coarse, boxes, masks, annotations.mesh_names)


def place_points(
    points: AnnotatedPoints,
    persons: Tensor,
    boxes: Tensor,
    side: int,
    *,
    published_grid: bool = True,
) -> GridPoints:
    """Points in the frames of the persons' boxes → cells of the maps of proposals.

    Those outside the proposal are left out, and those on its right or lower edge (published).

    Args:
        points: of R persons
        persons, boxes: (R, 4) XYXY, annotated and proposed
        side: S
        published_grid: a cell's value stands at its upper left corner, so that results, which are read
            as if it stood in the middle, are half a cell off; False: it stands in the middle
    """
    person, box = persons[points.person], boxes[points.person]
    frame = torch.stack([points.x, points.y], dim=1)
    position = person[:, :2] + frame * (person[:, 2:] - person[:, :2]) / FRAME
    valid = ((position >= box[:, :2]) & (position < box[:, 2:])).all(dim=1)
    grid = ((position - box[:, :2]) * side / (box[:, 2:] - box[:, :2]))[valid].T
    if not published_grid:
        grid = (grid - 0.5).clamp(min=0)
    low = grid.floor().long()
    high = (low + 1).clamp(max=side - 1)
    low = low.clamp(max=side - 1)
    weight = torch.minimum(grid, high.to(grid.dtype)) - low
    return GridPoints(AnnotatedPoints(*(x[valid] for x in points)), low, high, weight)


def resample_masks(
    masks: Tensor, persons: Tensor, boxes: Tensor, side: int, *, published_grid: bool = True
) -> Tensor:
    """Masks of persons' boxes → of proposals: the nearest value, zeros outside the person's box.

    Args:
        masks: (R, 256, 256)
        persons, boxes: (R, 4) XYXY
        side: S
        published_grid: the last column of a mask stands at the edge of the person's box, while the last
            one of the result stands before the edge of the proposal; False: values stand in the middle
            of their cells

    Returns:
        (R, S, S), the type of ``masks``
    """
    steps = torch.arange(side, device=boxes.device, dtype=boxes.dtype)
    steps = (steps if published_grid else steps + 0.5) / side
    low, size = boxes[:, :2, None], (boxes[:, 2:] - boxes[:, :2])[..., None]
    start, extent = persons[:, :2, None], (persons[:, 2:] - persons[:, :2])[..., None]
    index = (low + steps * size - start) / extent  # (R, 2, S)
    index = (index * (FRAME - 1)).round() if published_grid else (index * FRAME).floor()
    inside = (index >= 0) & (index <= FRAME - 1)
    column, row = index.clamp(0, FRAME - 1).long().unbind(1)
    region = torch.arange(len(masks), device=masks.device)[:, None, None]
    values = masks[region, row[:, :, None], column[:, None, :]]
    return values * (inside[:, 1, :, None] & inside[:, 0, None, :])


def _instance_masks(proposals: Sequence[Instances], side: int) -> Tensor:
    """``gt_masks`` cut to the proposals, (R, S, S) bool."""
    if any(len(x) and not x.has("gt_masks") for x in proposals):
        raise ValueError(
            "COARSE_SEGM_TRAINED_BY_MASKS and PIX_TO_SHAPE_CYCLE_LOSS need instance masks, and the "
            "training data come without `gt_masks`."
        )
    device = proposals[0].proposal_boxes.device
    cut = [
        x.gt_masks.crop_and_resize(x.proposal_boxes.tensor, side).to(device)
        for x in proposals
        if len(x)
    ]
    return torch.cat(cut) if cut else torch.zeros(0, side, side, dtype=torch.bool, device=device)
