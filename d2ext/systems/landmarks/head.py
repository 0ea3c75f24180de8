"""Heads: features → raw predictions, losses, and the input of their codec's decoder.

Every head is a :class:`LandmarkHead`, looked up by its name in :data:`LANDMARK_HEAD_REGISTRY`.

Letters: N crops, K landmarks, W, H size of the crop, w, h of a map.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from fvcore.common.registry import Registry
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.codecs.landmark_heatmaps import HeatmapCodec
from d2ext.codecs.landmark_integral import IntegralCodec, cell_probabilities
from d2ext.codecs.landmark_simcc import SimCCCodec
from d2ext.codecs.landmarks import LandmarkCodec, RegressionCodec, Size
from d2ext.systems.landmarks.losses import (
    MAP_LOSSES,
    POINT_LOSSES,
    kl_loss,
    point_loss,
)
from d2ext.systems.landmarks.targets import LandmarkTargets

# Floor of probabilities before their logarithm.
_LEAST = 1e-30
# Deviation of the weights of last layers (simple baselines' published code).
_LAST_LAYER_STD = 0.001


LANDMARK_HEAD_REGISTRY = Registry("LANDMARK_HEAD")
LANDMARK_HEAD_REGISTRY.__doc__ = """
Heads of LandmarkNet by name: ``head(cfg, output shape of the backbone)`` gives a :class:`LandmarkHead`.
"""


class LandmarkHead(nn.Module):
    """Interface of the heads of :class:`~d2ext.systems.landmarks.model.LandmarkNet`.

    Attributes:
        in_features: names of the backbone's features that it uses.
        codec: between points and predictions.
        learns_maps: whether it predicts a map for each landmark; a stacked hourglass then provides them.
    """

    in_features: list[str]
    codec: LandmarkCodec
    learns_maps = False

    def forward(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        """``in_features`` → raw predictions for the losses; inference uses the last ones."""
        raise NotImplementedError

    def losses(self, raw: tuple[Tensor, ...], targets: LandmarkTargets) -> dict[str, Tensor]:
        """Losses of raw predictions."""
        raise NotImplementedError

    def prediction(self, raw: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The last raw predictions → the decoder's input, float32."""
        return (raw[-1].float(),)

    def average(self, one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Mean of two predictions."""
        return tuple((a + b) / 2 for a, b in zip(one, other, strict=True))

    def strength(self, prediction: tuple[Tensor, ...]) -> Tensor:
        """Maps of a prediction for drawing, (N, K, h, w) in 0..1; only of heads that learn maps."""
        raise NotImplementedError


def input_size(cfg: CfgNode) -> Size:
    """(W, H) of the network's input."""
    height, width = cfg.MODEL.LANDMARKS.INPUT_SIZE
    return width, height


def select_feature(cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> str:
    """Name of the backbone's feature that a head uses.

    Raises:
        ValueError: the backbone has no feature of the name in ``MODEL.LANDMARKS.IN_FEATURE``.
    """
    name = cfg.MODEL.LANDMARKS.IN_FEATURE
    features = [key for key in shapes if not key.startswith("maps")]
    if name and name not in features:
        raise ValueError(
            f'MODEL.LANDMARKS.IN_FEATURE is "{name}", but the backbone has {features}.'
        )
    return name or features[-1]


class Upsampling(nn.Sequential):
    """Transposed convolutions 4x4 of stride 2, each with norm and ReLU (arXiv 1804.06208)."""

    def __init__(self, in_channels: int, channels: int, layers: int, norm: str) -> None:
        parts: list[nn.Module] = []
        for i in range(layers):
            conv = nn.ConvTranspose2d(
                channels if i else in_channels, channels, 4, stride=2, padding=1, bias=False
            )
            nn.init.normal_(conv.weight, std=_LAST_LAYER_STD)
            parts += [conv, get_norm(norm, channels), nn.ReLU(inplace=True)]
        super().__init__(*parts)
        self.out_channels = channels if layers else in_channels


class MapHead(LandmarkHead):
    """Common part of the heads that learn maps: (N, K, h, w) of each stack.

    On a stacked hourglass the maps come from the backbone and the head has no parameters; on another
    backbone it is up-sampling and a 1x1 convolution.
    """

    codec: HeatmapCodec | IntegralCodec
    learns_maps = True

    def __init__(
        self,
        *,
        in_features: list[str],
        upsampling: Upsampling | None = None,
        num_keypoints: int,
    ) -> None:
        """Args:
        in_features: the maps of all stacks, or one feature.
        upsampling: None: ``in_features`` are maps.
        num_keypoints: K.
        """
        super().__init__()
        self.in_features = list(in_features)
        self.upsampling = upsampling
        self.predictor: nn.Module | None = None
        if upsampling is not None:
            self.predictor = Conv2d(upsampling.out_channels, num_keypoints, 1)
            nn.init.normal_(self.predictor.weight, std=_LAST_LAYER_STD)
            nn.init.zeros_(self.predictor.bias)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        """(N, K, h, w) of each stack."""
        if self.upsampling is None or self.predictor is None:
            return tuple(features)
        return (self.predictor(self.upsampling(features[0])),)

    def strength(self, prediction: tuple[Tensor, ...]) -> Tensor:
        return prediction[0].clamp(0, 1)

    @staticmethod
    def arguments(cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> tuple[dict[str, Any], Size]:
        """Arguments of the constructor and (w, h).

        Raises:
            ValueError: the input's size is not a multiple of the stride, or the backbone predicts
                another number of maps.
        """
        c = cfg.MODEL.LANDMARKS
        width, height = input_size(cfg)
        maps = [key for key in shapes if key.startswith("maps")] if not c.IN_FEATURE else []
        if maps:
            stride, upsampling, names = shapes[maps[0]].stride, None, maps
            if shapes[maps[0]].channels != c.NUM_KEYPOINTS:
                raise ValueError(
                    f"The backbone predicts {shapes[maps[0]].channels} maps, but "
                    f"MODEL.LANDMARKS.NUM_KEYPOINTS is {c.NUM_KEYPOINTS}."
                )
        else:
            names = [select_feature(cfg, shapes)]
            layers = c.UPSAMPLE.NUM_LAYERS
            stride = shapes[names[0]].stride // 2**layers
            if stride < 1:
                raise ValueError(
                    f"MODEL.LANDMARKS.UPSAMPLE.NUM_LAYERS is {layers}: too many for a feature of "
                    f"stride {shapes[names[0]].stride}."
                )
            upsampling = Upsampling(
                shapes[names[0]].channels, c.UPSAMPLE.CHANNELS, layers, c.UPSAMPLE.NORM
            )
        coarsest = max(stride, shapes[names[0]].stride)
        if width % coarsest or height % coarsest:
            raise ValueError(
                f"MODEL.LANDMARKS.INPUT_SIZE {[height, width]} must be multiples of {coarsest}."
            )
        arguments = {
            "in_features": names,
            "upsampling": upsampling,
            "num_keypoints": c.NUM_KEYPOINTS,
        }
        return arguments, (width // stride, height // stride)


@LANDMARK_HEAD_REGISTRY.register()
class HeatmapHead(MapHead):
    """Heat maps: each landmark's map is trained to a bump around it."""

    @configurable
    def __init__(self, *, codec: HeatmapCodec, loss: str = "mse", **kwargs: Any) -> None:
        """Args:
        codec: targets and decoding.
        loss: a key of ``MAP_LOSSES``.
        kwargs: see :class:`MapHead`.

        Raises:
            ValueError: an unknown loss.
        """
        super().__init__(**kwargs)
        if loss not in MAP_LOSSES:
            raise ValueError(
                f"MODEL.LANDMARKS.LOSS.MAPS is one of {sorted(MAP_LOSSES)}, not '{loss}'."
            )
        self.codec: HeatmapCodec = codec
        self.loss = loss
        # Sum of a landmark's target in the middle of the map.
        middle = torch.tensor([[codec.input_size]], device="cpu") / 2
        (target,), _ = codec.encode(middle, torch.ones_like(middle[..., 0], dtype=torch.bool))
        self.mass = float(target.sum())

    @classmethod
    def from_config(cls, cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        c = cfg.MODEL.LANDMARKS
        arguments, map_size = cls.arguments(cfg, shapes)
        codec = HeatmapCodec(
            input_size=input_size(cfg),
            map_size=map_size,
            sigma=c.TARGET.SIGMA,
            shape=c.TARGET.SHAPE,
            center=c.TARGET.CENTER,
            window=c.TARGET.WINDOW,
            decoder=c.DECODER,
            blur=c.DECODER_BLUR,
            geometry=c.TARGET.CELL_GEOMETRY,
            flip_shift=c.TEST.FLIP_SHIFT,
        )
        return {**arguments, "codec": codec, "loss": c.LOSS.MAPS}

    def losses(self, raw: tuple[Tensor, ...], targets: LandmarkTargets) -> dict[str, Tensor]:
        """``loss_heatmap``: mean over the stacks."""
        (target,), weights = self.codec.encode(*targets)
        stacks = [MAP_LOSSES[self.loss](maps, target, weights) for maps in raw]
        return {"loss_heatmap": torch.stack(stacks).mean()}

    def prediction(self, raw: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The last stack's maps; with "cross_entropy" converted from logits to the scale of targets.

        These are the probabilities times the sum of a target: 1 at the peak if the network is as
        certain as the target, more if it is more certain.
        """
        (maps,) = super().prediction(raw)
        if self.loss == "cross_entropy":
            maps = cell_probabilities(maps) * self.mass
        return (maps,)


@LANDMARK_HEAD_REGISTRY.register()
class IntegralHead(MapHead):
    """Soft-argmax (arXiv 1711.08229): coordinates are the expectation over a map."""

    @configurable
    def __init__(self, *, codec: IntegralCodec, loss: str = "l1", **kwargs: Any) -> None:
        """Args:
        codec: targets and decoding.
        loss: a key of ``POINT_LOSSES``.
        kwargs: see :class:`MapHead`.
        """
        super().__init__(**kwargs)
        _check_point_loss(loss)
        self.codec: IntegralCodec = codec
        self.loss = loss

    @classmethod
    def from_config(cls, cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        c = cfg.MODEL.LANDMARKS
        arguments, map_size = cls.arguments(cfg, shapes)
        codec = IntegralCodec(input_size(cfg), map_size, c.TARGET.CELL_GEOMETRY)
        return {**arguments, "codec": codec, "loss": c.LOSS.POINTS}

    def losses(self, raw: tuple[Tensor, ...], targets: LandmarkTargets) -> dict[str, Tensor]:
        """``loss_points``: mean over the stacks."""
        _, weights = self.codec.encode(*targets)
        stacks = [
            point_loss(
                self.loss,
                self.codec.points(maps),
                targets.points,
                weights,
                self.codec.input_size[0],
            )
            for maps in raw
        ]
        return {"loss_points": torch.stack(stacks).mean()}

    def strength(self, prediction: tuple[Tensor, ...]) -> Tensor:
        """Probabilities divided by each landmark's largest."""
        maps = cell_probabilities(prediction[0])
        return maps / maps.amax(dim=(-2, -1), keepdim=True)

    def average(self, one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return _average_logits(one, other)


@LANDMARK_HEAD_REGISTRY.register()
class RegressionHead(LandmarkHead):
    """Coordinates from a fully connected layer on the averaged feature."""

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        in_channels: int,
        num_keypoints: int,
        codec: RegressionCodec,
        pool: int = 1,
        hidden: int = 0,
        loss: str = "l1",
    ) -> None:
        """Args:
        in_feature, in_channels: the backbone's feature.
        num_keypoints: K.
        codec: between points and numbers.
        pool: cells a side to which the feature is averaged.
        hidden: width of a hidden layer, 0 for none.
        loss: a key of ``POINT_LOSSES``.
        """
        super().__init__()
        _check_point_loss(loss)
        self.in_features = [in_feature]
        self.pool = pool
        self.codec: RegressionCodec = codec
        self.loss = loss
        width = in_channels * pool**2
        self.hidden = nn.Linear(width, hidden) if hidden else None
        self.predictor = nn.Linear(hidden or width, 2 * num_keypoints)
        nn.init.normal_(self.predictor.weight, std=_LAST_LAYER_STD)
        # Initially every landmark is in the middle.
        nn.init.constant_(self.predictor.bias, 0.5)

    @classmethod
    def from_config(cls, cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        c = cfg.MODEL.LANDMARKS
        name = select_feature(cfg, shapes)
        return {
            "in_feature": name,
            "in_channels": shapes[name].channels,
            "num_keypoints": c.NUM_KEYPOINTS,
            "codec": RegressionCodec(input_size(cfg)),
            "pool": c.REGRESSION.POOL,
            "hidden": c.REGRESSION.HIDDEN,
            "loss": c.LOSS.POINTS,
        }

    def forward(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        """(N, K, 2), x/W and y/H."""
        x = F.adaptive_avg_pool2d(features[0], self.pool).flatten(1)
        if self.hidden is not None:
            x = F.relu(self.hidden(x))
        return (self.predictor(x).unflatten(1, (-1, 2)),)

    def losses(self, raw: tuple[Tensor, ...], targets: LandmarkTargets) -> dict[str, Tensor]:
        """``loss_points``."""
        _, weights = self.codec.encode(*targets)
        decoded = self.codec.decode(raw).points
        value = point_loss(self.loss, decoded, targets.points, weights, self.codec.input_size[0])
        return {"loss_points": value}


@LANDMARK_HEAD_REGISTRY.register()
class SimCCHead(LandmarkHead):
    """One classification per axis (arXiv 2107.03332): a 1x1 convolution to K maps, then one fully
    connected layer per axis that all landmarks share."""

    @configurable
    def __init__(
        self,
        *,
        in_feature: str,
        in_channels: int,
        cells: int,
        num_keypoints: int,
        codec: SimCCCodec,
    ) -> None:
        """Args:
        in_feature, in_channels, cells: the backbone's feature, its channels and number of cells.
        num_keypoints: K.
        codec: between points and bins.
        """
        super().__init__()
        self.in_features = [in_feature]
        self.codec: SimCCCodec = codec
        self.reduce = Conv2d(in_channels, num_keypoints, 1)
        self.along_x = nn.Linear(cells, codec.bins[0])
        self.along_y = nn.Linear(cells, codec.bins[1])

    @classmethod
    def from_config(cls, cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        c = cfg.MODEL.LANDMARKS
        name = select_feature(cfg, shapes)
        width, height = input_size(cfg)
        stride = shapes[name].stride
        if width % stride or height % stride:
            raise ValueError(
                f"MODEL.LANDMARKS.INPUT_SIZE {[height, width]} must be multiples of {stride}."
            )
        return {
            "in_feature": name,
            "in_channels": shapes[name].channels,
            "cells": (width // stride) * (height // stride),
            "num_keypoints": c.NUM_KEYPOINTS,
            "codec": SimCCCodec((width, height), c.SIMCC.RATIO, c.SIMCC.SIGMA, c.SIMCC.REFINE),
        }

    def forward(self, features: list[Tensor]) -> tuple[Tensor, ...]:
        """Logits (N, K, bins) along x and y."""
        x = self.reduce(features[0]).flatten(2)
        return self.along_x(x), self.along_y(x)

    def losses(self, raw: tuple[Tensor, ...], targets: LandmarkTargets) -> dict[str, Tensor]:
        """``loss_bins``: mean of both axes."""
        bins, weights = self.codec.encode(*targets)
        axes = [kl_loss(r, t, weights) for r, t in zip(raw, bins, strict=True)]
        return {"loss_bins": torch.stack(axes).mean()}

    def prediction(self, raw: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.float() for x in raw)

    def average(self, one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return _average_logits(one, other)


def _average_logits(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Logarithms of the mean probabilities over the cells or bins of each landmark."""
    return tuple(
        ((a.flatten(2).softmax(dim=-1) + b.flatten(2).softmax(dim=-1)) / 2)
        .clamp(min=_LEAST)
        .log()
        .view_as(a)
        for a, b in zip(one, other, strict=True)
    )


def _check_point_loss(name: str) -> None:
    if name not in POINT_LOSSES:
        raise ValueError(
            f"MODEL.LANDMARKS.LOSS.POINTS is one of {sorted(POINT_LOSSES)}, not '{name}'."
        )


def build_landmark_head(cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> LandmarkHead:
    """The head that ``cfg.MODEL.LANDMARKS.HEAD`` names, on features of these shapes.

    Raises:
        ValueError: there is no such head, or it does not fit the backbone.
    """
    return landmark_head_class(cfg)(cfg, shapes)


def landmark_head_class(cfg: CfgNode) -> type[LandmarkHead]:
    """Class of :func:`build_landmark_head`."""
    name = cfg.MODEL.LANDMARKS.HEAD
    if name not in LANDMARK_HEAD_REGISTRY:
        known = ", ".join(sorted(key for key, _ in LANDMARK_HEAD_REGISTRY))
        raise ValueError(f'MODEL.LANDMARKS.HEAD is "{name}"; known heads: {known}.')
    return LANDMARK_HEAD_REGISTRY.get(name)
