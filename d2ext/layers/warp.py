"""Warping by optical flow: each cell takes what lies where its flow leads to, bilinearly.

Shapes: B images, C channels, H×W cells. A flow is (x, y) in cells.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["warp"]


def warp(
    features: Tensor, flow: Tensor, *, padding_mode: str = "zeros", published_grid: bool = False
) -> Tensor:
    """Features at the places that a flow leads to: ``result(p) = features(p + flow(p))``.

    Computed in float32, or float64 for features of it, also under autocast: in half precision a
    coordinate would be off by a part of a cell.

    Args:
        features: (B, C, H, W).
        flow: (B, 2, H, W), any floating dtype.
        padding_mode: what lies outside: ``"zeros"``, or ``"border"``, the nearest cell of the border
            (FlowNet2's ``resample2d``).
        published_grid: sample at ``x·W/(W - 1) - 1/2`` instead of x, and likewise for y. VPSNet's warp
            divides by W - 1 as for coordinates from corner to corner, and PyTorch since 1.3 takes them
            from edge to edge (``align_corners=False``), so that zero flow moves features by up to half a
            cell; the published weights were trained with this (vpsnet/NOTES.md, *Network*).

    Returns:
        (B, C, H, W) in the features' dtype.

    Raises:
        ValueError: a flow of another size.
    """
    batch, _, height, width = features.shape
    if flow.shape != (batch, 2, height, width):
        raise ValueError(
            f"The flow's shape is {tuple(flow.shape)}, for features of shape {tuple(features.shape)} it "
            f"must be {(batch, 2, height, width)}."
        )
    dtype = torch.promote_types(features.dtype, torch.float32)
    flow = flow.to(dtype)
    x = torch.arange(width, dtype=dtype, device=flow.device) + flow[:, 0]
    y = torch.arange(height, dtype=dtype, device=flow.device)[:, None] + flow[:, 1]
    if published_grid:
        x, y = x * (2 / max(width - 1, 1)) - 1, y * (2 / max(height - 1, 1)) - 1
    else:
        x, y = (2 * x + 1) / width - 1, (2 * y + 1) / height - 1
    places = torch.stack([x, y], dim=-1)
    with torch.autocast(features.device.type, enabled=False):
        return F.grid_sample(
            # Sampled plane by plane: neighbouring threads then read neighbouring cells.
            features.to(dtype).contiguous(),
            places,
            mode="bilinear",
            padding_mode=padding_mode,
            align_corners=False,
        ).to(features.dtype)
