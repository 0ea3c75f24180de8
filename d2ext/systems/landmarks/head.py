"""Heads: features → raw predictions, their losses, and what their codec decodes.

Every head is a :class:`LandmarkHead`, found by its name in :data:`LANDMARK_HEAD_REGISTRY`; both are in
:mod:`d2ext.systems.landmarks.head_base`.

Letters: N crops, K landmarks, W, H size of the crop, w, h of a map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.codecs.landmark_heatmaps import HeatmapCodec, draw_targets
from d2ext.codecs.landmark_integral import IntegralCodec
from d2ext.codecs.landmark_simcc import SimCCCodec
from d2ext.codecs.landmarks import RegressionCodec, Size, to_cells
from d2ext.systems.landmarks.head_base import (
    LANDMARK_HEAD_REGISTRY,
    LandmarkHead,
    choose_feature,
    input_size,
)
from d2ext.systems.landmarks.losses import (
    MAP_ACTIVATIONS,
    MAP_LOSSES,
    POINT_LOSSES,
    cross_entropy_loss,
    kl_loss,
    point_loss,
)

# Deviation of the weights of last layers (simple baselines' published code).
_LAST_LAYER_STD = 0.001


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

    On a stacked hourglass the maps come from the backbone and this has no parameters; on another
    backbone: up-sampling and a 1x1 convolution.
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

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """(N, K, h, w) of each stack."""
        if self.upsampling is None or self.predictor is None:
            return tuple(features[name] for name in self.in_features)
        return (self.predictor(self.upsampling(features[self.in_features[0]])),)

    def strength(self, raw: tuple[Tensor, ...]) -> Tensor:
        """The last stack's maps for pictures: (N, K, h, w) in 0..1."""
        return self.prediction(raw)[0].clamp(0, 1)

    @staticmethod
    def arguments(cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> tuple[dict[str, Any], Size]:
        """Arguments of the constructor and (w, h).

        Raises:
            ValueError: the input's size is no multiple of a cell, or the maps are of other landmarks.
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
            names = [choose_feature(cfg, shapes)]
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
    """Heat maps: each cell of a landmark's map learns the value of a bump around it."""

    @configurable
    def __init__(
        self, *, codec: HeatmapCodec, loss: str = "mse", weight: float = 1.0, **kwargs: Any
    ):
        """Args:
        codec: targets and decoding.
        loss: a key of ``MAP_LOSSES``.
        weight: factor on the loss.
        kwargs: see :class:`MapHead`.

        Raises:
            ValueError: an unknown loss; the focal loss with targets that never are 1.
        """
        super().__init__(**kwargs)
        if loss not in MAP_LOSSES:
            raise ValueError(
                f"MODEL.LANDMARKS.LOSS.MAPS is one of {sorted(MAP_LOSSES)}, not '{loss}'."
            )
        self.codec: HeatmapCodec = codec
        self.loss = loss
        self.weight = weight
        # What the target of one landmark sums to, in the middle of the map.
        middle = torch.tensor([[codec.input_size]], device="cpu") / 2
        (target,), _ = codec.encode(middle, torch.ones_like(middle[..., 0], dtype=torch.bool))
        self.mass = float(target.sum())
        whole = codec.center in ("rounded", "hourglass")
        if loss == "focal" and not (whole and float(target.max()) == 1):
            raise ValueError(
                "The focal loss wants targets that are exactly 1 at one cell: set "
                'MODEL.LANDMARKS.TARGET.CENTER to "rounded" and UNIT_PEAK to True.'
            )
        if loss == "focal" and isinstance(self.predictor, nn.Conv2d):
            # A first probability of 0.1 for every cell (arXiv 1904.07850).
            nn.init.constant_(self.predictor.bias, -2.19)

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
            unit_peak=c.TARGET.UNIT_PEAK,
            decoder=c.DECODER,
            blur=c.DECODER_BLUR,
            geometry=c.TARGET.CELL_GEOMETRY,
            flip_shift=c.TEST.FLIP_SHIFT,
        )
        return {**arguments, "codec": codec, "loss": c.LOSS.MAPS, "weight": c.LOSS.WEIGHT}

    def losses(
        self, raw: tuple[Tensor, ...], points: Tensor, labelled: Tensor
    ) -> dict[str, Tensor]:
        """``loss_heatmap``: mean over the stacks."""
        (target,), weights = self.codec.encode(points, labelled)
        function = MAP_LOSSES[self.loss]
        stacks = [function(maps, target, weights) for maps in raw]
        return {"loss_heatmap": torch.stack(stacks).mean() * self.weight}

    def prediction(self, raw: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The last stack's maps; with a loss on logits, as the targets that they stand for.

        After a classification over all cells these are the probabilities times the sum of a target:
        1 at the peak where the network is as sure as the target, more where it is surer.
        """
        maps = raw[-1].float()
        activation = MAP_ACTIVATIONS.get(self.loss)
        if activation == "sigmoid":
            maps = maps.sigmoid()
        elif activation == "softmax":
            maps = maps.flatten(2).softmax(dim=-1).view_as(maps) * self.mass
        return (maps,)


@LANDMARK_HEAD_REGISTRY.register()
class IntegralHead(MapHead):
    """Soft-argmax (arXiv 1711.08229): coordinates are the expectation over a map."""

    @configurable
    def __init__(
        self,
        *,
        codec: IntegralCodec,
        loss: str = "l1",
        weight: float = 1.0,
        shape_weight: float = 0.0,
        sigma: float = 1.0,
        **kwargs: Any,
    ) -> None:
        """Args:
        codec: targets and decoding.
        loss: a key of ``POINT_LOSSES``.
        weight: factor on all.
        shape_weight: factor on the divergence of the map from a Gaussian around the landmark.
        sigma: deviation of that Gaussian in cells.
        kwargs: see :class:`MapHead`.
        """
        super().__init__(**kwargs)
        _check_point_loss(loss)
        self.codec: IntegralCodec = codec
        self.loss = loss
        self.weight = weight
        self.shape_weight = shape_weight
        self.sigma = sigma

    @classmethod
    def from_config(cls, cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        c = cfg.MODEL.LANDMARKS
        arguments, map_size = cls.arguments(cfg, shapes)
        codec = IntegralCodec(
            input_size=input_size(cfg),
            map_size=map_size,
            beta=c.INTEGRAL.BETA,
            debias=c.INTEGRAL.DEBIAS,
            geometry=c.TARGET.CELL_GEOMETRY,
            formula=c.INTEGRAL.DEBIAS_FORMULA,
        )
        return {
            **arguments,
            "codec": codec,
            "loss": c.LOSS.POINTS,
            "weight": c.LOSS.WEIGHT,
            "shape_weight": c.INTEGRAL.SHAPE_WEIGHT,
            "sigma": c.TARGET.SIGMA,
        }

    def losses(
        self, raw: tuple[Tensor, ...], points: Tensor, labelled: Tensor
    ) -> dict[str, Tensor]:
        """``loss_points`` and, with a shape weight, ``loss_shape``: means over the stacks."""
        codec = self.codec
        _, weights = codec.encode(points, labelled)
        width = codec.input_size[0]
        stacks = [point_loss(self.loss, self._points(maps), points, weights, width) for maps in raw]
        losses = {"loss_points": torch.stack(stacks).mean() * self.weight}
        if self.shape_weight > 0:
            cells = to_cells(points, codec.input_size, codec.map_size, codec.geometry)
            (target,), _ = draw_targets(cells, weights > 0, codec.map_size, sigma=self.sigma)
            stacks = [cross_entropy_loss(codec.beta * maps, target, weights) for maps in raw]
            losses["loss_shape"] = torch.stack(stacks).mean() * self.weight * self.shape_weight
        return losses

    def _points(self, maps: Tensor) -> Tensor:
        """Expectation as it is trained: without removal of the bias."""
        return replace(self.codec, debias=False).points(maps)

    def prediction(self, raw: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (raw[-1].float(),)

    def strength(self, raw: tuple[Tensor, ...]) -> Tensor:
        """Probabilities over the largest of each landmark."""
        maps = self.codec.probabilities(raw[-1])
        return maps / maps.amax(dim=(-2, -1), keepdim=True)

    def average(self, one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """A map of the mean probabilities, see the codec's ``average``."""
        (a,), (b,) = one, other
        return (self.codec.average(a, b),)


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
        weight: float = 1.0,
    ) -> None:
        """Args:
        in_feature, in_channels: the backbone's feature.
        num_keypoints: K.
        codec: between points and numbers.
        pool: cells a side to which the feature is averaged.
        hidden: width of a hidden layer, 0 for none.
        loss: a key of ``POINT_LOSSES``.
        weight: factor on the loss.
        """
        super().__init__()
        _check_point_loss(loss)
        self.in_feature = in_feature
        self.pool = pool
        self.codec: RegressionCodec = codec
        self.loss = loss
        self.weight = weight
        width = in_channels * pool**2
        self.hidden = nn.Linear(width, hidden) if hidden else None
        self.predictor = nn.Linear(hidden or width, 2 * num_keypoints)
        nn.init.normal_(self.predictor.weight, std=_LAST_LAYER_STD)
        # At first every landmark is in the middle.
        nn.init.constant_(self.predictor.bias, 0.5)

    @classmethod
    def from_config(cls, cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        c = cfg.MODEL.LANDMARKS
        name = choose_feature(cfg, shapes)
        return {
            "in_feature": name,
            "in_channels": shapes[name].channels,
            "num_keypoints": c.NUM_KEYPOINTS,
            "codec": RegressionCodec(input_size(cfg)),
            "pool": c.REGRESSION.POOL,
            "hidden": c.REGRESSION.HIDDEN,
            "loss": c.LOSS.POINTS,
            "weight": c.LOSS.WEIGHT,
        }

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """(N, K, 2), x/W and y/H."""
        x = F.adaptive_avg_pool2d(features[self.in_feature], self.pool).flatten(1)
        if self.hidden is not None:
            x = F.relu(self.hidden(x))
        return (self.predictor(x).view(len(x), -1, 2),)

    def losses(
        self, raw: tuple[Tensor, ...], points: Tensor, labelled: Tensor
    ) -> dict[str, Tensor]:
        """``loss_points``."""
        (_,), weights = self.codec.encode(points, labelled)
        found = self.codec.decode(raw).points
        value = point_loss(self.loss, found, points, weights, self.codec.input_size[0])
        return {"loss_points": value * self.weight}

    def prediction(self, raw: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (raw[0].float(),)


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
        weight: float = 1.0,
    ) -> None:
        """Args:
        in_feature, in_channels, cells: the backbone's feature and how many cells it has.
        num_keypoints: K.
        codec: between points and bins.
        weight: factor on the loss.
        """
        super().__init__()
        self.in_feature = in_feature
        self.codec: SimCCCodec = codec
        self.weight = weight
        self.reduce = Conv2d(in_channels, num_keypoints, 1)
        self.along_x = nn.Linear(cells, codec.bins[0])
        self.along_y = nn.Linear(cells, codec.bins[1])

    @classmethod
    def from_config(cls, cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        c = cfg.MODEL.LANDMARKS
        name = choose_feature(cfg, shapes)
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
            "weight": c.LOSS.WEIGHT,
        }

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Logits (N, K, bins) along x and y."""
        x = self.reduce(features[self.in_feature]).flatten(2)
        return self.along_x(x), self.along_y(x)

    def losses(
        self, raw: tuple[Tensor, ...], points: Tensor, labelled: Tensor
    ) -> dict[str, Tensor]:
        """``loss_bins``: mean of both axes."""
        targets, weights = self.codec.encode(points, labelled)
        axes = [kl_loss(r, t, weights) for r, t in zip(raw, targets, strict=True)]
        return {"loss_bins": torch.stack(axes).mean() * self.weight}

    def prediction(self, raw: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.float() for x in raw)

    def average(self, one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Logarithm of the mean probability."""
        return tuple(
            ((a.softmax(dim=-1) + b.softmax(dim=-1)) / 2).clamp(min=1e-30).log()
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
