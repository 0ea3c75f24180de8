"""Targets of CenterNet's maps (arXiv 1904.07850, section 3).

Shapes: B images, N object slots, J joints, C classes, h×w cells of the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2ext.codecs.heatmaps import draw_gaussians, gaussian_radius

# Detectron2's keypoints are COCO's plus half a pixel; the published code uses COCO's.
KEYPOINT_SHIFT = 0.5
# Heat maps of rotated images: no positives, and negatives that hardly count (published).
_ROTATED = 0.9999


class ObjectAnnotations(NamedTuple):
    """Objects of one image, in cells of the output."""

    boxes: Tensor
    """(n, 4) float32 XYXY, may extend beyond the map."""
    classes: Tensor
    """(n,) int64."""
    joints: Tensor | None = None
    """(n, J, 3) float32: x, y, and > 0 where the joint is annotated. None: no poses."""
    rotated: bool = False
    """The image is rotated and the boxes are not: only joint heat maps and offsets are trained."""


def read_annotations(inputs: dict[str, Any], stride: int, num_joints: int) -> ObjectAnnotations:
    """Objects of one image, on a map of ``stride``; with joints if ``num_joints`` is above 0.

    Raises:
        ValueError: the instances have no joints, or not ``num_joints``.
    """
    instances = inputs["instances"]
    boxes = instances.gt_boxes.tensor.float() / stride
    if num_joints == 0:
        return ObjectAnnotations(boxes, instances.gt_classes)
    if not instances.has("gt_keypoints"):
        raise ValueError(
            "This CenterNet learns poses and the instances have no keypoints: the data set needs "
            "`keypoints`, and MODEL.KEYPOINT_ON must be True so that the mapper keeps them."
        )
    joints = instances.gt_keypoints.tensor.float().clone()
    if joints.shape[1] != num_joints:
        raise ValueError(
            f"MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS is {num_joints}, and the annotations have "
            f"{joints.shape[1]} keypoints."
        )
    joints[..., :2] = (joints[..., :2] - KEYPOINT_SHIFT) / stride
    return ObjectAnnotations(boxes, instances.gt_classes, joints, inputs.get("rotated", False))


class JointTargets(NamedTuple):
    """Additional targets of poses."""

    heatmap: Tensor
    """(B, J, h, w)."""
    position: Tensor
    """(B, N, 2J) from the centre's cell, in cells."""
    position_mask: Tensor
    """(B, N, 2J) bool."""
    index: Tensor
    """(B, N * J) int64 cell of each joint."""
    offset: Tensor
    """(B, N * J, 2) position of a joint in its cell."""
    offset_mask: Tensor
    """(B, N * J) bool."""


class CenterNetTargets(NamedTuple):
    """Targets of a batch. Slots without an object have mask False and index 0."""

    heatmap: Tensor
    """(B, C, h, w), exactly 1 at the centres."""
    index: Tensor
    """(B, N) int64 cell of the centre, y * w + x."""
    mask: Tensor
    """(B, N) bool: sizes and offsets are trained."""
    size: Tensor
    """(B, N, 2) width, height in cells."""
    offset: Tensor
    """(B, N, 2) position of the centre in its cell."""
    classes: Tensor
    """(B, N) int64."""
    radii: Tensor
    """(B, N) int64."""
    joints: JointTargets | None


def encode_targets(
    images: Sequence[ObjectAnnotations],
    map_size: tuple[int, int],
    num_classes: int,
    *,
    max_objects: int = 128,
    min_overlap: float = 0.7,
    device: torch.device | None = None,
) -> CenterNetTargets:
    """Targets of a batch; does not wait for the device.

    As published, boxes are clipped to [0, w - 1] and [0, h - 1], so that sizes and centres are those of
    the visible part; boxes without area are left out. A person without annotated joints is a positive
    of the heat map, but its size and offset are not trained (published: its centre is set to 0.9999,
    and back to 1 by the Gaussian drawn afterwards). Of a rotated image, the heat map is 0.9999 all
    over and sizes, offsets and joints' positions are not trained.

    Args:
        images: all with joints, or all without.
        map_size: (h, w).
        num_classes: C.
        max_objects: only the first objects of an image are used, as in the published code.
        min_overlap: see :func:`gaussian_radius`.
        device: of the targets; None: that of the annotations. A batch is copied at once.
    """
    height, width = map_size
    count = min(max_objects, max((len(image.boxes) for image in images), default=0))
    boxes = _stack([image.boxes.float() for image in images], count, device)
    classes = _stack([image.classes for image in images], count, device)
    x, y = boxes[..., 0::2].clamp(0, width - 1), boxes[..., 1::2].clamp(0, height - 1)
    boxes = torch.stack([x, y], dim=-1).flatten(2)
    size = boxes[..., 2:] - boxes[..., :2]
    present = (size > 0).all(dim=-1)
    center = (boxes[..., :2] + boxes[..., 2:]) / 2
    # Slots without an object draw a Gaussian of height 0 in the corner.
    center = torch.where(present[..., None], center, 0.0)
    cells = center.long()
    sides = size.ceil()
    radii = gaussian_radius(sides[..., 1], sides[..., 0], min_overlap, "centernet")
    radii = torch.where(present, radii, 0.0).long()

    image_number = torch.arange(len(images), device=boxes.device)[:, None].expand_as(classes)
    heatmap = draw_gaussians(
        map_size,
        len(images) * num_classes,
        cells.flatten(0, 1),
        radii.flatten(),
        (image_number * num_classes + classes).flatten(),
        peaks=present.flatten(),
    )
    joints, mask = None, present
    if images and images[0].joints is not None:
        raw = _stack([x.joints for x in images if x.joints is not None], count, device)
        joints = _encode_joints(raw, cells, radii, present, map_size)
        mask = present & (raw[..., 2] > 0).any(dim=-1)
    heatmap = heatmap.view(len(images), num_classes, height, width)
    for i, image in enumerate(images):
        if image.rotated:
            heatmap[i], mask[i] = _ROTATED, False
            if joints is not None:
                joints.position_mask[i] = False
    return CenterNetTargets(
        heatmap=heatmap,
        index=cells[..., 1] * width + cells[..., 0],
        mask=mask,
        size=torch.where(present[..., None], size, 0.0),
        offset=center - cells,
        classes=classes,
        radii=radii,
        joints=joints,
    )


