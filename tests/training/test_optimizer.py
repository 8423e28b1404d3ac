"""The optimiser's groups, and the learning rate of every step."""

import numpy as np
import pytest
import torch
from conftest import MODEL

from common.config import TrainingConfig
from common.training.models import build_model
from common.training.optimizer import build_optimizer, learning_rate_factor


def test_the_learning_rate_falls_along_a_half_cosine() -> None:
    config = TrainingConfig(n_epochs=10, lr_min=0.1)
    factors = [learning_rate_factor(step, 10, config) for step in range(100)]
    assert factors[0] == 1
    assert factors[49] + factors[50] == pytest.approx(1.1)
    assert factors[99] == pytest.approx(0.1)
    assert factors == sorted(factors, reverse=True)
    constant = TrainingConfig(n_epochs=10, lr_min=1.0)
    assert {learning_rate_factor(step, 10, constant) for step in range(100)} == {1}


def test_the_warm_up_rises_in_a_straight_line_to_the_peak() -> None:
    config = TrainingConfig(n_epochs=10, lr_min=0.1, lr_warmup_epochs=2, lr_warmup_decay=0.1)
    factors = [learning_rate_factor(step, 10, config) for step in range(100)]
    np.testing.assert_allclose(np.diff(factors[:21]), 0.9 / 20)
    assert factors[0] == pytest.approx(0.1)
    assert factors[20] == 1 == max(factors)
    assert factors[99] == pytest.approx(0.1)


def test_every_parameter_has_the_weight_decay_and_its_learning_rate_factor() -> None:
    model = build_model(MODEL, 9, 28)
    names = dict(model.named_parameters())
    first, config = next(iter(names)), TrainingConfig(weight_decay=0.3, optimizer="adamw", amsgrad=True)
    optimizer = build_optimizer(model, config, {first: 0.1})
    assert isinstance(optimizer, torch.optim.AdamW)
    assert type(build_optimizer(model, TrainingConfig())) is torch.optim.Adam
    factors = {id(p): group["lr_factor"] for group in optimizer.param_groups for p in group["params"]}
    assert factors == {id(p): 0.1 if name == first else 1.0 for name, p in names.items()}
    assert all((group["weight_decay"], group["amsgrad"]) == (0.3, True) for group in optimizer.param_groups)
