"""Task 5: fine-tuning a pre-trained network, compared with the same network from scratch.

    python task5.py                        # with a GPU: MobileNetV3-Large with its ImageNet weights
    python task5.py --size 28 --model_name tf_efficientnet_lite1   # a CPU: smaller inputs
    python task5.py --weights FILE.pth     # or a torchvision entry

Tiles are resized to the side that the weights were trained with (224 pixels for MobileNetV3-Large). With batches
of 512, the run from scratch then needs about 27 GB of a GPU in bf16: --batch_size 128 or --input_size 64 needs
less. All layers but the classifier are frozen, so their features are computed once. Then the same network is
trained from random weights, with the same seed and epochs, but always with train.py's learning rate, warm-up and
weight decay. The ImageNet weights of tf_efficientnet_lite1 are in a Python package; its recipe trains all layers.
The defaults below are those of MobileNetV3-Large; a run's config.json has the values that it used.

Each run, <run_id> and <run_id>-scratch, leaves the same records as task1.py, and figures in my/fig/task5/. The
comparison is in my/runs/<run_id>/comparison.md and my/fig/task5/<run_id>-comparison.png.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from common.cli import UsageError, key, run_script  # before torch: common/__init__.py sets how its threads wait

# isort: split
import torch
from pydantic import model_validator

from common.config import TrainingConfig
from common.data.batches import device_splits
from common.data.dataset import Dataset, load_dataset
from common.files import write_text
from common.finetune.features import cached_splits
from common.finetune.network import TRAIN_PARTS, build_fine_tuned, lr_factors
from common.finetune.weights import (
    PACKAGED,
    SCRATCH,
    Weights,
    default_weights,
    inputs_of,
    load_weights,
    network_of,
)
from common.records.read import Record, is_finished, run_folder
from common.records.run import Run, check_record
from common.training.device import Compute
from common.training.loop import Trainer
from common.training.models import check_model_name
from study.figures import draw_curves
from study.groups import CONVERGED_WITHIN, Group
from study.tables import difference_table
from train import COURSEWORK as TASK3

# The coursework's configuration: frozen convolutions, and a lower learning rate than Task 3's. Augmentation is by
# flips and quarter turns alone, because a frozen network's features of these 8 views can be kept. Without
# early stopping, both runs of the comparison have the same number of epochs.
COURSEWORK: dict[str, Any] = TASK3 | {
    "augmentation": "dihedral",
    "early_stopping_delta": 0.0,
    "early_stopping_patience": None,
    "lr": 5e-4,
    "lr_warmup_epochs": 0,
}

# What the EfficientNet-Lite networks change in COURSEWORK. The trials of study/recipes.yaml chose between these
# values and others of augmentation, lr, n_epochs and input_size; the rest was not varied.
LITE_RECIPE: dict[str, Any] = {
    "augmentation": "stain",
    "batch_size": 64,
    "ema_decay": 0.99,
    "input_size": 64,
    "lr": 3e-3,
    "lr_min": 0.0,
    "lr_warmup_epochs": 1,
    "n_epochs": 6,
    "select_on": "last",
    "train_part": "all",
    "weight_decay": 0.01,
}

# The changes for a network without pretrained weights: nothing can be frozen, and it needs train.py's
# learning rate, warm-up and weight decay. All other keys stay, also the number of epochs.
FROM_SCRATCH: dict[str, Any] = {
    "train_part": "all",
    "backbone_lr_factor": 1.0,
    **{name: TASK3[name] for name in ("lr", "lr_warmup_epochs", "weight_decay")},
}


class Task5Config(TrainingConfig):
    """The keys of a network that starts from pretrained weights: the coursework's Task 5, or a Lite network's."""

    model_name: str = key(
        "mobilenet_v3_large",
        "torchvision classification model, tf_efficientnet_lite0 (to 2), or timm:NAME for one of the package timm "
        "(default: that of `weights`, else mobilenet_v3_large)",
    )
    weights: str = key(
        None,
        "a torchvision entry such as ResNet18_Weights.IMAGENET1K_V1, efficientnet_lite0_imagenet, a file, or none "
        "for random weights (default: the network's ImageNet weights)",
    )
    train_part: str = key(
        "classifier", "the new last layer, all that is not convolutional, or all layers", choices=TRAIN_PARTS
    )
    backbone_lr_factor: float = key(
        0.1, "with train_part=all: the first layers learn with lr times this, the last one with lr", gt=0, le=1
    )
    input_size: int = key(
        None, "side in pixels of the network's inputs (default: that of the weights' training; Lite: 64)", ge=8
    )
    scratch: bool = key(True, "also train the same network from scratch, and compare")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Fill in defaults that follow from other keys. Raises UsageError where keys contradict each other."""
        check_model_name(self.model_name)
        if self.weights is None:
            self._set("weights", default_weights(self.model_name))
        if self.input_size is None:
            self._set("input_size", inputs_of(self.model_name, self.weights)[0])
        if self.weights == SCRATCH and self.train_part != "all":
            raise UsageError(f"--train_part {self.train_part}: random weights cannot stay frozen; use all")
        return self

    @classmethod
    def recipe(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The network that `weights` belong to, and its recipe; also the changes for random weights."""
        owner = network_of(given.get("weights", ""))
        implied = {**COURSEWORK, **({"model_name": owner} if owner else {})}
        if given.get("model_name", owner) in PACKAGED:
            implied |= LITE_RECIPE
        return implied | FROM_SCRATCH if given.get("weights") == SCRATCH else implied

    def runs(self) -> list["Task5Config"]:
        """The configuration of each run: the fine-tuned one, then the one from scratch."""
        if not self.scratch or self.weights == SCRATCH:
            return [self]
        return [self, self.replaced(**FROM_SCRATCH, weights=SCRATCH, run_id=f"{self.run_id}-scratch")]


def main(config: Task5Config) -> None:
    """Weights and data → the runs that are not finished → comparison."""
    compute = Compute.of(config.device, config.precision).prepare_process()
    runs = config.runs()
    weights = {run.weights: load_weights(run.weights, run.model_name) for run in runs}
    dataset = load_dataset(config.dataset, config.size, config.data_root, config.train_tiles)
    for single in runs:  # both first: no refusal comes after hours of training
        facts = {"data_fingerprint": dataset.fingerprint, "weights": weights[single.weights].record()}
        check_record(single, {"task": "task5", **facts})
    for single in runs:
        if len(runs) > 1 and is_finished(config.output_dir, single.run_id):  # `Run` refuses a single one
            print(f"run {single.run_id} is finished already")
        else:
            train(single, weights[single.weights], dataset, compute)
    if len(runs) > 1 and config.test:
        compare(config)


def train(config: Task5Config, weights: Weights, dataset: Dataset, compute: Compute) -> None:
    """One run: model → features, where the network is frozen → fit → test → records and figures."""
    torch.manual_seed(config.seed)
    model = build_fine_tuned(config.model_name, weights, config.input_size, config.train_part)
    name = Path(config.weights).name  # of a file without its folders
    start = "from scratch" if config.weights == SCRATCH else f"from {name}, training {config.train_part}"
    facts, title = {"weights": weights.record()}, f"{config.model_name} {start}"
    run = Run("task5", config, dataset, compute.name, network=title, facts=facts)
    started = time.perf_counter()
    if model.frozen:
        splits = cached_splits(model, dataset, config, compute.device)
    else:
        splits = device_splits(dataset, config, compute.device)
    seconds = time.perf_counter() - started
    factors = lr_factors(model, config.backbone_lr_factor)
    trainer = Trainer(model, splits, config, compute, run, lr_factors=factors)
    trainer.fit()
    summary = trainer.test()
    summary["wall_seconds"] += seconds
    run.finish(trainer.history, summary)


def compare(config: Task5Config) -> None:
    """The finished runs side by side: a table of convergence and scores, and the curves in one figure."""
    folder, runs = config.output_dir, config.runs()
    tuned = Group("fine-tuned", [Record.read(folder, runs[0].run_id)])
    scratch = Group("from scratch", [Record.read(folder, runs[1].run_id)])
    title = f"{config.model_name} · {tuned.first.summary['dataset']}"
    words = f"the first epoch whose validation ACC is within {CONVERGED_WITHIN:g} of the run's best one."
    lines = [f"{title} · seed {config.seed}. Epoch of convergence: {words}", "", *difference_table(tuned, scratch)]
    table = run_folder(folder, config.run_id) / "comparison.md"
    figure = folder / "fig" / "task5" / f"{config.run_id}-comparison.png"
    write_text(table, "\n".join(lines) + "\n")
    draw_curves(figure, {group.title: group.records for group in (scratch, tuned)}, f"Task 5 · {title}")
    print("\n".join([*lines, "", f"table and figure:\n  {table}\n  {figure}"]))


if __name__ == "__main__":
    run_script(main, Task5Config)
