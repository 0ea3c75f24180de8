"""Soft non-maximum suppression (https://arxiv.org/abs/1704.04503) as CornerNet publishes it
(https://arxiv.org/abs/1808.01244), and its variant that merges boxes.

Shapes: N boxes, B images.

Each round selects the box of highest score and lowers the scores of the remaining ones by their IoU
with it; a box whose score falls below the threshold is discarded. Classes are treated separately.

Quirks of the published code that change numbers:

- IoU counts pixels: a box is ``x2 - x1 + 1`` wide, also with fractional coordinates.
- A discarded box is overwritten by the last one of the array, which then is one shorter. The
  published evaluation nevertheless uses the whole array, so that a moved box counts twice, the second
  time with the score it had before the move: the *stale* rows of :func:`soft_nms_rows`.
- Of equal scores, the first in the array's current order is selected.
- Boxes and their scores move in the array, corner scores do not: merging weights a box with the corner
  scores of the row in which it currently lies.

Everything is computed in float32. Rounds depend on each other: on a GPU one block goes through those of
a class (``csrc/cuda/soft_nms.cu``), and the host does not wait; merging, and all without the compiled
operator, runs on the CPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from d2ext.layers._extension import compiled_for, has_cuda_extension, has_extension
from d2ext.layers.exporting import needs_fixed_shapes

__all__ = ["SoftNMSRows", "soft_nms", "soft_nms_merge", "soft_nms_rows", "soft_nms_slots"]

_METHODS = ("hard", "linear", "gaussian")
# Score of a slot without a box.
EMPTY = -math.inf
# Above all classes, of which there are at most as many.
_MOST_CLASSES = 2**31


class SoftNMSRows(NamedTuple):
    """The published array, class by class in ascending order.

    Attributes:
        indices: (N,) int64, the input box that each row holds; a stale row repeats one.
        scores: (N,) float32, weighted; descending within a class, stale rows aside.
        keep: (N,) bool; False: a stale row. Within a class, stale rows come last.
        boxes: (N, 4) float32, x1, y1, x2, y2; as given, or merged.
    """

    indices: Tensor
    scores: Tensor
    keep: Tensor
    boxes: Tensor


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None = None,
    *,
    method: str = "gaussian",
    sigma: float = 0.5,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.001,
) -> tuple[Tensor, Tensor]:
    """Soft-NMS class by class: the boxes that stay, best first.

    Args:
        boxes: (N, 4), x1, y1, x2, y2 in pixels, x2 and y2 counting as inside.
        scores: (N,).
        classes: (N,) integers; None: all boxes are of one class.
        method: how the IoU lowers a score. "gaussian": times exp(-IoU² / sigma); "linear": times
            1 - IoU where the IoU is above ``iou_threshold``; "hard": 0 there, as in plain NMS.
        sigma: of "gaussian", > 0.
        iou_threshold: of "linear" and "hard"; "gaussian" has none.
        score_threshold: a box whose weighted score is below this is discarded. A box that overlaps
            with no selected one stays whatever its score is.

    Returns:
        Indices (K,) int64 of the boxes that stay and their weighted scores (K,) float32, by descending
        score (equal ones in order of class), on the boxes' device.

    Raises:
        ValueError: a wrong method, value, shape, dtype or device.
    """
    rows = soft_nms_rows(
        boxes,
        scores,
        classes,
        method=method,
        sigma=sigma,
        iou_threshold=iou_threshold,
        score_threshold=score_threshold,
    )
    weighted, order = rows.scores[rows.keep].sort(descending=True, stable=True)
    return rows.indices[rows.keep][order], weighted


def soft_nms_rows(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None = None,
    *,
    method: str = "gaussian",
    sigma: float = 0.5,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.001,
) -> SoftNMSRows:
    """As :func:`soft_nms`, but all N rows of the published array, the stale ones included."""
    _check("soft_nms", boxes, scores, classes, method, sigma)
    return _run(
        boxes, scores, None, classes, method, sigma, iou_threshold, score_threshold, weight_exp=0.0
    )


def soft_nms_slots(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    valid: Tensor,
    *,
    method: str = "gaussian",
    sigma: float = 0.5,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.001,
) -> SoftNMSRows:
    """:func:`soft_nms_rows` of each of B images, whose boxes are in fixed slots.

    Args:
        boxes, scores: (B, N, 4), (B, N).
        classes: (B, N) integers, in 0..2^31 - 1 where there is a box.
        valid: (B, N) bool: which slots hold a box.
        method, sigma, iou_threshold, score_threshold: as for :func:`soft_nms`.

    Returns:
        Fields (B, N, ...): the rows of each image; then the slots without a box, which ``keep`` does not
        hold either, their score :data:`EMPTY`. ``indices`` are slots of the image.

    Raises:
        ValueError: a wrong method, value, shape, dtype or device.
    """
    if valid.dim() != 2 or valid.dtype != torch.bool or boxes.shape != (*valid.shape, 4):
        raise ValueError(
            "soft_nms_slots: valid must be bool of shape (B, N) and boxes of shape (B, N, 4), "
            f"got {valid.dtype} of shape {tuple(valid.shape)} and {tuple(boxes.shape)}"
        )
    images, slots = valid.shape
    image = torch.arange(images, device=valid.device)[:, None]
    # A slot without a box is a class of its own, after all others of its image.
    own = _MOST_CLASSES + torch.arange(slots, device=valid.device)
    keys = 2 * _MOST_CLASSES * image + torch.where(valid, classes.long(), own)
    flat = soft_nms_rows(
        boxes.flatten(0, 1),
        scores.flatten(),
        keys.flatten(),
        method=method,
        sigma=sigma,
        iou_threshold=iou_threshold,
        score_threshold=score_threshold,
    )
    rows = SoftNMSRows(*(x.unflatten(0, (images, slots)) for x in flat))
    indices = rows.indices - slots * image
    holds_box = valid.gather(1, indices)
    return SoftNMSRows(
        indices, rows.scores.masked_fill(~holds_box, EMPTY), rows.keep & holds_box, rows.boxes
    )


def soft_nms_merge(
    boxes: Tensor,
    scores: Tensor,
    corner_scores: Tensor,
    classes: Tensor | None = None,
    *,
    weight_exp: float = 10.0,
    method: str = "gaussian",
    sigma: float = 0.5,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.001,
) -> SoftNMSRows:
    """Soft-NMS in which a selected box moves towards the boxes whose scores it lowers.

    Each corner becomes the weighted mean of that corner over the selected box (weight 1) and the
    remaining boxes that overlap with it (weight (1 - w)^weight_exp, w being the factor of their score),
    each weight times the corner's score.

    Args:
        boxes, scores, classes, method, sigma, iou_threshold, score_threshold: as for
            :func:`soft_nms`.
        corner_scores: (N, 2), of the top left and of the bottom right corner, > 0.
        weight_exp: 10 in CornerNet's multi-scale configuration.

    Returns:
        All N rows of the published array.

    Raises:
        ValueError: a wrong method, value, shape, dtype or device.
    """
    _check("soft_nms_merge", boxes, scores, classes, method, sigma)
    if corner_scores.shape != (boxes.shape[0], 2) or not corner_scores.is_floating_point():
        raise ValueError(
            f"soft_nms_merge: corner_scores must be floating point of shape ({boxes.shape[0]}, 2), "
            f"got {corner_scores.dtype} of shape {tuple(corner_scores.shape)}"
        )
    if corner_scores.device != boxes.device:
        raise ValueError(
            "soft_nms_merge: boxes and corner_scores must be on one device, "
            f"got {boxes.device} and {corner_scores.device}"
        )
    return _run(
        boxes,
        scores,
        corner_scores,
        classes,
        method,
        sigma,
        iou_threshold,
        score_threshold,
        weight_exp,
    )


@torch.no_grad()
def _run(
    boxes: Tensor,
    scores: Tensor,
    corner_scores: Tensor | None,
    classes: Tensor | None,
    method: str,
    sigma: float,
    iou_threshold: float,
    score_threshold: float,
    weight_exp: float,
) -> SoftNMSRows:
    device, at = boxes.device, torch.device("cpu")
    if device.type == "cuda" and corner_scores is None and has_cuda_extension():
        at = device
    order, sizes = _by_class(None if classes is None else classes.to(at), boxes.shape[0], at)
    own_boxes = boxes.to(at, torch.float32)[order]
    own_scores = scores.to(at, torch.float32)[order]
    corners = None
    if corner_scores is not None:
        corners = corner_scores.to(at, torch.float32)[order]
    if compiled_for(own_boxes.device):
        own_boxes, own_scores, indices, keep = torch.ops.d2ext.soft_nms.default(
            own_boxes,
            own_scores,
            corners,
            sizes,
            _METHODS.index(method),
            sigma,
            iou_threshold,
            score_threshold,
            weight_exp,
        )
    else:
        rounds = _Rounds(method, sigma, iou_threshold, score_threshold, weight_exp)
        indices, keep = rounds.run(own_boxes, own_scores, corners, sizes.tolist())
    return SoftNMSRows(
        order[indices].to(device), own_scores.to(device), keep.to(device), own_boxes.to(device)
    )


def _by_class(classes: Tensor | None, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Stable order of the boxes by class, and the number of boxes of each class; on a GPU followed by
    zeros, so that the host need not know how many classes there are."""
    if classes is None or count == 0:
        return torch.arange(count, device=device), torch.full((1,), count, device=device)
    ordered, order = classes.sort(stable=True)
    if not needs_fixed_shapes(ordered):
        return order, ordered.unique_consecutive(return_counts=True)[1]
    number = (ordered[1:] != ordered[:-1]).cumsum(0)
    number = torch.nn.functional.pad(number, (1, 0))
    return order, torch.zeros_like(number).scatter_add_(0, number, torch.ones_like(number))


