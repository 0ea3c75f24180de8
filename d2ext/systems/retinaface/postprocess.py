"""From RetinaFace's raw predictions to detections (retinaface/NOTES.md, "Post-processing").

No shape depends on the values: decoding can be compiled or captured into a CUDA graph, and after NMS,
which runs once for the whole batch, the host waits for the device once, for the numbers of faces.

Letters: B images, A priors, P points, K candidates of an image, D slots for its detections.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from d2ext.codecs.canvas import scale_points
from d2ext.codecs.prior_boxes import decode_boxes, decode_points
from d2ext.layers import nms
from d2ext.systems.retinaface.head import RetinaFacePredictions


class Candidates(NamedTuple):
    """The priors of highest score, best first, in pixels of the network's input."""

    scores: Tensor
    """(B, K) of the best class, 0..1."""
    classes: Tensor
    """(B, K) int64, from 0."""
    boxes: Tensor
    """(B, K, 4) corner form, not clipped."""
    index: Tensor
    """(B, K) int64 into A."""
    priors: Tensor
    """(B, K, 4) the priors, centre form."""
    points: Tensor | None = None
    """(B, K, P, 2)."""
    vectors: Tensor | None = None
    """(B, cells, c): :class:`RetinaFacePredictions`'s, for the mesh branch."""


def decode(predictions: RetinaFacePredictions, priors: Tensor, top_k: int) -> Candidates:
    """The best ``top_k`` priors of each image, decoded. ``priors``: (A, 4) centre form."""
    # Classes first: on a CPU a softmax over neighbours takes 15 times as long.
    shares = predictions.logits.float().movedim(-1, 1).softmax(dim=1)
    scores, classes = shares[:, 1:].max(dim=1)
    scores, index = scores.topk(min(top_k, scores.shape[1]), dim=1)
    height, width = predictions.input_size
    selected = scale_points(priors[index], (width, height))
    points = None
    if predictions.points is not None:
        offsets = gather(predictions.points.flatten(2), index).float().unflatten(2, (-1, 2))
        points = decode_points(offsets, selected)
    return Candidates(
        scores,
        classes.gather(1, index),
        decode_boxes(gather(predictions.offsets, index).float(), selected),
        index,
        selected,
        points,
        predictions.vectors,
    )


def gather(values: Tensor, index: Tensor) -> Tensor:
    """values (B, A, v), index (B, K) into A → (B, K, v)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


class Selection(NamedTuple):
    """Which candidates are detections."""

    slots: Tensor
    """(B, D) int64 into K: the detections of each image, by falling score, then others."""
    counts: Tensor
    """(B,) int64: detections in D."""
    incomplete: Tensor
    """(B,) bool: there may be further ones among the candidates that were not looked at."""


def select(
    candidates: Candidates,
    *,
    score_threshold: float = 0.02,
    nms_threshold: float = 0.4,
    max_detections: int = 750,
    first: int | None = None,
    one_class: bool = False,
) -> Selection:
    """The detections among the ``first`` candidates (None: all), ``max_detections`` at most;
    ``one_class``: all are of one class.

    Worse candidates do not change which of the better ones stay, and are mostly not needed. NMS is
    greedy within each class, counts whole pixels (sides and overlaps are one more than the difference of
    coordinates) and suppresses above ``nms_threshold``. Boxes are in pixels of the image. Shapes do not
    depend on values, and nothing waits for the device.
    """
    above = candidates.scores > score_threshold
    rest, above = above[:, first:] if first else above[:, :0], above[:, :first]
    boxes = candidates.boxes[:, :first].double()
    if not one_class:
        # Classes lie apart, so that one group holds all.
        extent = torch.where(above[..., None] & boxes.isfinite(), boxes, 0.0).abs().amax() * 2 + 2
        boxes = boxes + (candidates.classes[:, :first] * extent)[..., None]
    boxes = torch.cat([boxes[..., :2], boxes[..., 2:] + 1], dim=-1)
    keep = nms(boxes, above, nms_threshold)
    slots = keep.byte().argsort(dim=1, descending=True, stable=True)  # the kept ones first
    counts = keep.sum(dim=1)
    incomplete = rest[:, :1].any(dim=1) & (counts < max_detections)
    return Selection(slots[:, :max_detections], counts.clamp(max=max_detections), incomplete)
