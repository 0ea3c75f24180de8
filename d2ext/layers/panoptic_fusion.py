"""Pruning of instance masks and their fusion with semantic logits (UPSNet, arXiv 1901.03784).

Shapes: n instances with M×M mask logits, S stuff and T thing classes, h×w semantic logits, H×W map.

- :func:`prune_masks`: which instances stay, by score, when those of a class overlap.
- :func:`fuse_panoptic`: arg max over stuff, instances and "unknown", without their logits in memory.

Both run compiled kernels (``csrc/``) where available and the plain PyTorch functions ``*_reference``
elsewhere; the results agree except at pixels whose two best logits are equal up to rounding.

**Boxes** are (x1, y1, x2, y2) in pixels of the map, x2 and y2 *included*; :func:`whole_boxes` gives the
pixels that they cover.

**Precision.** Everything is computed in float32, or in float64 for float64 logits, whatever the dtype of
the arguments, under autocast too. There are no gradients: the results are integers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from d2ext.layers._extension import compiled_for, has_extension

__all__ = [
    "WholeBoxes",
    "fuse_panoptic",
    "fuse_panoptic_reference",
    "paste_weights",
    "prune_masks",
    "prune_masks_reference",
    "whole_boxes",
]

_FAR = 2**29  # pixels; as csrc/panoptic_fusion.h
# Semantic channels that the plain PyTorch path interpolates at a time.
_CHUNK_CHANNELS = 16


class WholeBoxes(NamedTuple):
    """Boxes in whole pixels, both ends included, (n, 4) int64 each."""

    semantic: Tensor
    """int(x1)..round(x2), half to even: where the semantic logits of the class count."""
    mask: Tensor
    """int(x1)..int(x2): where the mask logits go."""


def whole_boxes(boxes: Tensor) -> WholeBoxes:
    """(n, 4) → the pixels that boxes cover; with a NaN, none. Beyond ±2²⁹ they are cut."""
    near = boxes.double().clamp(-_FAR, _FAR)
    empty = near.new_tensor([0, 0, -1, -1])
    near = torch.where(near.isnan().any(dim=1, keepdim=True), empty, near)
    cut = near.trunc()
    return WholeBoxes(
        torch.cat([cut[:, :2], near[:, 2:].round()], dim=1).to(torch.int64), cut.to(torch.int64)
    )


def paste_weights(first: Tensor, last: Tensor, size: int, cells: int) -> Tensor:
    """Matrices that resize ``cells`` values to the pixels first..last of a line of ``size`` pixels
    (bilinear, half-pixel centres, ends repeated), with 0 elsewhere.

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
    """Drop instances that are covered by better ones of their class.

    Instances are visited by falling score. A mask is the pixels of the map where the logits, resized to
    the box, are positive. An instance is dropped if its mask is empty, or if more than
    ``overlap_fraction`` of it is covered by earlier instances of its class that were not dropped.

    Args:
        masks: (n, M, M) logits.
        boxes: (n, 4).
        classes: (n,) int64.
        scores: (n,); equal ones in their order.
        size: (H, W) of the map.
        overlap_fraction: in 0..1.

    Returns:
        (n',) int64 indices of the instances that stay, by falling score.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together; a fraction that is none.
    """
    if not compiled_for(masks.device):
        return prune_masks_reference(masks, boxes, classes, scores, size, overlap_fraction)
    _check_fraction(overlap_fraction)
    order, keep = torch.ops.d2ext.prune_masks.default(
        masks, boxes, classes, scores, size[0], size[1], overlap_fraction
    )
    return order[keep]


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
        unknown: add a channel after the instances for things that no instance covers.

    Returns:
        labels (H, W) int32: 0..S-1 stuff, S..S+n-1 instances, S + n unknown; and the arg max of the
        semantic logits (H, W) int32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
        IndexError: a class outside of -1..T-1, on the CPU. The GPU kernel does not check, which would
            make the host wait: it treats such an instance as one of class -1.
    """
    if not compiled_for(score.device):
        return fuse_panoptic_reference(
            score, boxes, classes, masks, size, num_stuff=num_stuff, unknown=unknown
        )
    return torch.ops.d2ext.fuse_panoptic.default(
        score, boxes, classes, masks, size[0], size[1], num_stuff, unknown
    )


# ---------------------------------------------------------------- plain PyTorch


def _pasted(mask: Tensor, box: list[int], size: tuple[int, int]) -> tuple[Tensor, slice, slice]:
    """Logits (M, M) resized to the box, cut to the map, and where they go."""
    x1, y1, x2, y2 = box
    rows, columns = _within(y1, y2, size[0]), _within(x1, x2, size[1])
    return _resized(mask, (y1, x1), (y2 - y1 + 1, x2 - x1 + 1), rows, columns), rows, columns


def _resized(
    grid: Tensor, start: tuple[int, int], size: tuple[int, int], rows: slice, columns: slice
) -> Tensor:
    """Rows and columns of (..., h, w) values that are spread over ``size`` pixels from ``start`` on.

    Bilinear, half-pixel centres, ends repeated, as ``F.interpolate``; but a neighbour of weight 0 is not
    read: it may be infinite.
    """
    upper, lower, part = _taps(start[0], size[0], rows, grid.shape[-2], grid.device)
    grid = grid.float()
    grid = grid[..., upper, :] * (1 - part)[:, None] + grid[..., lower, :] * part[:, None]
    left, right, part = _taps(start[1], size[1], columns, grid.shape[-1], grid.device)
    return grid[..., left] * (1 - part) + grid[..., right] * part


def _taps(
    start: int, size: int, line: slice, cells: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """For each pixel of a line the two cells between which it lies, and the weight of the second."""
    pixels = torch.arange(line.start - start, line.stop - start, device=device)
    source = ((pixels + 0.5) * (cells / max(size, 1)) - 0.5).clamp(min=0)
    first = source.long().clamp(max=cells - 1)
    part = (source - first).clamp(max=1)
    return first, (first + (part > 0)).clamp(max=cells - 1), part


def _within(first: int, last: int, size: int) -> slice:
    return slice(min(max(first, 0), size), max(min(last + 1, size), min(max(first, 0), size)))


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
    _check_prune(masks, boxes, classes, scores, size)
    _check_fraction(overlap_fraction)
    order = scores.argsort(descending=True, stable=True).tolist()
    kinds = classes.tolist()
    places = whole_boxes(boxes).mask.tolist()
    covered: dict[int, Tensor] = {}
    selected = []
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
        selected.append(i)
    return torch.tensor(selected, dtype=torch.int64, device=masks.device)


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
    """:func:`fuse_panoptic` in plain PyTorch, one instance after the other, within its box.

    Besides the results it holds a few H×W maps, and one for each class that occurs.
    """
    _check_fusion(score, boxes, classes, masks, size, num_stuff)
    _check_class_values(score, classes, num_stuff)
    count = len(boxes)
    best, labels = _best_channel(score[:num_stuff], size)
    thing, thing_labels = _best_channel(score[num_stuff:], size)
    semantic = torch.where(thing > best, thing_labels + num_stuff, labels)
    places = whole_boxes(boxes)
    kinds = classes.tolist()
    maps = {c: _upsampled(score[num_stuff + c], size) for c in set(kinds) if c >= 0}
    # The first instance of which neither view covers the pixel: its logit there is 0.
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
        inside_best[rows, columns] = inside_best[rows, columns].fmax(view)
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
    return _resized(score, (0, 0), size, slice(0, size[0]), slice(0, size[1]))


def _best_channel(score: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(C, h, w) → maximum over the channels at (H, W), and the first channel that has it, int32. A NaN
    is no maximum; where there is nothing else, -inf and 0."""
    best = torch.full(size, -torch.inf, device=score.device)
    labels = torch.zeros(size, dtype=torch.int32, device=score.device)
    for start in range(0, len(score), _CHUNK_CHANNELS):
        values = _upsampled(score[start : start + _CHUNK_CHANNELS], size)
        values, channels = values.where(~values.isnan(), -torch.inf).max(0)
        better = values > best
        best = torch.where(better, values, best)
        labels = torch.where(better, channels.to(torch.int32) + start, labels)
    return best, labels


