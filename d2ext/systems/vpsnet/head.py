"""VPSNet's network: features of the frame before are fused with the current ones, objects are matched
with those of earlier frames (arXiv 2006.11339, sections 4.1 and 4.2).

Letters: B images, C channels of the pyramid, h×w cells of its finest level (stride 4), R regions,
M objects in memory, D channels of an object's embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.layers.correlation import correlation
from d2ext.layers.exporting import is_exporting
from d2ext.layers.warp import warp
from d2ext.modeling.region_slots import Slots
from d2ext.systems.upsnet.head import SemanticPredictions

# Stride of the finest level of the pyramid.
STRIDE = 4
# Slope of the fusion's activations for negative inputs (vpsnet/NOTES.md, Network).
NEGATIVE_SLOPE = 0.1
# Channels of the hidden convolutions that correct the flow (vpsnet/NOTES.md, Network).
FLOW_CHANNELS = (64, 64, 32)


class VPSNetPredictions(NamedTuple):
    """Predictions for a batch: UPSNet's, and what the next frame needs."""

    features: dict[str, Tensor]
    """The pyramid, fused."""
    logits: list[Tensor]
    deltas: list[Tensor]
    """See :meth:`SlotRPN.predict`."""
    semantic: SemanticPredictions
    gathered: Tensor | None
    """(B, C, h, w) of the pyramid before fusion (:meth:`FusionNeck.gather`); None without fusion."""
    reference: dict[str, Tensor] | None = None
    """The pyramid of the other frame of a pair, in training."""
    candidates: Slots | None = None
    """In inference: of the panoptic head, which are the detections too."""
    embeddings: Tensor | None = None
    """(B, slots, D) of them, with a track head."""


def _leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, NEGATIVE_SLOPE)


class FusionNeck(nn.Module):
    """Fuses a pyramid with the one of another frame.

    The levels are gathered at the finest one's size. The other frame's are warped by the optical flow
    and by a correction of it, which convolutions predict from both frames' cost volume. An attention
    over the frames and one over the cells weight them; what comes out is added to every level.

    Args:
        channels: C.
        max_displacement: of the cost volume, in cells.
        published_warp: see ``MODEL.VPSNET.PUBLISHED_WARP``.
    """

    def __init__(
        self, channels: int, *, max_displacement: int = 4, published_warp: bool = False
    ) -> None:
        super().__init__()
        self.channels = channels
        self.max_displacement = max_displacement
        self.published_warp = published_warp
        width = channels + (2 * max_displacement + 1) ** 2 + 2
        convs = [
            nn.Conv2d(a, b, 3, padding=1)
            for a, b in zip((width, *FLOW_CHANNELS), (*FLOW_CHANNELS, 2), strict=True)
        ]
        self.residual_flow = nn.ModuleList(convs)
        self.temporal_embedding = nn.Conv2d(channels, channels, 3, padding=1)
        self.temporal_reference = nn.Conv2d(channels, channels, 3, padding=1)
        self.temporal_fusion = nn.Conv2d(2 * channels, channels, 1)
        self.spatial1 = nn.Conv2d(2 * channels, channels, 1)
        self.spatial2 = nn.Conv2d(2 * channels, channels, 1)
        self.spatial3 = nn.Conv2d(channels, channels, 3, padding=1)
        self.spatial4 = nn.Conv2d(channels, channels, 3, padding=1)
        self.spatial_add1 = nn.Conv2d(channels, channels, 1)
        self.spatial_add2 = nn.Conv2d(channels, channels, 1)
        self.refine = nn.Conv2d(channels, channels, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=NEGATIVE_SLOPE)
                nn.init.zeros_(module.bias)
        # A new neck hardly corrects the flow or changes the features. Not zero: the ReLU after `refine`
        # lets no gradient through at 0.
        for conv in (convs[-1], self.refine):
            nn.init.normal_(conv.weight, std=1e-3)

    def gather(self, features: dict[str, Tensor]) -> Tensor:
        """Mean of the levels, brought to the finest one's size (nearest): (B, C, h, w)."""
        levels = list(features.values())
        size = levels[0].shape[-2:]
        return torch.stack(
            [levels[0], *(F.interpolate(x, size, mode="nearest") for x in levels[1:])]
        ).mean(dim=0)

    def warp(self, features: Tensor, flow: Tensor) -> Tensor:
        """Features (B, C, h, w) at the places that a flow (B, 2, h, w) in cells leads to, 0 outside."""
        return warp(features, flow, published_grid=self.published_warp)

    def correct(self, current: Tensor, warped: Tensor, flow: Tensor) -> Tensor:
        """What the flow that warped the other frame's features lacks: (B, 2, h, w), in cells."""
        volume = correlation(current, warped, self.max_displacement)
        x = torch.cat([current, volume, flow.to(current.dtype)], dim=1)
        *hidden, last = self.residual_flow
        for conv in hidden:
            x = _leaky_relu(conv(x))
        return last(x)

    def attend(self, current: Tensor, warped: Tensor) -> Tensor:
        """Temporal and spatial attention over both frames' features (B, C, h, w) → (B, C, h, w)."""
        frames = torch.cat([current, warped])
        reference = self.temporal_reference(current).repeat(2, 1, 1, 1)
        weights = (self.temporal_embedding(frames) * reference).sum(dim=1, keepdim=True).sigmoid()
        x = torch.cat((frames * weights).chunk(2), dim=1)
        fused = _leaky_relu(self.temporal_fusion(x))
        x = _leaky_relu(self.spatial1(x))
        pools = F.max_pool2d(x, 3, 2, padding=1), F.avg_pool2d(x, 3, 2, padding=1)
        x = _leaky_relu(self.spatial2(torch.cat(pools, dim=1)))
        x = _leaky_relu(self.spatial3(x))
        x = F.interpolate(x, fused.shape[-2:], mode="bilinear", align_corners=False)
        x = self.spatial4(x)
        added = self.spatial_add2(_leaky_relu(self.spatial_add1(x)))
        return fused * x.sigmoid() * 2 + added

    def forward(
        self, features: dict[str, Tensor], current: Tensor, reference: Tensor, flow: Tensor
    ) -> dict[str, Tensor]:
        """Pyramid → fused pyramid.

        Args:
            features: of the current frame.
            current, reference: (B, C, h, w), :meth:`gather` of the current and of the other frame.
            flow: (B, 2, h, w) x, y from the current to the other frame, in cells.
        """
        warped = self.warp(reference, flow)
        warped = self.warp(warped, self.correct(current, warped, flow))
        refined = F.relu(self.refine(self.attend(current, warped)))
        return {name: x + _max_pool_to(refined, x) for name, x in features.items()}


