"""From RetinaFace's raw predictions to detections (retinaface/NOTES.md, "Post-processing").

Decoding has shapes that do not depend on the values, so that it can be compiled or captured into a CUDA
graph; NMS runs afterwards, once for the whole batch.

Letters: B images, A priors, P points, K candidates of an image, N candidates of a batch.
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
    scores, classes = predictions.logits.float().softmax(dim=-1)[..., 1:].max(dim=-1)
    scores, index = scores.topk(min(top_k, scores.shape[1]), dim=1)
    height, width = predictions.input_size
    selected = priors[index]
    boxes = decode_boxes(_gather(predictions.offsets, index).float(), selected)
    points = None
    if predictions.points is not None:
        offsets = _gather(predictions.points.flatten(2), index).float().unflatten(2, (-1, 2))
        points = scale_points(decode_points(offsets, selected), (width, height))
    return Candidates(
        scores,
        classes.gather(1, index),
        scale_points(boxes, (width, height)),
        index,
        scale_points(selected, (width, height)),
        points,
        predictions.vectors,
    )


def _gather(values: Tensor, index: Tensor) -> Tensor:
    """values (B, A, v), index (B, K) into A → (B, K, v)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


def select(
    candidates: Candidates,
    *,
    score_threshold: float = 0.02,
    nms_threshold: float = 0.4,
    max_detections: int = 750,
) -> list[Tensor]:
    """Which candidates of each image are detections: indices into K, by falling score.

    NMS is greedy within each class, counts whole pixels (sides and overlaps are one more than the
    difference of coordinates) and suppresses above ``nms_threshold``. Boxes are in pixels of the image.
    """
    above = candidates.scores > score_threshold
    # Worse candidates do not change which of the better ones stay, and are mostly not needed.
    first = 2 * max_detections
    selected = _nms(candidates, above[:, :first], nms_threshold)
    if first < above.shape[1]:
        more = above[:, first].tolist()
        if any(m and len(s) < max_detections for m, s in zip(more, selected, strict=True)):
            selected = _nms(candidates, above, nms_threshold)
    return [x[:max_detections] for x in selected]


def _nms(candidates: Candidates, above: Tensor, threshold: float) -> list[Tensor]:
    """:func:`select` of the candidates where ``above`` (B, k) is true, k up to K, without limit."""
    count = above.shape[1]
    boxes = candidates.boxes[:, :count].double()
    # Classes lie apart, so that one group holds all.
    extent = torch.where(above[..., None] & boxes.isfinite(), boxes, 0.0).abs().amax() * 2 + 2
    boxes = boxes + (candidates.classes[:, :count] * extent)[..., None]
    boxes = torch.cat([boxes[..., :2], boxes[..., 2:] + 1], dim=-1)
    keep = nms(boxes, above, threshold)
    slots = (~keep).byte().argsort(dim=1, stable=True)  # the kept ones first
    counts = keep.sum(dim=1).tolist()  # the host waits for the device
    return [own[:n] for own, n in zip(slots, counts, strict=True)]
