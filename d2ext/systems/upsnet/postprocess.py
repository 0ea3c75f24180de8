"""From UPSNet's raw predictions to detections, candidates of the panoptic head and segments.

Fields of the resulting ``Instances``: ``pred_boxes``, ``scores``, ``pred_classes``, ``pred_masks``.
Boxes have their end behind the last pixel, as Detectron2's evaluators and the COCO format count (the
published x2, y2 are one less).

Letters: R regions, T thing classes, S stuff classes, n instances, h×w output.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

from d2ext.systems.upsnet.targets import IGNORE


class Candidates(NamedTuple):
    """Scored boxes of one image, best first."""

    boxes: Tensor
    """(n, 4)."""
    classes: Tensor
    """(n,) int64 in 0..T-1."""
    scores: Tensor
    """(n,) in 0..1."""


class Detections(NamedTuple):
    """One image's boxes, in pixels of the network input, with their mask logits."""

    boxes: Candidates
    masks: Tensor
    """(n, M, M)."""


def select(
    boxes: Tensor,
    probabilities: Tensor,
    *,
    score_threshold: float,
    nms_threshold: float,
    limit: int,
    across_classes: bool = False,
) -> Candidates:
    """Boxes above a score, after non-maximum suppression.

    Args:
        boxes: (R, T, 4), a box for each class.
        probabilities: (R, T).
        score_threshold: lower and equal scores are left out.
        nms_threshold: IoU above which the worse box is suppressed.
        limit: the best so many; more only if they score the same as the last of these.
        across_classes: suppress boxes of other classes too (the panoptic head's candidates).
    """
    regions, classes = (probabilities > score_threshold).nonzero(as_tuple=True)
    scores, own = probabilities[regions, classes], boxes[regions, classes]
    if across_classes:
        kept = nms(own, scores, nms_threshold)
    else:
        kept = batched_nms(own, scores, classes, nms_threshold)
    if len(kept) > limit:
        kept = kept[scores[kept] >= scores[kept[limit - 1]]]
    return Candidates(own[kept], classes[kept], scores[kept])


