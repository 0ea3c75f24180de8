"""YOLACT's feature pyramid (arXiv 1904.02689, section 4; yolact/NOTES.md §2).

Differences from Detectron2's FPN: the top-down path resizes bilinearly to the exact size of the finer
map (any input size works), the output convolutions are followed by a ReLU, and the extra levels are
strided convolutions on the coarsest of these outputs.

Shapes: image (B, 3, H, W); p{l} (B, C, h_l, w_l), finest level l = 3.
"""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.modeling.fusion import conv_relu


class BilinearFPN(Backbone):
    """Feature pyramid with bilinear top-down path.

    Args:
        bottom_up: network that computes ``in_features``.
        in_features: features of ``bottom_up``, finest first; their strides must double.
        out_channels: channels of every level.
        num_extra_levels: levels added by stride-2 convolutions on the coarsest.
    """

    def __init__(
        self,
        bottom_up: Backbone,
        in_features: Sequence[str],
        *,
        out_channels: int = 256,
        num_extra_levels: int = 2,
    ) -> None:
        super().__init__()
        self.bottom_up = bottom_up
        self.in_features = list(in_features)
        shapes = bottom_up.output_shape()
        missing = [name for name in in_features if name not in shapes]
        if missing:
            raise ValueError(
                f"The bottom-up net has no feature {missing}, only {sorted(shapes)}: set "
                "MODEL.YOLACT.IN_FEATURES and the bottom-up net's OUT_FEATURES to agree."
            )
        # log2(stride) names the level, as in Detectron2.
        self.levels = [shapes[name].stride.bit_length() - 1 for name in in_features]
        for level, name in zip(self.levels, in_features, strict=True):
            self.add_module(f"lateral{level}", nn.Conv2d(shapes[name].channels, out_channels, 1))
            self.add_module(f"output{level}", nn.Conv2d(out_channels, out_channels, 3, padding=1))
        top = self.levels[-1]
        self.extra_levels = list(range(top + 1, top + 1 + num_extra_levels))
        for level in self.extra_levels:
            conv = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
            self.add_module(f"downsample{level}", conv)
        self._out_features = [f"p{level}" for level in self.levels + self.extra_levels]
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        self._out_feature_strides = {
            f"p{level}": 2**level for level in self.levels + self.extra_levels
        }
        for module in self.children():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) → {"p3": (B, C, h, w), ...}, finest first."""
        return self.outputs(self.merge(self.laterals(self.bottom_up(images))))

    def lateral(self, level: int, feature: Tensor) -> Tensor:
        """A feature of the bottom-up net → (B, C, h_l, w_l)."""
        return getattr(self, f"lateral{level}")(feature)

    def laterals(self, features: dict[str, Tensor]) -> dict[int, Tensor]:
        """Features of the bottom-up net → {level: its lateral (B, C, h_l, w_l)}."""
        named = zip(self.levels, self.in_features, strict=True)
        return {level: self.lateral(level, features[name]) for level, name in named}

    def merge(self, laterals: dict[int, Tensor]) -> dict[int, Tensor]:
        """Laterals → {level: top-down sum, of the same shape}, before the output convolutions."""
        sums: dict[int, Tensor] = {}
        previous: Tensor | None = None
        for level in sorted(laterals, reverse=True):
            x = laterals[level]
            if previous is not None:
                x = x + resize(previous, x)
            sums[level] = previous = x
        return sums

    def output(self, level: int, x: Tensor) -> Tensor:
        """The sum of a level → its output, both (B, C, h_l, w_l)."""
        return conv_relu(getattr(self, f"output{level}"), x)

    def outputs(self, sums: dict[int, Tensor]) -> dict[str, Tensor]:
        """Top-down sums → the pyramid, finest first."""
        outputs = {f"p{level}": self.output(level, sums[level]) for level in self.levels}
        x = outputs[f"p{self.levels[-1]}"]
        for level in self.extra_levels:
            x = outputs[f"p{level}"] = getattr(self, f"downsample{level}")(x)
        return outputs


def resize(x: Tensor, like: Tensor) -> Tensor:
    """(B, C, h, w) → the size of ``like``: bilinear, half-pixel centres."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


@BACKBONE_REGISTRY.register()
def build_yolact_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> BilinearFPN:
    """:class:`BilinearFPN` over the registered backbone ``cfg.MODEL.YOLACT.BOTTOM_UP``."""
    bottom_up = BACKBONE_REGISTRY.get(cfg.MODEL.YOLACT.BOTTOM_UP)(cfg, input_shape)
    return BilinearFPN(
        bottom_up,
        cfg.MODEL.YOLACT.IN_FEATURES,
        out_channels=cfg.MODEL.YOLACT.FPN_CHANNELS,
        num_extra_levels=cfg.MODEL.YOLACT.NUM_EXTRA_LEVELS,
    )
