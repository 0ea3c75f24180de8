"""Targets of CenterNet with triplets: CornerNet's, and centres (published code)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from d2ext.codecs.corners import CornerTargets, encode_corners


def encode_triplets(
    boxes: Sequence[Tensor], classes: Sequence[Tensor], **sizes: Any
) -> CornerTargets:
    """:func:`encode_corners` with the published radii and Gaussians of centres."""
    return encode_corners(boxes, classes, radius_variant="triplets", center_divisor=5.0, **sizes)