def nearest(maps: Tensor, image_size: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Crop maps (..., H, W) to the unpadded image and resize them (nearest) to (h, w).

    Output cell i is input cell floor(i · H / h).
    """
    for dim, before, after in zip((-2, -1), image_size, size, strict=True):
        if before == after:
            maps = maps.narrow(dim, 0, before)
        else:
            index = torch.arange(after, device=maps.device) * before // after
            maps = maps.index_select(dim, index)
    return maps


class Cleaned(NamedTuple):
    """A panoptic map after :func:`clean`."""

    labels: Tensor
    """(h, w) int64: stuff 0..S-1, instances S..S+n-1, void -1."""
    areas: Tensor
    """(S + n,) int64 pixels of each label."""


def clean(
    labels: Tensor,
    semantic: Tensor,
    classes: Tensor,
    *,
    num_stuff: int,
    num_classes: int,
    stuff_area_limit: int,
) -> Cleaned:
    """The published clean-up of a panoptic map, at the size of the output.

    An instance whose pixels the semantic map gives to another class in the majority becomes stuff if
    that class is stuff and has at least half of the pixels; otherwise it stays. Then stuff classes
    with fewer than ``stuff_area_limit`` pixels become void. What stands in for no instance (class -1)
    reads as the last stuff class.

    Args:
        labels: (h, w): stuff 0..S-1, instances S..S+n-1, unknown S+n.
        semantic: (h, w) arg max of the semantic logits, 0..S+T-1.
        classes: (n,) of the instances, in 0..T-1; -1 for a stand-in.
        num_stuff: S.
        num_classes: S + T.
        stuff_area_limit: in pixels.
    """
    count = len(classes)
    labels, semantic = labels.to(torch.int64), semantic.to(torch.int64)
    # Pixels of each instance by semantic class.
    joint = (labels * num_classes + semantic).flatten()
    votes = torch.bincount(joint, minlength=(num_stuff + count + 1) * num_classes)
    votes = votes.view(-1, num_classes)[num_stuff : num_stuff + count]
    most, winner = votes.max(dim=1)  # of equal votes the lowest class wins
    to_stuff = (winner < num_stuff) & (2 * most >= votes.sum(dim=1))
    table = torch.arange(num_stuff + count + 1, device=labels.device)
    kept = torch.where(classes < 0, num_stuff - 1, table[num_stuff : num_stuff + count])
    table[num_stuff : num_stuff + count] = torch.where(to_stuff, winner, kept)
    table[-1] = -1
    # Areas follow from the counts, without another look at the map.
    before = torch.bincount(labels.flatten(), minlength=num_stuff + count + 1)
    areas = torch.zeros_like(before)
    areas.index_add_(0, table[:-1], before[:-1])
    small = areas[:num_stuff] < stuff_area_limit
    lost = torch.zeros_like(table, dtype=torch.bool)
    lost[:-1] = (table[:-1] < num_stuff) & small[table[:-1].clamp(max=num_stuff - 1)]
    areas[:num_stuff][small] = 0
    return Cleaned(table.masked_fill(lost, -1)[labels], areas[:-1])


def segments(
    cleaned: Cleaned,
    classes: Tensor,
    scores: Tensor,
    *,
    num_stuff: int,
    category_ids: str,
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Detectron2's ``panoptic_seg``.

    Args:
        cleaned: see :func:`clean`.
        classes, scores: (n,) of the instances.
        num_stuff: S.
        category_ids: "separated" (things 0..T-1, stuff 1..S) or "joint" (stuff 0..S-1, things S..).

    Returns:
        (h, w) int32 map of segment ids, 0 void; and for each segment ``id`` (from 1), ``category_id``,
        ``isthing``, ``score`` (of the detection; 1 for stuff), ``area`` in pixels.
    """
    separated = category_ids == "separated"
    areas, kinds, confidences = cleaned.areas.tolist(), classes.tolist(), scores.tolist()
    ids = torch.zeros(len(areas) + 1, dtype=torch.int32)  # the last: void
    infos: list[dict[str, Any]] = []
    # Things first, as Detectron2's own merge.
    for label in [*range(num_stuff, len(areas)), *range(num_stuff)]:
        if areas[label] == 0:
            continue
        thing = label >= num_stuff
        if thing:
            kind = kinds[label - num_stuff]
            category = kind if separated else kind + num_stuff
        else:
            category = label + 1 if separated else label
        ids[label] = len(infos) + 1
        infos.append(
            {
                "id": len(infos) + 1,
                "category_id": category,
                "isthing": thing,
                "score": confidences[label - num_stuff] if thing else 1.0,
                "area": areas[label],
            }
        )
    return ids.to(cleaned.labels.device)[cleaned.labels], infos


def two_channels(
    labels: Tensor, cleaned: Cleaned, classes: Tensor, *, num_stuff: int
) -> tuple[Tensor, Tensor]:
    """The published result's form: a map of semantic ids and a map of instance numbers.

    Returns:
        (h, w) ids, stuff 0..S-1, things S.., IGNORE void; (h, w) numbers: 0 for stuff and void, else
        1 + the rank of the instance among those present before the clean-up.
    """
    count = len(classes)
    present = torch.bincount(labels.flatten().long(), minlength=num_stuff + count + 1)
    rank = torch.cumsum(present[num_stuff : num_stuff + count] > 0, dim=0)
    # The last entries serve void, -1.
    kinds = torch.cat([torch.arange(num_stuff, device=labels.device), classes + num_stuff])
    kinds = torch.cat([kinds, kinds.new_full((1,), IGNORE)])
    numbers = torch.cat([rank.new_zeros(num_stuff), rank, rank.new_zeros(1)])
    return kinds[cleaned.labels], numbers[cleaned.labels]
