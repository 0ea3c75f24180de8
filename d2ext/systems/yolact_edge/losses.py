"""Losses of YolactEdge beside YOLACT's (arXiv 2012.12259, section 3.3; yolact_edge/NOTES.md §4).

Letters: B frames, C channels, h_l×w_l cells of level l.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.systems.yolact.fpn import resize
from d2ext.systems.yolact_edge.flow import FLOW_UNITS


def warp_loss(
    carried: Sequence[Tensor], own: Sequence[Tensor], convs: Sequence[nn.Conv2d]
) -> Tensor:
    """How far carried-over features point elsewhere than the frame's own; a scalar in 0..2.

    1 - cosine similarity over the channels, averaged over cells and frames: of the features, and of what
    a convolution of the pyramid and a ReLU make of them; the mean over levels and both.

    Args:
        carried, own: for each level (B, C, h_l, w_l); no gradient goes to ``own``.
        convs: for each level the convolution; no gradient goes to its weights.
    """

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(a.float(), b.float(), dim=1).mean()

    terms = []
    for x, y, conv in zip(carried, own, convs, strict=True):
        weight = conv.weight.detach()
        bias = None if conv.bias is None else conv.bias.detach()

        def output(z: Tensor, weight: Tensor = weight, bias: Tensor | None = bias) -> Tensor:
            return F.relu(F.conv2d(z, weight, bias, padding=1))

        with torch.no_grad():
            target = output(y)
        terms += [distance(x, y.detach()), distance(output(x), target)]
    return torch.stack(terms).mean()


def flow_targets(flow: Tensor) -> Tensor:
    """Flow in pixels (B, 2, H, W) → in the flow net's units."""
    sides = flow.new_tensor([flow.shape[3], flow.shape[2]]).view(1, 2, 1, 1)
    return flow * (2 * FLOW_UNITS / sides)


def flow_loss(flows: Iterable[Tensor], targets: Tensor, valid: Tensor) -> Tensor:
    """Mean end-point error, summed over the levels; a scalar.

    Args:
        flows: of all levels (B, 2, h_l, w_l).
        targets: (B, 2, H, W) flow in the flow net's units; resized bilinearly to each level.
        valid: (B, H, W) bool; cells that any unknown pixel reaches do not count.
    """
    total = targets.new_zeros(())
    targets = targets.masked_fill(~valid[:, None], 0)
    for flow in flows:
        known = resize(valid[:, None].float(), flow)[:, 0] > 1 - 1e-4
        error = (flow.float() - resize(targets, flow)).square().sum(dim=1)
        # The root's gradient at 0 is infinite.
        error = error.clamp(min=1e-12).sqrt()
        total = total + (error * known).sum() / known.sum().clamp(min=1)
    return total
