"""From VPSNet's predictions to results: ids of objects over the video, and panoptic maps with them.

Letters: n candidates of a frame, M objects in a video's memory, D channels of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor
from torch.nn import functional as F

from d2ext.config import ConfigError
from d2ext.modeling.region_slots import EMPTY, Slots
from d2ext.systems.upsnet.panoptic_head import PanopticPrediction
from d2ext.systems.upsnet.postprocess import UPSNetPostprocessor, nearest
from d2ext.systems.vpsnet.head import match_logits

# Class of the object that stands for "nothing detected".
DUMMY = -1


@dataclass(frozen=True)
class ObjectMemory:
    """The objects of a video so far, in the order of their ids; boxes in pixels of the network input."""

    boxes: Tensor
    """(M, 4) where each was seen last."""
    embeddings: Tensor
    """(M, D) from then."""
    classes: Tensor
    """(M,) int64 of its first detection."""
    ids: Tensor
    """(M,) int64, from 1."""
    seen: Tensor
    """(M,) int64: number of the frame in which it was seen last."""
    frame: int = 0
    """Number of frames before the next one."""
    next_id: int = 1

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> ObjectMemory:
        """Of a video that begins."""
        numbers = torch.zeros((3, 0), dtype=torch.int64, device=device)
        floats = (torch.zeros((0, x), device=device) for x in (4, channels))
        return cls(*floats, *numbers)


def match_scores(
    candidates: Instances, embeddings: Tensor, objects: ObjectMemory, weights: Sequence[float]
) -> Tensor:
    """How well each candidate is explained by each object.

    Args:
        candidates: n with ``pred_boxes``, ``pred_classes``, ``scores``.
        embeddings: (n, D) of them.
        objects: M.
        weights: see ``MODEL.VPSNET.MATCH_WEIGHTS``.

    Returns:
        (n, 1 + M); column 0: it is a new object
    """
    score_weight, iou_weight, class_weight = weights
    iou = pairwise_iou(candidates.pred_boxes, Boxes(objects.boxes))
    same = candidates.pred_classes[:, None] == objects.classes
    bonus = iou_weight * iou + class_weight * same
    new = bonus.new_full((len(candidates), 1), class_weight)
    logits = match_logits(embeddings, objects.embeddings).log_softmax(dim=1)
    return logits + score_weight * candidates.scores.log()[:, None] + torch.cat([new, bonus], dim=1)


def assign_objects(scores: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Which object each candidate is, as published.

    A candidate wants the column of its highest score. Candidates come in order; one whose score for an
    object is higher than the last taker's takes the object from it.

    Args:
        scores: (n, 1 + M), see :func:`match_scores`.

    Returns:
        (n,) the object's index, -1 for none; and the candidates without object in the order in which
        they become new ones: those that wanted none, then those that lost theirs.
    """
    wanted = scores.argmax(axis=1)
    taker: dict[int, int] = {}
    for candidate in np.flatnonzero(wanted > 0).tolist():
        column = int(wanted[candidate])
        last = taker.get(column)
        if last is None or scores[candidate, column] > scores[last, column]:
            taker[column] = candidate
    index = np.full(len(scores), -1)
    for column, candidate in taker.items():
        index[candidate] = column - 1
    new = np.flatnonzero(wanted == 0).tolist()
    return index, new + np.flatnonzero((wanted > 0) & (index < 0)).tolist()


