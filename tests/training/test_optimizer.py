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


def test_norms_and_biases_are_decayed_apart() -> None:
    model = build_model(MODEL, 9, 28)
    config = TrainingConfig(weight_decay=0.3, norm_weight_decay=0.0, optimizer="adamw", amsgrad=True)
    groups = build_optimizer(model, config).param_groups
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert len(decays) == len(list(model.parameters()))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_matrix = isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and name == "weight"
            assert decays[id(parameter)] == (0.3 if is_matrix else 0.0)
    assert all(group["amsgrad"] for group in groups)
    same = build_optimizer(model, TrainingConfig(weight_decay=0.3)).param_groups
    assert {group["weight_decay"] for group in same} == {0.3}
