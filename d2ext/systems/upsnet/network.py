"""UPSNet's network with all heads, as inference runs it: shapes do not depend on values.

Letters: N images, R regions, T thing classes.
"""

from __future__ import annotations

from typing import Any

from detectron2.modeling import Backbone
from torch import Tensor, nn

from d2ext.modeling.region_slots import Slots, select
from d2ext.systems.upsnet.head import UPSNetPredictions, UPSNetSemanticHead
from d2ext.systems.upsnet.roi_heads import UPSNetROIHeads
from d2ext.systems.upsnet.rpn import UPSNetRPN


class UPSNetNetwork(nn.Module):
    """Backbone, RPN head and semantic head: images (N, 3, H, W) → :class:`UPSNetPredictions`; in
    inference also the heads on regions.

    Args:
        candidates: arguments of :func:`region_slots.select` for the panoptic head's candidates.
    """

    def __init__(
        self,
        backbone: Backbone,
        rpn: UPSNetRPN,
        semantic: UPSNetSemanticHead,
        roi_heads: UPSNetROIHeads,
        candidates: dict[str, Any],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.rpn = rpn
        self.semantic = semantic
        self.roi_heads = roi_heads
        self.candidates = candidates

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> UPSNetPredictions:
        """``sizes``: (N, 2) height and width of the images without padding; None or (0, 2): without the
        heads on regions."""
        features = self.backbone(images)
        predictions = UPSNetPredictions(
            features, *self.rpn.predict(features), self.semantic(features)
        )
        return self.detect(predictions, sizes)

    def detect(self, predictions: Any, sizes: Tensor | None) -> Any:
        """Add ``detections`` and ``candidates``, with their masks."""
        if sizes is None or sizes.shape[0] == 0:
            return predictions
        slots = self.select(*self.find(predictions, sizes))
        slots = self.roi_heads.add_masks(predictions.features, slots)
        return predictions._replace(detections=slots[0], candidates=slots[1])

    def find(self, predictions: Any, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`UPSNetROIHeads.find`."""
        found = predictions.features, predictions.logits, predictions.deltas
        proposals = self.rpn.find(*found, sizes)
        return self.roi_heads.find(predictions.features, proposals, sizes)

    def select(self, boxes: Tensor, probabilities: Tensor) -> list[Slots]:
        """What :meth:`find` has found → detections, and candidates of the panoptic head."""
        return [
            self.roi_heads.select(boxes, probabilities),
            self.select_candidates(boxes, probabilities),
        ]

    def select_candidates(self, boxes: Tensor, probabilities: Tensor) -> Slots:
        """See :meth:`select`."""
        return select(boxes, probabilities, across_classes=True, **self.candidates)


def drop_features(predictions: Any) -> Any:
    """The network's decoding: without what post-processing does not read, if the heads on regions have
    seen it.

    A function of the module, so that models can be pickled.
    """
    if predictions.candidates is None:
        return predictions
    semantic = predictions.semantic._replace(features=predictions.semantic.score[:, :0])
    return predictions._replace(features={}, logits=[], deltas=[], semantic=semantic)
