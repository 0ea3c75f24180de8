"""Which boxes of a batch of images are looked into, and what left and right are.

Letters: N boxes of all images, H, W size of a crop.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import Tensor

from d2ext.codecs.landmark_crops import crop_to_image, has_side, pad_boxes
from d2ext.data.dataset_facts import flip_indices

logger = logging.getLogger(__name__)

# Fields of `instances` that hold boxes to look into, the first that is there.
BOX_FIELDS = ("pred_boxes", "proposal_boxes", "gt_boxes")
# Largest coordinate of a box that is cropped; what lies beyond is no place in an image.
_FAR = 1e6


class Regions(NamedTuple):
    """The boxes of a batch of images; tensors on the CPU."""

    counts: list[int]
    """Boxes of each image."""
    boxes: Tensor
    """(N, 4) XYXY, float64, as given."""
    padded: Tensor
    """(N, 4) float64, what is cropped."""
    matrices: Tensor
    """(N, 2, 3) float64, crop to image."""
    classes: Tensor
    """(N,) int64."""
    scores: Tensor
    """(N,) float32."""
    valid: Tensor
    """(N,) bool: finite, with a side (a line has one, a dot none), and not all outside the image."""


def find_regions(
    batched_inputs: Sequence[dict[str, Any]], input_size: tuple[int, int], padding: float
) -> Regions:
    """The boxes of a batch in inference.

    Args:
        batched_inputs: see :meth:`LandmarkNet.forward`.
        input_size: (H, W).
        padding: factor on the boxes, see :func:`~d2ext.codecs.landmark_crops.pad_boxes`.
    """
    if not batched_inputs:
        nothing = torch.zeros((0, 4), dtype=torch.float64)
        matrices = crop_to_image(nothing, input_size)
        none = torch.zeros(0)
        return Regions([], nothing, nothing, matrices, none.long(), none, none.bool())
    # Over all boxes at once: operators on each image's few boxes would take longer than a small network.
    found = [_boxes(inputs) for inputs in batched_inputs]
    counts = [len(boxes) for boxes, _, _ in found]
    joined, classes, scores = (torch.cat(parts) for parts in zip(*found, strict=True))
    sides = [(x["image"].shape[-1], x["image"].shape[-2]) for x in batched_inputs]
    limits = torch.tensor(sides, dtype=joined.dtype).repeat_interleave(torch.tensor(counts), dim=0)
    low, high = joined[:, :2], joined[:, 2:]
    usable = has_side(joined) & ((high > 0) & (low < limits)).all(dim=1)
    # In place of an invalid box any pixel: its result does not count.
    anywhere = joined.new_tensor([0.0, 0.0, 1.0, 1.0])
    cropped = torch.where(usable[:, None], joined, anywhere).clamp(-_FAR, _FAR)
    padded = pad_boxes(cropped, input_size, padding)
    matrices = crop_to_image(padded, input_size)
    return Regions(counts, joined, padded, matrices, classes, scores, usable)


def _boxes(inputs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (n, 4) float64, classes (n,) and scores (n,) of an image in inference, on the CPU."""
    instances = inputs.get("instances", inputs.get("proposals"))
    if instances is None or inputs.get("crop"):
        height, width = inputs["image"].shape[-2:]
        whole = torch.tensor([[0.0, 0.0, width, height]], dtype=torch.float64)
        return whole, torch.zeros(1, dtype=torch.int64), torch.ones(1)
    for field in BOX_FIELDS:
        if instances.has(field):
            boxes = instances.get(field).tensor.detach().double().cpu()
            break
    else:
        raise ValueError(
            f"`instances` have none of {BOX_FIELDS}: name the boxes to look into, or leave "
            "`instances` out to take the whole image."
        )
    classes = torch.zeros(len(boxes), dtype=torch.int64)
    for field in ("pred_classes", "gt_classes"):
        if instances.has(field):
            classes = instances.get(field).cpu()
            break
    scores = instances.scores.detach().float().cpu() if instances.has("scores") else None
    return boxes, classes, torch.ones(len(boxes)) if scores is None else scores


def counts_between(counts: Sequence[int], start: int, stop: int) -> list[int]:
    """How many of the items ``start`` to ``stop`` of concatenated lists belong to each list."""
    result = []
    first = 0
    for count in counts:
        result.append(max(min(first + count, stop) - max(first, start), 0))
        first += count
    return result


def find_flip_indices(cfg: CfgNode) -> list[int]:
    """The mirror partner of each landmark, from the metadata of the config's data sets, test sets
    first, or from ``MODEL.LANDMARKS.FLIP_INDICES``.

    A data set's names and ``keypoint_flip_map`` win, for they say what its points are; the log tells
    if ``FLIP_INDICES`` says otherwise. It serves where no data set of as many landmarks is known.

    Raises:
        ValueError: neither says, or the data set has another number of landmarks.
    """
    landmarks = cfg.MODEL.LANDMARKS
    given = list(landmarks.FLIP_INDICES)
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        metadata = MetadataCatalog.get(name) if name in MetadataCatalog.list() else None
        if (
            metadata is None
            or not metadata.get("keypoint_names")
            or metadata.get("keypoint_flip_map") is None
        ):
            continue
        indices = flip_indices(name)
        if len(indices) != landmarks.NUM_KEYPOINTS:
            if given:
                continue
            raise ValueError(
                f"Data set '{name}' has {len(indices)} landmarks, but "
                f"MODEL.LANDMARKS.NUM_KEYPOINTS is {landmarks.NUM_KEYPOINTS}."
            )
        if given and given != indices:
            logger.warning(
                "MODEL.LANDMARKS.FLIP_INDICES %s is not used: the landmarks of data set '%s' have "
                "other mirror partners, %s.",
                given,
                name,
                indices,
            )
        return indices
    if given:
        return given
    raise ValueError(
        "MODEL.LANDMARKS.TEST.FLIP needs to know left from right: set MODEL.LANDMARKS.FLIP_INDICES, or "
        "name a registered data set with keypoint_names and keypoint_flip_map in DATASETS.TEST."
    )
