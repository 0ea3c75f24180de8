"""From landmarks in crops to Detectron2's ``Instances``.

Instances have ``pred_boxes`` (the input boxes, clipped to the image), ``scores``, ``pred_classes``,
``pred_keypoints`` (n, K, 3: x, y in the output image, score) and, with
``MODEL.LANDMARKS.TEST.HEATMAPS``, ``pred_keypoint_heatmaps`` (n, K, h, w), the maps that were decoded,
and ``pred_keypoint_heatmap_matrices`` (n, 2, 3), affine maps from cells to the output image, both in
continuous coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from d2ext.codecs.landmark_crops import CropRegions
from d2ext.layers.transfer import upload


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


def make_instances(
    points: Tensor,
    point_scores: Tensor,
    regions: CropRegions,
    *,
    image_sizes: Sequence[tuple[int, int]],
    output_sizes: Sequence[tuple[int, int]],
    threshold: float,
    heatmaps: tuple[Tensor, Tensor] | None = None,
) -> list[Instances]:
    """Instances of each image, at the size of the output.

    Args:
        points: (N, K, 2) in the input images.
        point_scores: (N, K).
        regions: the N boxes; those that are not valid get scores of 0.
        image_sizes, output_sizes: (height, width) of each image and its output.
        threshold: see :func:`instance_scores`.
        heatmaps: maps (N, K, h, w), and (N, 2, 3) from their cells to the input image.
    """
    sides = torch.tensor(output_sizes).view(-1, 2).flip(1).float()
    stretch = sides / torch.tensor(image_sizes).view(-1, 2).flip(1)
    columns = [
        regions.boxes.float(),
        stretch[regions.images],
        sides[regions.images],
        regions.scores[:, None],
        regions.valid[:, None],
    ]
    # One copy instead of five.
    sent = upload(torch.cat(columns, dim=1), points.device)
    boxes, scales, limits, box_scores, valid = sent.split([4, 2, 2, 1, 1], dim=1)
    classes = upload(regions.classes, points.device)
    low = torch.minimum((boxes[:, :2].nan_to_num(0, 0, 0) * scales).clamp(min=0), limits)
    high = torch.minimum((boxes[:, 2:].nan_to_num(0, 0, 0) * scales).clamp(min=0), limits)
    # A box with its corners in the wrong order has no area either.
    boxes = torch.cat([low, torch.maximum(low, high)], dim=1)
    scores = instance_scores(point_scores, box_scores[:, 0], threshold) * valid[:, 0]
    keypoints = torch.cat(
        [points * scales[:, None], (point_scores * valid)[..., None]], dim=-1
    ).nan_to_num(0, 0, 0)
    results = []
    first = 0
    counts = regions.images.bincount(minlength=len(output_sizes)).tolist()
    for count, size in zip(counts, output_sizes, strict=True):
        here = slice(first, first + count)
        result = Instances(size)
        result.pred_boxes = Boxes(boxes[here])
        result.scores = scores[here]
        result.pred_classes = classes[here]
        result.pred_keypoints = keypoints[here]
        if heatmaps is not None:
            result.pred_keypoint_heatmaps = heatmaps[0][here]
            result.pred_keypoint_heatmap_matrices = heatmaps[1][here] * scales[here, :, None]
        results.append(result)
        first += count
    return results
