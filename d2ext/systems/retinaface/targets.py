"""Annotations → targets of RetinaFace's losses (retinaface/NOTES.md, "Matching").

Letters: n faces of an image, P points and V mesh vertices of a face, A priors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

from d2ext.codecs.prior_boxes import BACKGROUND, NEUTRAL, PriorMatches, to_corners


class RetinaFaceTargets(NamedTuple):
    """Faces of one image, relative to the network's input (0..1)."""

    boxes: Tensor
    """(n, 4) corner form, sides > 0."""
    classes: Tensor
    """(n,) int64, from 0."""
    points: Tensor
    """(n, P, 2)."""
    annotated: Tensor
    """(n, P) bool: which points are annotated, visible or not; only these are trained."""
    meshes: Tensor
    """(n, V, 3) in pixels, all vertices, hidden ones and those outside the image, too."""
    has_mesh: Tensor
    """(n,) bool."""


def read_targets(
    inputs: dict[str, Any],
    input_size: tuple[int, int],
    num_points: int,
    device: torch.device,
    num_vertices: int = 0,
) -> RetinaFaceTargets:
    """Targets of one image; faces without area are left out.

    Args:
        inputs: ``instances`` with ``gt_boxes``, ``gt_classes``, for points ``gt_keypoints`` and, as far
            as annotated, ``gt_face_meshes`` (n, V, 3) with ``gt_mesh_valid`` (n,).
        input_size: (height, width) of the batch, at whose top left the image lies.
        num_points: P; 0: no points.
        num_vertices: V; 0: no meshes.

    Raises:
        ValueError: the instances have no points, or not P, or meshes of other than V vertices.
    """
    instances = inputs["instances"].to(device)
    height, width = input_size
    size = torch.tensor([width, height], dtype=torch.float64, device=device)
    boxes = (instances.gt_boxes.tensor.double() / size.repeat(2)).float()
    points = torch.zeros((len(boxes), num_points, 3), device=device)
    if num_points > 0 and len(boxes) > 0:
        if not instances.has("gt_keypoints"):
            raise ValueError(
                "This RetinaFace learns points and the instances have no keypoints: the data set needs "
                "`keypoints`, of which v is 0 where a point is not annotated. MODEL.KEYPOINT_ON: False "
                "learns boxes alone."
            )
        points = instances.gt_keypoints.tensor
        if points.shape[1] != num_points:
            raise ValueError(
                f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {num_points}, and the annotations have "
                f"{points.shape[1]} keypoints."
            )
    relative = (points[..., :2].double() / size).float()
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    meshes = torch.zeros((len(boxes), num_vertices, 3), device=device)
    has_mesh = torch.zeros(len(boxes), dtype=torch.bool, device=device)
    if num_vertices > 0 and instances.has("gt_face_meshes"):
        meshes, has_mesh = instances.gt_face_meshes, instances.gt_mesh_valid
        if meshes.shape[1] != num_vertices:
            raise ValueError(
                f"MODEL.RETINAFACE.MESH.NUM_VERTICES is {num_vertices}, and the annotations have meshes "
                f"of {meshes.shape[1]} vertices."
            )
    return RetinaFaceTargets(
        boxes[keep],
        instances.gt_classes[keep],
        relative[keep],
        points[keep][..., 2] > 0,
        meshes[keep],
        has_mesh[keep],
    )


def match_priors(
    priors: Tensor,
    boxes: Tensor,
    classes: Tensor,
    *,
    positive_iou: float = 0.35,
    negative_iou: float = 0.35,
    forced_iou: float = 0.2,
) -> PriorMatches:
    """Match priors with faces.

    A prior takes the face of highest IoU. It is positive from ``positive_iou`` up, background below
    ``negative_iou``, neutral in between. The best prior of each face that overlaps it by ``forced_iou``
    is positive in any case.

    Published quirk: then the best prior of *each* face, in their order, is assigned to it, even if the
    face was left out above. So it may take over a positive prior of another face, and of several faces
    with the same best prior the last one has it.

    Args:
        priors: (A, 4) in centre form.
        boxes: (n, 4) in corner form; n may be 0.
        classes: (n,) int64, from 0.
    """
    objects = torch.zeros(len(priors), dtype=torch.int64, device=priors.device)
    if len(boxes) == 0:
        return PriorMatches(torch.full_like(objects, BACKGROUND), objects)
    iou = pairwise_iou(Boxes(boxes), Boxes(to_corners(priors)))
    best_of_face, best_prior = iou.max(dim=1)
    forced = best_of_face >= forced_iou
    best_of_prior, objects = iou.max(dim=0)
    best_of_prior = best_of_prior.index_fill(0, best_prior[forced], 2.0)
    # The last of several faces, which an assignment by index does not promise on a GPU.
    owner = torch.full_like(objects, -1).scatter_reduce(
        0, best_prior, torch.arange(len(boxes), device=objects.device), "amax"
    )
    objects = torch.where(owner >= 0, owner, objects)
    labels = classes[objects] + 1
    labels = labels.masked_fill(best_of_prior < positive_iou, NEUTRAL)
    labels = labels.masked_fill(best_of_prior < negative_iou, BACKGROUND)
    return PriorMatches(labels, objects)
