"""VPSNet's losses that differ from UPSNet's (vpsnet/NOTES.md, Training).

Letters: N images, R positive regions, K objects of the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.systems.upsnet.targets import NO_TARGET


def match_loss(logits: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Cross entropy of the track head, mean over the positive regions of each image.

    Args:
        logits: N × (R, 1 + K).
        targets: N × (R,) columns.
    """
    sums = [F.cross_entropy(*pair, reduction="sum") for pair in zip(logits, targets, strict=True)]
    means = [x / max(len(y), 1) for x, y in zip(sums, targets, strict=True)]
    return torch.stack(means).mean()


def panoptic_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of one image, mean over the cells that have a target.

    Args:
        logits: (channels, h, w).
        target: (h, w). Without any target the loss is 0.
    """
    total = F.cross_entropy(
        logits[None].float(), target[None], ignore_index=NO_TARGET, reduction="sum"
    )
    return total / (target != NO_TARGET).sum().clamp(min=1)
