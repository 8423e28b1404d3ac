"""The keys of fine-tuning: the recipe of a network, defaults that follow from other keys, and contradictions."""

from dataclasses import dataclass
from typing import Any

from common.config import TrainingConfig, key
from common.errors import UsageError
from common.finetune import weights
from common.finetune.network import TRAIN_PARTS
from common.finetune.weights import SCRATCH

RANDOM_VIEWS = 16  # cached views of a tile, for augmentations with an unlimited number of views

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

# Chosen by validation scores alone, with 9,000 training tiles of PathMNIST at 28 pixels, seed 0 (n = 1 each).
# Validation loss and ACC at 64 pixels: 0.286 and 0.926 after 4 epochs (with lr 1e-3: 0.353 and 0.902), 0.231 and
# 0.947 after 8 epochs. 80 pixels give 0.262 and 0.938 after three of 4 epochs, but in the same time, twice as many
# epochs gain more.
LITE_RECIPE: dict[str, Any] = {
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
RECIPES = dict.fromkeys(weights.PACKAGED, LITE_RECIPE)


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig(TrainingConfig):
    """The keys of a network that starts from pretrained weights.

    `cache_features` is None until `features.decide_caching` has compared the size of the features with the memory.
    """

    model_name: str = key(
        "mobilenet_v3_large",
        f"torchvision classification model, {weights.LITE0}, or timm:NAME for one of the package timm "
        "(default: the one that `weights` belong to)",
        check=weights.check_network,
    )
    weights: str = key(
        None,
        "where the network starts: a torchvision entry such as ResNet18_Weights.IMAGENET1K_V1, a timm one such as "
        f"timm:resnet18.a1_in1k, {weights.LITE0_WEIGHTS}, a .pth, .pt or .safetensors file, the id of a run, or "
        f"{SCRATCH} "
        "(default: the network's ImageNet weights)",
    )
    train_part: str = key(
        "classifier",
        "what is trained: the new last layer, all that is not convolutional, or all layers",
        choices=TRAIN_PARTS,
    )
    adapt_batchnorm: bool = key(False, "update the frozen part's BatchNorm statistics with the training tiles")
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
    input_size: int = key(
        None,
        "side in pixels of the network's inputs (default: what the weights were trained on)",
        at_least=8,
    )
    cache_features: bool | None = key(
        None,
        "compute a frozen network's features once instead of in every epoch (default: where possible, if they fit "
        "into memory)",
    )
    feature_views: int | None = key(
        None,
        f"cached views of a training tile: itself and augmented ones (default: all 8 for dihedral, "
        f"{RANDOM_VIEWS} for random augmentations)",
        at_least=1,
    )

    def __post_init__(self) -> None:
        """Fill in defaults that follow from other keys. Raises UsageError where keys contradict each other."""
        super().__post_init__()
        if self.weights is None:
            self._set("weights", weights.default_weights(self.model_name))
        if self.weights == SCRATCH and self.train_part != "all":
            raise UsageError(f"--train_part {self.train_part}: random weights cannot stay frozen; use all")
        if self.adapt_batchnorm and self.train_part == "all":
            raise UsageError("--adapt_batchnorm: with --train_part all the statistics follow the tiles anyway")
        if self.unfreeze_epoch > 1 and self.train_part != "all":
            raise UsageError(f"--unfreeze_epoch {self.unfreeze_epoch}: only --train_part all unfreezes anything")
        obstacle = self._obstacle_to_caching()
        if self.cache_features and obstacle:
            raise UsageError(f"--cache_features: not possible with {obstacle}")
        if obstacle:
            self._set("cache_features", False)
        views, needed = self.feature_views, {"none": 1, "dihedral": 8}.get(self.augmentation)
        if self.cache_features is False:
            if views is not None:
                raise UsageError(f"--feature_views {views}: no features are cached here")
        elif views is None:
            self._set("feature_views", needed or RANDOM_VIEWS)
        elif needed not in (None, views):
            raise UsageError(f"--feature_views {views}: with augmentation {self.augmentation} it is {needed}")

    def _obstacle_to_caching(self) -> str:
        if self.train_part == "all":
            return "--train_part all, which changes the features"
        if self.adapt_batchnorm:
            return "--adapt_batchnorm, which changes the features"
        if self.mixup_alpha or self.cutmix_alpha:
            return "mixup or cutmix, which mix tiles before the network"
        return ""

    @classmethod
    def implied(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The network of the weights, the recipe of the network, and the changes for a start from scratch."""
        owner = weights.network_of(given.get("weights", ""))
        implied: dict[str, Any] = {"model_name": owner} if owner else {}
        implied |= RECIPES.get(given.get("model_name", owner or cls.model_name), {})
        if given.get("weights") == SCRATCH:
            implied |= FROM_SCRATCH
        return implied
