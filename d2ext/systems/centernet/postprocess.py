"""From CenterNet's raw maps to detections (arXiv 1904.07850, section 3; poses: section 4.2).

Everything up to the detections of one scale has shapes that do not depend on the values, so that it
can be compiled or captured into a CUDA graph.

Letters: B images, C classes, h×w cells, K detections, J joints.

Fields of the resulting ``Instances``, in pixels of the output image:

- ``pred_boxes``, ``scores``, ``pred_classes``;
- ``centers`` (N, 2): x, y of the peak that became the detection;
- ``pred_keypoints`` (N, J, 3), with poses: x, y in Detectron2's convention (COCO's plus half a pixel,
  which its evaluator subtracts again) and 1: CenterNet does not score joints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from d2ext.codecs.heatmaps import gather_at, local_peaks, top_k, top_k_per_class
from d2ext.layers import SoftNMSRows, soft_nms_rows
from d2ext.systems.centernet.head import Predictions

# A peak of the joint's heat map replaces the regressed joint if it has at least this score and is no
# farther away than this share of the box's longer side (published code).
_JOINT_THRESHOLD = 0.1
_JOINT_DISTANCE = 0.3
# Sigma and score threshold of soft-NMS over scales.
_SIGMA = 0.5
_DISCARD = 0.001
# Coordinates given to peaks below the threshold.
_FAR_AWAY = -10000.0


class CenterDetections(NamedTuple):
    """Detections of a batch, best first, in cells of the output; or of one image (without B)."""

    boxes: Tensor
    """(B, K, 4) XYXY."""
    scores: Tensor
    """(B, K)."""
    classes: Tensor
    """(B, K) int64."""
    centers: Tensor
    """(B, K, 2)."""
    joints: Tensor | None = None
    """(B, K, 2J): x, y, x, y, ..."""

    def map_points(self, function: Callable[[Tensor], Tensor]) -> CenterDetections:
        """Apply a function of coordinates (..., 2n) x, y, x, y, ... to all points."""
        points = [x for x in (self.boxes, self.centers, self.joints) if x is not None]
        mapped = function(torch.cat(points, dim=-1))
        boxes, centers, *joints = mapped.split([x.shape[-1] for x in points], dim=-1)
        return self._replace(boxes=boxes, centers=centers, joints=joints[0] if joints else None)


def probabilities(predictions: Predictions) -> Predictions:
    """Raw maps → float32, heat maps as probabilities."""
    return {
        name: value.float().sigmoid() if name.endswith("heatmap") else value.float()
        for name, value in predictions.items()
    }


def merge_mirrored(predictions: Predictions, flip_pairs: Sequence[Sequence[int]]) -> Predictions:
    """Average predictions with those for the mirror images.

    As published, offsets are the plain image's, and mirrored maps are reversed without a shift.

    Args:
        predictions: maps (2B, ...) in which heat maps are probabilities, images first, then their
            mirror images in the same order.
        flip_pairs: joints to swap.
    """
    merged = {}
    for name, value in predictions.items():
        plain, mirrored = value.unflatten(0, (2, -1)).unbind()
        if name.endswith("offset"):
            merged[name] = plain
            continue
        mirrored = mirrored.flip(3)
        if name.startswith("joint"):
            mirrored = _swap_joints(mirrored, flip_pairs, points=name == "joints")
        merged[name] = (plain + mirrored) / 2
    return merged


def _swap_joints(maps: Tensor, flip_pairs: Sequence[Sequence[int]], *, points: bool) -> Tensor:
    """Swap the joints of pairs; ``points``: each has channels x, y, and x changes sign."""
    count = maps.shape[1] // 2 if points else maps.shape[1]
    order = list(range(count))
    for left, right in flip_pairs:
        order[left], order[right] = order[right], order[left]
    if not points:
        return torch.stack([maps[:, i] for i in order], dim=1)
    swapped = torch.cat([maps[:, 2 * i : 2 * i + 2] for i in order], dim=1)
    return torch.cat([x if i % 2 else -x for i, x in enumerate(swapped.split(1, dim=1))], dim=1)


def decode(predictions: Predictions, k: int = 100) -> CenterDetections:
    """Peaks of the heat map → boxes and, if predicted, joints.

    Args:
        predictions: heat maps are probabilities. Without ``offset`` centres are in the middle of their
            cell; without ``joint_heatmap`` joints are the regressed ones; without ``joint_offset`` peaks
            of joints are in the middle of their cell.
        k: number of detections; a smaller map gives one for each of its values.
    """
    heatmap = predictions["heatmap"]
    best = top_k(local_peaks(heatmap), k)
    cells = torch.stack([best.xs, best.ys], dim=-1).to(heatmap.dtype)
    offset = predictions.get("offset")
    centers = cells + (0.5 if offset is None else gather_at(offset, best.index))
    size = gather_at(predictions["size"], best.index)
    if size.shape[2] > 2:
        channels = 2 * best.classes[..., None] + torch.arange(2, device=size.device)
        size = size.gather(2, channels)
    boxes = torch.cat([centers - size / 2, centers + size / 2], dim=-1)
    joints = None
    if "joints" in predictions:
        joints = gather_at(predictions["joints"], best.index).unflatten(2, (-1, 2))
        joints = joints + cells[:, :, None]
        if "joint_heatmap" in predictions:
            joints = _refine_joints(joints, boxes, predictions, k)
        joints = joints.flatten(2)
    return CenterDetections(boxes, best.scores, best.classes, centers, joints)


def _refine_joints(joints: Tensor, boxes: Tensor, predictions: Predictions, k: int) -> Tensor:
    """Replace regressed joints (B, K, J, 2) by the nearest peak of the joint's heat map.

    The peak must be in the box, have a score of at least 0.1, and be no farther away than 0.3 of the
    box's longer side; otherwise the regressed joint stays.
    """
    best = top_k_per_class(local_peaks(predictions["joint_heatmap"]), k)  # (B, J, P)
    peaks = torch.stack([best.xs, best.ys], dim=-1).to(boxes.dtype)
    offset = predictions.get("joint_offset")
    if offset is None:
        peaks = peaks + 0.5
    else:
        peaks = peaks + gather_at(offset, best.index.flatten(1)).view(peaks.shape)
    strong = best.scores > _JOINT_THRESHOLD
    scores = torch.where(strong, best.scores, -1.0)
    peaks = torch.where(strong[..., None], peaks, _FAR_AWAY)

    regressed = joints.transpose(1, 2)  # (B, J, K, 2)
    difference = regressed[:, :, :, None] - peaks[:, :, None]  # (B, J, K, P, 2)
    distance, nearest = difference.square().sum(dim=-1).sqrt().min(dim=3)
    score = scores.gather(2, nearest)
    peak = peaks.gather(2, nearest[..., None].expand(-1, -1, -1, 2))
    low, high = boxes[:, None, :, :2], boxes[:, None, :, 2:]
    longer_side = (high - low).amax(dim=-1)
    replace = (
        ((peak >= low) & (peak <= high)).all(dim=-1)
        & (score >= _JOINT_THRESHOLD)
        & (distance <= _JOINT_DISTANCE * longer_side)
    )
    return torch.where(replace[..., None], peak, regressed).transpose(1, 2)


def merge_scales(scales: Sequence[CenterDetections], limit: int | None) -> CenterDetections:
    """Detections of one image at several scales, in pixels, merged by Gaussian soft-NMS in each class.

    Published quirks: rows that soft-NMS discards stay, see :mod:`d2ext.layers.soft_nms`; and where the
    last pose overwrites a discarded one, their joints are swapped instead, so that the stale row has
    the box of one and the joints of the other.

    Args:
        limit: number of detections, plus ties with the last one; None: all.
    """
    boxes = torch.cat([x.boxes for x in scales])
    scores = torch.cat([x.scores for x in scales])
    classes = torch.cat([x.classes for x in scales])
    centers = torch.cat([x.centers for x in scales])
    rows = soft_nms_rows(
        boxes, scores, classes, method="gaussian", sigma=_SIGMA, score_threshold=_DISCARD
    )
    original_scores = scores
    scores, order = rows.scores.sort(descending=True, stable=True)
    index = rows.indices[order]
    joints = [x.joints for x in scales if x.joints is not None]
    if joints:
        owners = _joint_owners(boxes, original_scores, classes, rows)[order]
    merged = CenterDetections(
        rows.boxes[order],
        scores,
        classes[index],
        centers[index],
        torch.cat(joints)[owners] if joints else None,
    )
    if limit is None or len(scores) <= limit:
        return merged
    count = int((scores >= scores[limit - 1]).sum())
    return CenterDetections(*(None if field is None else field[:count] for field in merged))


def _joint_owners(boxes: Tensor, scores: Tensor, classes: Tensor, rows: SoftNMSRows) -> Tensor:
    """(N,) int64: whose joints are in each row after soft-NMS, see :func:`merge_scales`."""
    if bool(rows.keep.all()):
        return rows.indices
    owners = rows.indices.clone()
    row_classes = classes[rows.indices]
    for label in row_classes.unique():
        in_class = row_classes == label
        members = (classes == label).nonzero()[:, 0]
        selected = rows.indices[in_class & rows.keep]
        discarded = members[~torch.isin(members, selected)]
        rounds = _discard_rounds(boxes, scores, selected, discarded)
        replayed = _replay(members.tolist(), selected.tolist(), rounds)
        owners[in_class] = owners.new_tensor(replayed)
    return owners


def _discard_rounds(
    boxes: Tensor, scores: Tensor, selected: Tensor, discarded: Tensor
) -> dict[int, int]:
    """Round in which each of ``discarded`` is discarded; round i selects ``selected[i]``."""
    low = torch.maximum(boxes[selected, None, :2], boxes[None, discarded, :2])
    high = torch.minimum(boxes[selected, None, 2:], boxes[None, discarded, 2:])
    sides = (high - low + 1).clamp(min=0)  # a box counts its last pixel, as in soft-NMS
    common = sides.prod(dim=-1)
    area = (boxes[:, 2:] - boxes[:, :2] + 1).prod(dim=-1)
    overlap = common / (area[selected, None] + area[None, discarded] - common)
    weighted = scores[discarded] * torch.exp(-(overlap**2) / _SIGMA).cumprod(dim=0)
    falls = (weighted < _DISCARD) & (overlap > 0)
    first = falls.int().argmax(dim=0)
    return dict(zip(discarded.tolist(), first.tolist(), strict=True))


def _replay(members: list[int], selected: list[int], rounds: dict[int, int]) -> list[int]:
    """The detection whose joints are in each row after the rounds of soft-NMS have moved them.

    Args:
        members: detections in their original order.
        selected: the one that each round selects.
        rounds: the round that discards each of the others.
    """
    array, owners, count = list(members), list(members), len(members)
    for number, best in enumerate(selected):
        place = array.index(best, number, count)
        for column in (array, owners):
            column[number], column[place] = column[place], column[number]
        place = number + 1
        while place < count:
            if rounds.get(array[place]) != number:
                place += 1
                continue
            count -= 1
            array[place] = array[count]
            owners[place], owners[count] = owners[count], owners[place]
    return owners
