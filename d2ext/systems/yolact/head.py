"""YOLACT's heads (arXiv 1904.02689, sections 3 and 5; arXiv 1912.06218 for the mask re-scoring).

Shapes: B images, A priors over all levels, C thing classes, k prototypes, h×w prototype cells,
h3×w3 cells of the finest pyramid level, N masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.modeling.fusion import conv_relu


class YOLACTPredictions(NamedTuple):
    """Predictions for a batch."""

    offsets: Tensor
    """(B, A, 4) box offsets for ``codecs.prior_boxes.decode_boxes``."""
    logits: Tensor
    """(B, A, C + 1); index 0 is the background."""
    coefficients: Tensor
    """(B, A, k) in -1..1."""
    prototypes: Tensor
    """(B, h, w, k), not negative."""
    semantic_logits: Tensor | None
    """(B, C, h3, w3); None in inference."""
    feature_sizes: tuple[tuple[int, int], ...]
    """(rows, columns) of each level, finest first."""


def _conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def _xavier_init(module: nn.Module) -> None:
    """Initial weights of all convolutions outside the bottom-up net (yolact/NOTES.md §8)."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


class PrototypeNet(nn.Module):
    """Finest pyramid level → prototypes at twice its resolution."""

    def __init__(self, in_channels: int, channels: int, num_prototypes: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, channels)
        self.conv2 = _conv3x3(channels, channels)
        self.conv3 = _conv3x3(channels, channels)
        self.conv4 = _conv3x3(channels, channels)
        self.output = nn.Conv2d(channels, num_prototypes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, h3, w3) → (B, h, w, k) with h = 2·h3, w = 2·w3."""
        for conv in (self.conv1, self.conv2, self.conv3):
            x = conv_relu(conv, x)
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        x = conv_relu(self.conv4, x)
        return conv_relu(self.output, x).permute(0, 2, 3, 1)


class PredictionHead(nn.Module):
    """Boxes, classes and mask coefficients of one level's priors; the same weights for all levels."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        num_prototypes: int,
        priors_per_cell: int,
    ) -> None:
        super().__init__()
        self.tower = _conv3x3(in_channels, channels)
        self.offsets = _conv3x3(channels, priors_per_cell * 4)
        self.logits = _conv3x3(channels, priors_per_cell * (num_classes + 1))
        self.coefficients = _conv3x3(channels, priors_per_cell * num_prototypes)
        self.num_classes = num_classes
        self.num_prototypes = num_prototypes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, c, h, w) → offsets (B, a, 4), logits (B, a, C+1), coefficients (B, a, k).

        A cell's priors vary fastest, then column and row.
        """
        x = conv_relu(self.tower, x)

        def flatten(y: Tensor, values: int) -> Tensor:
            return y.permute(0, 2, 3, 1).reshape(y.shape[0], -1, values)

        return (
            flatten(self.offsets(x), 4),
            flatten(self.logits(x), self.num_classes + 1),
            flatten(self.coefficients(x), self.num_prototypes).tanh(),
        )


class MaskScorer(nn.Module):
    """YOLACT++'s mask re-scoring: soft masks → their IoU with the targets, for each class.

    The strided convolutions have no padding, and the last layer has a ReLU too, so that an estimate
    can be exactly 0 (yolact/NOTES.md §2 and §11).
    """

    CHANNELS = (8, 16, 32, 64, 128)
    # Smallest side of which five unpadded, strided convolutions leave at least one cell.
    MIN_SIDE = 63

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        inputs = (1, *self.CHANNELS[:-1])
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride=2) for i, o in zip(inputs, self.CHANNELS, strict=True)
        )
        self.output = nn.Conv2d(self.CHANNELS[-1], num_classes, 1)
        _xavier_init(self)

    def forward(self, masks: Tensor) -> Tensor:
        """(N, h, w) probabilities, cropped → (N, C), not negative."""
        x = masks[:, None]
        for conv in self.convs:
            x = F.relu(conv(x))
        return F.relu(self.output(x)).amax(dim=(2, 3))


class YOLACTHead(nn.Module):
    """All heads over the pyramid.

    Args:
        input_shape: the pyramid's levels, finest first.
        num_classes: C.
        num_prototypes: k.
        channels: of the hidden layers.
        priors_per_cell: prior boxes at each cell.
        semantic: also build the semantic head, which is used in training only.
    """

    def __init__(
        self,
        input_shape: Sequence[ShapeSpec],
        *,
        num_classes: int,
        num_prototypes: int,
        channels: int,
        priors_per_cell: int,
        semantic: bool,
    ) -> None:
        super().__init__()
        in_channels = input_shape[0].channels
        self.prototypes = PrototypeNet(in_channels, channels, num_prototypes)
        self.predictor = PredictionHead(
            in_channels, channels, num_classes, num_prototypes, priors_per_cell
        )
        self.semantic = nn.Conv2d(in_channels, num_classes, 1) if semantic else None
        _xavier_init(self)

    def forward(self, features: Sequence[Tensor]) -> YOLACTPredictions:
        """Levels (B, c, h_l, w_l), finest first → :class:`YOLACTPredictions`."""
        levels = [self.predictor(x) for x in features]
        offsets, logits, coefficients = (
            torch.cat(part, dim=1) for part in zip(*levels, strict=True)
        )
        semantic = None
        if self.training and self.semantic is not None:
            semantic = self.semantic(features[0])
        return YOLACTPredictions(
            offsets,
            logits,
            coefficients,
            self.prototypes(features[0]),
            semantic,
            tuple((x.shape[2], x.shape[3]) for x in features),
        )
