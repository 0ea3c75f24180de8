"""Pull and push losses for embeddings that tell which points belong to one object.

Shared by CornerNet (arXiv 1808.01244, equations 4 and 5; Newell's associative embedding, arXiv
1611.05424) and CenterNet with triplets (arXiv 1904.08189). Computed in float32.

Letters: B images, N object slots of an image, n objects of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Added to the divisors (published code).
_EPSILON = 1e-4


def pull_push_loss(first: Tensor, second: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pull both points of an object to their mean, push the means of objects apart.

    Pull is the sum over objects of both squared distances to the mean, divided by (n + 1e-4). Push is
    the sum over all ordered pairs, including an object with itself, of
    (max(0, 1 - distance) - 1 / (n + 1e-4)) / (n (n - 1) + 1e-4).

    Published quirks: both are *summed* over images, so they grow with the images per process. The
    subtraction cancels the pairs of an object with itself, but also takes a constant from every other
    pair; an image with one object adds a constant of nearly 1 (1e-4 / 1e-4) without gradient. The
    published code fails on a batch of one image; this one does not.

    Args:
        first, second: (B, N) embeddings of the two points; any finite values in empty slots.
        mask: (B, N), 1 or True where a slot holds an object.

    Returns:
        (pull, push), float32 scalars.
    """
    weight = mask.to(torch.float32)
    first, second = first.float(), second.float()
    mean = (first + second) / 2
    count = weight.sum(dim=1)

    spread = (first - mean) ** 2 + (second - mean) ** 2
    pull = (spread * weight / (count + _EPSILON)[:, None]).sum()

    pairs = weight[:, :, None] * weight[:, None, :]
    closeness = (1 - (mean[:, :, None] - mean[:, None, :]).abs()).clamp(min=0)
    closeness = closeness - (1 / (count + _EPSILON))[:, None, None]
    divisor = count * (count - 1) + _EPSILON
    push = (closeness / divisor[:, None, None] * pairs).sum()
    return pull, push