# ---------------------------------------------------------------- arguments


def _check_instances(masks: Tensor, boxes: Tensor, classes: Tensor, others: list[Tensor]) -> None:
    """The checks of the compiled operators (csrc/panoptic_fusion.h), for the plain PyTorch path and for
    tensors without values."""
    if masks.dim() != 3 or min(masks.shape[1:]) < 1 or not masks.is_floating_point():
        raise ValueError(
            "masks must be floating point of shape (n, M, M) with M >= 1, "
            f"got {masks.dtype} of shape {tuple(masks.shape)}"
        )
    count = len(masks)
    if boxes.shape != (count, 4) or not boxes.is_floating_point():
        raise ValueError(
            f"boxes must be floating point of shape ({count}, 4), one box per mask, "
            f"got {boxes.dtype} of shape {tuple(boxes.shape)}"
        )
    if classes.shape != (count,) or classes.dtype != torch.int64:
        raise ValueError(
            f"classes must be int64 of shape ({count},), "
            f"got {classes.dtype} of shape {tuple(classes.shape)}"
        )
    devices = {str(x.device) for x in (masks, boxes, classes, *others)}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, got {', '.join(sorted(devices))}")


def _check_prune(
    masks: Tensor, boxes: Tensor, classes: Tensor, scores: Tensor, size: tuple[int, int]
) -> None:
    _check_instances(masks, boxes, classes, [scores])
    if scores.shape != (len(masks),) or scores.is_complex():
        raise ValueError(
            f"scores must be real numbers of shape ({len(masks)},), got {scores.dtype} of shape "
            f"{tuple(scores.shape)}"
        )
    _check_size(size)


