"""Boxes of two-stage detectors in fixed slots: Detectron2's RPN, pooling and selection, without waiting
for the device.

Detectron2 gives each image another number of boxes. Here their shapes do not depend on values, so that
CUDA graphs and exported files can hold them; a score says which slots are in use.

Letters: N images, R regions, T thing classes, D slots, L levels, C channels, s side of the pooled grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torch.nn import functional as F

from d2ext.layers.exporting import needs_fixed_shapes
from d2ext.layers.nms import nms
from d2ext.modeling.export_form import Outputs

# Score of an empty slot.
EMPTY = -1.0
# Slots for detections beyond the limit whose score equals the last one's.
TIES = 12
# Coordinate in pixels before the first one of any level.
_OUTSIDE = -4096.0


class Proposals(NamedTuple):
    """Proposals of a batch in fixed slots, best first."""

    boxes: Tensor
    """(N, R, 4), zeros in empty slots."""
    logits: Tensor
    """(N, R) objectness; -inf in empty slots, which come last."""


class Slots(NamedTuple):
    """Boxes of a batch in D fixed slots, best first, pixels of the network input."""

    boxes: Tensor
    """(N, D, 4); zeros in empty slots."""
    scores: Tensor
    """(N, D) in 0..1; :data:`EMPTY` in empty slots, which come last."""
    classes: Tensor
    """(N, D) int64 in 0..T-1."""
    mask_logits: Tensor | None = None
    """(N, D, M, M), of a model with masks."""

    def outputs(self, prefix: str = "") -> Outputs:
        """As tensors of an exported file."""
        named = {name: x for name, x in self._asdict().items() if x is not None}
        if self.mask_logits is not None:
            empty = (self.scores == EMPTY)[..., None, None]
            named["mask_logits"] = self.mask_logits.masked_fill(empty, 0.0)
        return {f"{prefix}{name}": x for name, x in named.items()} | {f"{prefix}count": self.counts}

    @classmethod
    def of(cls, outputs: Outputs, prefix: str = "") -> Slots:
        """Inverse of :meth:`outputs`."""
        names = [name for name in cls._fields if f"{prefix}{name}" in outputs]
        return cls(**{name: outputs[f"{prefix}{name}"] for name in names})

    @property
    def counts(self) -> Tensor:
        """(N,) int64: slots in use."""
        return (self.scores != EMPTY).sum(dim=1)

    def instances(self, row: int, count: int, image_size: tuple[int, int]) -> Instances:
        """Those of an image, of ``image_size`` (height, width) without padding."""
        boxes, scores, classes = (x[row, :count] for x in self[:3])
        result = Instances(image_size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)
        if self.mask_logits is not None:
            result.mask_logits = self.mask_logits[row, :count]
        return result


def gather(values: Tensor, index: Tensor) -> Tensor:
    """values (B, A, v), index (B, n) into A → (B, n, v)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


