"""MobileNetV2 (arXiv 1801.04381; torchvision's network) and MobileNetV1 (arXiv 1704.04861), both
without their classifiers, as backbones.

Shapes: input (B, 3, H, W). Output of V2: ``group{g}`` (B, C_g, H/s, W/s), g as in the paper's table 2;
of V1: ``stage1``, ``stage2``, ``stage3`` (B, C, H/s, W/s) with s = 8, 16, 32, rounded up.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import MobileNetV2 as TorchvisionMobileNetV2

from d2ext.config import CONFIG_REGISTRY
from d2ext.modeling.fusion import conv_norm

# Group -> (blocks, channels, stride of its output), at width 1. Group 0 is the stem; the two groups
# after these (320 and 1280 channels) serve the classifier.
GROUPS = {
    0: (1, 32, 2),
    1: (1, 16, 2),
    2: (2, 24, 4),
    3: (3, 32, 8),
    4: (4, 64, 16),
    5: (3, 96, 16),
    6: (3, 160, 32),
}

# MobileNetV1: the stem's channels and each stage's blocks (channels, stride), at width 1.
V1_STEM = 32
V1_STAGES = (
    ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1)),
    ((512, 2), *((512, 1),) * 5),
    ((1024, 2), (1024, 1)),
)
# Slope of its activations below zero, as in the published RetinaFace (retinaface/NOTES.md).
_SLOPE = 0.1


class MobileNetV2(Backbone):
    """MobileNetV2 of width 1 up to its group 6.

    Args:
        norm: norm after every convolution, a name that Detectron2's ``get_norm`` knows.
        out_features: which of ``group0``..``group6`` to return.
    """

    def __init__(self, *, norm: str = "BN", out_features: Sequence[str] = ("group3",)) -> None:
        super().__init__()
        names = [f"group{g}" for g in GROUPS]
        unknown = set(out_features) - set(names)
        if unknown:
            raise ValueError(f"MobileNetV2 has no feature {sorted(unknown)}: {names}.")
        layers = TorchvisionMobileNetV2(norm_layer=lambda c: get_norm(norm, c)).features
        first = 0
        for name, (blocks, _, _) in zip(names, GROUPS.values(), strict=True):
            self.add_module(name, nn.Sequential(*layers[first : first + blocks]))
            first += blocks
        self._out_features = list(out_features)
        self._out_feature_channels = {f"group{g}": c for g, (_, c, _) in GROUPS.items()}
        self._out_feature_strides = {f"group{g}": s for g, (_, _, s) in GROUPS.items()}

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) → the features named in ``out_features``."""
        outputs = {}
        for name, group in self.named_children():
            x = group(x)
            if name in self._out_features:
                outputs[name] = x
        return outputs

    def prepare_inference(self) -> None:
        """Fold batch norms into the convolutions before them."""
        for module in list(self.modules()):
            if not isinstance(module, nn.Sequential):
                continue
            children = list(module.named_children())
            for (name, conv), (norm_name, norm) in pairwise(children):
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    setattr(module, name, fuse_conv_bn_eval(conv, norm))
                    setattr(module, norm_name, nn.Identity())


class _Stem(nn.Module):
    """3x3 convolution of stride 2."""

    def __init__(self, out_channels: int, norm: str) -> None:
        super().__init__()
        self.conv = conv_norm(3, out_channels, 3, norm=norm, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu_(self.conv(x), _SLOPE)


class _SeparableConv(nn.Module):
    """3x3 convolution of each channel, then a 1x1 convolution of them all."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: str) -> None:
        super().__init__()
        self.depthwise = conv_norm(
            in_channels, in_channels, 3, norm=norm, stride=stride, groups=in_channels
        )
        self.pointwise = conv_norm(in_channels, out_channels, 1, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu_(self.depthwise(x), _SLOPE)
        return F.leaky_relu_(self.pointwise(x), _SLOPE)


class MobileNetV1(Backbone):
    """MobileNetV1 with leaky ReLUs, as the published RetinaFace has it.

    Args:
        width: factor on all channels; "MobileNet-0.25" is 0.25, with 8 channels in its stem.
        norm: norm after every convolution, a name that Detectron2's ``get_norm`` knows.
        out_features: which of ``stage1``, ``stage2``, ``stage3`` to return.
    """

    def __init__(
        self,
        *,
        width: float = 0.25,
        norm: str = "BN",
        out_features: Sequence[str] = ("stage1", "stage2", "stage3"),
    ) -> None:
        super().__init__()
        names = [f"stage{i + 1}" for i in range(len(V1_STAGES))]
        unknown = set(out_features) - set(names)
        if unknown:
            raise ValueError(f"MobileNetV1 has no feature {sorted(unknown)}: {names}.")
        channels, stride = max(round(V1_STEM * width), 1), 2
        blocks: list[nn.Module] = [_Stem(channels, norm)]
        self._out_features = list(out_features)
        self._out_feature_channels, self._out_feature_strides = {}, {}
        for name, stage in zip(names, V1_STAGES, strict=True):
            for full, step in stage:
                out_channels = max(round(full * width), 1)
                blocks.append(_SeparableConv(channels, out_channels, step, norm))
                channels, stride = out_channels, stride * step
            self.add_module(name, nn.Sequential(*blocks))
            self._out_feature_channels[name] = channels
            self._out_feature_strides[name] = stride
            blocks = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) → the features named in ``out_features``."""
        outputs = {}
        for name, stage in self.named_children():
            x = stage(x)
            if name in self._out_features:
                outputs[name] = x
        return outputs


@CONFIG_REGISTRY.register()
def add_mobilenet_config(cfg: CfgNode) -> None:
    """Add the keys of :func:`build_mobilenetv2_backbone` to ``cfg``, in place."""
    cfg.MODEL.MOBILENET = CfgNode()
    # Norm after every convolution.
    cfg.MODEL.MOBILENET.NORM = "BN"
    # Groups to return. YolactEdge's: strides 8, 16, 32 and 32, 64, 160 channels.
    cfg.MODEL.MOBILENET.OUT_FEATURES = ["group3", "group4", "group6"]


@CONFIG_REGISTRY.register()
def add_mobilenet_v1_config(cfg: CfgNode) -> None:
    """Add the keys of :func:`build_mobilenet_v1_backbone` to ``cfg``, in place."""
    cfg.MODEL.MOBILENET_V1 = CfgNode()
    # Factor on all channels; RetinaFace's.
    cfg.MODEL.MOBILENET_V1.WIDTH = 0.25
    # Norm after every convolution.
    cfg.MODEL.MOBILENET_V1.NORM = "BN"
    # Stages to return: strides 8, 16, 32 and, at width 0.25, 64, 128, 256 channels.
    cfg.MODEL.MOBILENET_V1.OUT_FEATURES = ["stage1", "stage2", "stage3"]


@BACKBONE_REGISTRY.register()
def build_mobilenetv2_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MobileNetV2:
    """:class:`MobileNetV2` from ``cfg.MODEL.MOBILENET``."""
    return MobileNetV2(norm=cfg.MODEL.MOBILENET.NORM, out_features=cfg.MODEL.MOBILENET.OUT_FEATURES)


@BACKBONE_REGISTRY.register()
def build_mobilenet_v1_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MobileNetV1:
    """:class:`MobileNetV1` from ``cfg.MODEL.MOBILENET_V1``."""
    mobilenet = cfg.MODEL.MOBILENET_V1
    return MobileNetV1(
        width=mobilenet.WIDTH, norm=mobilenet.NORM, out_features=mobilenet.OUT_FEATURES
    )
