from typing import Any

import pytest

import train
from common.cli import UsageError, parse


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
