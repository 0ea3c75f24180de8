"""Optimizers by name."""

import math
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.solver import build
from torch import nn

from d2ext.config import ConfigError

__all__ = ["build_optimizer"]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer ``SOLVER.OPTIMIZER``: "SGD", "Adam" or "AdamW".

    SGD is Detectron2's. For all three, ``SOLVER.{BASE_LR, WEIGHT_DECAY, WEIGHT_DECAY_NORM,
    WEIGHT_DECAY_BIAS, BIAS_LR_FACTOR, CLIP_GRADIENTS}`` have Detectron2's meaning; Adam and AdamW
    also read ``SOLVER.ADAM_BETAS``, and all three ``SOLVER.LR_FACTORS``. Adam adds the decay to the
    gradient (L2 penalty), AdamW shrinks the weights.

    Raises:
        ConfigError: another name, a model without trainable parameters, or a factor for none of them.
    """
    name = cfg.SOLVER.OPTIMIZER
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("The model has no trainable parameter; check MODEL.BACKBONE.FREEZE_AT.")
    if name == "SGD":
        sgd = torch.optim.SGD(
            _parameter_groups(cfg, model),
            lr=cfg.SOLVER.BASE_LR,
            momentum=cfg.SOLVER.MOMENTUM,
            nesterov=cfg.SOLVER.NESTEROV,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            foreach=True,
        )
        return _with_clipping(cfg, sgd)
    if name not in ("Adam", "AdamW"):
        raise ConfigError(f"SOLVER.OPTIMIZER is {name!r}; it must be 'SGD', 'Adam' or 'AdamW'.")
    # Loss scaling leaves it to a fused optimizer to unscale gradients, which clipping needs before.
    scaled = cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "float16"
    optimizer = getattr(torch.optim, name)(
        _parameter_groups(cfg, model),
        lr=cfg.SOLVER.BASE_LR,
        betas=tuple(cfg.SOLVER.ADAM_BETAS),
        weight_decay=cfg.SOLVER.WEIGHT_DECAY,
        # One pass over the weights instead of a dozen. None: PyTorch chooses; False would go tensor by
        # tensor.
        fused=None if scaled and cfg.SOLVER.CLIP_GRADIENTS.ENABLED else True,
    )
    return _with_clipping(cfg, optimizer)


def _parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Detectron2's, with the factors of ``SOLVER.LR_FACTORS``."""
    factors = cfg.SOLVER.LR_FACTORS
    names = [name for name, _ in model.named_parameters()]
    for prefix, _ in factors:
        if not any(name.startswith(prefix) for name in names):
            raise ConfigError(
                f'SOLVER.LR_FACTORS: no parameter of the model begins with "{prefix}".'
            )

    def factor(name: str) -> float:
        # Detectron2's own factor of biases would take the place of the others.
        bias = cfg.SOLVER.BIAS_LR_FACTOR if name.rpartition(".")[2] == "bias" else 1.0
        return bias * math.prod(value for prefix, value in factors if name.startswith(prefix))

    return build.get_default_optimizer_params(
        model,
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
        weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
        lr_factor_func=factor,
    )


def _with_clipping(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Detectron2's clipping, of the gradients that there are: a step may leave parameters without, and
    torch's clipping by value fails for these. Beside its types, "value" and "norm" of each parameter,
    there is "full_model", by the norm of all gradients together."""
    clipping = cfg.SOLVER.CLIP_GRADIENTS
    if not clipping.ENABLED:
        return optimizer
    if clipping.CLIP_TYPE == "full_model":
        clippers = {
            "global_clipper": lambda parameters: nn.utils.clip_grad_norm_(
                parameters, clipping.CLIP_VALUE, clipping.NORM_TYPE
            )
        }
    elif clipping.CLIP_TYPE in ("value", "norm"):
        clip = build._create_gradient_clipper(clipping)
        clippers = {"per_param_clipper": lambda p: None if p.grad is None else clip(p)}
    else:
        raise ConfigError(
            f'SOLVER.CLIP_GRADIENTS.CLIP_TYPE is "{clipping.CLIP_TYPE}"; it must be "value", "norm" or '
            '"full_model".'
        )
    optimizer.__class__ = build._generate_optimizer_class_with_gradient_clipping(
        type(optimizer), **clippers
    )
    return optimizer