def track(
    candidates: Instances,
    embeddings: Tensor,
    objects: ObjectMemory,
    *,
    weights: Sequence[float],
    limit: int = 0,
) -> tuple[Tensor, ObjectMemory]:
    """Give each candidate of a frame the id of an object.

    Args:
        candidates, embeddings, objects, weights: see :func:`match_scores`.
        limit: most objects that are remembered, those seen last; 0: all.

    Returns:
        (n,) int64 ids; the memory for the next frame
    """
    boxes, classes = candidates.pred_boxes.tensor.float(), candidates.pred_classes
    frame, count = objects.frame, len(candidates)
    if count == 0:
        return classes.new_zeros(0), replace(objects, frame=frame + 1)
    if len(objects.ids) > 0:
        scores = match_scores(candidates, embeddings, objects, weights)
        index, new = assign_objects(scores.cpu().numpy())
    else:
        index, new = np.full(count, -1), list(range(count))
    known = np.flatnonzero(index >= 0).tolist()
    to = torch.from_numpy(index[known]).to(boxes.device)
    from_, added = (torch.tensor(x, dtype=torch.int64, device=boxes.device) for x in (known, new))
    new_ids = torch.arange(len(new), device=boxes.device) + objects.next_id
    ids = torch.empty_like(classes)
    ids[from_], ids[added] = objects.ids[to], new_ids

    def updated(old: Tensor, values: Tensor) -> Tensor:
        return torch.cat([old.index_copy(0, to, values[from_].to(old)), values[added].to(old)])

    memory = ObjectMemory(
        updated(objects.boxes, boxes),
        updated(objects.embeddings, embeddings),
        torch.cat([objects.classes, classes[added]]),
        torch.cat([objects.ids, new_ids]),
        updated(objects.seen, torch.full_like(classes, frame)),
        frame + 1,
        objects.next_id + len(new),
    )
    return ids, forget(memory, limit)


def forget(objects: ObjectMemory, limit: int) -> ObjectMemory:
    """At most ``limit`` objects, those seen last; 0: all."""
    if limit == 0 or len(objects.ids) <= limit:
        return objects
    newest = torch.sort(objects.seen, descending=True, stable=True).indices[:limit].sort().values
    rows = ("boxes", "embeddings", "classes", "ids", "seen")
    return replace(objects, **{name: getattr(objects, name)[newest] for name in rows})


def with_dummy(candidates: Slots) -> Slots:
    """Where nothing is detected, the empty box of no class that the published code passes on."""
    none = candidates.scores[:, :1] == EMPTY
    first = F.pad(none, (0, candidates.scores.shape[1] - 1))
    corner = torch.zeros_like(candidates.boxes[..., :2])
    boxes = torch.cat([corner, corner + 1], dim=-1)  # end behind
    return candidates._replace(
        boxes=torch.where(first[..., None], boxes, candidates.boxes),
        scores=torch.where(first, 1.0, candidates.scores),
        classes=torch.where(first, DUMMY, candidates.classes),
    )


class VPSNetPostprocessor(UPSNetPostprocessor):
    """As UPSNet's; things of the panoptic map have ``track_id``, ``instances`` have ``track_ids``.

    Args:
        published_dummy, published_id_lookup: see ``MODEL.VPSNET``.
        upsnet: see the base class.
    """

    @configurable
    def __init__(
        self, *, published_dummy: bool = False, published_id_lookup: bool = False, **upsnet: Any
    ) -> None:
        super().__init__(**upsnet)
        if self.heuristic is not None:
            raise ConfigError(
                'VPSNet has its panoptic head alone: set MODEL.UPSNET.TEST.PANOPTIC to "head".'
            )
        self.dummy = published_dummy
        self.published_id_lookup = published_id_lookup

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        vpsnet = cfg.MODEL.VPSNET
        return {
            **super().from_config(cfg),
            "published_dummy": vpsnet.PUBLISHED_DUMMY,
            "published_id_lookup": vpsnet.PUBLISHED_ID_LOOKUP,
        }

    def instances(
        self,
        detections: Instances,
        size: tuple[int, int],
        scales: tuple[float, float] | None = None,
    ) -> Instances:
        """As the base class; the dummy is left out."""
        detections = detections[detections.pred_classes != DUMMY]
        result = super().instances(detections, size, scales)
        if detections.has("track_ids"):
            result.track_ids = detections.track_ids
        return result

    def segments(
        self,
        prediction: PanopticPrediction,
        image_size: tuple[int, int],
        size: tuple[int, int],
        scales: tuple[float, float] | None = None,
        track_ids: Tensor | None = None,
    ) -> tuple[Tensor, list[dict[str, Any]]]:
        """As the base class."""
        if track_ids is not None and self.published_id_lookup:
            labels = nearest(prediction.labels, image_size, size, scales).flatten().long()
            first, last = self.num_stuff, self.num_stuff + len(track_ids)
            present = torch.bincount(labels, minlength=last)[first:last] > 0
            # The place among the instances that have pixels, taken for the channel.
            track_ids = track_ids[(present.cumsum(0) - 1).clamp(min=0)]
        return super().segments(prediction, image_size, size, scales, track_ids)
