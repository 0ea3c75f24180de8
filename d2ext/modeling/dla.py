"""DLA-34 (deep layer aggregation, arXiv 1707.06484) with deformable up-sampling (arXiv 1904.07850).

Shapes: input (B, 3, H, W), H and W multiples of 32; ``level{l}`` (B, C_l, H/2^l, W/2^l) for l = 0..5;
output ``dla_up`` (B, 64, H/4, W/4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.config import CONFIG_REGISTRY
from d2ext.modeling.fusion import conv_add_relu, conv_norm, conv_relu
from d2ext.modeling.upsampling import DeformConvNormReLU, upsampling

# DLA-34, table 1 of arXiv 1707.06484: channels of the levels, and levels of the trees from level 2 on.
_CHANNELS = (16, 32, 64, 128, 256, 512)
_TREE_LEVELS = (1, 2, 2, 1)


class DLABlock(nn.Module):
    """Two 3x3 convolutions and a given shortcut."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, norm: str) -> None:
        super().__init__()
        self.conv1 = conv_norm(in_channels, out_channels, 3, stride=stride, norm=norm)
        self.conv2 = conv_norm(out_channels, out_channels, 3, norm=norm)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return conv_add_relu(self.conv2, conv_relu(self.conv1, x), shortcut)


class DLATree(nn.Module):
    """One aggregation node: two blocks and the root that joins them with the node's children.

    Args:
        stride: of the first block.
        extra_channels: total width of the children that :meth:`forward` gets.
        keep_input: the down-sampled input is a child of the root.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int,
        norm: str,
        extra_channels: int = 0,
        keep_input: bool = False,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.keep_input = keep_input
        self.block1 = DLABlock(in_channels, out_channels, stride=stride, norm=norm)
        self.block2 = DLABlock(out_channels, out_channels, stride=1, norm=norm)
        self.project = (
            None
            if in_channels == out_channels
            else conv_norm(in_channels, out_channels, 1, norm=norm)
        )
        collected = extra_channels + (in_channels if keep_input else 0)
        self.root = conv_norm(2 * out_channels + collected, out_channels, 1, norm=norm)

    def forward(self, x: Tensor, children: Sequence[Tensor] = ()) -> Tensor:
        """(B, in, h, w) → (B, out, h/stride, w/stride)."""
        bottom = F.max_pool2d(x, self.stride) if self.stride > 1 else x
        shortcut = bottom if self.project is None else self.project(bottom)
        if self.keep_input:
            children = [*children, bottom]
        first = self.block1(x, shortcut)
        second = self.block2(first, first)
        return conv_relu(self.root, torch.cat([second, first, *children], dim=1))


class DLATwoLevelTree(nn.Module):
    """Two trees in a row; the second's root also joins the down-sampled input and the first's output."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: int, norm: str) -> None:
        super().__init__()
        self.stride = stride
        self.tree1 = DLATree(in_channels, out_channels, stride=stride, norm=norm)
        self.tree2 = DLATree(
            out_channels,
            out_channels,
            stride=1,
            norm=norm,
            extra_channels=in_channels + out_channels,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, h, w) → (B, out, h/stride, w/stride)."""
        first = self.tree1(x)
        return self.tree2(first, [F.max_pool2d(x, self.stride), first])


class DLA34(Backbone):
    """The bottom-up net.

    Args:
        in_channels: of the image.
        norm: after every convolution, a name that Detectron2's ``get_norm`` knows.
        out_features: of ``level0`` to ``level5``.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        norm: str = "BN",
        out_features: Sequence[str] = ("level2", "level3", "level4", "level5"),
    ) -> None:
        super().__init__()
        self.stem = conv_norm(in_channels, _CHANNELS[0], 7, norm=norm)
        self.level0 = conv_norm(_CHANNELS[0], _CHANNELS[0], 3, norm=norm)
        self.level1 = conv_norm(_CHANNELS[0], _CHANNELS[1], 3, stride=2, norm=norm)
        for level, depth in enumerate(_TREE_LEVELS, start=2):
            widths = _CHANNELS[level - 1 : level + 1]
            tree: nn.Module
            if depth == 1:
                # As published, from level 3 on the root joins the down-sampled input.
                tree = DLATree(*widths, stride=2, norm=norm, keep_input=level > 2)
            else:
                tree = DLATwoLevelTree(*widths, stride=2, norm=norm)
            self.add_module(f"level{level}", tree)
        self._out_features = list(out_features)
        self._out_feature_channels = {f"level{i}": c for i, c in enumerate(_CHANNELS)}
        self._out_feature_strides = {f"level{i}": 2**i for i in range(len(_CHANNELS))}
        unknown = set(out_features) - set(self._out_feature_strides)
        if unknown:
            raise ValueError(f"DLA-34 has level0 to level5, not {sorted(unknown)}.")

    @property
    def size_divisibility(self) -> int:
        """Max pooling and strided convolution give the same size only for even maps."""
        return 32

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) → the levels named in ``out_features``."""
        x = conv_relu(self.stem, x)
        outputs = {}
        for level in range(len(_CHANNELS)):
            module = getattr(self, f"level{level}")
            x = conv_relu(module, x) if level < 2 else module(x)
            if f"level{level}" in self._out_features:
                outputs[f"level{level}"] = x
        return outputs


class _ConvNormReLU(nn.Module):
    """k×k convolution, norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, norm: str) -> None:
        super().__init__()
        self.conv = conv_norm(in_channels, out_channels, kernel, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return conv_relu(self.conv, x)


class IterativeAggregation(nn.Module):
    """Fuses maps of falling resolution one by one with the result so far (IDA).

    Each map after the first is projected to ``out_channels``, enlarged to the first map's resolution,
    joined with the result so far and convolved.

    Args:
        in_channels: of each map, the finest first.
        factors: enlargement of each map after the first.
        out_channels: of all results.
        deform: maps are joined by a sum, and all convolutions are 3x3 and deformable (CenterNet); else
            they are concatenated, projections are 1x1 and nodes 3x3 (arXiv 1707.06484).
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        factors: Sequence[int],
        out_channels: int,
        *,
        norm: str,
        deform: bool = True,
    ) -> None:
        super().__init__()
        self.deform = deform
        out = out_channels
        projections = [
            DeformConvNormReLU(c, out, norm=norm) if deform else _ConvNormReLU(c, out, 1, norm=norm)
            for c in in_channels[1:]
        ]
        nodes = [
            DeformConvNormReLU(out, out, norm=norm)
            if deform
            else _ConvNormReLU(2 * out, out, 3, norm=norm)
            for _ in factors
        ]
        self.projections = nn.ModuleList(projections)
        self.ups = nn.ModuleList(upsampling(out, f, depthwise=True) for f in factors)
        self.nodes = nn.ModuleList(nodes)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """n maps → n - 1 results at the resolution of the first map, the last one fuses all."""
        results = []
        previous = maps[0]
        steps = zip(self.projections, self.ups, self.nodes, strict=True)
        for x, (project, up, node) in zip(maps[1:], steps, strict=True):
            x = up(project(x))
            previous = node(x + previous if self.deform else torch.cat([previous, x], dim=1))
            results.append(previous)
        return results


class DLAUp(Backbone):
    """DLA-34 and its up-sampling path to stride 4.

    Every level from the second deepest upwards is fused with the next deeper level and the results of
    the previous step. With ``deform`` the fused maps of strides 4, 8 and 16 are then fused once more.
    Published quirk: this last step leaves out the map of stride 32.

    Args:
        bottom_up: computes ``level2`` to ``level5``.
        norm: after every convolution.
        deform: the up-sampling of CenterNet's ``dla_34``; else of ``dlav0_34``, without the last step,
            see :class:`IterativeAggregation`.
    """

    _LEVELS = ("level2", "level3", "level4", "level5")

    def __init__(self, bottom_up: Backbone, *, norm: str = "BN", deform: bool = True) -> None:
        super().__init__()
        self.bottom_up = bottom_up
        shapes = bottom_up.output_shape()
        widths = [shapes[name].channels for name in self._LEVELS]
        # From the deepest pair upwards; a step's results have the width of its finest level.
        self.steps = nn.ModuleList()
        for start in range(len(widths) - 2, -1, -1):
            below = [widths[start + 1]] * (len(widths) - 1 - start)
            factors = [2] * len(below)
            inputs = [widths[start], *below]
            self.steps.append(
                IterativeAggregation(inputs, factors, widths[start], norm=norm, deform=deform)
            )
        self.fusion: nn.Module | None = None
        if deform:
            self.fusion = IterativeAggregation(widths[:3], (2, 4), widths[0], norm=norm)
        self._out_features = ["dla_up"]
        self._out_feature_channels = {"dla_up": widths[0]}
        self._out_feature_strides = {"dla_up": shapes[self._LEVELS[0]].stride}

    @property
    def size_divisibility(self) -> int:
        return self.bottom_up.size_divisibility

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) → {"dla_up": (B, 64, H/4, W/4)}."""
        features = self.bottom_up(x)
        levels = [features[name] for name in self._LEVELS]
        below = [levels[-1]]
        fused = []
        for step, level in zip(self.steps, reversed(levels[:-1]), strict=True):
            results = step([level, *below])
            fused.append(results[-1])
            below = [level, *results]
        return {"dla_up": fused[-1] if self.fusion is None else self.fusion(fused[::-1])[-1]}


@CONFIG_REGISTRY.register()
def add_dla_config(cfg: CfgNode) -> None:
    """Add the keys of :func:`build_dla_up_backbone` to ``cfg``, in place."""
    cfg.MODEL.DLA = CfgNode()
    # Norm after every convolution.
    cfg.MODEL.DLA.NORM = "BN"
    # Deformable up-sampling (published: dla_34), or the plain one of the DLA paper (dlav0_34).
    cfg.MODEL.DLA.DEFORM = True


@BACKBONE_REGISTRY.register()
def build_dla_up_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> DLAUp:
    """DLA-34 with up-sampling, by ``cfg.MODEL.DLA``."""
    norm, deform = cfg.MODEL.DLA.NORM, cfg.MODEL.DLA.DEFORM
    return DLAUp(DLA34(in_channels=input_shape.channels, norm=norm), norm=norm, deform=deform)
