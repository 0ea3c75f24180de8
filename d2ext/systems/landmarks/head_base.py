"""What all heads of landmark networks have in common: interface, registry, choice of their input.

Letters as in :mod:`d2ext.systems.landmarks.head`.
"""

from __future__ import annotations

from collections.abc import Mapping

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from fvcore.common.registry import Registry
from torch import Tensor, nn

from d2ext.codecs.landmarks import LandmarkCodec, Size

LANDMARK_HEAD_REGISTRY = Registry("LANDMARK_HEAD")
LANDMARK_HEAD_REGISTRY.__doc__ = """
Heads of LandmarkNet by name: ``head(cfg, output shape of the backbone)`` gives a :class:`LandmarkHead`.
"""


class LandmarkHead(nn.Module):
    """What :class:`~d2ext.systems.landmarks.model.LandmarkNet` wants of a head.

    Attributes:
        codec: between points and predictions.
        learns_maps: whether a stacked hourglass predicts this head's maps itself.
    """

    codec: LandmarkCodec
    learns_maps = False

    def forward(self, features: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The backbone's features → raw predictions, all that the loss wants; the last ones count."""
        raise NotImplementedError

    def losses(
        self, raw: tuple[Tensor, ...], points: Tensor, labelled: Tensor
    ) -> dict[str, Tensor]:
        """Losses of raw predictions.

        Args:
            points: (N, K, 2), pixels of the crop.
            labelled: (N, K) bool.
        """
        raise NotImplementedError

    def prediction(self, raw: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Raw predictions → what the codec decodes, float32."""
        raise NotImplementedError

    def average(self, one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Mean of two predictions."""
        return tuple((a + b) / 2 for a, b in zip(one, other, strict=True))


def input_size(cfg: CfgNode) -> Size:
    """(W, H) of the network's input."""
    height, width = cfg.MODEL.LANDMARKS.INPUT_SIZE
    return width, height


def choose_feature(cfg: CfgNode, shapes: Mapping[str, ShapeSpec]) -> str:
    """Name of the backbone's feature that a head takes.

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
