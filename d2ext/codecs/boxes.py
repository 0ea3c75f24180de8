"""Operations on boxes that several systems use."""

from __future__ import annotations

import torch
from torch import Tensor


def clip_boxes(boxes: Tensor, size: tuple[float, float], *, min_overlap: float = 0.0) -> Tensor:
    """Boxes (..., 4) XYXY clipped to an image of ``size`` (height, width), with ordered corners.

    Args:
        min_overlap: length of each side that stays inside, wherever the box is.
    """
    # Limits as numbers: tensors of them would wait for the device.
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


def mirror_boxes(boxes: Tensor, width: float) -> Tensor:
    """Boxes (..., 4) XYXY in a mirrored image of this width → in the image, and back."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return torch.stack([width - x1, y0, width - x0, y1], dim=-1)
