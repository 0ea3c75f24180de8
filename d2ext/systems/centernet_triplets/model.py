"""CenterNet with keypoint triplets (arXiv 1904.08189): CornerNet with boxes confirmed by a centre.

Differs from CornerNet (:mod:`d2ext.systems.cornernet.model`) in the heads (``head.py``), the targets
(``targets.py``) and the check of centres (``postprocess.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from torch import Tensor

from d2ext.codecs.canvas import Canvas
from d2ext.codecs.corners import decode_points
from d2ext.systems.centernet_triplets.head import CenterNetTripletsHead
from d2ext.systems.centernet_triplets.postprocess import (
    OUTSIDE_MARGIN,
    confirm_slots,
    image_centers,
    rows_of_centers,
    to_instances,
)
from d2ext.systems.centernet_triplets.targets import encode_triplets
from d2ext.systems.cornernet.model import CornerNet
from d2ext.systems.cornernet.postprocess import image_slots


@META_ARCH_REGISTRY.register()
class CenterNetTriplets(CornerNet):
    """CenterNet with triplets on any hourglass."""

    config_key = "CENTERNET_TRIPLETS"
    head_class = CenterNetTripletsHead
    encode = staticmethod(encode_triplets)
    margin = OUTSIDE_MARGIN

    @configurable
    def __init__(self, **corner_net: Any) -> None:
        """Args:
        corner_net: see :class:`CornerNet`; ``head`` also predicts centres.
        """
        super().__init__(**corner_net)
        if 1.0 not in self.scales:
            raise ValueError(
                "Centres come from the unscaled image: MODEL.CENTERNET_TRIPLETS.TEST.SCALES must "
                f"include 1.0, not only {self.scales}."
            )

    def _decode(self, predictions: Any) -> tuple[Tensor, ...]:
        """Raw predictions → rows of pairs (B, P, COLUMNS) and of centres (B, K, 4), in cells."""
        (rows,) = super()._decode(predictions)
        centers = decode_points(predictions[2], self.top_k)
        return rows, rows_of_centers(centers)

    def _rows(self, canvas: Canvas, *decoded: Tensor) -> tuple[Tensor, ...]:
        """Rows of pairs (N, COLUMNS), rejected ones too, and of centres (M, 4), in pixels."""
        rows, centers = decoded
        # As published: boxes of all scales, centres of the unscaled image only.
        centers = image_centers(
            centers if canvas.scale == 1.0 else centers[:, :0], canvas, self.stride
        )
        return image_slots(rows, canvas, self.stride, self.margin), centers

    def _candidates(self, passes: list[tuple[Tensor, ...]]) -> Tensor:
        rows, centers = (torch.cat(parts) for parts in zip(*passes, strict=True))
        return confirm_slots(rows, centers)

    def _instances(
        self, rows: Tensor, image_size: tuple[int, int], output_size: tuple[int, int]
    ) -> Instances:
        return to_instances(rows, image_size, output_size)
