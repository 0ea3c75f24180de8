"""Pruning of instance masks and their fusion with semantic logits (UPSNet, arXiv 1901.03784).

Shapes: n instances with M×M mask logits, S stuff and T thing classes, h×w semantic logits, H×W map.

- :func:`prune_masks`: which instances stay, by score, when those of a class overlap.
- :func:`fuse_panoptic`: arg max over stuff, instances and "unknown", without their logits in memory.

**Boxes** are (x1, y1, x2, y2) in pixels of the map, x2 and y2 *included*; :func:`whole_boxes` says which
pixels they cover.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "WholeBoxes",
    "fuse_panoptic",
    "fuse_panoptic_reference",
    "paste_weights",
    "prune_masks",
    "prune_masks_reference",
    "whole_boxes",
]

# Semantic channels that the plain PyTorch path interpolates at a time.
_CHUNK_CHANNELS = 16


class WholeBoxes(NamedTuple):
    """Boxes in whole pixels, both ends included, (n, 4) int64 each."""

    semantic: Tensor
    """int(x1)..round(x2), half to even: where the semantic logits of the class count."""
    mask: Tensor
    """int(x1)..int(x2): where the mask logits go."""


def whole_boxes(boxes: Tensor) -> WholeBoxes:
    """(n, 4) → the pixels that boxes cover."""
    cut = boxes.trunc()
    return WholeBoxes(
        torch.cat([cut[:, :2], boxes[:, 2:].round()], dim=1).to(torch.int64), cut.to(torch.int64)
    )


def paste_weights(first: Tensor, last: Tensor, size: int, cells: int) -> Tensor:
    """Matrices that resize ``cells`` values to pixels first..last of a line of ``size`` (bilinear,
    half-pixel centres, ends repeated), 0 elsewhere.

    Args:
        first, last: (n,) int64.

    Returns:
        (n, size, cells) float32.
    """
    pixels = torch.arange(size, device=first.device)
    sides = (last - first + 1)[:, None]
    offset = pixels - first[:, None]
    source = (offset + 0.5) * (cells / sides.float()) - 0.5
    source = source.clamp(0, cells - 1)
    weights = 1 - (source[..., None] - torch.arange(cells, device=first.device)).abs()
    inside = (offset >= 0) & (pixels <= last[:, None])
    return torch.where(inside[..., None], weights.clamp(min=0), 0.0)


def prune_masks(
    masks: Tensor,
    boxes: Tensor,
    classes: Tensor,
    scores: Tensor,
    size: tuple[int, int],
    overlap_fraction: float = 0.3,
) -> Tensor:
    """Drop instances that better ones of their class cover.

    From the best score down: the mask is the pixels of the map where the logits, resized to the box,
    are positive. An instance is dropped if its mask is empty, or if more than ``overlap_fraction`` of it
    is covered by the masks of kept instances of the same class.

    Args:
        masks: (n, M, M) logits.
        boxes: (n, 4).
        classes: (n,) int64.
        scores: (n,); of equal ones the first comes first.
        size: (H, W) of the map.
        overlap_fraction: in 0..1.

    Returns:
        (n',) int64 indices of the kept, by falling score.
    """
    return prune_masks_reference(masks, boxes, classes, scores, size, overlap_fraction)


def fuse_panoptic(
    score: Tensor,
    boxes: Tensor,
    classes: Tensor,
    masks: Tensor,
    size: tuple[int, int],
    *,
    num_stuff: int,
    unknown: bool = True,
) -> tuple[Tensor, Tensor]:
    """Arg max of UPSNet's panoptic logits.

    Of equal logits the first channel wins. No gradient.

    Args:
        score: (S + T, h, w) semantic logits, interpolated to (H, W) (bilinear, half-pixel centres).
        boxes: (n, 4).
        classes: (n,) int64 in 0..T-1; -1: an instance whose logits are 0 everywhere.
        masks: (n, M, M) logits.
        size: (H, W).
        num_stuff: S.
        unknown: whether there is a channel after the instances for things that none of them covers.

    Returns:
        labels (H, W) int32, 0..S-1 stuff, S.. instances, S + n unknown; and the arg max of the semantic
        logits (H, W) int32.
    """
    return fuse_panoptic_reference(
        score, boxes, classes, masks, size, num_stuff=num_stuff, unknown=unknown
    )


# ---------------------------------------------------------------- plain PyTorch


def _pasted(mask: Tensor, box: list[int], size: tuple[int, int]) -> tuple[Tensor, slice, slice]:
    """Logits (M, M) resized to the box, cut to the map, and where they go."""
    x1, y1, x2, y2 = box
    cells_y, cells_x = mask.shape
    first_y, last_y = mask.new_tensor([y1, y2]).to(torch.int64).split(1)
    first_x, last_x = mask.new_tensor([x1, x2]).to(torch.int64).split(1)
    rows, columns = _within(y1, y2, size[0]), _within(x1, x2, size[1])
    weights_y = paste_weights(first_y - rows.start, last_y - rows.start, _length(rows), cells_y)
    weights_x = paste_weights(
        first_x - columns.start, last_x - columns.start, _length(columns), cells_x
    )
    return weights_y[0] @ mask.float() @ weights_x[0].T, rows, columns


def _within(first: int, last: int, size: int) -> slice:
    return slice(min(max(first, 0), size), max(min(last + 1, size), min(max(first, 0), size)))


def _length(part: slice) -> int:
    return part.stop - part.start


@torch.no_grad()
def prune_masks_reference(
    masks: Tensor,
    boxes: Tensor,
    classes: Tensor,
    scores: Tensor,
    size: tuple[int, int],
    overlap_fraction: float = 0.3,
) -> Tensor:
    """:func:`prune_masks` in plain PyTorch; waits for the device at every instance."""
    order = scores.argsort(descending=True, stable=True).tolist()
    kinds = classes.tolist()
    places = whole_boxes(boxes).mask.tolist()
    covered: dict[int, Tensor] = {}
    kept = []
    for i in order:
        logits, rows, columns = _pasted(masks[i], places[i], size)
        mask = logits > 0
        if kinds[i] not in covered:
            covered[kinds[i]] = torch.zeros(size, dtype=torch.bool, device=masks.device)
        region = covered[kinds[i]][rows, columns]
        area, both = torch.stack([mask.sum(), (mask & region).sum()]).tolist()
        if area == 0 or both / area > overlap_fraction:
            continue
        region |= mask
        kept.append(i)
    return torch.tensor(kept, dtype=torch.int64, device=masks.device)


@torch.no_grad()
def fuse_panoptic_reference(
    score: Tensor,
    boxes: Tensor,
    classes: Tensor,
    masks: Tensor,
    size: tuple[int, int],
    *,
    num_stuff: int,
    unknown: bool = True,
) -> tuple[Tensor, Tensor]:
    """:func:`fuse_panoptic` in plain PyTorch: one instance after the other, within its box.

    Holds, beside results, a few maps of H×W and one of the classes' for each class that occurs.
    """
    count = len(boxes)
    best, labels = _best_channel(score[:num_stuff], size)
    thing, thing_labels = _best_channel(score[num_stuff:], size)
    semantic = torch.where(thing > best, thing_labels + num_stuff, labels)
    places = whole_boxes(boxes)
    kinds = classes.tolist()
    maps = {c: _upsampled(score[None, [num_stuff + c]], size)[0, 0] for c in set(kinds) if c >= 0}
    # The lowest instance that covers a pixel with neither view: its logit there is 0.
    first_outside = torch.zeros(size, dtype=torch.int32, device=score.device)
    coverings = torch.zeros(size, dtype=torch.int32, device=score.device)
    inside_best = torch.full(size, -torch.inf, device=score.device)
    for i, (kind, own, place) in enumerate(
        zip(kinds, places.semantic.tolist(), places.mask.tolist(), strict=True)
    ):
        if kind < 0:
            continue
        rows, columns = _within(own[1], own[3], size[0]), _within(own[0], own[2], size[1])
        view = maps[kind][rows, columns]
        inside_best[rows, columns] = inside_best[rows, columns].maximum(view)
        coverings[rows, columns] += 1
        pasted, mask_rows, mask_columns = _pasted(masks[i], place, size)
        # The smallest window with both views.
        top, left = min(rows.start, mask_rows.start), min(columns.start, mask_columns.start)
        bottom, right = max(rows.stop, mask_rows.stop), max(columns.stop, mask_columns.stop)
        logits = torch.zeros((bottom - top, right - left), device=score.device)
        covered = torch.zeros_like(logits, dtype=torch.bool)
        for part, y, x in ((view, rows, columns), (pasted, mask_rows, mask_columns)):
            window = (slice(y.start - top, y.stop - top), slice(x.start - left, x.stop - left))
            logits[window] += part
            covered[window] = True
        window = (slice(top, bottom), slice(left, right))
        first_outside[window][covered & (first_outside[window] == i)] = i + 1
        better = covered & (logits > best[window])
        best[window] = torch.where(better, logits, best[window])
        labels[window] = torch.where(better, num_stuff + i, labels[window])
    free = num_stuff + first_outside
    zero_wins = (first_outside < count) & ((best < 0) | ((best == 0) & (free < labels)))
    best = torch.where(zero_wins, 0.0, best)
    labels = torch.where(zero_wins, free, labels)
    if unknown:
        # X_mask is 0 outside an instance's box.
        inside_best = torch.where(coverings < count, inside_best.clamp(min=0), inside_best)
        rest = thing - inside_best if count > 0 else thing
        labels = torch.where(rest > best, num_stuff + count, labels)
    return labels.to(torch.int32), semantic.to(torch.int32)


def _upsampled(score: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(score.float(), size, mode="bilinear", align_corners=False)


def _best_channel(score: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(C, h, w) → largest value over the channels at (H, W) and the first channel that has it, int32."""
    best = torch.full(size, -torch.inf, device=score.device)
    labels = torch.zeros(size, dtype=torch.int32, device=score.device)
    for start in range(0, len(score), _CHUNK_CHANNELS):
        values, channels = _upsampled(score[None, start : start + _CHUNK_CHANNELS], size)[0].max(0)
        better = values > best
        best = torch.where(better, values, best)
        labels = torch.where(better, channels.to(torch.int32) + start, labels)
    return best, labels
