"""NaN anywhere in a network's heads is an iteration that is skipped, never the end of a training."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import create_ddp_model
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from d2ext.engine import launch
from d2ext.engine.processes import RankError
from d2ext.engine.train_loop import StepTrainer
from d2ext.testing import random_inputs, tiny_architectures, tiny_config

# Architectures, and layers whose output is NaN in an iteration, one after the other.
TRAININGS = (
    ("YOLACT", ["backbone.output5", "head.prototypes.output"]),
    ("UPSNet", ["roi_heads.mask_head.predictor", "sem_seg_head.score"]),
    ("UPSNet", ["proposal_generator.rpn_head.anchor_deltas"]),
)


def train_with_nan_in_one(folder: str) -> None:
    """What each of two processes does: trainings with an iteration for each layer, whose output is NaN
    in rank 1 alone, and one without. Writes whether weights changed, and how many were skipped."""
    for number, (architecture, layers) in enumerate(TRAININGS):
        states = list(states_with_nan_in_one(architecture, layers))
        (Path(folder) / f"{number}_{comm.get_rank()}.json").write_text(json.dumps(states))


def states_with_nan_in_one(
    architecture: str, layers: list[str]
) -> Iterator[tuple[bool, int, float]]:
    torch.manual_seed(0)
    cfg = tiny_config(architecture)
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.001)
    wrapped = create_ddp_model(model, device_ids=None, broadcast_buffers=False)
    data = (copy.deepcopy(inputs) for inputs in itertools.repeat(random_inputs()))
    trainer = StepTrainer(wrapped, data, optimizer, seed=0)
    for trainer.iter, name in enumerate([*layers, ""]):
        hook = None
        if name and comm.get_rank() == 1:
            hook = model.get_submodule(name).register_forward_hook(lambda *x: x[2] * float("nan"))
        with EventStorage():
            trainer.run_step()
        if hook:
            hook.remove()
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        yield trainer.updated, trainer.skipped, weights.double().sum().item()


def test_nan_in_one_process_is_skipped_by_all(tmp_path: Path) -> None:
    """NaN that ends a forward pass is named: the others wait for gradients that this process lacks."""
    with pytest.raises(RankError, match=r"rank 1 failed: FloatingPointError: .*Inf/NaN"):
        launch(train_with_nan_in_one, 2, device="cpu", args=(str(tmp_path),))
    for number in (0, 1):
        first, second = (
            json.loads((tmp_path / f"{number}_{rank}.json").read_text()) for rank in (0, 1)
        )
        assert first == second
        updated, skipped, weights = zip(*first, strict=True)
        assert updated == (False, False, True) and skipped == (1, 2, 2)
        assert weights[0] == weights[1] != weights[2]


def last_layers(model: nn.Module) -> list[nn.Module]:
    """The last layer of the backbone and of each part of the rest that has parameters."""
    last = {}
    for name, module in model.named_modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            part = name.rpartition(".")[0]
            last["backbone" if name.startswith("backbone.") else part] = module
    return list(last.values())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("architecture", tiny_architectures())
def test_nan_in_a_head_is_skipped(architecture: str, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    cfg = tiny_config(architecture)
    cfg.MODEL.DEVICE = device
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
        else:
            model.load_state_dict(before)
        return trainer.skipped - skipped

    layers = last_layers(model)
    assert [run(layer, one=False) for layer in layers] == [1] * len(layers)
    for layer in layers[-3:]:
        run(layer, one=True)  # no loss may look at that one
