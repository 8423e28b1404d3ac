"""Tasks 3 and 4: MobileNetV3-Large from scratch on PathMNIST, with training techniques; what sweep.yaml runs.

    python train.py                                 # with a GPU: the coursework's configuration, 64 pixels
    python train.py --size 28                       # a CPU: downloads 206 MB once
    python train.py --dataset phantom --size 28     # a CPU without any data: generated tiles
    python -m study.sweep ablation.yaml            # Task 4: what each technique adds
    wandb sweep sweep.yaml                          # Task 4: the search; prints the command for its agents
    python -m study.sweep sweep.yaml --count 30    # the same search without an account

The defaults are the coursework's configuration. The coursework reports test AUC 0.988 and test ACC 0.913 for it on
the full PathMNIST at 64 pixels, one seed. Techniques that it does not have are off by default: EMA, stain
augmentation, selection by other scores. One is on: the statistics of BatchNorm are measured again before each
validation. With MobileNetV3's momentum of 0.01 the running ones lag behind, and early stopping would follow noise.
The weights of the best epoch are scored, not the last ones.

Leaves the same records as task1.py; the figures are in my/fig/task3/.
"""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import model_validator

from common.cli import UsageError, key, run_script
from common.config import TrainingConfig
from common.training.loop import train_from_scratch

# The coursework's configuration of Tasks 3 and 4, with `reestimate_batchnorm`.
COURSEWORK: dict[str, Any] = {
    "augmentation": "ta_wide",
    "batch_size": 512,
    "early_stopping_delta": 0.01,
    "early_stopping_patience": 3,
    "label_smoothing": 0.1,
    "lr": 0.0019976195957370426,
    "lr_min": 0.1,
    "lr_warmup_epochs": 2,
    "model_name": "mobilenet_v3_large",
    "n_epochs": 20,
    "optimizer": "adamw",
    "reestimate_batchnorm": True,
    "weight_decay": 1.0640579453275e-06,
}

# The rows of the ablation table: the keys that each row changes in the coursework's configuration. The rows
# without_… switch off one of the coursework's techniques; the rows with_… have another one, added or in its place.
ABLATIONS: dict[str, dict[str, Any]] = {
    "combined": {},
    "without_augmentation": {"augmentation": "none"},
    "without_early_stopping": {"early_stopping_patience": None},
    "without_label_smoothing": {"label_smoothing": 0.0},
    "without_lr_strategy": {"lr_min": 1.0, "lr_warmup_epochs": 0},
    "without_lr_warmup": {"lr_warmup_epochs": 0},
    "without_weight_decay": {"weight_decay": 0.0},
    "with_stain_only": {"augmentation": "stain"},  # in the place of ta_wide
    "with_ema": {"ema_decay": 0.99},
    "with_all": {"augmentation": "stain", "ema_decay": 0.99},
}


class TrainConfig(TrainingConfig):
    """The coursework's configuration, and the row of the ablation table that changes it."""

    ablation: str = key(
        "combined",
        "a row of the ablation table: the configuration with one or two techniques changed",
        choices=tuple(ABLATIONS),
    )

    @classmethod
    def recipe(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The coursework's configuration with the changes of the row."""
        return {**COURSEWORK, **ABLATIONS.get(given.get("ablation", "combined"), {})}

    @model_validator(mode="after")
    def _is_the_row(self) -> Self:
        """Raise UsageError where a key that was given undoes the row's change."""
        for name, value in ABLATIONS[self.ablation].items():
            if getattr(self, name) != value:
                problem = f"--{name} {getattr(self, name)}: --ablation {self.ablation} sets this key itself"
                raise UsageError(f"{problem}; leave one of them out")
        return self


def main(config: TrainConfig) -> None:
    """Model → data → fit → test → records and figures: the same for every network that is trained from scratch."""
    train_from_scratch("task3", config)


if __name__ == "__main__":
    run_script(main, TrainConfig)
