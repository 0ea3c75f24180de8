"""FlowNet 2.0 (arXiv 1612.01925): FlowNetC, two FlowNetS that refine it, FlowNetSD beside them for small
motions, and a network that fuses both (vpsnet/NOTES.md, *Network*).

Convolutions run in the weights' dtype; flows, warping and differences of images in float32. Layers have
the published names; the number in a name is the level, with 1/2^level of the image's size.

Letters: B images, H×W pixels; flows of the single networks are (B, 2, H/4, W/4).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.layers import correlation, warp
from d2ext.modeling.flow.estimator import FLOW_REGISTRY, FlowEstimator

# Slope of the activations for negative inputs; and pixels of which the networks' outputs are multiples.
_NEGATIVE_SLOPE = 0.1
_FLOW_UNIT = 20.0
# FlowNetC's cost volume, cells of level 3: 21² displacements.
_MAX_DISPLACEMENT, _DISPLACEMENT_STRIDE = 20, 2
# Channels of the features that join at levels 5 to 2, and of what comes up from the level below.
_SKIP = {5: 512, 4: 512, 3: 256, 2: 128}
_UP = {5: 512, 4: 256, 3: 128, 2: 64}


def _leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, _NEGATIVE_SLOPE)


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2)


def _deconv(inputs: int, outputs: int, bias: bool = True) -> nn.ConvTranspose2d:
    """Twice the size."""
    return nn.ConvTranspose2d(inputs, outputs, 4, 2, padding=1, bias=bias)


def channel_norm(x: Tensor) -> Tensor:
    """(B, C, H, W) → (B, 1, H, W), Euclidean, in float32."""
    return torch.linalg.vector_norm(x.float(), dim=1, keepdim=True)


class _FlowNet(nn.Module):
    """Levels 4 to 6, and the way back up to level 2, which the three networks share.

    Args:
        upsample_bias: whether the layers that enlarge a flow have a bias.
        inter_convs: whether a convolution stands before each prediction.
    """

    def __init__(self, *, upsample_bias: bool, inter_convs: bool = False) -> None:
        super().__init__()
        self.conv4 = _conv(256, 512, stride=2)
        self.conv4_1 = _conv(512, 512)
        self.conv5 = _conv(512, 512, stride=2)
        self.conv5_1 = _conv(512, 512)
        self.conv6 = _conv(512, 1024, stride=2)
        self.conv6_1 = _conv(1024, 1024)
        self.inter_convs = inter_convs
        self.predict_flow6 = _conv(1024, 2)
        below = 1024
        for level, up in _UP.items():
            self.add_module(f"deconv{level}", _deconv(below, up))
            self.add_module(f"upsampled_flow{level + 1}_to_{level}", _deconv(2, 2, upsample_bias))
            below = _SKIP[level] + up + 2
            if inter_convs:
                self.add_module(f"inter_conv{level}", _conv(below, up))
            self.add_module(f"predict_flow{level}", _conv(up if inter_convs else below, 2))

    def contract(self, x: Tensor) -> list[Tensor]:
        """Features of level 3 → those of levels 4 to 6."""
        features = []
        for level in (4, 5, 6):
            x = _leaky_relu(getattr(self, f"conv{level}")(x))
            x = _leaky_relu(getattr(self, f"conv{level}_1")(x))
            features.append(x)
        return features

    def expand(self, features: Sequence[Tensor]) -> Tensor:
        """Features of levels 2 to 6 → flow of level 2."""
        x = features[-1]
        flow = self.predict_flow6(x)
        for level, skip in zip((5, 4, 3, 2), features[-2::-1], strict=True):
            enlarged = getattr(self, f"upsampled_flow{level + 1}_to_{level}")(flow)
            x = torch.cat([skip, _leaky_relu(getattr(self, f"deconv{level}")(x)), enlarged], dim=1)
            y = getattr(self, f"inter_conv{level}")(x) if self.inter_convs else x
            flow = getattr(self, f"predict_flow{level}")(y)
        return flow


class FlowNetC(_FlowNet):
    """Compares the features of both images by a cost volume."""

    def __init__(self) -> None:
        super().__init__(upsample_bias=True)
        self.conv1 = _conv(3, 64, 7, stride=2)
        self.conv2 = _conv(64, 128, 5, stride=2)
        self.conv3 = _conv(128, 256, 5, stride=2)
        self.conv_redir = _conv(256, 32, 1)
        displacements = (2 * (_MAX_DISPLACEMENT // _DISPLACEMENT_STRIDE) + 1) ** 2
        self.conv3_1 = _conv(32 + displacements, 256)

    def forward(self, images: Tensor) -> Tensor:
        """Both images (B, 6, H, W) → flow (B, 2, H/4, W/4) in units of 20 pixels."""
        x = _leaky_relu(self.conv1(torch.cat(images.chunk(2, dim=1))))
        level2 = _leaky_relu(self.conv2(x))
        current, reference = _leaky_relu(self.conv3(level2)).chunk(2)
        costs = correlation(current, reference, _MAX_DISPLACEMENT, _DISPLACEMENT_STRIDE)
        x = torch.cat([_leaky_relu(self.conv_redir(current)), _leaky_relu(costs)], dim=1)
        level3 = _leaky_relu(self.conv3_1(x))
        return self.expand([level2.chunk(2)[0], level3, *self.contract(level3)])


class FlowNetS(_FlowNet):
    """Sees the images side by side, and what it refines; ``in_channels`` of them."""

    def __init__(self, in_channels: int) -> None:
        super().__init__(upsample_bias=False)
        self.conv1 = _conv(in_channels, 64, 7, stride=2)
        self.conv2 = _conv(64, 128, 5, stride=2)
        self.conv3 = _conv(128, 256, 5, stride=2)
        self.conv3_1 = _conv(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) → flow (B, 2, H/4, W/4) in units of 20 pixels."""
        level2 = _leaky_relu(self.conv2(_leaky_relu(self.conv1(x))))
        level3 = _leaky_relu(self.conv3_1(_leaky_relu(self.conv3(level2))))
        return self.expand([level2, level3, *self.contract(level3)])