def _stack(parts: Sequence[Tensor], count: int, device: torch.device | None) -> Tensor:
    """Tensors (n_i, ...) → (B, count, ...) on ``device``, cut or filled with zeros."""
    if not parts:
        raise ValueError("Targets need at least one image.")
    stacked = parts[0].new_zeros((len(parts), count, *parts[0].shape[1:]))
    for row, part in zip(stacked, parts, strict=True):
        row[: len(part)] = part[:count]
    return stacked.to(device, non_blocking=True)


def _encode_joints(
    joints: Tensor, cells: Tensor, radii: Tensor, present: Tensor, map_size: tuple[int, int]
) -> JointTargets:
    """Targets of joints (B, N, J, 3) of objects at ``cells`` (B, N, 2) with ``radii`` (B, N).

    Joints outside the map are not trained. All joints of a person have the radius of its box.
    """
    height, width = map_size
    images, count, num_joints = joints.shape[:3]
    x, y = joints[..., 0], joints[..., 1]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    visible = (joints[..., 2] > 0) & inside & present[..., None]
    places = torch.where(visible[..., None], joints[..., :2], 0.0)
    joint_cells = places.long()
    position = torch.where(visible[..., None], places - cells[:, :, None], 0.0)
    numbers = torch.arange(images * num_joints, device=joints.device).view(images, 1, num_joints)
    heatmap = draw_gaussians(
        map_size,
        images * num_joints,
        joint_cells.flatten(0, 2),
        radii[..., None].expand(-1, -1, num_joints).flatten(),
        numbers.expand(-1, count, -1).flatten(),
        peaks=visible.flatten(),
    )
    index = joint_cells[..., 1] * width + joint_cells[..., 0]
    return JointTargets(
        heatmap=heatmap.view(images, num_joints, height, width),
        position=position.flatten(2),
        position_mask=visible.repeat_interleave(2, dim=2),
        index=index.flatten(1),
        offset=(places - joint_cells).flatten(1, 2),
        offset_mask=visible.flatten(1),
    )


class DenseTargets(NamedTuple):
    """Targets at every cell under an object's Gaussian, not only at its centre."""

    values: Tensor
    """(B, 2V, h, w)."""
    weights: Tensor
    """(B, 2V, h, w): the height of the Gaussian."""


def dense_targets(targets: CenterNetTargets, *, joints: bool) -> DenseTargets:
    """Sizes (V = 1), or offsets from each cell to the joints (V = J), at all cells under Gaussians.

    A cell gets the value of the last object whose Gaussian there is at least as high as all earlier
    ones. Cells won by an invisible joint get no value.

    Published quirk: sizes are drawn after the object's Gaussian, which is compared in float64 with the
    map in float32. Where rounding made the map larger, the cell gets no size, although it has a weight.
    Joints are drawn before the Gaussian.
    """
    images, _, height, width = targets.heatmap.shape
    device = targets.heatmap.device
    present = (targets.size > 0).all(dim=-1)
    if not joints:
        values, drawn = targets.size[:, :, None], present[..., None]
    elif targets.joints is None:
        raise ValueError("These targets have no joints.")
    else:
        values = targets.joints.position.unflatten(2, (-1, 2))
        drawn = targets.joints.position_mask[..., ::2]
    columns = torch.arange(width, device=device).expand(height, width)
    rows = torch.arange(height, device=device)[:, None].expand(height, width)
    field = values.new_zeros((images, values.shape[2], 2, height, width))
    weights = values.new_zeros((images, values.shape[2], height, width))
    highest = values.new_zeros((images, height, width))
    for k in range(values.shape[1]):
        index, radius = targets.index[:, k, None, None], targets.radii[:, k, None, None]
        x = columns - index % width
        y = rows - index.div(width, rounding_mode="floor")
        window = (x.abs() <= radius) & (y.abs() <= radius) & present[:, k, None, None]
        sigma = (2 * radius + 1).double() / 6
        bump = torch.exp(-(x * x + y * y) / (2 * sigma * sigma)) * window
        before, highest = highest, torch.maximum(highest, bump.float())
        wins = window & (bump >= (before if joints else highest).double())
        takes = (wins[:, None] & drawn[:, k, :, None, None])[:, :, None]
        value = values[:, k, :, :, None, None]
        if joints:
            value = value - torch.stack([x, y], dim=1)[:, None]
        field = torch.where(takes, value, field)
        weights = torch.maximum(weights, bump.float()[:, None] * drawn[:, k, :, None, None])
    return DenseTargets(field.flatten(1, 2), weights.repeat_interleave(2, dim=1))
