"""From landmarks in crops to Detectron2's ``Instances``.

An instance found has ``pred_boxes`` (the box that was cropped, inside the image), ``scores``,
``pred_classes``, ``pred_keypoints`` (n, K, 3: x, y in the output image, score) and, on request,
``pred_keypoint_heatmaps`` (n, K, h, w), the maps that were decoded, and
``pred_keypoint_heatmap_matrices`` (n, 2, 3), affine maps from cells to the output image, both in
continuous coordinates.
"""

from __future__ import annotations

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


def make_instances(
    boxes: Tensor,
    classes: Tensor,
    scores: Tensor,
    keypoints: Tensor,
    valid: Tensor,
    input_size: tuple[int, int],
    output_size: tuple[int, int],
) -> Instances:
    """Instances of one image at the size of the output.

    Args:
        boxes: (n, 4) in the input image.
        classes: (n,) int64.
        scores: (n,).
        keypoints: (n, K, 3) x, y in the input image, score.
        valid: (n,) bool; an instance whose box held nothing of the image gets the scores 0.
        input_size, output_size: (height, width).
    """
    scale = boxes.new_tensor([output_size[1] / input_size[1], output_size[0] / input_size[0]])
    result = Instances(output_size)
    shown = Boxes(boxes.nan_to_num(0, 0, 0) * scale.repeat(2))
    shown.clip(output_size)
    # A box with its corners in the wrong order has no area either.
    shown.tensor[:, 2:] = torch.maximum(shown.tensor[:, :2], shown.tensor[:, 2:])
    result.pred_boxes = shown
    result.scores = scores * valid
    result.pred_classes = classes
    points = keypoints[..., :2] * scale
    result.pred_keypoints = torch.cat(
        [points, keypoints[..., 2:] * valid[:, None, None]], dim=-1
    ).nan_to_num(0, 0, 0)
    return result
