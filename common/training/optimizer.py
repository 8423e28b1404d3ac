"""The optimiser, and the learning rate of every step."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from common.config import TrainingConfig


def learning_rate_factor(step: int, steps_per_epoch: int, config: TrainingConfig) -> float:
    """The factor of lr at `step`: a linear warm-up to 1, then half a cosine to `lr_min` at the last step.

    Warm-up after Goyal et al. 2017, cosine after Loshchilov & Hutter 2017, both by the step.
    """
    warmup = config.lr_warmup_epochs * steps_per_epoch
    if step < warmup:
        return config.lr_warmup_decay + (1 - config.lr_warmup_decay) * step / warmup
    progress = (step - warmup) / max(1, config.n_epochs * steps_per_epoch - 1 - warmup)
    return config.lr_min + (1 - config.lr_min) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(
    model: nn.Module, config: TrainingConfig, lr_factors: Mapping[str, float] = {}
) -> torch.optim.Optimizer:
    """The fused optimiser that the configuration names, over every trainable parameter.

    `lr_factors` multiply the learning rate of the parameters that they name; each factor has its group.
    """
    groups: dict[float, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factor = lr_factors.get(name, 1.0)
            groups.setdefault(factor, {"params": [], "lr_factor": factor})["params"].append(parameter)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    decay, amsgrad = config.weight_decay, config.amsgrad
    return kind(groups.values(), lr=config.lr, weight_decay=decay, amsgrad=amsgrad, fused=True)
