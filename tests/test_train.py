from typing import Any

import pytest
import torch

import train
from common.cli import parse
from common.training.optimizer import build_optimizer


def read(*arguments: str) -> train.TrainConfig:
    return parse(train.TrainConfig, arguments)


def differing(one: train.TrainConfig, other: train.TrainConfig) -> dict[str, Any]:
    ignored = ("run_id", "ablation")
    before, after = one.as_dict(), other.as_dict()
    return {name: after[name] for name in after if name not in ignored and after[name] != before[name]}


def test_the_courseworks_weight_decay_changes_no_weight() -> None:
    for keys, same in (((), True), (("--weight_decay=0.05",), False)):
        layer = torch.nn.Linear(50, 40)
        optimizer, before = build_optimizer(layer, read(*keys)), layer.weight.clone()
        layer.weight.grad = torch.zeros(40, 50)
        optimizer.step()
        assert torch.equal(layer.weight, before) == same


def test_the_configuration_is_the_same_for_every_number_of_tiles() -> None:
    assert differing(read(), read("--size=28", "--train_tiles=1800")) == {"size": 28, "train_tiles": 1800}


def test_the_defaults_are_the_courseworks() -> None:
    config = read()
    assert (config.model_name, config.augmentation, config.batch_size, config.n_epochs) == (
        *("mobilenet_v3_large", "ta_wide"),
        *(512, 20),
    )
    assert (config.optimizer, config.lr, config.lr_min, config.lr_warmup_epochs) == (
        *("adamw", 0.0019976195957370426),
        *(0.1, 2),
    )
    assert (config.early_stopping_patience, config.early_stopping_delta, config.label_smoothing) == (3, 0.01, 0.1)
    assert (config.weight_decay, config.reestimate_batchnorm) == (1.0640579453275e-06, True)


@pytest.mark.parametrize(
    ("ablation", "changes"),
    [
        ("combined", {}),
        ("without_augmentation", {"augmentation": "none"}),
        ("without_early_stopping", {"early_stopping_patience": None}),
        ("without_label_smoothing", {"label_smoothing": 0.0}),
        ("without_lr_strategy", {"lr_min": 1.0, "lr_warmup_epochs": 0}),
        ("without_lr_warmup", {"lr_warmup_epochs": 0}),
        ("without_weight_decay", {"weight_decay": 0.0}),
        ("with_stain_only", {"augmentation": "stain"}),
        ("with_ema", {"ema_decay": 0.99}),
        ("with_all", {"augmentation": "stain", "ema_decay": 0.99}),
    ],
)
def test_an_ablation_changes_the_keys_of_its_row_and_no_others(ablation: str, changes: dict[str, Any]) -> None:
    assert differing(read(), read(f"--ablation={ablation}")) == changes
