"""A model with memory: it sees one square, larger with each frame, and remembers how many it saw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn


@dataclass
class Memory:
    """What the model knows of a video."""

    count: int
    last: Tensor
    """The frame before."""


@META_ARCH_REGISTRY.register()
class ToyVideo(nn.Module):
    """``inputs`` collects what :meth:`step` got."""

    has_memory = gives_ids = True

    def __init__(self, cfg: CfgNode | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.inputs: list[dict[str, Any]] = []

    def step(
        self, inputs: list[dict[str, Any]], memory: Memory | None
    ) -> tuple[list[dict[str, Any]], Memory]:
        (x,) = inputs
        self.inputs.append(x)
        assert x["is_first"] == (memory is None) and not torch.is_grad_enabled()
        count = 1 if memory is None else memory.count + 1
        instances = Instances((x["height"], x["width"]))
        instances.pred_boxes = Boxes(torch.tensor([[0.0, 0, 8 + count, 8]]))
        instances.scores, instances.pred_classes = torch.ones(1), torch.zeros(1, dtype=torch.int64)
        instances.pred_masks = torch.zeros((1, x["height"], x["width"]), dtype=torch.bool)
        instances.pred_masks[:, :8, : 8 + count] = True
        instances.track_ids = torch.tensor([7])
        return [{"instances": instances}], Memory(count, x["image"])
