"""The keys of data, training and runs, which every script that trains shares."""

import os
import re
import secrets
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, model_validator

from common.cli import Keys, key
from common.data import pathmnist

LAST_SEED = 2**32 - 1
MIN_TRAIN_TILES = 45  # of training: every class has some, and the phantom's test split has every class
DEVICES = ("auto", "cpu", "cuda")
AUGMENTATIONS = {  # the steps of each part; docs/running.md describes the parts
    "none": (),
    "dihedral": ("dihedral",),
    "stain": ("dihedral", "stain", "zoom"),
    "ta_wide": ("flip", "ta_wide", "erase"),
    "auto": ("flip", "auto", "erase"),
}


def _checked_run_id(run_id: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", run_id):
        raise ValueError("a run id names files: use up to 64 letters, digits, '.', '_' and '-'")
    return run_id


def _checked_augmentation(names: str) -> str:
    for name in names.split(","):
        if name not in AUGMENTATIONS:
            raise ValueError(f"unknown part {name}; choose from {', '.join(AUGMENTATIONS)}")
    return names


RunId = Annotated[str, AfterValidator(_checked_run_id)]
AugmentationNames = Annotated[str, AfterValidator(_checked_augmentation)]


def _new_run_id() -> str:
    """A random id, or W&B's id under a W&B agent."""
    if "WANDB_SWEEP_ID" in os.environ and "WANDB_RUN_ID" in os.environ:
        return os.environ["WANDB_RUN_ID"]
    return secrets.token_hex(4)


class FolderConfig(Keys):
    """Where a command reads and writes."""

    data_root: Path = key(
        lambda: os.environ.get("PATHMNIST_ROOT") or "~/.medmnist",
        "folder of the data files (default: $PATHMNIST_ROOT, else ~/.medmnist)",
    )
    output_dir: Path = key(Path("my"), "folder of runs/, checkpoints/, fig/ and wandb/")


class ScriptConfig(FolderConfig):
    """Also where a script computes, and whether it logs to W&B."""

    device: str = key("auto", "computing device; auto is CUDA if there is one", choices=DEVICES)
    wandb: str = key(
        "auto",
        "W&B mode; auto is $WANDB_MODE, else online where an API key is configured, else offline",
        choices=("auto", "online", "offline", "disabled"),
    )


class TrainingConfig(ScriptConfig):
    """The keys of a script that trains: its data, the run's name, and the training loop's."""

    dataset: str = key(
        pathmnist.NAME, "data set; phantom is generated, without download", choices=(pathmnist.NAME, "phantom")
    )
    size: int = key(64, "tile side in pixels", choices=tuple(pathmnist.MD5))
    train_tiles: int | None = key(
        lambda given: pathmnist.PHANTOM_TRAIN_TILES if given["dataset"] == "phantom" else None,
        f"number of training tiles; {pathmnist.NAME}: a part in which each class keeps its share (default: all); "
        f"phantom: so many are generated (default: {pathmnist.PHANTOM_TRAIN_TILES})",
        ge=MIN_TRAIN_TILES,
    )
    seed: int = key(0, "seed of weights, shuffling and augmentation", ge=0, le=LAST_SEED)
    run_id: RunId = key(
        _new_run_id,
        "name of the run; an unfinished run is continued (default: a new id; under a W&B agent, the agent's id)",
    )
    precision: str = key(
        "auto", "of training; auto is bf16 on a GPU that has it, else fp32", choices=("auto", "fp32", "bf16")
    )

    input_size: int = key(
        lambda given: max(64, given["size"]),
        "side in pixels of the network's inputs; tiles are resized before they are augmented "
        "(default: 64, or size where that is larger)",
        ge=8,
    )
    model_name: str = key("resnet18", "network of torchvision, timm:NAME, or tf_efficientnet_lite0 (to 2)")
    n_epochs: int = key(5, "largest number of epochs", ge=1)
    batch_size: int = key(64, "tiles per step", ge=3)

    optimizer: str = key("adam", "Adam, or AdamW with decoupled weight decay", choices=("adam", "adamw"))
    amsgrad: bool = key(False, "use the maximum of past second moments (Reddi et al. 2018)")
    lr: float = key(1e-3, "learning rate at its peak", gt=0)
    lr_min: float = key(0.0, "the cosine ends at this factor of lr; 1: constant lr", ge=0, le=1)
    lr_warmup_epochs: int = key(
        0, "epochs of linear warm-up; half of n_epochs where it would be n_epochs or more", ge=0
    )
    lr_warmup_decay: float = key(0.1, "the warm-up starts at this factor of lr", gt=0, le=1)
    weight_decay: float = key(0.0, "weight decay", ge=0)

    augmentation: AugmentationNames = key(
        "none", f"augmentation of the training tiles: {', '.join(AUGMENTATIONS)}, or several joined by commas"
    )
    label_smoothing: float = key(0.0, "share of the target that is spread evenly over all classes", ge=0, lt=1)

    early_stopping_patience: int | None = key(
        None,
        "stop after N epochs, the warm-up not counted, without a better `select_on` (`last`: loss); None: never",
        ge=1,
    )
    early_stopping_delta: float = key(0.0, "only a larger rise of ACC or AUC, or fall of the loss, counts", ge=0)
    select_on: str = key(
        "validate/acc",
        "the metric that chooses the epoch with the best weights, or `last` for the last epoch",
        choices=("validate/acc", "validate/auc", "validate/loss", "last"),
    )
    ema_decay: float = key(
        0.0,
        "score a moving average (EMA) of the weights in their place; this is its decay per step if the run had "
        "1,000 steps (0.99: the average goes over about the last tenth of a run); 0: off",
        ge=0,
        lt=1,
    )
    reestimate_batchnorm: bool = key(
        False,
        "before scoring, measure BatchNorm statistics again, on training tiles without augmentation; always on "
        "with EMA",
    )
    test: bool = key(True, "score the test tiles at the end; False: a run that serves to choose a recipe")
    tta: bool = key(True, "also score the test tiles averaged over their 8 flips and quarter turns")

    @model_validator(mode="after")
    def _room_after_the_warm_up(self) -> Self:
        """Shorten a warm-up that would fill the whole run."""
        if 0 < self.lr_warmup_epochs >= self.n_epochs:
            self._set("lr_warmup_epochs", self.n_epochs // 2)
        return self
