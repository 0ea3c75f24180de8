"""YOLACT's losses (arXiv 1904.02689, section 3; yolact/NOTES.md §5 and §6).

Letters: B images, A priors, C thing classes, k prototypes, h×w prototype cells, n objects of an
image, P positives of the batch, M positives of which masks are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from detectron2.utils import comm
from torch import Tensor
from torch.nn import functional as F

from d2ext.codecs.prior_boxes import PriorMatches, encode_boxes, match_priors, mine_negatives
from d2ext.layers import assemble_masks
from d2ext.systems.yolact.head import MaskScorer, YOLACTPredictions
from d2ext.systems.yolact.targets import MASK_THRESHOLD, YOLACTTargets, resize_masks


@dataclass(kw_only=True)
class YOLACTCriterion:
    """Matches priors with objects and sums up the losses; has no parameters.

    Args:
        box_weight ... mask_iou_weight: factors of the terms.
        positive_iou, negative_iou, crowd_ioa: see :func:`match_priors`.
        negatives_per_positive: see :func:`mine_negatives`.
        max_masks: most positives of an image in the mask loss; a random selection of more.
        min_mask_iou_area: only objects of more prototype cells are in the re-scoring loss.
        normalizer: "local" or "global", how the number of positives is counted over processes.
    """

    box_weight: float = 1.5
    class_weight: float = 1.0
    mask_weight: float = 6.125
    semantic_weight: float = 1.0
    mask_iou_weight: float = 25.0
    positive_iou: float = 0.5
    negative_iou: float = 0.4
    crowd_ioa: float = 0.7
    negatives_per_positive: int = 3
    max_masks: int = 100
    min_mask_iou_area: float = 25.0
    normalizer: str = "local"

    def __post_init__(self) -> None:
        if self.normalizer not in ("local", "global"):
            raise ValueError(
                f'MODEL.YOLACT.LOSS.NORMALIZER is "local" or "global", not "{self.normalizer}".'
            )

    def match(self, priors: Tensor, targets: Sequence[YOLACTTargets]) -> list[PriorMatches]:
        """Match the priors (A, 4) with each image's objects."""
        return [
            match_priors(
                priors,
                target.boxes,
                target.classes,
                target.crowd_boxes,
                positive_iou=self.positive_iou,
                negative_iou=self.negative_iou,
                crowd_ioa=self.crowd_ioa,
            )
            for target in targets
        ]

    def __call__(
        self,
        predictions: YOLACTPredictions,
        priors: Tensor,
        targets: Sequence[YOLACTTargets],
        mask_scorer: MaskScorer | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            predictions: of the network.
            priors: (A, 4) centre form.
            targets: one per image.
            mask_scorer: YOLACT++'s re-scoring net; None: no such loss.

        Returns:
            ``loss_box``, ``loss_class``, ``loss_mask`` and, where the model has the heads,
            ``loss_semantic``, ``loss_mask_iou``: scalars, weighted.
        """
        matches = self.match(priors, targets)
        labels = torch.stack([m.labels for m in matches])
        image_of, prior_of = (labels > 0).nonzero(as_tuple=True)
        object_of = torch.stack([m.objects for m in matches])[image_of, prior_of]
        boxes = torch.cat([target.boxes for target in targets])
        firsts = self._first_objects(targets, labels.device)
        box_of = boxes[firsts[image_of] + object_of]
        normalizer = self._count(len(image_of), labels.device)

        losses = {
            "loss_box": self._box_loss(
                predictions.offsets[image_of, prior_of], box_of, priors[prior_of]
            )
            * (self.box_weight / normalizer),
            "loss_class": self._class_loss(predictions.logits, labels)
            * (self.class_weight / normalizer),
        }
        loss_mask, loss_mask_iou = self._mask_losses(
            predictions, targets, mask_scorer, labels, image_of, prior_of, object_of, box_of
        )
        losses["loss_mask"] = loss_mask * (self.mask_weight / normalizer)
        if loss_mask_iou is not None:
            losses["loss_mask_iou"] = loss_mask_iou * (self.mask_iou_weight / normalizer)
        if predictions.semantic_logits is not None:
            losses["loss_semantic"] = self.semantic_weight * self._semantic_loss(
                predictions.semantic_logits, targets
            )
        return losses

    @staticmethod
    def _first_objects(targets: Sequence[YOLACTTargets], device: torch.device) -> Tensor:
        """(B,) index of each image's first object in the concatenation of all objects."""
        counts = torch.tensor([0, *(len(t.boxes) for t in targets[:-1])], device=device)
        return counts.cumsum(0)

    def _count(self, positives: int, device: torch.device) -> Tensor:
        """Number of positives to divide by, float32; at least 1 (over all processes)."""
        count = torch.tensor(float(positives), device=device)
        if self.normalizer == "global" and comm.get_world_size() > 1:
            torch.distributed.all_reduce(count)
            count = count / comm.get_world_size()
            return count.clamp(min=1.0 / comm.get_world_size())
        return count.clamp(min=1.0)

    @staticmethod
    def _box_loss(offsets: Tensor, boxes: Tensor, priors: Tensor) -> Tensor:
        target = encode_boxes(boxes, priors)
        return F.smooth_l1_loss(offsets.float(), target, beta=1.0, reduction="sum")

    def _class_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        keep = mine_negatives(logits, labels, self.negatives_per_positive) | (labels > 0)
        return F.cross_entropy(logits[keep].float(), labels[keep], reduction="sum")

    def _mask_losses(
        self,
        predictions: YOLACTPredictions,
        targets: Sequence[YOLACTTargets],
        mask_scorer: MaskScorer | None,
        labels: Tensor,
        image_of: Tensor,
        prior_of: Tensor,
        object_of: Tensor,
        box_of: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Sums of the mask loss and (with a re-scoring net) of the mask IoU loss; not normalised."""
        selected, scale = self._select_masks(image_of, len(targets))
        image_of, prior_of, object_of, box_of = (
            x[selected] for x in (image_of, prior_of, object_of, box_of)
        )
        grid = (predictions.prototypes.shape[1], predictions.prototypes.shape[2])
        # (objects of the batch, h, w), then one target per positive: (M, h, w)
        per_object = torch.cat([resize_masks(target.masks, grid) for target in targets])
        firsts = self._first_objects(targets, labels.device)
        target_masks = per_object[firsts[image_of] + object_of].float()
        # In float32 always: the logarithm's gradient is infinite where a probability rounds to 1.
        masks = assemble_masks(
            predictions.prototypes.float(),
            predictions.coefficients[image_of, prior_of].float(),
            box_of,
            image_of,
        )
        # Outside the (widened) box the prediction is 0 and binary cross-entropy 0 too, or 100 where
        # the target extends beyond its box, as published.
        pixel_loss = _binary_cross_entropy(masks, target_masks)
        sides = box_of[:, 2:] - box_of[:, :2]
        area = sides[:, 0] * grid[1] * sides[:, 1] * grid[0]
        loss_mask = (pixel_loss.sum(dim=(1, 2)) / area * scale[image_of]).sum()
        if mask_scorer is None:
            return loss_mask, None
        classes = labels[image_of, prior_of] - 1
        return loss_mask, self._mask_iou_loss(mask_scorer, masks, target_masks, classes)

    def _select_masks(self, image_of: Tensor, num_images: int) -> tuple[Tensor, Tensor]:
        """Which of the P positives are in the mask loss, and the factor of each image's sum.

        Returns:
            indices (M,) into the positives, factors (B,) = all / selected positives of the image.
        """
        counts = torch.bincount(image_of, minlength=num_images)
        scale = counts.clamp(min=1) / counts.clamp(min=1, max=self.max_masks)
        if int(counts.max()) <= self.max_masks:
            return torch.arange(len(image_of), device=image_of.device), scale
        selected = []
        for i in range(num_images):
            indices = (image_of == i).nonzero()[:, 0]
            order = torch.randperm(len(indices), device=indices.device)
            selected.append(indices[order[: self.max_masks]])
        return torch.cat(selected), scale

    def _mask_iou_loss(
        self, mask_scorer: MaskScorer, masks: Tensor, target_masks: Tensor, classes: Tensor
    ) -> Tensor:
        """Smooth L1 between the predicted IoU of each mask and the actual one; summed."""
        large = target_masks.sum(dim=(1, 2)) > self.min_mask_iou_area
        masks, target_masks, classes = masks[large], target_masks[large], classes[large]
        if len(masks) == 0:
            return masks.sum() + 0.0 * sum(p.sum() for p in mask_scorer.parameters())
        predicted = mask_scorer(masks).gather(1, classes[:, None])[:, 0]
        return F.smooth_l1_loss(
            predicted.float(), mask_iou(masks, target_masks), beta=1.0, reduction="sum"
        )

    @staticmethod
    def _semantic_loss(logits: Tensor, targets: Sequence[YOLACTTargets]) -> Tensor:
        """Sum of the BCE against the union of each class's objects, over cells times images."""
        num_images, _, rows, columns = logits.shape
        union = torch.zeros_like(logits, dtype=torch.float32)
        for i, target in enumerate(targets):
            masks = resize_masks(target.masks, (rows, columns)).float()
            union[i].index_add_(0, target.classes, masks)
        loss = F.binary_cross_entropy_with_logits(
            logits.float(), union.clamp(max=1), reduction="sum"
        )
        return loss / (rows * columns * num_images)


def _binary_cross_entropy(probabilities: Tensor, target: Tensor) -> Tensor:
    """Element-wise, NaN where the probability is NaN: PyTorch's raises there, on CUDA with an assertion
    that ends the process. It also refuses autocast, although the input is float32 here."""
    bad = probabilities.isnan()
    with torch.autocast(probabilities.device.type, enabled=False):
        loss = F.binary_cross_entropy(
            probabilities.masked_fill(bad, 0).clamp(0, 1), target, reduction="none"
        )
    return loss.masked_fill(bad, float("nan"))


def mask_iou(masks: Tensor, target_masks: Tensor) -> Tensor:
    """IoU of soft masks (N, h, w), thresholded, with binary ones; (N,), 0 where both are empty."""
    with torch.no_grad():
        binary = (masks > MASK_THRESHOLD).to(target_masks.dtype)
        intersection = (binary * target_masks).sum(dim=(1, 2))
        union = binary.sum(dim=(1, 2)) + target_masks.sum(dim=(1, 2)) - intersection
        return intersection / union.clamp(min=1)