def _check_fraction(overlap_fraction: float) -> None:
    if not 0 <= overlap_fraction <= 1:  # NaN, too
        raise ValueError(f"overlap_fraction must be in 0..1, got {overlap_fraction}")


def _check_fusion(
    score: Tensor,
    boxes: Tensor,
    classes: Tensor,
    masks: Tensor,
    size: tuple[int, int],
    num_stuff: int,
) -> None:
    _check_instances(masks, boxes, classes, [score])
    if score.dim() != 3 or min(score.shape[1:]) < 1 or not score.is_floating_point():
        raise ValueError(
            "score must be floating point of shape (S + T, h, w) with h, w >= 1, "
            f"got {score.dtype} of shape {tuple(score.shape)}"
        )
    if not 0 < num_stuff < len(score):
        raise ValueError(
            f"num_stuff must be in 1..{len(score) - 1}, to leave stuff and things, got {num_stuff}"
        )
    _check_size(size)


def _check_class_values(score: Tensor, classes: Tensor, num_stuff: int) -> None:
    things = len(score) - num_stuff
    if len(classes) > 0 and not bool(((classes >= -1) & (classes < things)).all()):
        raise IndexError(f"classes must be in 0..{things - 1}, or -1, got {classes.tolist()}")


def _check_size(size: tuple[int, int]) -> None:
    if min(size) < 1 or max(size) >= _FAR:
        raise ValueError(f"size must be (height, width), both >= 1 and < 2^29, got {tuple(size)}")


# ---------------------------------------------------------------- shapes, for compile and export

if has_extension():

    @torch.library.register_fake("d2ext::prune_masks")
    def _prune_masks_fake(
        masks: Tensor,
        boxes: Tensor,
        classes: Tensor,
        scores: Tensor,
        height: int,
        width: int,
        overlap_fraction: float,
    ) -> tuple[Tensor, Tensor]:
        _check_prune(masks, boxes, classes, scores, (height, width))
        count = masks.shape[0]
        return (
            masks.new_empty((count,), dtype=torch.int64),
            masks.new_empty((count,), dtype=torch.bool),
        )

    @torch.library.register_fake("d2ext::fuse_panoptic")
    def _fuse_panoptic_fake(
        score: Tensor,
        boxes: Tensor,
        classes: Tensor,
        masks: Tensor,
        height: int,
        width: int,
        num_stuff: int,
        unknown: bool,
    ) -> tuple[Tensor, Tensor]:
        _check_fusion(score, boxes, classes, masks, (height, width), num_stuff)
        return (
            score.new_empty((height, width), dtype=torch.int32),
            score.new_empty((height, width), dtype=torch.int32),
        )
