import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import train
from common.cli import UsageError, parse
from common.training.metrics import softmax


def read(*arguments: str) -> train.TrainConfig:
    return parse(train.TrainConfig, arguments, "")


def differing(one: train.TrainConfig, other: train.TrainConfig) -> dict[str, Any]:
    ignored = ("run_id", "ablation")
    before, after = one.as_dict(), other.as_dict()
    return {name: after[name] for name in after if name not in ignored and after[name] != before[name]}


def test_the_configuration_is_the_same_for_every_number_of_tiles() -> None:
    assert differing(read(), read("--size=28", "--train_tiles=1800")) == {"size": 28, "train_tiles": 1800}


@pytest.mark.parametrize("ablation", train.ABLATIONS)
def test_an_ablation_changes_the_keys_of_its_row_and_no_others(ablation: str) -> None:
    assert differing(read(), read(f"--ablation={ablation}")) == train.ABLATIONS[ablation]


def test_a_key_that_contradicts_its_ablation_is_refused() -> None:
    with pytest.raises(
        UsageError, match="--augmentation auto: --ablation without_augmentation sets this key itself"
    ):
        read("--ablation=without_augmentation", "--augmentation=auto")
    with pytest.raises(UsageError, match="did you mean with_ema"):
        read("--ablation=with_emma")


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
