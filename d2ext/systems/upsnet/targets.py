"""Annotations → targets of UPSNet's losses.

Label ids of semantic maps: stuff 0..S-1, things S..S+T-1 (class + S), :data:`IGNORE` for no label.

Letters: H×W network input (without padding), S stuff classes, T thing classes, G objects.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional as F

from d2ext.modeling.meta_arch import image_size, output_size
from d2ext.systems.upsnet.boxes import end_behind, image_scale, inclusive

# Label of pixels and anchors that are not trained on.
IGNORE = 255
# Panoptic channel of cells that are not trained on.
NO_TARGET = -1


@dataclass(frozen=True)
class UPSNetTargets:
    """Targets of one image; coordinates in pixels of the network input."""

    instances: Instances
    """``gt_boxes``, ``gt_classes``, ``gt_masks``, in videos also ``gt_ids``, of the objects, without
    crowds, none without area."""
    crowd_boxes: Tensor
    """(n, 4)."""
    crowd_classes: Tensor
    """(n,) int64."""
    semantic: Tensor
    """(H, W) int64 labels."""
    masks: Tensor
    """(G, H, W) bool."""
    pixel: float
    """Side of a pixel of the original image. Boxes have their end behind such a pixel."""

    @property
    def rpn_instances(self) -> Instances:
        """The objects with boxes whose end is behind a pixel of the network input, for the RPN."""
        boxes = end_behind(inclusive(self.instances.gt_boxes.tensor, self.pixel))
        return Instances(self.instances.image_size, gt_boxes=Boxes(boxes))


def read_targets(
    inputs: dict[str, Any], *, num_stuff: int, with_things: bool, device: torch.device
) -> UPSNetTargets:
    """Detectron2's training dict → :class:`UPSNetTargets`.

    Args:
        inputs: ``image`` (3, H, W), ``instances`` (``gt_boxes``, ``gt_classes``, ``gt_masks``),
            ``sem_seg`` (H, W), optionally ``crowd_instances`` and ``height``, ``width``.
        num_stuff: S.
        with_things: ``sem_seg`` has UPSNet's label ids already (``INPUT.SEM_SEG_WITH_THINGS``); else
            Detectron2's separated ones, see :func:`full_labels`.

    Raises:
        KeyError: no ``sem_seg``.
        ValueError: objects without masks, or a label map of another size.
    """
    if "sem_seg" not in inputs:
        raise KeyError(
            "UPSNet's training inputs need `sem_seg`: UPSNet trains on panoptic data, for example "
            "coco_2017_train_panoptic_separated."
        )
    size = image_size(inputs)
    if tuple(inputs["sem_seg"].shape) != size:
        raise ValueError(
            f"`sem_seg` has shape {tuple(inputs['sem_seg'].shape)} and the image {size}: the label "
            "map must go through the image's transforms."
        )
    instances = inputs["instances"]
    if len(instances) > 0 and not instances.has("gt_masks"):
        raise ValueError(
            "UPSNet trains on masks and these instances have none: the annotations need "
            "`segmentation`, and MODEL.MASK_ON must be True so that the mapper keeps it."
        )
    original = output_size(inputs)
    scale = image_scale(size, original)
    boxes = instances.gt_boxes.tensor
    instances = instances[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])].to(device)
    objects = Instances(size)
    objects.gt_boxes = Boxes(instances.gt_boxes.tensor.float())
    objects.gt_classes = instances.gt_classes
    if instances.has("gt_ids"):
        objects.gt_ids = instances.gt_ids
    masks = torch.zeros((0, *size), dtype=torch.bool, device=device)
    if len(instances) > 0:
        objects.gt_masks = instances.gt_masks
        masks = object_masks(instances.gt_masks, size, original if scale else size).to(device)
    crowd_boxes, crowd_classes = boxes.new_zeros((0, 4)), objects.gt_classes.new_zeros(0)
    if "crowd_instances" in inputs:
        crowd = inputs["crowd_instances"]
        crowd_boxes, crowd_classes = crowd.gt_boxes.tensor, crowd.gt_classes
    semantic = inputs["sem_seg"].to(device, torch.int64, non_blocking=True)
    if not with_things:
        semantic = full_labels(semantic, masks, objects.gt_classes, num_stuff)
    return UPSNetTargets(
        objects,
        crowd_boxes.to(device).float(),
        crowd_classes.to(device),
        semantic,
        masks,
        1.0 if scale is None else scale,
    )


def full_labels(separated: Tensor, masks: Tensor, classes: Tensor, num_stuff: int) -> Tensor:
    """Detectron2's separated labels → UPSNet's.

    Stuff is 1..S there and 0..S-1 here. 0 there is any thing: its class comes from the objects' masks,
    of overlapping ones the last. Thing pixels outside all masks (crowds) get no label.

    Args:
        separated: (H, W) int64: 0 things, 1..S stuff, 255 no label.
        masks, classes: (G, H, W) bool, (G,) of the objects.
        num_stuff: S.

    Raises:
        ValueError: a label above S that is not 255.
    """
    # One wait for the device per image.
    if bool(((separated > num_stuff) & (separated != IGNORE)).any()):
        raise ValueError(
            f"`sem_seg` holds labels above MODEL.UPSNET.NUM_STUFF ({num_stuff}) that are not 255: set "
            "NUM_STUFF to the data set's stuff classes (without `things`), or "
            "INPUT.SEM_SEG_WITH_THINGS to True if things have labels of their own."
        )
    labels = torch.where(separated == IGNORE, IGNORE, separated - 1)
    things = torch.full_like(separated, IGNORE)
    if len(masks) > 0:
        last = masks.flip(0).to(torch.uint8).argmax(dim=0)
        owner = len(masks) - 1 - last
        things = torch.where(masks.any(dim=0), classes[owner] + num_stuff, IGNORE)
    return torch.where(separated == 0, things, labels)


def object_masks(
    masks: PolygonMasks | BitMasks, size: tuple[int, int], original: tuple[int, int]
) -> Tensor:
    """(G, H, W) bool masks.

    As published, polygons are drawn, outline and inside, at the size of the original image and resized
    (:func:`scaled_nearest`) to the network input. Bitmasks are used unchanged.

    Args:
        masks: at the scale of the network input.
        size: (H, W) of the network input.
        original: (height, width) of the original image, in the same aspect ratio.
    """
    if isinstance(masks, BitMasks):
        return masks.tensor.to(torch.bool)
    scale = image_scale(size, original) or 1.0
    drawn = np.stack([draw_polygons(p, scale, original) for p in masks.polygons])
    return scaled_nearest(torch.from_numpy(drawn), size, scale).to(torch.bool)


def draw_polygons(polygons: list[np.ndarray], scale: float, size: tuple[int, int]) -> np.ndarray:
    """(height, width) uint8 mask of one object, its polygons divided by ``scale``."""
    canvas = Image.new("L", (size[1], size[0]), 0)
    draw = ImageDraw.Draw(canvas)
    for polygon in polygons:
        points = (np.asarray(polygon, dtype=np.float64) / scale).round(6)
        draw.polygon(points.tolist(), outline=1, fill=1)
    return np.asarray(canvas)


def scaled_nearest(maps: Tensor, size: tuple[int, int], scale: float) -> Tensor:
    """maps (..., h, w) → (..., H, W): cell i of the output is cell floor(i / scale) of the input."""
    for dim, cells in zip((-2, -1), size, strict=True):
        index = (torch.arange(cells, dtype=torch.float64) * (1 / scale)).floor().to(torch.int64)
        index = index.clamp(max=maps.shape[dim] - 1).to(maps.device)
        maps = maps.index_select(dim, index)
    return maps


def quarter(maps: Tensor, padded: tuple[int, int]) -> Tensor:
    """Labels or masks (..., H, W) at stride 4, padded with :data:`IGNORE` to ``padded`` / 4.

    Cell i is pixel 4i; a side has round(H / 4) cells (half to even).
    """
    height, width = round(maps.shape[-2] / 4), round(maps.shape[-1] / 4)
    cells = maps[..., ::4, ::4][..., :height, :width]
    margin = (0, padded[1] // 4 - width, 0, padded[0] // 4 - height)
    return F.pad(cells, margin, value=IGNORE)


def panoptic_target(semantic: Tensor, masks: Tensor, num_stuff: int, *, unknown: bool) -> Tensor:
    """Channel of the panoptic logits that should win in each cell.

    Args:
        semantic: (h, w) int64 labels.
        masks: (n, h, w) of the instances that have a channel, in its order: nonzero where set,
            :data:`IGNORE` in the padding.
        num_stuff: S.
        unknown: whether there is an unknown channel, S + n.

    Returns:
        (h, w) int64: an instance's channel where its mask is set (of overlapping ones the last),
        labelled or not; elsewhere stuff as labelled, NO_TARGET without label, and for everything else
        the unknown channel (NO_TARGET if there is none). (The published NO_TARGET is 255, which an
        image with more than 255 - S instances would use as a channel.)
    """
    rest = num_stuff + len(masks) if unknown else NO_TARGET
    target = torch.where(semantic < num_stuff, semantic, rest)
    target = torch.where(semantic == IGNORE, NO_TARGET, target)
    if len(masks) > 0:
        set_ = (masks != 0) & (masks != IGNORE)
        last = len(masks) - 1 - set_.flip(0).to(torch.uint8).argmax(dim=0)
        target = torch.where(set_.any(dim=0), num_stuff + last, target)
    return target


def crop_labels(semantic: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Label maps inside boxes, for the semantic loss on regions.

    Args:
        semantic: (H, W) labels.
        boxes: (G, 4) inclusive; rounded to pixels, half to even.
        size: s, side of the output.

    Returns:
        (G, s, s): nearest-resized crops.
    """
    low = boxes[:, :2].round().to(torch.int64)
    high = boxes[:, 2:].round().to(torch.int64)
    # The last column and row are left out, as published.
    sides = (high - low).clamp(min=1)
    cells = torch.arange(size, device=boxes.device)
    offsets = cells[None, :, None] * sides[:, None, :] // size  # (G, s, 2)
    limit = sides.new_tensor([semantic.shape[1] - 1, semantic.shape[0] - 1])
    index = (low[:, None, :] + offsets).clamp(min=0).minimum(limit)
    return semantic[index[:, :, None, 1], index[:, None, :, 0]]
