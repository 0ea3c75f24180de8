"""CenterNet's heads (arXiv 1904.07850, sections 3 and 4).

Shapes: B images, h×w cells of the output, C classes, J joints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from d2ext.modeling.fusion import conv_relu

Predictions = dict[str, Tensor]
"""Raw maps (B, channels, h, w) of one feature:

========================  =========  ===============================================================
``heatmap``               C          logits of the centres
``size``                  2 or 2C    width, height of the box in cells (for each class)
``offset``                2          x, y of the centre in its cell
``joints``                2J         x, y of each joint from the centre's cell, in cells
``joint_heatmap``         J          logits of the joints
``joint_offset``          2          x, y of a joint in its cell
========================  =========  ===============================================================

The last three only with poses; all but ``heatmap``, ``size`` and ``joints`` may be left out.
"""

# Initial probability 0.1, so that the many negatives do not dominate the first steps.
_HEATMAP_BIAS = -2.19


def head_channels(
    num_classes: int,
    *,
    class_specific_size: bool = False,
    num_joints: int = 0,
    offset: bool = True,
    joint_heatmap: bool = True,
    joint_offset: bool = True,
) -> dict[str, int]:
    """Channels of each map of :data:`Predictions`; the last three say which there are."""
    channels = {
        "heatmap": num_classes,
        "size": 2 * num_classes if class_specific_size else 2,
    }
    if offset:
        channels["offset"] = 2
    if num_joints > 0:
        channels["joints"] = 2 * num_joints
        if joint_heatmap:
            channels["joint_heatmap"] = num_joints
        if joint_heatmap and joint_offset:
            channels["joint_offset"] = 2
    return channels


class _Branch(nn.Module):
    """3x3 convolution, ReLU, 1x1 convolution."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, hidden, 3, padding=1)
        self.output = nn.Conv2d(hidden, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(conv_relu(self.conv, x))


class CenterNetHead(nn.Module):
    """A branch for each map, for each feature.

    Args:
        input_shapes: of the features, in order; all of one stride.
        channels: see :func:`head_channels`.
        hidden: channels of the hidden layers.
        init_std: standard deviation of the initial weights of all branches except the heat maps'; 0:
            PyTorch's initial weights.
    """

    def __init__(
        self,
        input_shapes: Sequence[ShapeSpec],
        *,
        channels: Mapping[str, int],
        hidden: int,
        init_std: float = 0.0,
    ) -> None:
        super().__init__()
        strides = {shape.stride for shape in input_shapes}
        if len(strides) != 1:
            raise ValueError(
                f"The features in MODEL.CENTERNET.IN_FEATURES need one stride, not {sorted(strides)}."
            )
        self.stride = int(strides.pop())
        self.stacks = nn.ModuleList(
            nn.ModuleDict({k: _Branch(shape.channels, hidden, c) for k, c in channels.items()})
            for shape in input_shapes
        )
        for stack in self.stacks:
            for name, branch in stack.items():
                self._initialize(name, branch, init_std)

    @staticmethod
    def _initialize(name: str, branch: _Branch, init_std: float) -> None:
        if name.endswith("heatmap"):
            nn.init.constant_(branch.output.bias, _HEATMAP_BIAS)
            return
        nn.init.zeros_(branch.output.bias)
        if init_std > 0:
            nn.init.normal_(branch.conv.weight, std=init_std)
            nn.init.normal_(branch.output.weight, std=init_std)
            nn.init.zeros_(branch.conv.bias)

    def forward(self, features: Sequence[Tensor]) -> Any:
        """Features → in training a list with the maps of each, otherwise the maps of the last one."""

        def predict(x: Tensor, stack: nn.ModuleDict) -> Predictions:
            return {name: branch(x) for name, branch in stack.items()}

        if not self.training:
            return predict(features[-1], self.stacks[-1])
        return [predict(x, stack) for x, stack in zip(features, self.stacks, strict=True)]
