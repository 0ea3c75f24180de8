"""UPSNet's region proposal network: Detectron2's, trained and decoded as published.

Boxes are in "end behind" form (``boxes.py``), pixels of the network input.

Letters: A anchors of all levels, a anchors of a cell, N images, R proposals.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor
from torch.nn import functional as F

from d2ext.modeling.region_slots import SlotRPN
from d2ext.systems.upsnet.boxes import clip
from d2ext.systems.upsnet.head import UPSNetPredictions

# Beta of the box regression loss (published: sigma 3, that is 1 / 3²).
SMOOTH_L1_BETA = 1.0 / 9.0


@PROPOSAL_GENERATOR_REGISTRY.register()
class UPSNetRPN(SlotRPN):
    """Detectron2's RPN with four published differences:

    - anchors must lie inside the unpadded image to be trained on;
    - negatives are drawn from all anchors with IoU below the threshold, so an object's best anchor,
      which is positive whatever its IoU, may be overwritten; if there are no more candidates than
      should be sampled, none becomes negative;
    - the box loss is divided by the number of sampled anchors, the class loss by the configured number;
    - clipped proposals keep at least one pixel inside the image.
    """

    def propose(
        self,
        predictions: UPSNetPredictions,
        image_sizes: Sequence[tuple[int, int]],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Proposals (``proposal_boxes``, ``objectness_logits``) of each image, and with
        ``gt_instances`` the losses."""
        logits, deltas = predictions.logits, predictions.deltas
        losses = {}
        if gt_instances is not None:
            maps = [predictions.features[name] for name in self.in_features]
            anchors = self.anchor_generator(maps)
            labels, boxes = self.label_and_sample_anchors(anchors, gt_instances)
            losses = self.losses(anchors, logits, labels, deltas, boxes)
        sizes = torch.tensor(image_sizes, dtype=torch.float32, device=logits[0].device)
        found = self.find(predictions.features, logits, deltas, sizes)
        counts = (found.logits > -torch.inf).sum(dim=1).tolist()
        return [
            Instances(size, proposal_boxes=Boxes(boxes[:n]), objectness_logits=scores[:n])
            for size, boxes, scores, n in zip(image_sizes, *found, counts, strict=True)
        ], losses

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels (A,) in {1 positive, 0 negative, -1 not trained on} and matched boxes (A, 4)."""
        every = Boxes.cat(anchors).tensor
        labels, matched = [], []
        for targets in gt_instances:
            height, width = targets.image_size
            inside = (every[:, :2] >= 0).all(1) & (every[:, 2] <= width) & (every[:, 3] <= height)
            inside = inside.nonzero()[:, 0]
            label = every.new_full((len(every),), -1, dtype=torch.int64)
            boxes = torch.zeros_like(every)
            label[inside], best = self._label(targets.gt_boxes, Boxes(every[inside]))
            if len(targets) > 0:
                boxes[inside] = targets.gt_boxes.tensor.to(every.dtype)[best]
            labels.append(label)
            matched.append(boxes)
        return labels, matched

    def _label(self, objects: Boxes, anchors: Boxes) -> tuple[Tensor, Tensor]:
        """G boxes and ``a`` anchors → sampled labels (a,) and each anchor's box (a,) int64."""
        iou, best = match(objects, anchors)
        return self._sample(iou), best

    def _class_loss_divisor(self, sampled: Tensor) -> Tensor | int:
        """What the class loss of an image is divided by; ``sampled``: (A,) bool."""
        return self.batch_size_per_image

    def _sample(self, iou: Tensor) -> Tensor:
        """iou (G, a) of boxes and anchors → labels (a,)."""
        negative_iou, positive_iou = self.anchor_matcher.thresholds[1:3]
        count = iou.shape[1]
        label = iou.new_full((count,), -1, dtype=torch.int64)
        highest = iou.new_zeros(count)
        if len(iou) > 0 and count > 0:
            highest = iou.amax(dim=0)
            # A box that no anchor touches has no best anchor: its best IoU is 0, that of all of them.
            best = iou.amax(dim=1, keepdim=True)
            label[((iou == best) & (best > 0)).any(dim=0) | (highest >= positive_iou)] = 1
        positives = (label == 1).nonzero()[:, 0]
        surplus = len(positives) - int(self.positive_fraction * self.batch_size_per_image)
        if surplus > 0:
            label[positives[_permutation(positives)[:surplus]]] = -1
        wanted = self.batch_size_per_image - int((label == 1).sum())
        candidates = (highest < negative_iou).nonzero()[:, 0]
        if len(candidates) > wanted:
            label[candidates[_permutation(candidates)[:wanted]]] = 0
        return label

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """``loss_rpn_cls`` and ``loss_rpn_loc``, means over the images of published losses.

        Args: as the base class.
        """
        every = Boxes.cat(anchors).tensor
        logits = torch.cat(pred_objectness_logits, dim=1)
        deltas = torch.cat(pred_anchor_deltas, dim=1)
        count = len(gt_labels)
        classification, localization = logits.sum() * 0, deltas.sum() * 0
        for i, (label, boxes) in enumerate(zip(gt_labels, gt_boxes, strict=True)):
            sampled = label >= 0
            classification = classification + F.binary_cross_entropy_with_logits(
                logits[i][sampled], label[sampled].float(), reduction="sum"
            ) / (self._class_loss_divisor(sampled) * count)
            positive = label == 1
            target = self.box2box_transform.get_deltas(every[positive], boxes[positive])
            localization = localization + F.smooth_l1_loss(
                deltas[i][positive], target, reduction="sum", beta=SMOOTH_L1_BETA
            ) / (sampled.sum().clamp(min=1) * count)
        weights = self.loss_weight
        return {
            "loss_rpn_cls": classification * weights.get("loss_rpn_cls", 1.0),
            "loss_rpn_loc": localization * weights.get("loss_rpn_loc", 1.0),
        }

    def clip(self, boxes: Tensor, height: Tensor, width: Tensor) -> Tensor:
        """See :func:`boxes.clip`."""
        return clip(boxes, height, width)


def match(objects: Boxes, boxes: Boxes) -> tuple[Tensor, Tensor]:
    """IoU (G, R), and each box's best object (R,) int64 (0 where there is no object)."""
    iou = pairwise_iou(objects, boxes)
    if len(objects) == 0:
        return iou, torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    return iou, iou.argmax(dim=0)


def _permutation(indices: Tensor) -> Tensor:
    return torch.randperm(len(indices), device=indices.device)