# ---------------------------------------------------------------- plain PyTorch


class _Rounds:
    """The rounds in plain PyTorch: each is a few operations on all remaining boxes."""

    def __init__(
        self,
        method: str,
        sigma: float,
        iou_threshold: float,
        score_threshold: float,
        weight_exp: float,
    ) -> None:
        self.method, self.sigma, self.iou_threshold = method, sigma, iou_threshold
        self.score_threshold, self.weight_exp = score_threshold, weight_exp

    def run(
        self, boxes: Tensor, scores: Tensor, corners: Tensor | None, sizes: list[int]
    ) -> tuple[Tensor, Tensor]:
        """Changes boxes and scores in place; returns (indices, keep)."""
        indices = torch.arange(len(boxes))
        keep = torch.zeros(len(boxes), dtype=torch.bool)
        begin = 0
        for size in sizes:
            part = slice(begin, begin + size)
            own = None if corners is None else corners[part]
            count = self._one_class(boxes[part], scores[part], indices[part], own)
            keep[begin : begin + count] = True
            begin += size
        return indices, keep

    def _one_class(
        self, boxes: Tensor, scores: Tensor, indices: Tensor, corners: Tensor | None
    ) -> int:
        """The number of rows that are not stale."""
        count, row = len(boxes), 0
        while row < count:
            best = row + int(scores[row:count].argmax())
            for column in (boxes, scores, indices):
                column[[row, best]] = column[[best, row]]
            left = slice(row + 1, count)
            overlaps = _pixel_iou(boxes[row], boxes[left])
            weights = self._weights(overlaps)
            weighted = scores[left] * weights
            dropped = (overlaps > 0) & (weighted < self.score_threshold)
            moves = _Moves(dropped)
            if corners is not None:
                shares = (1 - weights) ** self.weight_exp
                seen = overlaps[moves.visited] > 0
                boxes[row] = _merged(
                    boxes[row:count],
                    corners[row:count],
                    shares,
                    moves.visited[seen],
                    moves.places[seen],
                )
            scores[left] = torch.where(moves.stale, scores[left], weighted[moves.sources])
            boxes[left] = boxes[left][moves.sources]
            indices[left] = indices[left][moves.sources]
            count -= moves.dropped
            row += 1
        return count

    def _weights(self, overlaps: Tensor) -> Tensor:
        if self.method == "gaussian":
            return torch.exp(-(overlaps * overlaps) / self.sigma)
        reduced = 1 - overlaps if self.method == "linear" else torch.zeros_like(overlaps)
        return torch.where(overlaps > self.iou_threshold, reduced, 1.0)


