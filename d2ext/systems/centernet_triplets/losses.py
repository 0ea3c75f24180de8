"""Losses of CenterNet with triplets: CornerNet's, and those of the centres (arXiv 1904.08189,
section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

from d2ext.codecs.corners import CornerTargets, PointMaps, PointTargets
from d2ext.systems.cornernet.losses import CornerNetCriterion


class CenterNetTripletsCriterion(CornerNetCriterion):
    """Heat maps and offsets of all three kinds of points; pull and push of the corners."""

    def points(
        self, predictions: Sequence[PointMaps], targets: CornerTargets
    ) -> list[tuple[PointMaps, PointTargets]]:
        if targets.center is None:
            raise ValueError("The targets lack centres: encode_corners needs a center_divisor.")
        kinds = (targets.top_left, targets.bottom_right, targets.center)
        return list(zip(predictions, kinds, strict=True))
