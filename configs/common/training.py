"""What a lazy config has beside its model, taken from the YAML config of the same name."""

from typing import Any

import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler
from omegaconf import DictConfig

from d2ext.config import load_config
from d2ext.data import build_test_loader, build_train_loader
from d2ext.evaluation import build_evaluator
from d2ext.model_zoo import find_config_file


def training(name: str) -> tuple[dict[str, Any], DictConfig, DictConfig, DictConfig]:
    """``dataloader, optimizer, lr_multiplier, train``, as Detectron2's lazyconfig_train_net.py reads.

    ``dataloader.cfg`` is the YAML config: ``dataloader.cfg.overrides = ["DATASETS.TRAIN", "('own',)"]``
    changes what the loaders and the evaluator read.
    """
    yaml = load_config(find_config_file(name))
    solver = yaml.SOLVER
    train = LazyConfig.load(find_config_file("common/train.py")).train
    train.max_iter = solver.MAX_ITER
    train.device = "cuda" if torch.cuda.is_available() else "cpu"

    cfg = L(load_config)(config_file=L(find_config_file)(name=name), overrides=[])
    dataloader = {
        "cfg": cfg,
        "train": L(build_train_loader)(cfg="${..cfg}"),
        "test": L(build_test_loader)(cfg="${..cfg}", dataset_name=yaml.DATASETS.TEST[0]),
        "evaluator": L(build_evaluator)(
            cfg="${..cfg}", dataset_name="${..test.dataset_name}", output_folder="output/inference"
        ),
    }

    params = L(get_default_optimizer_params)(
        base_lr="${..lr}",
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
    )
    common = {"params": params, "lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    if solver.OPTIMIZER == "SGD":
        optimizer = L(torch.optim.SGD)(**common, momentum=solver.MOMENTUM)
    else:
        adam = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[solver.OPTIMIZER]
        optimizer = L(adam)(**common, betas=tuple(solver.ADAM_BETAS))
    lr_multiplier = L(WarmupParamScheduler)(
        scheduler=L(MultiStepParamScheduler)(
            values=[solver.GAMMA**k for k in range(len(solver.STEPS) + 1)],
            milestones=[*solver.STEPS, solver.MAX_ITER],
        ),
        warmup_length=solver.WARMUP_ITERS / solver.MAX_ITER,
        warmup_method=solver.WARMUP_METHOD,
        warmup_factor=solver.WARMUP_FACTOR,
    )
    return dataloader, optimizer, lr_multiplier, train
