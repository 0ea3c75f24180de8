"""CornerNet-Saccade's attention maps, their targets and losses (arXiv 1904.08900, section 3).

Shapes: B images, C classes, H×W cells of the corner maps, N object slots of an image; L attention
maps of 2^(L-1), ..., 2, 1 times the corner maps' stride, coarsest first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2ext.codecs.corners import CornerTargets, PointMaps, encode_corners
from d2ext.modeling.cornernet_hourglass import CornerNetHourglass
from d2ext.modeling.heatmap_losses import penalty_reduced_focal_loss
from d2ext.systems.cornernet.head import (
    PRIOR_LOGIT,
    CornerNetHead,
    CornerNetwork,
    Prediction,
)
from d2ext.systems.cornernet.losses import CornerNetCriterion


class SaccadePredictions(NamedTuple):
    """What the network says of a batch, from one of its stacks."""

    top_left: PointMaps
    bottom_right: PointMaps
    attention: tuple[Tensor, ...]
    """L maps (B, 1, h, w) of logits, coarsest first."""


class SaccadeTargets(NamedTuple):
    """Targets of a batch."""

    corners: CornerTargets
    top_left_valid: Tensor
    """(B, C, H, W) bool; False around corners of objects that are neither positive nor negative."""
    bottom_right_valid: Tensor
    attention: list[Tensor]
    """L maps (B, 1, h, w) float32, 1 at the objects' centres and 0 elsewhere."""


class SaccadeHead(CornerNetHead):
    """CornerNet's head and attention maps on every level of every stack.

    Args:
        level_channels: of the levels, coarsest first.
        corner_net: see :class:`CornerNetHead`.
    """

    def __init__(self, *, level_channels: Sequence[int], **corner_net: Any) -> None:
        super().__init__(**corner_net)
        # Their kernels are 3×3 whatever those of the corners are, as published.
        self.attention = nn.ModuleList(
            nn.ModuleList(
                Prediction(channels, corner_net["hidden"], 1, 3) for channels in level_channels
            )
            for _ in range(self.num_stacks)
        )
        for level in (level for stack in self.attention for level in stack):
            nn.init.constant_(level.output.bias, PRIOR_LOGIT)


class SaccadeNetwork(CornerNetwork):
    """Backbone with ``out_levels`` and head: images → predictions of the last stack."""

    def __init__(self, backbone: CornerNetHourglass, head: SaccadeHead) -> None:
        super().__init__(backbone, head)
        strides = [backbone.stride * 2**level for level in reversed(range(backbone.depth))]
        self.level_names = [[f"{name}_s{stride}" for stride in strides] for name in self.features]

    def predictions(self, images: Tensor, all_stacks: bool) -> list[tuple[Any, ...]]:
        features = self.backbone(images)
        corners = self.head([features[name] for name in self.features], all_stacks)
        first = self.head.num_stacks - len(corners)
        return [
            SaccadePredictions(
                maps[0],
                maps[1],
                tuple(
                    predict(features[name])
                    for predict, name in zip(
                        self.head.attention[first + i], self.level_names[first + i], strict=True
                    )
                ),
            )
            for i, maps in enumerate(corners)
        ]


