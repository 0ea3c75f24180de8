"""UPSNet's losses (arXiv 1901.03784, section 3.4), computed in float32.

The published code trains on one image per process. With several, the losses of each image are computed
separately and averaged, as N processes with one image each would do.

Letters: N images, R regions, T thing classes, S stuff classes, M side of mask logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.systems.upsnet.targets import IGNORE, NO_TARGET


def region_weights(counts: Sequence[int], device: torch.device) -> Tensor:
    """(R,) weights that make a sum over the regions of N images the mean of the images' means."""
    numbers = torch.tensor(counts, device=device)
    weights = 1.0 / (numbers.clamp(min=1) * len(counts))
    return torch.repeat_interleave(weights, numbers, output_size=sum(counts))


def box_losses(
    logits: Tensor, deltas: Tensor, classes: Tensor, targets: Tensor, counts: Sequence[int]
) -> dict[str, Tensor]:
    """``loss_cls`` and ``loss_box_reg`` of Fast R-CNN; both divide by all regions of the image.

    Args:
        logits: (R, T + 1), background last.
        deltas: (R, T, 4).
        classes: (R,) in 0..T.
        targets: (R, 4).
        counts: regions of each image.
    """
    weights = region_weights(counts, logits.device)
    classification = F.cross_entropy(logits, classes, reduction="none")
    positive = (classes < deltas.shape[1]).nonzero()[:, 0]
    errors = F.smooth_l1_loss(
        deltas[positive, classes[positive]], targets[positive], reduction="none", beta=1.0
    )
    return {
        "loss_cls": (classification * weights).sum(),
        "loss_box_reg": (errors.sum(dim=1) * weights[positive]).sum() + deltas.sum() * 0,
    }


def mask_loss(logits: Tensor, targets: Tensor, counts: Sequence[int]) -> Tensor:
    """Binary cross entropy of positive regions, mean over their pixels.

    Args:
        logits, targets: (R, M, M) for the region's class.
        counts: positive regions of each image.
    """
    pixels = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return (pixels.mean(dim=(1, 2)) * region_weights(counts, logits.device)).sum()


def semantic_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, mean over the labelled pixels of each image.

    Args:
        logits: (N, S + T, H, W).
        labels: (N, H, W), IGNORE without label. An image without any label counts as 0.
    """
    pixels = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
    labelled = (labels != IGNORE).sum(dim=(1, 2)).clamp(min=1)
    return (pixels.sum(dim=(1, 2)) / labelled).mean()


def semantic_roi_loss(logits: Tensor, labels: Tensor, counts: Sequence[int]) -> Tensor:
    """Cross entropy inside annotated boxes, mean over all pixels, unlabelled ones counting as 0.

    Args:
        logits: (G, S + T, s, s).
        labels: (G, s, s).
        counts: boxes of each image.
    """
    pixels = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
    return (pixels.mean(dim=(1, 2)) * region_weights(counts, logits.device)).sum()


def panoptic_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy of one image, mean over all cells, those without target counting as 0.

    Args:
        logits: (channels, h, w).
        target: (h, w).
    """
    cells = F.cross_entropy(
        logits[None].float(), target[None], ignore_index=NO_TARGET, reduction="sum"
    )
    return cells / target.numel()
