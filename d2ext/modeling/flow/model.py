"""``OpticalFlow``: any estimator as a model of its own, and the training of those that d2ext trains.

Letters: B pairs, H×W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from torch import Tensor
from torch.nn import functional as F

from d2ext.config import ConfigError
from d2ext.modeling.flow.colors import flow_colors
from d2ext.modeling.flow.estimator import FlowEstimator, build_flow
from d2ext.modeling.flow.pyramid_flow import PyramidFlow
from d2ext.modeling.meta_arch import MetaArch, output_size

# A level's loss counts this share of the next finer one's.
_LEVEL_WEIGHT = 0.5


@META_ARCH_REGISTRY.register()
class OpticalFlow(MetaArch):
    """Flow from ``image`` to ``reference``'s of each input; only ``PyramidFlow`` is trained.

    Inputs are those of ``INPUT.MAPPER`` ``FlowPairMapper``. An output is
    ``{"flow": (2, height, width)}``, x and y in pixels of the output.
    """

    @configurable
    def __init__(self, *, flow: FlowEstimator, **common: Any) -> None:
        """Args:
        flow: the estimator.
        common: see :class:`MetaArch`.
        """
        super().__init__(**common)
        self.flow = flow.requires_grad_(isinstance(flow, PyramidFlow))
        self.set_network(flow, lambda flow: flow)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments of the constructor. ``MODEL.FLOW.WEIGHTS`` is for models that estimate flow beside
        other things; this one's are ``MODEL.WEIGHTS``."""
        if cfg.MODEL.FLOW.WEIGHTS:
            raise ConfigError(
                "OpticalFlow reads its weights from MODEL.WEIGHTS: leave MODEL.FLOW.WEIGHTS empty. "
                "Published ones go through `d2ext convert` (flownet2, raft) first."
            )
        return {**super().from_config(cfg), "flow": build_flow(cfg)}

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """See :class:`MetaArch`.

        Raises:
            ConfigError: inputs without reference, or, in training, flow; an estimator that is not
                trained.
        """
        wanted = ("reference", "flow", "flow_valid") if self.training else ("reference",)
        for key in wanted:
            if not all(key in x for x in batched_inputs):
                raise ConfigError(
                    f'OpticalFlow needs `{key}` for each image: set INPUT.MAPPER to "FlowPairMapper" '
                    "and use pairs of images with flow, such as shapes_train_flow."
                )
        if not self.training:
            return self.inference(batched_inputs)
        if not isinstance(self.flow, PyramidFlow):
            raise ConfigError(
                f"MODEL.FLOW.NAME {type(self.flow).__name__!r} is not trained by d2ext, "
                '"PyramidFlow" is.'
            )
        current, targets = self.training_batch(batched_inputs)
        predictions = self.flow.flows(
            current, self._images([x["reference"] for x in batched_inputs])
        )
        self.put_picture(batched_inputs, current, targets, predictions)
        return self.losses(predictions, targets)

    def _images(self, inputs: list[dict[str, Any]]) -> Tensor:
        """(B, 3, H, W) RGB, 0..255, padded to a common size that the estimator takes."""
        images = [self.upload(x).float() for x in inputs]
        if self.input_format == "BGR":
            images = [image.flip(0) for image in images]
        return ImageList.from_tensors(images, self.flow.size_divisibility).tensor

    def preprocess(self, batched_inputs: list[dict[str, Any]]) -> Tensor:
        return self._images(batched_inputs)

    def encode_targets(
        self, batched_inputs: list[dict[str, Any]], images: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Flow (B, 2, H, W) and where it counts (B, 1, H, W) bool."""
        flow = images.new_zeros(len(images), 2, *images.shape[-2:])
        valid = torch.zeros_like(flow[:, :1], dtype=torch.bool)
        for i, x in enumerate(batched_inputs):
            height, width = x["flow_valid"].shape
            flow[i, :, :height, :width] = x["flow"].to(flow)
            valid[i, 0, :height, :width] = x["flow_valid"].to(valid)
        return flow, valid

    def losses(
        self, predictions: Sequence[Tensor], targets: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """Mean end-point error over the valid pixels, or cells, of each level; a weighted sum.

        Args:
            predictions: (B, 2, h_l, w_l), pixels; the coarsest first.
            targets: see :meth:`encode_targets`; a cell's is the mean of its valid pixels.
        """
        flow, valid = targets
        known = valid.float()
        total = flow.new_zeros(())
        for i, prediction in enumerate(reversed(predictions)):
            size = prediction.shape[-2:]
            share = F.adaptive_avg_pool2d(known, size)
            mean = F.adaptive_avg_pool2d(flow * known, size) / share.clamp(min=1e-6)
            # The root's gradient at 0 is infinite.
            error = (prediction - mean).square().sum(dim=1, keepdim=True).clamp(min=1e-12).sqrt()
            total = total + _LEVEL_WEIGHT**i * (error * share).sum() / share.sum().clamp(min=1)
        return {"loss_flow": total}

    @torch.no_grad()
    def inference(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        outputs = []
        for x in batched_inputs:  # whose sizes may differ
            pair = self._images([x]), self._images([x["reference"]])
            runs_as_network = any(True for _ in self.flow.parameters())
            flow = self.inference_network(*pair) if runs_as_network else self.flow(*pair, [x])
            height, width = x["image"].shape[-2:]
            outputs.append(flow[0, :, :height, :width])
        return self.postprocess(outputs, batched_inputs)

    def postprocess(
        self, predictions: Sequence[Tensor], batched_inputs: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Flows (2, h, w) of the inputs' images → ``flow`` at the size of the output, in its pixels."""
        results = []
        for flow, x in zip(predictions, batched_inputs, strict=True):
            size = output_size(x)
            if flow.shape[1:] != size:
                scale = flow.new_tensor([size[1] / flow.shape[2], size[0] / flow.shape[1]])
                flow = F.interpolate(flow[None], size, mode="bilinear")[0] * scale[:, None, None]
            results.append({"flow": flow})
        return results

    def draw_training(
        self, batched_inputs: list[dict[str, Any]], images: Tensor, targets: Any, predictions: Any
    ) -> tuple[str, Tensor]:
        flow, valid = targets
        pair = torch.cat([flow[0] * valid[0], predictions[-1][0]], dim=2)
        return "Left: annotated flow. Right: predicted flow", flow_colors(pair.cpu())