class SlotRPN(RPN):
    """Detectron2's RPN that also gives its proposals in fixed slots. A subclass may decode and clip
    boxes in another way."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # No buffers, as the generator's are, which half precision would round.
        self._cell_anchors = [x.float() for x in self.anchor_generator.cell_anchors]

    @classmethod
    def of(cls, rpn: RPN) -> SlotRPN:
        """An RPN that is already there, in inference."""
        own = cls(
            in_features=rpn.in_features,
            head=rpn.rpn_head,
            anchor_generator=rpn.anchor_generator,
            anchor_matcher=rpn.anchor_matcher,
            box2box_transform=rpn.box2box_transform,
            batch_size_per_image=rpn.batch_size_per_image,
            positive_fraction=rpn.positive_fraction,
            pre_nms_topk=(rpn.pre_nms_topk[True], rpn.pre_nms_topk[False]),
            post_nms_topk=(rpn.post_nms_topk[True], rpn.post_nms_topk[False]),
            nms_thresh=rpn.nms_thresh,
            min_box_size=rpn.min_box_size,
        )
        return own.eval()

    def predict(self, features: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Maps (N, C, h, w) of L levels → logits L × (N, h·w·a), deltas L × (N, h·w·a, 4), ``a`` anchors
        of a cell.

        Always in float32, which coordinates need.
        """
        logits, deltas = self.rpn_head([features[name] for name in self.in_features])
        return (
            [x.permute(0, 2, 3, 1).flatten(1).float() for x in logits],
            [x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3).float() for x in deltas],
        )

    @torch.no_grad()
    def find(
        self,
        features: dict[str, Tensor],
        logits: Sequence[Tensor],
        deltas: Sequence[Tensor],
        sizes: Tensor,
    ) -> Proposals:
        """What Detectron2's ``find_top_rpn_proposals`` finds, without waiting for the device: the best
        of each level, NMS in each, the best of all.

        Args:
            features: the pyramid. logits, deltas: what :meth:`predict` gives for it.
            sizes: (N, 2) height and width of the images without padding.

        Raises:
            FloatingPointError: in training, a box or logit that is not finite.
        """
        limit = self.pre_nms_topk[self.training]
        boxes, scores = [], []
        for level, (own_logits, own_deltas) in enumerate(zip(logits, deltas, strict=True)):
            best, index = own_logits.topk(min(limit, own_logits.shape[1]), dim=1)
            width = features[self.in_features[level]].shape[-1]
            anchors = self._anchors(level, width, index)
            boxes.append(self.decode(anchors, gather(own_deltas, index)))
            scores.append(best)
        slots = max(x.shape[1] for x in scores)
        joined = torch.stack([F.pad(x, (0, 0, 0, slots - x.shape[1])) for x in boxes], dim=1)
        height, width = sizes[:, :, None, None].unbind(1)
        joined = self.clip(joined, height, width)  # (N, levels, slots, 4)
        ranked = torch.stack(
            [F.pad(x, (0, slots - x.shape[1]), value=-torch.inf) for x in scores], 1
        )
        finite = joined.isfinite().all(dim=-1) & ranked.isfinite()
        if self.training and int(finite.sum()) < sum(x.numel() for x in scores):
            raise FloatingPointError(
                "Predicted boxes or scores contain Inf/NaN. Training has diverged."
            )
        valid = finite & (joined[..., 2:] - joined[..., :2] > self.min_box_size).all(dim=-1)
        keep = nms(joined, valid, self.nms_thresh)
        ranked = ranked.masked_fill(~keep, -torch.inf).flatten(1)
        limit = min(self.post_nms_topk[self.training], ranked.shape[1])
        best, index = ranked.topk(limit, dim=1)
        found = gather(joined.flatten(1, 2), index)
        return Proposals(found.masked_fill((best == -torch.inf)[..., None], 0.0), best)

    def _anchors(self, level: int, width: int, index: Tensor) -> Tensor:
        """index (N, k) into the anchors of a level whose map has ``width`` cells → anchors (N, k, 4)."""
        cells = self._cell_anchors[level] = self._cell_anchors[level].to(index.device)
        generator = self.anchor_generator
        cell = index // len(cells)
        x, y = cell % width, cell // width
        shift = torch.stack([x, y, x, y], dim=-1) + generator.offset
        return shift * generator.strides[level] + cells[index % len(cells)]

    def decode(self, anchors: Tensor, deltas: Tensor) -> Tensor:
        """Anchors and deltas (N, k, 4) → boxes (N, k, 4)."""
        boxes = self.box2box_transform.apply_deltas(deltas.flatten(0, 1), anchors.flatten(0, 1))
        return boxes.view_as(deltas)

    def clip(self, boxes: Tensor, height: Tensor, width: Tensor) -> Tensor:
        """Boxes (..., 4) cut to the image."""
        return clip(boxes, height, width)


