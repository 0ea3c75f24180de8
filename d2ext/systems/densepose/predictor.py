"""Predictors: features of a region → maps, by transposed convolutions and a bilinear upsampling.

Parameters are called what Detectron2's DensePose checkpoints call them.

Letters: R regions, s side of a pooled region, S side of the maps (4 s as published).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from detectron2.config import CfgNode, configurable
from detectron2.layers import ConvTranspose2d
from fvcore.common.registry import Registry
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.codecs.densepose import ChartPredictions, EmbeddingPredictions, SurfacePredictions
from d2ext.config import ConfigError
from d2ext.data.densepose import NUM_PARTS
from d2ext.systems.densepose.head import he_init

DENSEPOSE_PREDICTOR_REGISTRY = Registry("DENSEPOSE_PREDICTOR")
DENSEPOSE_PREDICTOR_REGISTRY.__doc__ = """
Predictors: ``predictor(cfg, in_channels)`` maps features (R, C, s, s) to
:class:`~d2ext.codecs.densepose.SurfacePredictions`.
"""

# Maps by the kind of confidence of U and V (Neverova et al., NeurIPS 2019).
UV_CONFIDENCES = {
    "": (),
    "iid_iso": ("sigma_2",),
    "indep_aniso": ("sigma_2", "kappa_u", "kappa_v"),
}


class SurfacePredictor(nn.Module):
    """A transposed convolution for each map; a subclass names the maps and their type."""

    # Names of the layers, before "_lowres", where they are not the maps' own.
    LAYERS: ClassVar[Mapping[str, str]] = {}
    RESULT: ClassVar[type[SurfacePredictions]]

    def __init__(
        self,
        in_channels: int,
        channels: Mapping[str, int],
        *,
        kernel: int = 4,
        scale: int = 2,
        segm_epsilon: float = 0.01,
    ) -> None:
        """Args:
        in_channels: of the features.
        channels: of each map. A map ``*_segm_confidence``, positive, multiplies the logits ``*_segm``.
        kernel: side of the transposed convolutions, whose stride is 2.
        scale: of the bilinear upsampling after them.
        segm_epsilon: least confidence.
        """
        super().__init__()
        self.names = list(channels)
        self.scale = scale
        self.segm_epsilon = segm_epsilon
        for name, count in channels.items():
            layer = ConvTranspose2d(
                in_channels, count, kernel, stride=2, padding=int(kernel / 2 - 1)
            )
            self.add_module(f"{self.LAYERS.get(name, name)}_lowres", layer)
        he_init(self)

    def forward(self, features: Tensor) -> SurfacePredictions:
        """(R, C, s, s) → maps (R, channels, S, S)."""
        maps = {}
        for name in self.names:
            maps[name] = getattr(self, f"{self.LAYERS.get(name, name)}_lowres")(features)
            if self.scale > 1:
                maps[name] = F.interpolate(
                    maps[name], scale_factor=self.scale, mode="bilinear", align_corners=False
                )
        for name in self.names:
            if name.endswith("_segm_confidence"):
                maps[name] = F.softplus(maps[name]) + self.segm_epsilon
                segm = name.removesuffix("_confidence")
                maps[segm] = maps[segm] * maps[name]
        return self.RESULT(**maps)


def _common_options(head: CfgNode) -> dict[str, Any]:
    return {
        "kernel": head.DECONV_KERNEL,
        "scale": head.UP_SCALE,
        "segm_epsilon": head.SEGM_CONFIDENCE.EPSILON,
    }


@DENSEPOSE_PREDICTOR_REGISTRY.register()
class DensePoseChartPredictor(SurfacePredictor):
    """Coarse and fine segmentation, U and V, with or without confidences."""

    LAYERS: ClassVar[Mapping[str, str]] = {
        "coarse_segm": "ann_index",
        "fine_segm": "index_uv",
    }
    RESULT = ChartPredictions

    @configurable
    def __init__(
        self,
        in_channels: int,
        *,
        coarse_channels: int = 2,
        uv_confidence: str = "",
        segm_confidence: bool = False,
        **options: Any,
    ) -> None:
        """Args:
        in_channels: of the features.
        coarse_channels: 2 (foreground) or 15 (parts).
        uv_confidence: "", "iid_iso" or "indep_aniso".
        segm_confidence: confidences of both segmentations.
        options: of :class:`SurfacePredictor`.
        """
        if uv_confidence not in UV_CONFIDENCES:
            raise ConfigError(
                f'UV_CONFIDENCE.TYPE is "iid_iso" or "indep_aniso", not "{uv_confidence}".'
            )
        parts = NUM_PARTS + 1
        channels = {"coarse_segm": coarse_channels, "fine_segm": parts, "u": parts, "v": parts}
        channels |= dict.fromkeys(UV_CONFIDENCES[uv_confidence], parts)
        if segm_confidence:
            channels |= {"fine_segm_confidence": 1, "coarse_segm_confidence": 1}
        super().__init__(in_channels, channels, **options)

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int) -> dict[str, Any]:
        head = cfg.MODEL.ROI_DENSEPOSE_HEAD
        uv = head.UV_CONFIDENCE
        return {
            "in_channels": in_channels,
            "coarse_channels": head.NUM_COARSE_SEGM_CHANNELS,
            "uv_confidence": uv.TYPE if uv.ENABLED else "",
            "segm_confidence": head.SEGM_CONFIDENCE.ENABLED,
            **_common_options(head),
        }


@DENSEPOSE_PREDICTOR_REGISTRY.register()
class DensePoseEmbeddingPredictor(SurfacePredictor):
    """Coarse segmentation and an embedding (CSE, arXiv 2011.12438)."""

    LAYERS: ClassVar[Mapping[str, str]] = {"embedding": "embed"}
    RESULT = EmbeddingPredictions

    @configurable
    def __init__(
        self,
        in_channels: int,
        *,
        embed_size: int = 16,
        coarse_channels: int = 2,
        segm_confidence: bool = False,
        **options: Any,
    ) -> None:
        """Args:
        in_channels: of the features.
        embed_size: D.
        coarse_channels: of the coarse segmentation.
        segm_confidence: a confidence of it.
        options: of :class:`SurfacePredictor`.
        """
        channels = {"coarse_segm": coarse_channels, "embedding": embed_size}
        if segm_confidence:
            channels["coarse_segm_confidence"] = 1
        super().__init__(in_channels, channels, **options)

    @classmethod
    def from_config(cls, cfg: CfgNode, in_channels: int) -> dict[str, Any]:
        head = cfg.MODEL.ROI_DENSEPOSE_HEAD
        return {
            "in_channels": in_channels,
            "embed_size": head.CSE.EMBED_SIZE,
            "coarse_channels": head.NUM_COARSE_SEGM_CHANNELS,
            "segm_confidence": head.SEGM_CONFIDENCE.ENABLED,
            **_common_options(head),
        }
