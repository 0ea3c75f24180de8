"""UPSNet's semantic head (arXiv 1901.03784, section 3.2), and the network's predictions.

Shapes: B images, K semantic classes (stuff first, then things), h×w cells of stride 4, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.layers.deform_conv import DeformConv
from d2ext.modeling.region_slots import Slots


class SemanticPredictions(NamedTuple):
    """Predictions of the semantic head for a batch."""

    features: Tensor
    """(B, L·C, h, w): the levels' features, one after the other."""
    score: Tensor
    """(B, K, h, w) logits."""


class UPSNetPredictions(NamedTuple):
    """Predictions for a batch; those of the heads on regions in inference alone."""

    features: dict[str, Tensor]
    """The pyramid."""
    logits: list[Tensor]
    deltas: list[Tensor]
    """See :meth:`SlotRPN.predict`."""
    semantic: SemanticPredictions
    detections: Slots | None = None
    candidates: Slots | None = None
    """Of the panoptic head."""


@SEM_SEG_HEADS_REGISTRY.register()
class UPSNetSemanticHead(nn.Module):
    """A stack of deformable convolutions with ReLU, shared by the pyramid's levels; its results are
    resized to the finest level (bilinear), concatenated and classified by a 1x1 convolution."""

    @configurable
    def __init__(
        self,
        input_shape: dict[str, ShapeSpec],
        *,
        in_features: Sequence[str],
        channels: Sequence[int],
        num_classes: int,
        deformable: bool = True,
        norm: str = "",
    ) -> None:
        """Args:
        input_shape: of the pyramid.
        in_features: its levels that are used, finest first, each half the size of the one before.
        channels: output channels of the shared convolutions.
        num_classes: K.
        deformable: deformable convolutions (v1), or plain ones.
        norm: normalisation after each convolution; published: none.
        """
        super().__init__()
        strides = [input_shape[name].stride for name in in_features]
        if any(b != 2 * a for a, b in pairwise(strides)):
            raise ValueError(f"The strides of {list(in_features)} must double, not be {strides}.")
        self.in_features = list(in_features)
        self.stride = strides[0]
        layers: list[nn.Module] = []
        width = input_shape[in_features[0]].channels
        for out in channels:
            layer_norm = get_norm(norm, out)
            if deformable:
                layers.append(DeformConv(width, out, bias=not norm, norm=layer_norm))
            else:
                layers.append(Conv2d(width, out, 3, padding=1, bias=not norm, norm=layer_norm))
                nn.init.kaiming_normal_(layers[-1].weight, mode="fan_out", nonlinearity="relu")
            width = out
        self.layers = nn.ModuleList(layers)
        self.score = nn.Conv2d(width * len(in_features), num_classes, 1)
        nn.init.normal_(self.score.weight, std=0.01)
        nn.init.zeros_(self.score.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict[str, Any]:
        head = cfg.MODEL.UPSNET.SEMANTIC_HEAD
        return {
            "input_shape": input_shape,
            "in_features": cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES,
            "channels": head.CHANNELS,
            "num_classes": cfg.MODEL.UPSNET.NUM_STUFF + cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "deformable": head.DEFORMABLE,
            "norm": head.NORM,
        }

    def level_features(self, feature: Tensor) -> Tensor:
        """The shared stack on one level."""
        for layer in self.layers:
            feature = F.relu(layer(feature))
        return feature

    def forward(self, pyramid: dict[str, Tensor]) -> SemanticPredictions:
        """Pyramid, name → (B, C, h/2^i, w/2^i) → :class:`SemanticPredictions`."""
        levels = [self.level_features(pyramid[name]) for name in self.in_features]
        levels = [levels[0]] + [
            F.interpolate(level, scale_factor=2.0**i, mode="bilinear", align_corners=False)
            for i, level in enumerate(levels[1:], start=1)
        ]
        features = torch.cat(levels, dim=1)
        return SemanticPredictions(features, self.score(features))
