"""CenterNet with keypoint triplets (arXiv 1904.08189): CornerNet whose boxes a centre confirms.

Follows CornerNet (:mod:`d2ext.systems.cornernet.model`) but for the heads (``head.py``), the centres'
losses (``losses.py``) and the centre check (``postprocess.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from torch import Tensor

from d2ext.codecs.corners import PointMaps, decode_points
from d2ext.systems.centernet_triplets.head import CenterNetTripletsHead
from d2ext.systems.centernet_triplets.losses import CenterNetTripletsCriterion
from d2ext.systems.centernet_triplets.postprocess import (
    confirm_by_centers,
    pass_boxes,
    pass_centers,
    rows_of_centers,
    to_instances,
)
from d2ext.systems.cornernet.model import CornerNet
from d2ext.systems.cornernet.postprocess import View


@META_ARCH_REGISTRY.register()
class CenterNetTriplets(CornerNet):
    """CenterNet with triplets on any hourglass."""

    # See encode_corners.
    radius_variant = "triplets"
    center_divisor = 5.0

    @configurable
    def __init__(
        self, *, small_area: float = 22500.0, outside_margin: float = 5.0, **corner_net: Any
    ) -> None:
        """Args:
        small_area: see :func:`confirm_by_centers`.
        outside_margin: see :func:`pass_boxes`.
        corner_net: see :class:`CornerNet`; ``head`` also predicts centres, ``criterion`` takes them.
        """
        super().__init__(**corner_net)
        if 1.0 not in self.scales:
            raise ValueError(
                "Centres are those of the unscaled image: MODEL.CENTERNET_TRIPLETS.TEST.SCALES must "
                f"hold 1.0, not only {self.scales}."
            )
        self.small_area = small_area
        self.outside_margin = outside_margin

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        node = cfg.MODEL.CENTERNET_TRIPLETS
        return {
            **cls._arguments(cfg, node, CenterNetTripletsHead, CenterNetTripletsCriterion),
            "small_area": node.TEST.SMALL_AREA,
            "outside_margin": node.TEST.OUTSIDE_MARGIN,
        }

    def _decode(self, predictions: tuple[PointMaps, ...]) -> tuple[Tensor, ...]:
        """Raw predictions → rows of pairs (B, P, COLUMNS) and of centres (B, K, 4), in cells."""
        (rows,) = super()._decode(predictions)
        centers = decode_points(predictions[2], self.top_k, self.peak_kernel)
        return rows, rows_of_centers(centers)

    def _candidates(self, passes: list[tuple[tuple[Tensor, ...], View]]) -> Tensor:
        boxes, centers = [], []
        for (rows, points), view in passes:
            boxes.append(pass_boxes(rows, view, self.stride, self.outside_margin))
            # As published: boxes of all scales, centres of the unscaled image only.
            if view.scale == 1.0:
                centers.append(pass_centers(points, view, self.stride))
        return confirm_by_centers(torch.cat(boxes), torch.cat(centers), self.small_area)

    def _to_instances(
        self, rows: Tensor, image_size: tuple[int, int], output_size: tuple[int, int]
    ) -> Instances:
        return to_instances(rows, image_size, output_size)