def encode_saccade(
    boxes: Sequence[Tensor],
    classes: Sequence[Tensor],
    shares: Sequence[Tensor],
    *,
    num_classes: int,
    input_size: tuple[int, int],
    output_size: tuple[int, int],
    attention_ranges: Sequence[Sequence[float]],
    min_overlap: float = 0.5,
    min_side: int = 16,
    min_share: float = 0.5,
) -> SaccadeTargets:
    """Ground truth of a batch → targets.

    An object whose longer side is below ``min_side`` (in whole pixels between its cut coordinates, as
    published), or of which not more than ``min_share`` is visible, is no positive: its Gaussians are
    left out of the loss. Attention looks for every object, positive or not.

    Args:
        boxes: for each image (n, 4) XYXY in pixels of the input, cut to its content.
        classes: for each image (n,) int64.
        shares: for each image (n,), how much of the object's box is inside.
        input_size, output_size: (height, width) of the input in pixels, of the corner maps in cells.
        attention_ranges: for each level, coarsest first, the smallest and largest longer side of its
            objects in pixels, both included.
        min_overlap: see :func:`encode_corners`.
    """
    positive_boxes, ignored_boxes = [], []
    for box, share in zip(boxes, shares, strict=True):
        sides = box[:, 2:].trunc() - box[:, :2].trunc()
        positive = ((sides.amax(dim=1) >= min_side) & (share > min_share))[:, None]
        # A box without area leaves its slot empty.
        positive_boxes.append(box * positive)
        ignored_boxes.append(box * ~positive)

    def encode(chosen: list[Tensor]) -> CornerTargets:
        return encode_corners(
            chosen,
            classes,
            num_classes=num_classes,
            input_size=input_size,
            output_size=output_size,
            min_overlap=min_overlap,
        )

    ignored = encode(ignored_boxes)
    attention = []
    levels = len(attention_ranges)
    for level, (low, high) in enumerate(attention_ranges):
        factor = 2 ** (levels - 1 - level)
        size = tuple(-(-cells // factor) for cells in output_size)
        stride = factor * -(-input_size[0] // output_size[0])
        attention.append(
            torch.stack([_attention_target(box, size, stride, low, high) for box in boxes])
        )
    return SaccadeTargets(
        encode(positive_boxes),
        ignored.top_left.heat == 0,
        ignored.bottom_right.heat == 0,
        attention,
    )


def _attention_target(
    boxes: Tensor, size: tuple[int, ...], stride: int, low: float, high: float
) -> Tensor:
    """(1, h, w): 1 at the centre of each box (n, 4) whose longer side lies in [low, high]."""
    target = boxes.new_zeros((1, *size))
    sides = boxes[:, 2:] - boxes[:, :2]
    longer = sides.amax(dim=1)
    chosen = ((longer >= low) & (longer <= high) & (sides > 0).all(dim=1)).float()
    cells = ((boxes[:, :2] + boxes[:, 2:]) / 2 / stride).long()
    index = cells[:, 1].clamp(0, size[0] - 1) * size[1] + cells[:, 0].clamp(0, size[1] - 1)
    target.view(-1).scatter_reduce_(0, index, chosen, "amax")
    return target


class SaccadeCriterion(CornerNetCriterion):
    """CornerNet's losses with left-out regions, and those of the attention maps."""

    def attention_terms(
        self, predictions: SaccadePredictions, targets: SaccadeTargets
    ) -> list[Tensor]:
        """Unweighted losses of one stack's attention maps."""
        return [
            penalty_reduced_focal_loss(logits, target)
            for logits, target in zip(predictions.attention, targets.attention, strict=True)
        ]

    def saccade_terms(
        self, predictions: SaccadePredictions, targets: SaccadeTargets
    ) -> dict[str, list[Tensor]]:
        """Unweighted losses of one stack."""
        terms = self.terms(predictions[:2], targets.corners)
        valid = (targets.top_left_valid, targets.bottom_right_valid)
        pairs = self.points(predictions[:2], targets.corners)
        terms["heat"] = [
            penalty_reduced_focal_loss(maps.heat, target.heat, mask)
            for (maps, target), mask in zip(pairs, valid, strict=True)
        ]
        terms["attention"] = self.attention_terms(predictions, targets)
        return terms

    def forward(self, stacks: Sequence[Any], targets: Any) -> dict[str, Tensor]:
        """CornerNet's four losses and ``loss_attention``.

        Published quirk: the attention losses are divided by the number of stacks twice.
        """
        terms = [self.saccade_terms(predictions, targets) for predictions in stacks]
        weights = {**self.weights, "attention": 1 / len(stacks)}
        return {
            f"loss_{name}": sum(sum(stack[name]) for stack in terms) * (weight / len(stacks))
            for name, weight in weights.items()
        }
