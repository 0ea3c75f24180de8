"""Optimizers under mixed precision and clipping."""

import pytest
import torch
from torch import nn

from d2ext.config import get_cfg
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
