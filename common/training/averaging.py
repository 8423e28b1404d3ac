"""Averages that make the scores of short runs less noisy: an EMA of the weights, and new BatchNorm statistics."""

import copy
from collections.abc import Iterable

import torch
from torch import nn

REFERENCE_STEPS = 1000


class ExponentialMovingAverage:
    """A copy of a network whose weights follow the trained ones slowly.

    `decay` is for a run of 1,000 steps and is scaled to the run's length: a run of any length averages over the
    same share of itself (0.99: about its last tenth). At step t the decay is at most (1 + t) / (10 + t), as in
    TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, model: nn.Module, decay: float, n_steps: int) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = decay ** (REFERENCE_STEPS / n_steps)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards `model` after step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, inputs: Iterable[torch.Tensor]) -> None:
    """Replace every BatchNorm layer's running statistics by their mean over batches of inputs (N, 3, H, W).

    The running statistics of MobileNetV3 (momentum 0.01) lag hundreds of steps behind the weights, and averaged
    weights have no running statistics of their own. All other layers stay in eval mode, so dropout does nothing.
    Layers that `model.train()` leaves in eval mode are frozen, and keep their statistics.
    """
    model.train()
    kind = nn.modules.batchnorm._BatchNorm
    norms = {module: module.momentum for module in model.modules() if isinstance(module, kind) and module.training}
    model.eval()
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.train()
        norm.momentum = None  # with it, PyTorch takes the mean over all batches
    for batch in inputs:
        model(batch)
    for norm, momentum in norms.items():
        norm.momentum = momentum
    model.eval()
