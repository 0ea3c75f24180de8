"""Optical flow as colours."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def flow_colors(flow: Tensor, largest: float = 0.0) -> Tensor:
    """Direction as hue (right red, left cyan), length as saturation; no motion is white.

    Args:
        flow: (2, H, W) x, y.
        largest: length with full colour; 0: the largest in the flow.

    Returns:
        (3, H, W) RGB in 0..1
    """
    length = torch.linalg.vector_norm(flow, dim=0)
    saturation = (length / (largest or length.max().clamp(min=1e-6))).clamp(max=1)
    hue = torch.atan2(flow[1], flow[0]) / (2 * math.pi)
    # A channel is 1 in the third of the circle around its own hue and falls to 0 over a sixth beside it.
    distances = [(hue - third / 3 + 0.5) % 1 - 0.5 for third in range(3)]
    channels = torch.stack([(2 - 6 * distance.abs()).clamp(0, 1) for distance in distances])
    return 1 - saturation * (1 - channels)