class _Moves:
    """How the remaining boxes move when dropped ones are overwritten by the last one of the array.

    Attributes:
        sources: (L,) for each place, the former place of the box that it holds afterwards.
        stale: (L,) bool; the place holds a copy of a moved box, with its former score.
        visited, places: for each step of the loop over the array, the former and the current place of
            the box that is visited.
        dropped: the number of dropped boxes.
    """

    def __init__(self, dropped: Tensor) -> None:
        count = len(dropped)
        self.stale = torch.zeros(count, dtype=torch.bool)
        self.dropped = int(dropped.sum())
        if self.dropped == 0:
            self.sources = self.visited = self.places = torch.arange(count)
            return
        drop, sources = dropped.tolist(), list(range(count))
        visited, places, place = [], [], 0
        while place < count:
            visited.append(sources[place])
            places.append(place)
            if drop[sources[place]]:
                count -= 1
                self.stale[count] = place != count
                sources[place] = sources[count]
            else:
                place += 1
        self.sources = torch.tensor(sources)
        self.visited, self.places = torch.tensor(visited), torch.tensor(places)


def _merged(
    boxes: Tensor, corners: Tensor, shares: Tensor, visited: Tensor, places: Tensor
) -> Tensor:
    """(4,): mean corners of row 0 (share 1) and of those after it that overlap with it, weighted by
    corner score."""
    shares = torch.cat([shares.new_ones(1), shares[visited]])
    rows = torch.cat([boxes[:1], boxes[1:][visited]])
    weights = shares[:, None] * torch.cat([corners[:1], corners[1:][places]])
    sums = (rows.view(-1, 2, 2) * weights[:, :, None]).sum(0)
    return (sums / weights.sum(0)[:, None]).flatten()


