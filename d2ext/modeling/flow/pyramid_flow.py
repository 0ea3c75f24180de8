"""A small network for optical flow, coarse to fine, after PWC-Net (arXiv 1709.02371).

On each level of a pyramid, the reference's features are warped by the flow so far, a cost volume
compares them with the current image's, and a decoder corrects the flow. All levels share the decoder, as
in arXiv 1904.05290.

Letters: B images, H×W pixels; level l has h_l×w_l = H/2^l × W/2^l cells.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.layers import correlation, warp
from d2ext.modeling.flow.estimator import FLOW_REGISTRY, FlowEstimator

# Channels of levels 1 to 5, and of what the decoder gets of each.
_CHANNELS = (16, 32, 64, 96, 128)
_REDUCED = 32
# Levels with a flow, the coarsest first; cells of the cost volume in each direction.
_LEVELS = (5, 4, 3, 2)
_RADIUS = 3
# Of the decoder, each a convolution of 3x3.
_DECODER = (64, 64, 32)


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.LeakyReLU(0.1, inplace=True)
    )


@FLOW_REGISTRY.register()
class PyramidFlow(FlowEstimator):
    """0.6 million parameters. Its flow has a quarter of the image's resolution, and is enlarged with
    weights that are predicted, too (arXiv 2003.12039, section 3.3). ``OpticalFlow`` trains it."""

    size_divisibility: ClassVar[int] = 32

    def __init__(self) -> None:
        super().__init__()
        inputs = (3, *_CHANNELS[:-1])
        self.encoder = nn.ModuleList(
            nn.Sequential(_conv(i, o, stride=2), _conv(o, o))
            for i, o in zip(inputs, _CHANNELS, strict=True)
        )
        self.reduce = nn.ModuleDict(
            {str(level): nn.Conv2d(_CHANNELS[level - 1], _REDUCED, 1) for level in _LEVELS}
        )
        widths = ((2 * _RADIUS + 1) ** 2 + _REDUCED + 2, *_DECODER)
        self.decoder = nn.Sequential(*(_conv(i, o) for i, o in pairwise(widths)))
        self.predict = nn.Conv2d(_DECODER[-1], 2, 3, padding=1)
        # For each pixel of a cell, weights of the cell and its neighbours.
        self.weights = nn.Conv2d(_DECODER[-1], 9 * 4**2, 1)
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.kaiming_normal_(conv.weight, a=0.1)
                nn.init.zeros_(conv.bias)
        nn.init.zeros_(self.predict.weight)  # nothing moves
        nn.init.zeros_(self.weights.weight)

    def estimate(
        self, current: Tensor, reference: Tensor, inputs: list[dict[str, Any]] | None
    ) -> Tensor:
        return self.flows(current, reference)[-1]

    def flows(self, current: Tensor, reference: Tensor) -> list[Tensor]:
        """Flows of all levels, the coarsest first, and the last one enlarged.

        Args:
            current, reference: as for :meth:`forward`; sides that are multiples of 32.

        Returns:
            for levels 5 to 2 (B, 2, h_l, w_l), and (B, 2, H, W), float32, all in pixels of the images
        """
        dtype = self.predict.weight.dtype
        x = (torch.cat([current, reference]) / 127.5 - 1).to(dtype)
        pyramid = []
        for layer in self.encoder:
            x = layer(x)
            pyramid.append(x)
        flows: list[Tensor] = []
        cells = x.new_zeros(
            len(current), 2, 1, 1, dtype=torch.float32
        )  # flow in cells of the level
        for level in _LEVELS:
            first, second = pyramid[level - 1].chunk(2)
            if flows:
                # Each level learns to correct what it gets (as in RAFT): through all levels at once,
                # training is several times slower.
                cells = F.interpolate(2 * cells, first.shape[-2:], mode="bilinear").detach()
                second = warp(second, cells)
            else:
                cells = cells.expand(-1, -1, *first.shape[-2:])
            # Of directions in feature space, so that the costs do not depend on contrast.
            costs = correlation(F.normalize(first), F.normalize(second), _RADIUS)
            costs = costs * first.shape[1]  # their sum
            features = F.leaky_relu(self.reduce[str(level)](first), 0.1)
            decoded = self.decoder(torch.cat([costs, features, cells.to(dtype)], dim=1))
            cells = cells + self.predict(decoded).float()
            flows.append(cells * 2**level)
        return [*flows, _enlarge(flows[-1], self.weights(decoded).float())]


def _enlarge(flow: Tensor, weights: Tensor) -> Tensor:
    """Four times the size: each pixel is a weighted mean of its cell and the eight around it.

    Args:
        flow: (B, 2, h, w).
        weights: (B, 9·16, h, w) logits.

    Returns:
        (B, 2, 4h, 4w)
    """
    batch, _, height, width = flow.shape
    shares = weights.view(batch, 1, 9, 16, height, width).softmax(dim=2)
    around = F.unfold(F.pad(flow, (1, 1, 1, 1), mode="replicate"), 3)
    around = around.view(batch, 2, 9, 1, height, width)
    return F.pixel_shuffle((shares * around).sum(dim=2).flatten(1, 2), 4)
