"""YolactEdge's flow net, and how features of the key frame are carried over (arXiv 2012.12259, 3.2).

Letters: B frames, C channels of the pyramid, F of the flow features, h_l×w_l cells of level l; level 0
is the finest (P3). A flow leads from a cell of the current frame to its place in the key frame, as x, y,
in units of which :data:`FLOW_UNITS` are half the map (yolact_edge/NOTES.md §3).
"""

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.systems.yolact.fpn import resize

# A flow of so many units moves by half the map (yolact_edge/NOTES.md §3).
FLOW_UNITS = 8.0
# Slope of the activations for negative inputs (yolact_edge/NOTES.md §3).
NEGATIVE_SLOPE = 0.1


class Motion(NamedTuple):
    """How a level's features are carried over."""

    flow: Tensor
    """(B, 2, h_l, w_l)."""
    scale: Tensor
    """(B, C, h_l, w_l), a factor on what the flow leads to."""
    bias: Tensor
    """(B, C, h_l, w_l), added to it."""


def _leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, NEGATIVE_SLOPE)


def _conv3x3(
    in_channels: int, out_channels: int, *, stride: int = 1, bias: bool = True
) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)


class FlowNet(nn.Module):
    """Flow, scale and bias on each level of the pyramid that the backbone computes.

    Args:
        channels: C.
        num_levels: levels, at least 2.
        width: F; level l of the net has ``width * 2**l`` channels.
        published_init: see ``MODEL.YOLACT_EDGE.PUBLISHED_FLOW_INIT``.
    """

    def __init__(
        self, channels: int, *, num_levels: int, width: int, published_init: bool = False
    ) -> None:
        super().__init__()
        self.width = width
        # In inference the first convolution in two: what reads the current frame, and the key frame.
        self.halves: nn.ModuleList | None = None
        widths = [width * 2**level for level in range(num_levels)]
        # Of what gives a level's flow: the encoder's features and, but for the coarsest, those of the
        # next level and its flow.
        joined = [*(2 * own + 2 for own in widths[:-1]), widths[-1]]
        self.reduce = _conv3x3(channels, width)
        self.encoder = nn.ModuleList(
            nn.ModuleList([_conv3x3(first, own, stride=2 if level else 1), _conv3x3(own, own)])
            for level, (first, own) in enumerate(
                zip([2 * width, *widths[:-1]], widths, strict=True)
            )
        )
        up = list(zip(joined[1:], widths[:-1], strict=True))
        self.up_features = nn.ModuleList(_conv3x3(next_, own, bias=False) for next_, own in up)
        self.up_flow = nn.ModuleList(_conv3x3(2, 2, bias=False) for _ in up)
        self.flow = nn.ModuleList(_conv3x3(inputs, 2, bias=False) for inputs in joined)
        self.scale = nn.ModuleList(nn.Conv2d(inputs, channels, 1) for inputs in joined)
        self.bias = nn.ModuleList(nn.Conv2d(inputs, channels, 1) for inputs in joined)
        self._init_weights(published_init)

    def _init_weights(self, published: bool) -> None:
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                if published:
                    nn.init.xavier_uniform_(conv.weight)
                else:
                    nn.init.kaiming_normal_(conv.weight, a=NEGATIVE_SLOPE)
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)
        if not published:  # nothing moves, scale 1, bias 0
            for conv in (*self.flow, *self.scale, *self.bias):
                nn.init.zeros_(conv.weight)
            for conv in self.scale:
                nn.init.ones_(conv.bias)

    def prepare_inference(self) -> None:
        """Make all channel counts multiples of 8, as tensor cores want them; one convolution gives scale
        and bias. The flow then has further channels, which are 0."""
        for level, conv in enumerate(self.flow):
            first = level == len(self.flow) - 1  # that reads no coarser flow
            self.flow[level] = _padded(conv, 8, 0 if first else 6)
            pair = nn.Conv2d(conv.in_channels, 2 * self.scale[level].out_channels, 1)
            for name in ("weight", "bias"):
                parts = [getattr(x, name) for x in (self.scale[level], self.bias[level])]
                setattr(pair, name, nn.Parameter(torch.cat(parts), requires_grad=False))
            self.scale[level] = _padded(pair, pair.out_channels, 0 if first else 6)
            self.bias[level] = nn.Identity()
        for level, conv in enumerate(self.up_flow):
            self.up_flow[level] = _padded(conv, 8, 6)
            up = self.up_features[level]
            last = level == len(self.up_flow) - 1
            self.up_features[level] = _padded(up, up.out_channels, 0 if last else 6)
        first = self.encoder[0][0]
        self.halves = nn.ModuleList(
            _padded(first, len(first.weight), 0, slice(i * self.width, (i + 1) * self.width))
            for i in range(2)
        )
        self.halves[0].bias = None
        self.encoder[0][0] = nn.Identity()

    def features(self, lateral: Tensor) -> Tensor:
        """A frame's finest lateral (B, C, h_0, w_0) → its flow features (B, F, h_0, w_0)."""
        return _leaky_relu(self.reduce(lateral))

    def encode_key(self, features: Tensor) -> Tensor:
        """Flow features (B, F, h_0, w_0) of a key frame → its part in the first convolution.

        That one takes both frames, one after the other; the key frame's part is computed once.
        """
        if self.halves is not None:
            return self.halves[1](features)
        conv = self.encoder[0][0]
        return F.conv2d(features, conv.weight[:, self.width :], conv.bias, padding=1)

    def forward(self, current: Tensor, key: Tensor, finest: int = 1) -> dict[int, Motion]:
        """Motions of the levels from ``finest`` on; only flow pre-training needs level 0.

        Args:
            current: flow features of the current frame.
            key: what :meth:`encode_key` makes of the key frame's.
        """
        if self.halves is not None:
            x = self.halves[0](current)
        else:
            x = F.conv2d(current, self.encoder[0][0].weight[:, : self.width], padding=1)
        x = _leaky_relu(x + key)
        encoded = []
        for level, (first, second) in enumerate(self.encoder):
            x = _leaky_relu(first(x)) if level else x
            x = _leaky_relu(second(x))
            encoded.append(x)
        motions: dict[int, Motion] = {}
        flow: Tensor | None = None
        for level in range(len(encoded) - 1, finest - 1, -1):
            if flow is not None:
                own = encoded[level]
                up = self.up_features[level](resize(x, own))
                x = torch.cat([own, up, self.up_flow[level](resize(flow, own))], dim=1)
            flow = self.flow[level](x)
            if isinstance(self.bias[level], nn.Identity):
                scale, bias = self.scale[level](x).chunk(2, dim=1)
            else:
                scale, bias = self.scale[level](x), self.bias[level](x)
            motions[level] = Motion(flow[:, :2], scale, bias)
        return motions