def _pixel_iou(box: Tensor, boxes: Tensor) -> Tensor:
    """(L,): IoU of one box with L boxes, counting pixels; 0 where they do not overlap, or where
    coordinates that are not finite make it NaN."""
    low = torch.maximum(box[:2], boxes[:, :2])
    high = torch.minimum(box[2:], boxes[:, 2:])
    sides = high - low + 1
    common = sides.prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2] + 1).prod(1)
    union = (box[2:] - box[:2] + 1).prod() + areas - common
    return torch.where((sides > 0).all(1), common / union, 0.0).nan_to_num(0.0, posinf=math.inf)


# ---------------------------------------------------------------- arguments


def _check(
    name: str, boxes: Tensor, scores: Tensor, classes: Tensor | None, method: str, sigma: float
) -> None:
    if method not in _METHODS:
        raise ValueError(f"{name}: method must be one of {', '.join(_METHODS)}, got {method!r}")
    if not sigma > 0:
        raise ValueError(f"{name}: sigma must be > 0, got {sigma}")
    if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise ValueError(
            f"{name}: boxes must be floating point of shape (N, 4), "
            f"got {boxes.dtype} of shape {tuple(boxes.shape)}"
        )
    count = boxes.shape[0]
    if scores.shape != (count,) or not scores.is_floating_point():
        raise ValueError(
            f"{name}: scores must be floating point of shape ({count},), "
            f"got {scores.dtype} of shape {tuple(scores.shape)}"
        )
    devices = {str(boxes.device), str(scores.device)}
    if classes is not None:
        if classes.shape != (count,) or classes.is_floating_point() or classes.is_complex():
            raise ValueError(
                f"{name}: classes must be integers of shape ({count},), "
                f"got {classes.dtype} of shape {tuple(classes.shape)}"
            )
        devices.add(str(classes.device))
    if len(devices) > 1:
        raise ValueError(
            f"{name}: all tensors must be on one device, got {', '.join(sorted(devices))}"
        )


# ---------------------------------------------------------------- shapes, for compile and export

if has_extension():

    @torch.library.register_fake("d2ext::soft_nms")
    def _soft_nms_fake(
        boxes: Tensor,
        scores: Tensor,
        corner_scores: Tensor | None,
        sizes: Tensor,
        method: int,
        sigma: float,
        iou_threshold: float,
        score_threshold: float,
        weight_exp: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        count = boxes.shape[0] if boxes.dim() else 0
        checks = [("boxes", boxes, (count, 4)), ("scores", scores, (count,))]
        if corner_scores is not None:
            checks.append(("corner_scores", corner_scores, (count, 2)))
        for name, x, shape in checks:
            if x.shape != shape or x.dtype != torch.float32:
                raise ValueError(
                    f"soft_nms: {name} must be float32 of shape {shape}, got {x.dtype} of shape "
                    f"{tuple(x.shape)}"
                )
        if sizes.dim() != 1 or sizes.dtype != torch.int64 or sizes.device != boxes.device:
            raise ValueError(
                "soft_nms: sizes must be int64 of shape (classes,), on the boxes' device"
            )
        if method not in (0, 1, 2) or not sigma > 0:
            raise ValueError(f"soft_nms: no method {method}, or no sigma > 0: {sigma}")
        rows = scores.shape
        return (
            boxes.new_empty(boxes.shape),
            boxes.new_empty(rows),
            boxes.new_empty(rows, dtype=torch.int64),
            boxes.new_empty(rows, dtype=torch.bool),
        )
