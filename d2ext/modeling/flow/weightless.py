"""Optical flow without a network: OpenCV's, and the data set's own."""

from __future__ import annotations

from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from d2ext.config import ConfigError
from d2ext.modeling.flow.estimator import FLOW_REGISTRY, FlowEstimator


@FLOW_REGISTRY.register()
class DIS(FlowEstimator):
    """OpenCV's dense inverse search (arXiv 1603.03590) on grey images, preset "medium"; on the CPU."""

    min_size: ClassVar[int] = 32  # OpenCV refuses images of less than about 16 pixels
    follows_inference_mode: ClassVar[bool] = False

    def estimate(
        self, current: Tensor, reference: Tensor, inputs: list[dict[str, Any]] | None
    ) -> Tensor:
        # Not kept: it can be neither copied nor pickled.
        method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
        pairs = zip(_grey(current), _grey(reference), strict=True)
        flows = [method.calc(first, second, None).transpose(2, 0, 1) for first, second in pairs]
        height, width = current.shape[-2:]
        stacked = np.stack(flows) if flows else np.zeros((0, 2, height, width), np.float32)
        return torch.from_numpy(stacked).to(current.device)


def _grey(images: Tensor) -> list[np.ndarray]:
    """(B, 3, H, W) RGB → B images H×W uint8."""
    rounded = images.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [cv2.cvtColor(np.ascontiguousarray(x), cv2.COLOR_RGB2GRAY) for x in rounded]


@FLOW_REGISTRY.register()
class Exact(FlowEstimator):
    """The data set's own flow: ``flow`` (2, h, w) of the inputs, in pixels of their ``image``.

    Unknown motion (NaN) becomes 0. Images of another size than ``image`` are taken for a resized one.
    """

    follows_inference_mode: ClassVar[bool] = False

    def estimate(
        self, current: Tensor, reference: Tensor, inputs: list[dict[str, Any]] | None
    ) -> Tensor:
        if inputs is None or not all("flow" in x for x in inputs):
            raise ConfigError(
                'MODEL.FLOW.NAME "Exact" needs `flow` for each image, from the frame to the one before: '
                'set INPUT.MAPPER to "ClipMapper" and INPUT.VIDEO.FLOW to True, and use a data set that '
                "has optical flow, such as shapes_val_video; or set another MODEL.FLOW.NAME."
            )
        height, width = current.shape[-2:]
        flows = []
        for x in inputs:
            flow = x["flow"].to(current.device, torch.float32).nan_to_num(nan=0.0)
            # The nearest, so that motions of two objects are not mixed.
            resized = F.interpolate(flow[None], (height, width), mode="nearest-exact")[0]
            scale = resized.new_tensor([width / flow.shape[2], height / flow.shape[1]])
            flows.append(resized * scale[:, None, None])
        return torch.stack(flows) if flows else current.new_zeros(0, 2, height, width)
