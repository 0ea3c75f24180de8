"""What is done to boxes of every kind."""

from __future__ import annotations

import torch
from torch import Tensor


def clip_boxes(boxes: Tensor, size: tuple[float, float], *, min_overlap: float = 0.0) -> Tensor:
    """Boxes (..., 4) XYXY cut to an image of ``size`` (height, width), their corners ordered.

    Args:
        min_overlap: what stays of each side, wherever the box is.
    """
    # Numbers instead of tensors of the limits: those would wait for the device.
    height, width = size
    x, y = boxes[..., 0::2], boxes[..., 1::2]
    return torch.stack(
        [
            x.amin(dim=-1).clamp(0, width - min_overlap),
            y.amin(dim=-1).clamp(0, height - min_overlap),
            x.amax(dim=-1).clamp(min_overlap, width),
            y.amax(dim=-1).clamp(min_overlap, height),
        ],
        dim=-1,
    )
