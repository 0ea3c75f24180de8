"""What estimates optical flow: one interface, chosen by ``MODEL.FLOW.NAME``.

Letters: B images, H×W pixels.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import Tensor, nn
from torch.nn import functional as F

from d2ext.config import ConfigError

__all__ = ["FLOW_REGISTRY", "FlowEstimator", "build_flow"]

FLOW_REGISTRY = Registry("FLOW")
FLOW_REGISTRY.__doc__ = """Subclasses of :class:`FlowEstimator`, by ``MODEL.FLOW.NAME``."""


class FlowEstimator(nn.Module):
    """Optical flow between two images; used as it is, never trained with the model that it is part of.

    A subclass implements :meth:`estimate`. It stays in evaluation mode.
    """

    size_divisibility: ClassVar[int] = 1
    """Sides of what :meth:`estimate` gets are multiples of this."""
    min_size: ClassVar[int] = 1
    """And at least this, pixels."""
    follows_inference_mode: ClassVar[bool] = True
    """Whether ``MODEL.INFERENCE`` (dtype, CUDA graphs) applies; if not, it is called as it is."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments of this class's constructor."""
        return {}

    @torch.no_grad()
    def forward(
        self, current: Tensor, reference: Tensor, inputs: list[dict[str, Any]] | None = None
    ) -> Tensor:
        """Where each pixel of ``current`` is in ``reference``.

        Args:
            current, reference: (B, 3, H, W) RGB, 0..255, of any size; padded inside with 0 at bottom and
                right.
            inputs: dicts of the current images in Detectron2's form; only some estimators read them.

        Returns:
            (B, 2, H, W) float32: x, y in pixels; the value of ``current`` at p is that of ``reference``
            at p + flow(p)
        """
        height, width = current.shape[-2:]
        padding = 0, self._padding(width), 0, self._padding(height)
        if any(padding):
            current, reference = F.pad(current, padding), F.pad(reference, padding)
        flow = self.estimate(current.float(), reference.float(), inputs)
        return flow[..., :height, :width].float()

    def _padding(self, side: int) -> int:
        d = self.size_divisibility
        return -(-max(side, self.min_size) // d) * d - side

    def estimate(
        self, current: Tensor, reference: Tensor, inputs: list[dict[str, Any]] | None
    ) -> Tensor:
        """As :meth:`forward`, of padded images, float32."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> FlowEstimator:
        """Stays in evaluation mode."""
        return super().train(False)


def build_flow(cfg: CfgNode) -> FlowEstimator:
    """The estimator that ``MODEL.FLOW.NAME`` names, frozen, with random weights.

    ``d2ext.checkpoint.flow.load_flow_weights`` reads ``MODEL.FLOW.WEIGHTS``.

    Raises:
        ConfigError: no such estimator.
    """
    name = cfg.MODEL.FLOW.NAME
    if name not in FLOW_REGISTRY:
        known = ", ".join(sorted(name for name, _ in FLOW_REGISTRY))
        raise ConfigError(f"MODEL.FLOW.NAME is {name!r}; it must be one of {known}.")
    estimator_class = FLOW_REGISTRY.get(name)
    return estimator_class(**estimator_class.from_config(cfg)).eval().requires_grad_(False)