class FlowNetSD(_FlowNet):
    """For small displacements: small kernels, and full resolution first."""

    def __init__(self) -> None:
        super().__init__(upsample_bias=True, inter_convs=True)
        self.conv0 = _conv(6, 64)
        self.conv1 = _conv(64, 64, stride=2)
        self.conv1_1 = _conv(64, 128)
        self.conv2 = _conv(128, 128, stride=2)
        self.conv2_1 = _conv(128, 128)
        self.conv3 = _conv(128, 256, stride=2)
        self.conv3_1 = _conv(256, 256)

    def forward(self, images: Tensor) -> Tensor:
        """Both images (B, 6, H, W) → flow (B, 2, H/4, W/4) in units of 1/20 pixel (in FlowNet2)."""
        x = _leaky_relu(self.conv0(images))
        x = _leaky_relu(self.conv1_1(_leaky_relu(self.conv1(x))))
        level2 = _leaky_relu(self.conv2_1(_leaky_relu(self.conv2(x))))
        level3 = _leaky_relu(self.conv3_1(_leaky_relu(self.conv3(level2))))
        return self.expand([level2, level3, *self.contract(level3)])


class FlowNetFusion(nn.Module):
    """One flow from that of FlowNetSD and that of the last FlowNetS."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = _conv(11, 64)
        self.conv1 = _conv(64, 64, stride=2)
        self.conv1_1 = _conv(64, 128)
        self.conv2 = _conv(128, 128, stride=2)
        self.conv2_1 = _conv(128, 128)
        self.deconv1 = _deconv(128, 32)
        self.deconv0 = _deconv(162, 16)
        self.inter_conv1 = _conv(162, 32)
        self.inter_conv0 = _conv(82, 16)
        self.predict_flow2 = _conv(128, 2)
        self.predict_flow1 = _conv(32, 2)
        self.predict_flow0 = _conv(16, 2)
        self.upsampled_flow2_to_1 = _deconv(2, 2)
        self.upsampled_flow1_to_0 = _deconv(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 11, H, W) → flow (B, 2, H, W), pixels."""
        level0 = _leaky_relu(self.conv0(x))
        level1 = _leaky_relu(self.conv1_1(_leaky_relu(self.conv1(level0))))
        level2 = _leaky_relu(self.conv2_1(_leaky_relu(self.conv2(level1))))
        flow = self.upsampled_flow2_to_1(self.predict_flow2(level2))
        x = torch.cat([level1, _leaky_relu(self.deconv1(level2)), flow], dim=1)
        flow = self.upsampled_flow1_to_0(self.predict_flow1(self.inter_conv1(x)))
        x = torch.cat([level0, _leaky_relu(self.deconv0(x)), flow], dim=1)
        return self.predict_flow0(self.inter_conv0(x))


