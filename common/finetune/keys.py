"""The keys of fine-tuning, defaults that follow from other keys, and contradictions."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import model_validator

from common.cli import UsageError, key
from common.config import MOST, TrainingConfig
from common.finetune import weights
from common.finetune.network import TRAIN_PARTS
from common.finetune.weights import SCRATCH

RANDOM_VIEWS = 16  # cached views of a tile, for augmentations with an unlimited number of views


class FineTuningConfig(TrainingConfig):
    """The keys of a network that starts from pretrained weights.

    `cache_features` is None until `features.decide_caching` has compared the size of the features with the memory.
    """

    model_name: str = key(
        "mobilenet_v3_large",
        f"torchvision classification model, {weights.LITE0}, or timm:NAME for one of the package timm "
        "(default: the one that `weights` belong to)",
    )
    weights: str = key(
        None,
        "where the network starts: a torchvision entry such as ResNet18_Weights.IMAGENET1K_V1, "
        f"{weights.LITE0_WEIGHTS}, a file ({', '.join(weights.SUFFIXES)}), the id of a run, or {SCRATCH} "
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
        gt=0,
        le=1,
    )
    unfreeze_epoch: int = key(
        1, "with train_part=all: the epoch from which more than the classifier is trained", ge=1, le=MOST
    )
    input_size: int = key(
        None, "side in pixels of the network's inputs (default: what the weights were trained on)", ge=8, le=MOST
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
        ge=1,
        le=MOST,
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Fill in defaults that follow from other keys. Raises UsageError where keys contradict each other."""
        if problem := weights.check_network(self.model_name):
            raise UsageError(f"--model_name {self.model_name}: {problem}")
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
        return self

    def _obstacle_to_caching(self) -> str:
        if self.train_part == "all":
            return "--train_part all, which changes the features"
        if self.adapt_batchnorm:
            return "--adapt_batchnorm, which changes the features"
        if self.mixup_alpha or self.cutmix_alpha:
            return "mixup or cutmix, which mix tiles before the network"
        return ""

    @classmethod
    def recipe(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        """The network that `weights` belong to."""
        owner = weights.network_of(given.get("weights", ""))
        return {"model_name": owner} if owner else {}
