"""Annotations → targets of the landmarks' losses.

Letters: N crops, n instances of an image, K landmarks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.structures import Instances
from torch import Tensor


class LandmarkTargets(NamedTuple):
    """Landmarks of the crops of a training batch; heads encode them with their codec."""

    points: Tensor
    """(N, K, 2) float32, pixels of the crop; 0 where not labelled."""
    labelled: Tensor
    """(N, K) bool."""


def read_keypoints(instances: Instances, count: int, device: torch.device) -> Tensor:
    """``gt_keypoints`` (n, K, 3): x, y, and v > 0 where labelled.

    Raises:
        ValueError: the instances have no keypoints, or not ``count`` = K.
    """
    if len(instances) == 0:
        return torch.zeros((0, count, 3), device=device)
    if not instances.has("gt_keypoints"):
        raise ValueError(
            "These instances have no gt_keypoints: the annotations need `keypoints`, and "
            "MODEL.KEYPOINT_ON must be True so that the mapper keeps them."
        )
    keypoints = instances.gt_keypoints.tensor.to(device, torch.float32)
    if keypoints.shape[1] != count:
        raise ValueError(
            f"The annotations have {keypoints.shape[1]} landmarks, but "
            f"MODEL.LANDMARKS.NUM_KEYPOINTS is {count}."
        )
    return keypoints


def make_targets(keypoints: Tensor) -> LandmarkTargets:
    """(N, K, 3) in the crops → targets; landmarks that are not finite count as not labelled."""
    points = keypoints[..., :2]
    labelled = (keypoints[..., 2] > 0) & points.isfinite().all(dim=-1)
    return LandmarkTargets(torch.where(labelled[..., None], points, 0), labelled)