def _normalize(current: Tensor, reference: Tensor) -> Tensor:
    """Both images (B, 3, H, W) → (B, 6, H, W): without their common mean per channel, divided by 255."""
    images = torch.stack([current, reference], dim=1)
    return ((images - images.mean(dim=(1, 3, 4), keepdim=True)) / 255).flatten(1, 2)


def _enlarge(flow: Tensor, mode: str = "bilinear") -> Tensor:
    """Level 2 → level 0, float32."""
    return F.interpolate(flow.float(), scale_factor=4, mode=mode)


@FLOW_REGISTRY.register()
class FlowNet2(FlowEstimator):
    """The whole of it, about 162 million parameters."""

    size_divisibility: ClassVar[int] = 64

    def __init__(self) -> None:
        super().__init__()
        self.flownetc = FlowNetC()
        self.flownets_1 = FlowNetS(12)
        self.flownets_2 = FlowNetS(12)
        self.flownets_d = FlowNetSD()
        self.flownetfusion = FlowNetFusion()

    def estimate(
        self, current: Tensor, reference: Tensor, inputs: list[dict[str, Any]] | None
    ) -> Tensor:
        dtype = self.flownetc.conv1.weight.dtype
        images = _normalize(current, reference)
        first, second = images.chunk(2, dim=1)

        def differences(flow: Tensor) -> tuple[Tensor, Tensor]:
            """The second image as the flow warps it, and its distance to the first at each pixel."""
            warped = warp(second, flow, padding_mode="border")
            return warped, channel_norm(first - warped)

        def refined(flow: Tensor, network: FlowNetS) -> Tensor:
            warped, difference = differences(flow)
            x = torch.cat([images, warped, flow / _FLOW_UNIT, difference], dim=1)
            return network(x.to(dtype))

        flow = _enlarge(self.flownetc(images.to(dtype)) * _FLOW_UNIT)
        flow = _enlarge(refined(flow, self.flownets_1) * _FLOW_UNIT)
        large = _enlarge(refined(flow, self.flownets_2) * _FLOW_UNIT, "nearest")
        small = _enlarge(self.flownets_d(images.to(dtype)) / _FLOW_UNIT, "nearest")
        flows = [small, large]
        x = [first, *flows, *map(channel_norm, flows), *(differences(flow)[1] for flow in flows)]
        return self.flownetfusion(torch.cat(x, dim=1).to(dtype))


class _SingleNetwork(FlowEstimator):
    """One network, its flow enlarged four times."""

    size_divisibility: ClassVar[int] = 64

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def estimate(
        self, current: Tensor, reference: Tensor, inputs: list[dict[str, Any]] | None
    ) -> Tensor:
        images = _normalize(current, reference).to(self.network.conv1.weight.dtype)
        return _enlarge(self.network(images) * _FLOW_UNIT)


@FLOW_REGISTRY.register()
class FlowNet2C(_SingleNetwork):
    """FlowNetC alone."""

    def __init__(self) -> None:
        super().__init__(FlowNetC())


@FLOW_REGISTRY.register()
class FlowNet2S(_SingleNetwork):
    """FlowNetS alone, on the two images."""

    def __init__(self) -> None:
        super().__init__(FlowNetS(6))


@FLOW_REGISTRY.register()
class FlowNet2SD(_SingleNetwork):
    """FlowNetSD alone; unlike in FlowNet2, its flow is in units of 20 pixels."""

    def __init__(self) -> None:
        super().__init__(FlowNetSD())
