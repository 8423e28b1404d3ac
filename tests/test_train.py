import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train
from common.cli import UsageError, parse
from common.training.metrics import softmax
from common.training.optimizer import build_optimizer

COURSEWORK = {
    "amsgrad": False,
    "augmentation": "ta_wide",
    "batch_size": 512,
    "early_stopping_delta": 0.01,
    "early_stopping_patience": 3,
    "label_smoothing": 0.1,
    "lr": 0.0019976195957370426,
    "lr_min": 0.1,
    "lr_warmup_decay": 0.1,
    "lr_warmup_epochs": 2,
    "model_name": "mobilenet_v3_large",
    "n_epochs": 20,
    "weight_decay": 1.0640579453275e-06,
}


def read(*arguments: str) -> train.TrainConfig:
    return parse(train.TrainConfig, arguments, "")


def differing(one: train.TrainConfig, other: train.TrainConfig) -> dict[str, Any]:
    ignored = ("run_id", "ablation")
    before, after = one.as_dict(), other.as_dict()
    return {name: after[name] for name in after if name not in ignored and after[name] != before[name]}


def test_the_defaults_are_the_courseworks_configuration() -> None:
    values = read().as_dict()
    assert {name: values[name] for name in COURSEWORK} == COURSEWORK
    assert values["optimizer"] == "adamw"
    off = ("ema_decay", "mixup_alpha", "cutmix_alpha", "norm_weight_decay")
    assert not any(values[name] for name in off)


def test_the_configuration_is_the_same_for_every_number_of_tiles() -> None:
    assert differing(read(), read("--size=28", "--train_tiles=1800")) == {"size": 28, "train_tiles": 1800}


@pytest.mark.parametrize("ablation", train.ABLATIONS)
def test_an_ablation_changes_the_keys_of_its_row_and_no_others(ablation: str) -> None:
    assert differing(read(), read(f"--ablation={ablation}")) == train.ABLATIONS[ablation]


def test_no_two_ablations_are_equal() -> None:
    rows = [sorted(changes.items(), key=str) for changes in train.ABLATIONS.values()]
    assert all(one != other for index, one in enumerate(rows) for other in rows[:index])


def test_a_key_that_contradicts_its_ablation_is_refused() -> None:
    with pytest.raises(
        UsageError, match="--augmentation auto: --ablation without_augmentation sets this key itself"
    ):
        read("--ablation=without_augmentation", "--augmentation=auto")
    with pytest.raises(UsageError, match="did you mean with_ema"):
        read("--ablation=with_emma")


def test_none_switches_early_stopping_off() -> None:
    assert read("--early_stopping_patience=None").early_stopping_patience is None
    assert (
        read("--early_stopping_patience=None", "--ablation=without_early_stopping").early_stopping_patience is None
    )
    with pytest.raises(UsageError, match="--early_stopping_patience 0: must be at least 1"):
        read("--early_stopping_patience=0")


def test_a_run_with_every_technique_records_scores_with_and_without_tta(
    tmp_path: Path, phantom_root: Path
) -> None:
    train.main(
        read(
            "--dataset=phantom",
            "--size=28",
            "--input_size=28",
            "--train_tiles=90",
            "--model_name=shufflenet_v2_x0_5",
            "--n_epochs=2",
            "--batch_size=32",
            "--augmentation=ta_wide,stain",
            "--mixup_alpha=0.2",
            "--cutmix_alpha=1",
            "--ema_decay=0.99",
            "--norm_weight_decay=0",
            "--amsgrad=True",
            "--select_on=validate/loss",
            "--run_id=r",
            f"--data_root={phantom_root}",
            f"--output_dir={tmp_path}",
        )
    )
    summary = json.loads((tmp_path / "runs/r/summary.json").read_text())
    assert summary["task"] == "task3"
    assert summary["tta"]["epoch"] == summary["best"]["epoch"]
    assert summary["test/acc"] == summary["best"]["acc"]["value"]
    with np.load(tmp_path / "runs/r/scores.npz", allow_pickle=False) as scores:
        plain, averaged = softmax(scores["best_logits"]), softmax(scores["tta_logits"])
        assert summary["tta"]["acc"]["value"] == np.mean(averaged.argmax(1) == scores["targets"])
        assert summary["best"]["acc"]["value"] == np.mean(plain.argmax(1) == scores["targets"])
        assert not np.allclose(plain, averaged)
    assert len(list((tmp_path / "fig/task3").glob("r-*.png"))) == 4


def test_without_the_courseworks_weight_decay_the_weights_are_the_same_to_the_last_bit() -> None:
    def trained(argument: str) -> torch.Tensor:
        config = read(argument)
        layer = torch.nn.Linear(50, 40)
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(-3, 3, 2000).view(40, 50))
        optimizer = build_optimizer(layer, config)
        random = torch.Generator().manual_seed(0)
        for _ in range(20):
            layer.weight.grad = torch.randn(40, 50, generator=random)
            layer.bias.grad = torch.zeros(40)
            optimizer.step()
        return layer.weight.detach()

    torch.manual_seed(0)
    combined = trained("--ablation=combined")
    assert torch.equal(trained("--ablation=without_weight_decay"), combined)
    assert not torch.equal(trained("--weight_decay=0.05"), combined)
