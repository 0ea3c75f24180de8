"""MobileNetV2 (arXiv 1801.04381) as a backbone: torchvision's network without its classifier.

Shapes: input (B, 3, H, W); output ``group{g}`` (B, C_g, H/s, W/s), g as in the paper's table 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import MobileNetV2 as TorchvisionMobileNetV2

from d2ext.config import CONFIG_REGISTRY

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


@CONFIG_REGISTRY.register()
def add_mobilenet_config(cfg: CfgNode) -> None:
    """Add the keys of :func:`build_mobilenetv2_backbone` to ``cfg``, in place."""
    cfg.MODEL.MOBILENET = CfgNode()
    # Norm after every convolution.
    cfg.MODEL.MOBILENET.NORM = "BN"
    # Groups to return. YolactEdge's: strides 8, 16, 32 and 32, 64, 160 channels.
    cfg.MODEL.MOBILENET.OUT_FEATURES = ["group3", "group4", "group6"]


@BACKBONE_REGISTRY.register()
def build_mobilenetv2_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MobileNetV2:
    """:class:`MobileNetV2` from ``cfg.MODEL.MOBILENET``."""
    return MobileNetV2(norm=cfg.MODEL.MOBILENET.NORM, out_features=cfg.MODEL.MOBILENET.OUT_FEATURES)