def clip(boxes: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Boxes (..., 4) cut to images of ``height`` and ``width``, as Detectron2's ``Boxes.clip``."""
    x1, y1, x2, y2 = (x.clamp(min=0) for x in boxes.unbind(-1))
    ends = (x1.minimum(width), y1.minimum(height), x2.minimum(width), y2.minimum(height))
    return torch.stack(ends, dim=-1)


def pool_by_level(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    size: int,
    align: Callable[[Tensor, Tensor, int], Tensor],
) -> Tensor:
    """Pool each region from its level.

    Args:
        features: L maps (B, C, h, w).
        rois: (R, 5) index of the image, and box.
        levels: (R,) int64.
        size: s.
        align: maps of a level, regions, the level's index → (r, C, s, s).

    Returns:
        (R, C, s, s)
    """
    if needs_fixed_shapes(rois):
        # Without waiting to know how many boxes a level has: from every other level a box is taken far
        # outside of the map, where there are zeros, which cost a GPU next to nothing.
        outside = F.pad(rois[:, :1], (0, 4), value=_OUTSIDE)
        parts = [
            align(feature, torch.where((levels == i)[:, None], rois, outside), i)
            for i, feature in enumerate(features)
        ]
        return sum(parts[1:], parts[0])
    pooled = features[0].new_zeros((rois.shape[0], features[0].shape[1], size, size))
    for i, feature in enumerate(features):
        selected = (levels == i).nonzero()[:, 0]
        part = align(feature, rois[selected], i)
        pooled = pooled.index_put((selected,), part.to(pooled.dtype))
    return pooled


def pool(pooler: ROIPooler, features: Sequence[Tensor], boxes: Tensor, images: Tensor) -> Tensor:
    """What Detectron2's ``ROIPooler`` (RoIAlign) gives for boxes (R, 4) and the index of each one's
    image (R,): (R, C, s, s). Coordinates are float32, whatever the maps are."""
    rois = torch.cat([images[:, None].to(boxes.dtype), boxes], dim=1).float()

    def align(feature: Tensor, rois: Tensor, level: int) -> Tensor:
        # The CPU kernel has no bfloat16; the result goes back to the feature's dtype.
        pooled: Tensor = pooler.level_poolers[level](feature.float(), rois)
        return pooled.to(feature.dtype)

    if len(features) == 1:
        return align(features[0], rois, 0)
    # Detectron2's ``assign_boxes_to_levels``, which wants to know whether there are boxes.
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    scale = torch.log2(sides / pooler.canonical_box_size + 1e-8)
    levels = (pooler.canonical_level + scale).floor().clamp(pooler.min_level, pooler.max_level)
    levels = levels.to(torch.int64) - pooler.min_level
    return pool_by_level(features, rois, levels, pooler.output_size[0], align)


def select(
    boxes: Tensor,
    probabilities: Tensor,
    *,
    score_threshold: float,
    nms_threshold: float,
    limit: int,
    across_classes: bool = False,
    ties: int = TIES,
) -> Slots:
    """Boxes above a score, after non-maximum suppression, best first.

    Args:
        boxes: (N, R, T, 4), a box for each class.
        probabilities: (N, R, T), of a region 1 together at most; EMPTY where there is none.
        score_threshold: only higher scores are selected.
        nms_threshold: IoU above which the worse box is suppressed.
        limit: number of boxes, plus ties with the last one, for ``ties`` of which there are slots.
        across_classes: suppress boxes of other classes too (the panoptic head's candidates).
    """
    batch, regions, kinds = probabilities.shape
    scores = torch.where(probabilities > score_threshold, probabilities, EMPTY)
    region = torch.arange(regions, device=boxes.device)
    if across_classes:
        # More classes of a region than these cannot be above the threshold.
        most = kinds
        if score_threshold > 0:
            most = min(kinds, max(int(1 / score_threshold), 1))
        scores, kind = scores.topk(most, dim=2)
        index = (region[:, None] * kinds + kind).flatten(1)[:, None]
        scores = scores.flatten(1)[:, None]
    else:  # a group of boxes for each class
        kind = torch.arange(kinds, device=boxes.device)
        index = (region * kinds + kind[:, None]).expand(batch, -1, -1)
        scores = scores.transpose(1, 2)
    scores, order = scores.sort(dim=2, descending=True, stable=True)
    index = index.gather(2, order).flatten(1)
    boxes = boxes.flatten(1, 2)
    keep = nms(gather(boxes, index).view(*scores.shape, 4), scores != EMPTY, nms_threshold)
    scores = scores.masked_fill(~keep, EMPTY).flatten(1)
    scores, order = scores.topk(min(limit + ties, scores.shape[1]), dim=1)
    scores = torch.where(scores >= scores[:, :limit][:, -1:], scores, EMPTY)
    index = index.gather(1, order)
    empty = scores == EMPTY
    boxes = gather(boxes, index).masked_fill(empty[..., None], 0.0)
    return Slots(boxes, scores, (index % kinds).masked_fill(empty, 0))
