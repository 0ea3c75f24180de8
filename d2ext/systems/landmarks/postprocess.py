"""From landmarks in crops to Detectron2's ``Instances``.

An instance found has ``pred_boxes`` (the box that was cropped, inside the image), ``scores``,
``pred_classes``, ``pred_keypoints`` (n, K, 3: x, y in the output image, score) and, on request,
``pred_keypoint_heatmaps`` (n, K, h, w), the maps that were decoded, and
``pred_keypoint_heatmap_matrices`` (n, 2, 3), affine maps from cells to the output image, both in
continuous coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor


def instance_scores(keypoint_scores: Tensor, box_scores: Tensor, threshold: float) -> Tensor:
    """A box's score times the mean of its landmarks' scores above ``threshold`` (0 if none is).

    The rule of the published top-down systems. Scores of landmarks above 1, which heat maps may have,
    count as 1.

    Args:
        keypoint_scores: (n, K).
        box_scores: (n,).
    """
    above = keypoint_scores > threshold
    total = (keypoint_scores.clamp(max=1) * above).sum(dim=1)
    return box_scores * total / above.sum(dim=1).clamp(min=1)


class Persons(NamedTuple):
    """What is known of the N boxes of a batch beside their landmarks; on the model's device."""

    boxes: Tensor
    """(N, 4) XYXY float32 in the input image."""
    classes: Tensor
    """(N,) int64."""
    scores: Tensor
    """(N,) float32."""
    valid: Tensor
    """(N,) bool; False: the box held nothing of the image, the scores become 0."""
    scales: Tensor
    """(N, 2) float32: output size over input size, in x and y."""
    limits: Tensor
    """(N, 2) float32: width and height of the output."""


def make_instances(
    persons: Persons,
    points: Tensor,
    point_scores: Tensor,
    counts: Sequence[int],
    output_sizes: Sequence[tuple[int, int]],
    *,
    threshold: float,
) -> list[Instances]:
    """Instances of each image, at the size of the output.

    Args:
        points: (N, K, 2) in the input image.
        point_scores: (N, K).
        counts: how many of the N belong to each image.
        output_sizes: (height, width) of each image.
        threshold: see :func:`instance_scores`.
    """
    valid = persons.valid[:, None]
    low = (persons.boxes[:, :2].nan_to_num(0, 0, 0) * persons.scales).clamp(min=0)
    high = (persons.boxes[:, 2:].nan_to_num(0, 0, 0) * persons.scales).clamp(min=0)
    low, high = torch.minimum(low, persons.limits), torch.minimum(high, persons.limits)
    # A box with its corners in the wrong order has no area either.
    boxes = torch.cat([low, torch.maximum(low, high)], dim=1)
    scores = instance_scores(point_scores, persons.scores, threshold) * persons.valid
    keypoints = torch.cat(
        [points * persons.scales[:, None], (point_scores * valid)[..., None]], dim=-1
    ).nan_to_num(0, 0, 0)
    results = []
    first = 0
    for count, size in zip(counts, output_sizes, strict=True):
        here = slice(first, first + count)
        result = Instances(size)
        result.pred_boxes = Boxes(boxes[here])
        result.scores = scores[here]
        result.pred_classes = persons.classes[here]
        result.pred_keypoints = keypoints[here]
        results.append(result)
        first += count
    return results