def _max_pool_to(x: Tensor, like: Tensor) -> Tensor:
    """``F.adaptive_max_pool2d`` of (B, C, h, w) to another map's size, faster where that divides."""
    height, width = like.shape[-2:]
    factor = x.shape[-2] // height
    if (height * factor, width * factor) == x.shape[-2:]:
        return x if factor == 1 else F.max_pool2d(x, factor)
    if not is_exporting():
        return F.adaptive_max_pool2d(x, (height, width))
    for dim, cells in ((2, height), (3, width)):  # ONNX has no such operator
        number, side = torch.arange(cells, device=x.device)[:, None], x.shape[dim]
        first, end = number * side // cells, -(-(number + 1) * side // cells)
        index = first + torch.arange(side // cells + 2, device=x.device)
        windows = x.index_select(dim, index.minimum(end - 1).flatten())
        x = windows.unflatten(dim, (cells, -1)).amax(dim + 1)
    return x


def quarter_flow(flow: Tensor) -> Tensor:
    """Flow (B, 2, H, W) in pixels → (B, 2, H / 4, W / 4) in cells of stride 4 (bilinear)."""
    return F.interpolate(flow, scale_factor=1 / STRIDE, mode="bilinear") / STRIDE


class TrackHead(nn.Module):
    """Two fully connected layers: what a region looks like → its embedding.

    Args:
        inputs: C · s · s of the regions' features.
        channels: D.
    """

    def __init__(self, inputs: int, channels: int = 1024) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, channels)
        self.fc2 = nn.Linear(channels, channels)
        for layer in (self.fc1, self.fc2):
            # Small, so that at first nothing matches well.
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, regions: Tensor) -> Tensor:
        """(R, C, s, s) → (R, D)."""
        return self.fc2(F.relu(self.fc1(regions.flatten(1))))


def match_logits(embeddings: Tensor, objects: Tensor) -> Tensor:
    """How well regions match objects.

    Args:
        embeddings: (R, D) of the regions.
        objects: (M, D) of the objects.

    Returns:
        (R, 1 + M) logits; column 0, "a new object", is 0.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        return F.pad(embeddings.float() @ objects.float().T, (1, 0))
