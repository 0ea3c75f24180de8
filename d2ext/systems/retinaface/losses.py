"""RetinaFace's losses (arXiv 1905.00641, section 3.1; retinaface/NOTES.md, "Loss").

Letters: B images, A priors, P points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.codecs.prior_boxes import PriorMatches, encode_boxes, encode_points, mine_negatives
from d2ext.systems.retinaface.head import RetinaFacePredictions
from d2ext.systems.retinaface.targets import RetinaFaceTargets, match_priors

_MINING = ("image", "batch")


@dataclass(kw_only=True)
class RetinaFaceCriterion:
    """Matches priors with faces and sums up the losses; has no parameters.

    Args:
        box_weight, class_weight, landmark_weight: factors of the terms.
        positive_iou, negative_iou, forced_iou: see :func:`match_priors`.
        negatives_per_positive, min_negatives: see :func:`mine_negatives`.
        mining: "image" or "batch", among which priors the hardest negatives are selected.
        smooth_l1_beta: error at which smooth L1 becomes linear.
    """

    box_weight: float = 2.0
    class_weight: float = 1.0
    landmark_weight: float = 1.0
    positive_iou: float = 0.35
    negative_iou: float = 0.35
    forced_iou: float = 0.2
    negatives_per_positive: int = 7
    min_negatives: int = 0
    mining: str = "image"
    smooth_l1_beta: float = 1.0

    def __post_init__(self) -> None:
        if self.mining not in _MINING:
            raise ValueError(
                f'MODEL.RETINAFACE.LOSS.MINING is "image" or "batch", not "{self.mining}".'
            )

    def match(self, priors: Tensor, targets: Sequence[RetinaFaceTargets]) -> list[PriorMatches]:
        """Match the priors (A, 4) with each image's faces."""
        return [
            match_priors(
                priors,
                target.boxes,
                target.classes,
                positive_iou=self.positive_iou,
                negative_iou=self.negative_iou,
                forced_iou=self.forced_iou,
            )
            for target in targets
        ]

    def mine(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Negatives that are trained, (B, A) bool, of logits (B, A, classes + 1), labels (B, A)."""
        shape = labels.shape
        minimum = self.min_negatives
        if self.mining == "batch":
            minimum *= len(labels)
            logits, labels = logits.flatten(0, 1)[None], labels.flatten()[None]
        mined = mine_negatives(logits, labels, self.negatives_per_positive, minimum)
        return mined.reshape(shape)

    def __call__(
        self,
        predictions: RetinaFacePredictions,
        priors: Tensor,
        targets: Sequence[RetinaFaceTargets],
    ) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            predictions: of the network.
            priors: (A, 4) centre form.
            targets: one per image.

        Returns:
            ``loss_box``, ``loss_class`` and, if the model predicts points, ``loss_landmark``: scalars,
            weighted. The first two are divided by the number of positives of the batch, the last by that
            of positives whose face has points; at least by 1.
        """
        matches = self.match(priors, targets)
        labels = torch.stack([m.labels for m in matches])
        image_of, prior_of = (labels > 0).nonzero(as_tuple=True)
        counts = torch.tensor([0, *(len(t.boxes) for t in targets[:-1])], device=labels.device)
        # Index of a positive's face in the concatenation of all faces.
        face_of = torch.stack([m.objects for m in matches])[image_of, prior_of]
        face_of = face_of + counts.cumsum(0)[image_of]
        positive_priors = priors[prior_of]
        normalizer = max(len(image_of), 1)

        boxes = torch.cat([target.boxes for target in targets])[face_of]
        box_loss = self._smooth_l1(
            predictions.offsets[image_of, prior_of], encode_boxes(boxes, positive_priors)
        ).sum()
        trained = self.mine(predictions.logits, labels) | (labels > 0)
        class_loss = F.cross_entropy(
            predictions.logits[trained].float(), labels[trained], reduction="sum"
        )
        losses = {
            "loss_box": box_loss * (self.box_weight / normalizer),
            "loss_class": class_loss * (self.class_weight / normalizer),
        }
        if predictions.points is not None:
            points = torch.cat([target.points for target in targets])[face_of]
            annotated = torch.cat([target.annotated for target in targets])[face_of]
            errors = self._smooth_l1(
                predictions.points[image_of, prior_of], encode_points(points, positive_priors)
            )
            # Where nothing is annotated the target may be far away: 0, whatever the error.
            errors = errors.masked_fill(~annotated[..., None], 0.0)
            faces = annotated.any(dim=1).sum().clamp(min=1)
            losses["loss_landmark"] = errors.sum() * (self.landmark_weight / faces)
        return losses

    def _smooth_l1(self, predicted: Tensor, target: Tensor) -> Tensor:
        return F.smooth_l1_loss(
            predicted.float(), target, beta=self.smooth_l1_beta, reduction="none"
        )
