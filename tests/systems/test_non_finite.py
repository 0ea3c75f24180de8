"""NaN anywhere in a network's heads is an iteration that is skipped, never the end of a training."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn

from d2ext.engine.train_loop import StepTrainer
from d2ext.testing import random_inputs, tiny_architectures, tiny_config


def last_layers(model: nn.Module) -> list[nn.Module]:
    """The last layer of the backbone and of each part of the rest that has parameters."""
    last = {}
    for name, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            part = name.rpartition(".")[0]
            last["backbone" if name.startswith("backbone.") else part] = module
    return list(last.values())


@pytest.mark.parametrize("architecture", tiny_architectures())
def test_nan_in_a_head_is_skipped(architecture: str) -> None:
    torch.manual_seed(0)
    cfg = tiny_config(architecture)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    data = (copy.deepcopy(inputs) for inputs in itertools.repeat(random_inputs()))
    trainer = StepTrainer(model, data, optimizer, seed=0, bad_step_limit=10**6)
    trainer.iter = 0
    before = {k: v.clone() for k, v in model.state_dict().items()}

    def run(module: nn.Module, *, one: bool) -> int:
        """One iteration with NaN in all or one of a layer's outputs; how many were skipped."""

        def spoil(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            factor = torch.ones_like(output)
            factor[(0,) * output.dim() if one else ...] = float("nan")
            return output * factor

        skipped = trainer.skipped
        hook = module.register_forward_hook(spoil)
        with EventStorage():
            trainer.run_step()
        hook.remove()
        if not trainer.updated:
            after = model.state_dict()
            assert all(torch.equal(after[k], v) for k, v in before.items())
        model.load_state_dict(before)
        return trainer.skipped - skipped

    layers = last_layers(model)
    assert [run(layer, one=False) for layer in layers] == [1] * len(layers)
    for layer in layers[-3:]:
        run(layer, one=True)  # no loss may look at that one
