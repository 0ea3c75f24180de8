"""Annotations of a pair of frames → targets of VPSNet's losses.

Letters: G objects of the current frame, K of the reference, R regions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor

from d2ext.systems.upsnet import targets as upsnet
from d2ext.systems.upsnet.boxes import end_behind, inclusive
from d2ext.systems.upsnet.targets import UPSNetTargets


@dataclass(frozen=True)
class VPSNetTargets(UPSNetTargets):
    """UPSNet's targets of the current frame, whose boxes have their end behind a pixel of the network
    input, and the objects of the reference."""

    reference_boxes: Tensor
    """(K, 4), as the other boxes."""
    reference_ids: Tensor
    """(K,) int64: the same numbers as ``instances.gt_ids``."""


def read_targets(
    inputs: dict[str, Any], *, num_stuff: int, with_things: bool, device: torch.device
) -> VPSNetTargets:
    """A training dict of a pair → :class:`VPSNetTargets`.

    Args:
        inputs: as for UPSNet's function of this name; ``instances`` with ``gt_ids``; ``reference``: the
            dict of the other frame, with ``instances`` if that is annotated.
        num_stuff, with_things: see there.
    """
    options: dict[str, Any] = {
        "num_stuff": num_stuff,
        "with_things": with_things,
        "device": device,
    }
    targets = upsnet.read_targets(inputs, **options)

    def own_pixel(boxes: Tensor) -> Tensor:
        return end_behind(inclusive(boxes.to(device).float(), targets.pixel))

    targets.instances.gt_boxes = Boxes(own_pixel(targets.instances.gt_boxes.tensor))
    if not targets.instances.has("gt_ids"):
        targets.instances.gt_ids = torch.full_like(targets.instances.gt_classes, -1)
    others = inputs["reference"].get("instances", Instances((0, 0)))
    boxes, ids = torch.zeros((0, 4)), torch.zeros(0, dtype=torch.int64)
    if others.has("gt_ids"):
        boxes, ids = others.gt_boxes.tensor, others.gt_ids
        filled = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        boxes, ids = boxes[filled], ids[filled]
    return VPSNetTargets(
        instances=targets.instances,
        crowd_boxes=own_pixel(targets.crowd_boxes),
        crowd_classes=targets.crowd_classes,
        semantic=targets.semantic,
        masks=targets.masks,
        pixel=1.0,
        reference_boxes=own_pixel(boxes),
        reference_ids=ids.to(device),
    )


def match_targets(index: Tensor, targets: VPSNetTargets) -> Tensor:
    """Which column of the match logits is right.

    Args:
        index: (R,) int64 objects of the current frame; -1: of a crowd, which matches nothing.

    Returns:
        (R,) int64: 1 + the object's place in the reference, 0 where it is not there
    """
    if len(targets.instances) == 0 or len(targets.reference_ids) == 0:
        return torch.zeros_like(index)
    same = targets.instances.gt_ids[:, None] == targets.reference_ids
    column = torch.where(same.any(dim=1), same.to(torch.uint8).argmax(dim=1) + 1, 0)
    return torch.where(index >= 0, column[index.clamp(min=0)], 0)
