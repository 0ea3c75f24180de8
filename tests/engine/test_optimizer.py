"""Optimizers under mixed precision and clipping."""

import pytest
import torch
from torch import nn

from d2ext.config import ConfigError, get_cfg
from d2ext.engine.optimizer import build_optimizer


def step(device: str, *, dtype: str = "", clip: bool = False, scale: float = 1.0) -> torch.Tensor:
    """What a step makes of four weights, whose gradients loss scaling has multiplied by `scale`."""
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR, cfg.SOLVER.WEIGHT_DECAY = "Adam", 0.1, 0.0
    cfg.SOLVER.AMP.ENABLED, cfg.SOLVER.AMP.DTYPE = bool(dtype), dtype or "float16"
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = clip
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "norm"
    # Adam's first step has the size of the rate whatever the gradient, unless epsilon is as large.
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1e-8
    model = nn.Linear(4, 1, bias=False, device=device)
    nn.init.ones_(model.weight)
    optimizer = build_optimizer(cfg, model)
    assert optimizer.defaults["fused"] is not False  # which would mean tensor by tensor
    scaler = torch.amp.GradScaler(device, enabled=dtype == "float16", init_scale=scale)
    scaler.scale(model(torch.tensor([[1.0, -2.0, 0.0, 0.5]], device=device)).sum()).backward()
    scaler.step(optimizer)
    return model.weight.detach().cpu()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_mixed_precision_changes_no_step(dtype: str, clip: bool, device: str) -> None:
    """Gradients are unscaled before they are clipped."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    expected = step("cpu", clip=clip)
    assert not torch.equal(expected, step("cpu", clip=not clip))
    torch.testing.assert_close(step(device, dtype=dtype, clip=clip, scale=1024.0), expected)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_rates_of_parts_of_a_model(name: str) -> None:
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR, cfg.SOLVER.BIAS_LR_FACTOR = name, 0.1, 2.0
    cfg.SOLVER.LR_FACTORS = [["1", 4.0], ["1.0", 3.0]]
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    rates = {
        id(p): group["lr"]
        for group in build_optimizer(cfg, model).param_groups
        for p in group["params"]
    }
    found = {name: rates[id(p)] for name, p in model.named_parameters()}
    expected = {"0.weight": 0.1, "1.0.weight": 1.2, "1.1.weight": 0.4}
    expected |= {"0.bias": 0.2, "1.0.bias": 2.4, "1.1.bias": 0.8}
    assert found == pytest.approx(expected)
    cfg.SOLVER.LR_FACTORS = [["2.", 4.0]]
    with pytest.raises(ConfigError, match=r"2\."):
        build_optimizer(cfg, model)
