"""What follows from a face's points or mesh by a least-squares similarity: its pose, its aligned crop.

Letters: N faces, P points, V mesh vertices, D dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Where the crops that recognition networks take (ArcFace, arXiv 1801.07698, as everybody prepares them)
# have the five points, in pixels of the crop: eyes, nose, mouth corners, left ones of the image first.
ARCFACE_SIZE = 112
ARCFACE_POINTS = (
    (38.2946, 51.6963),
    (73.5318, 51.5014),
    (56.0252, 71.7366),
    (41.5493, 92.3655),
    (70.7299, 92.2041),
)


class Similarity(NamedTuple):
    """x → scale · rotation x + shift."""

    scale: Tensor
    """(N,) not negative."""
    rotation: Tensor
    """(N, D, D) of determinant 1: it never mirrors."""
    shift: Tensor
    """(N, D)."""


def fit_similarity(source: Tensor, target: Tensor) -> Similarity:
    """The similarity that brings ``source`` nearest to ``target``, in least squares (Umeyama, IEEE
    Transactions on Pattern Analysis 13, 1991), computed and given in float64.

    Args:
        source: (N, P, D), or (P, D) for all. Of points that all coincide the scale is 0.
        target: (N, P, D).
    """
    source, target = source.double().expand_as(target), target.double()
    center, goal = source.mean(dim=1, keepdim=True), target.mean(dim=1, keepdim=True)
    centered = source - center
    covariance = (target - goal).transpose(1, 2) @ centered
    # A network that diverged predicts what the decomposition does not take.
    u, singular, vh = torch.linalg.svd(covariance.nan_to_num(0.0, 0.0, 0.0))
    sign = torch.ones_like(singular)
    sign[:, -1] = (u.det() * vh.det()).sign()
    rotation = u * sign[:, None, :] @ vh
    spread = centered.square().sum(dim=(1, 2)).clamp(min=torch.finfo(torch.float64).tiny)
    scale = ((singular * sign).sum(dim=1) / spread).clamp(min=0)
    shift = goal[:, 0] - scale[:, None] * (rotation @ center.transpose(1, 2))[..., 0]
    return Similarity(scale, rotation, shift)


def face_poses(meshes: Tensor, mean: Tensor) -> Tensor:
    """Yaw, pitch and roll of faces in degrees, (N, 3) float32.

    They are those of the rotation in a weak perspective (scaled orthographic) view of the mean face that
    fits best. A face that looks into the camera has 0, 0, 0; it turns first by the yaw, positive to the
    image's right, then by the pitch, positive down, then by the roll in the image plane, positive
    clockwise. Yaw and roll are in (-180, 180], the pitch is in [-90, 90].

    Args:
        meshes: (N, V, 3) x right, y down, z away from the camera, pixels; where z is 0 does not matter.
        mean: (V, 3) mean face that looks into the camera, in the same axes.
    """
    rotation = fit_similarity(mean, meshes).rotation
    yaw = torch.atan2(rotation[:, 2, 0], rotation[:, 2, 2])
    pitch = torch.asin(rotation[:, 2, 1].clamp(-1, 1))
    roll = torch.atan2(-rotation[:, 0, 1], rotation[:, 1, 1])
    return torch.stack([yaw, pitch, roll], dim=1).rad2deg().float()


def crop_matrices(points: Tensor) -> Tensor:
    """Maps from the image to aligned crops of faces, (N, 2, 3) float64, for ``cv2.warpAffine``.

    Recognition networks are trained on crops of points as a detector gives them, by the template as it
    is; nothing is shifted by half a pixel here either.

    Args:
        points: (N, 5, 2) pixels, in the order of :data:`ARCFACE_POINTS`.
    """
    scale, rotation, shift = fit_similarity(
        points, points.new_tensor(ARCFACE_POINTS).expand_as(points)
    )
    return torch.cat([scale[:, None, None] * rotation, shift[..., None]], dim=2)
