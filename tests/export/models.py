"""Tiny models whose scores differ from each other, as a trained model's do: with random weights all are
nearly equal, and rounding decides which are the best. Flows, offsets and fusion, which begin near 0,
have an effect."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from d2ext.export import exportable
from d2ext.testing import tiny_config

_NEARLY_ZERO = re.compile(r"fusion\.(refine|residual_flow\.3)\.weight")
_SCORES = re.compile(r"(logits|heat.*output|stacks\.\d\.predictor|merge_maps).*weight")


def lively_model(architecture: str, options: Sequence[Any] = ()) -> tuple[CfgNode, Any]:
    """Config and model of an architecture."""
    cfg = tiny_config(architecture)
    cfg.merge_from_list(list(options))
    torch.manual_seed(0)
    model = build_model(cfg)
    form = exportable(cfg, model).export_form()
    size = (64, 96) if form.multiple else form.size
    size = tuple(side - form.less for side in size)
    kind = nn.modules.batchnorm._BatchNorm
    norms = any(isinstance(x, kind) for x in model.train().modules())
    with torch.no_grad():
        for _ in range(20 if norms else 0):  # batch norms learn their statistics
            model.network(model.normalize(torch.rand(4, 3, *size) * 255))
        for name, parameter in model.named_parameters():
            if _SCORES.search(name):
                parameter.mul_(2)
            if _NEARLY_ZERO.match(name) or (parameter.dim() > 1 and not parameter.any()):
                parameter.normal_(std=0.05)
    return cfg, model.eval()