def _padded(
    conv: nn.Conv2d, out_channels: int, extra: int, inputs: slice = slice(None)
) -> nn.Conv2d:
    """The same convolution of some inputs, with more outputs, and ``extra`` more inputs, that are 0."""
    weight = conv.weight[:, inputs]
    outputs = out_channels - len(weight)
    result = copy.copy(conv)
    result._parameters = dict(conv._parameters)
    result.weight = nn.Parameter(F.pad(weight, (0, 0, 0, 0, 0, extra, 0, outputs)), False)
    result.out_channels, result.in_channels = out_channels, weight.shape[1] + extra
    return result


@lru_cache(maxsize=32)
def _cell_places(height: int, width: int, device: torch.device) -> Tensor:
    """(height, width, 2): x, y of the cells, -1..1 from corner to corner."""
    rows = torch.linspace(-1, 1, height, device=device)
    columns = torch.linspace(-1, 1, width, device=device)
    return torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)


def warp(features: Tensor, flow: Tensor) -> Tensor:
    """Features (B, C, h, w) at the places that a flow (B, 2, h, w) leads to: bilinear, 0 outside.

    In float32, whatever the types: in half precision a coordinate would be off by a part of a cell.
    """
    cells = _cell_places(flow.shape[2], flow.shape[3], flow.device)
    places = torch.add(cells, flow.float().permute(0, 2, 3, 1), alpha=1 / FLOW_UNITS)
    with torch.autocast(features.device.type, enabled=False):
        return F.grid_sample(
            features.float(), places, mode="bilinear", padding_mode="zeros", align_corners=True
        )


def carry_over(features: Tensor, motion: Motion) -> Tensor:
    """The key frame's features (B, C, h, w) → the current frame's, in the motion's type."""
    # Also in its layout, which the sampling does not keep.
    warped = torch.empty_like(motion.scale).copy_(warp(features, motion.flow))
    return torch.addcmul(motion.bias, warped, motion.scale)


class Refinement(nn.Module):
    """Corrects features that were carried over by the frame's own finest lateral (published: SPA).

    The lateral is resized from level to level, not from the finest each time (yolact_edge/NOTES.md §3).
    """

    def __init__(self, channels: int, num_levels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_conv3x3(2 * channels, channels) for _ in range(num_levels))
        for conv in self.convs:
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, levels: Sequence[Tensor], lateral: Tensor) -> list[Tensor]:
        """Levels 1, 2, ... (B, C, h_l, w_l) and the lateral (B, C, h_0, w_0) → the levels."""
        refined = []
        for conv, x in zip(self.convs, levels, strict=True):
            lateral = resize(lateral, x)
            refined.append(x + _leaky_relu(conv(torch.cat([x, lateral], dim=1))))
        return refined
