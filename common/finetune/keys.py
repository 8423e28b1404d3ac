"""The keys of fine-tuning, defaults that follow from other keys, and contradictions."""

from typing import Self

from pydantic import model_validator

from common.cli import UsageError, key
from common.config import MOST, TrainingConfig
from common.finetune.network import TRAIN_PARTS
from common.finetune.weights import SCRATCH, default_weights, library_name
from common.training.models import check_model_name

RANDOM_VIEWS = 16  # cached views of a tile, for augmentations with an unlimited number of views


class FineTuningConfig(TrainingConfig):
    """The keys of a network that starts from pretrained weights."""

    model_name: str = key(
        "mobilenet_v3_large",
        "torchvision classification model, tf_efficientnet_lite0 (to 2), or timm:NAME for one of the package timm "
        "(default: the one that `weights` belong to)",
    )
    weights: str = key(
        None,
        "a torchvision entry such as ResNet18_Weights.IMAGENET1K_V1, efficientnet_lite0_imagenet, a file, the id "
        "of a run, or none for random weights (default: the network's ImageNet weights)",
    )
    train_part: str = key(
        "classifier", "the new last layer, all that is not convolutional, or all layers", choices=TRAIN_PARTS
    )
    adapt_batchnorm: bool = key(False, "update the frozen part's BatchNorm statistics with the training tiles")
    backbone_lr_factor: float = key(
        0.1, "with train_part=all: the first block's factor of lr; it grows geometrically to the head", gt=0, le=1
    )
    input_size: int = key(
        None, "side in pixels of the network's inputs (default: what the weights were trained on)", ge=8, le=MOST
    )
    cache_features: bool = key(
        True, "compute a frozen network's features once, not in every epoch, where that is possible"
    )
    feature_views: int | None = key(
        None, "cached views of a training tile under random augmentation: itself and others", ge=1, le=MOST
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Fill in defaults that follow from other keys. Raises UsageError where keys contradict each other."""
        if problem := check_model_name(library_name(self.model_name)):
            raise UsageError(f"--model_name {self.model_name}: {problem}")
        if self.weights is None:
            self._set("weights", default_weights(self.model_name))
        frozen = self.train_part != "all"
        if self.weights == SCRATCH and frozen:
            raise UsageError(f"--train_part {self.train_part}: random weights cannot stay frozen; use all")
        if self.adapt_batchnorm and not frozen:
            raise UsageError("--adapt_batchnorm: with --train_part all the statistics follow the tiles anyway")
        possible = frozen and not (self.adapt_batchnorm or self.mixup_alpha or self.cutmix_alpha)
        self._set("cache_features", self.cache_features and possible)
        views = {"none": 1, "dihedral": 8}.get(self.augmentation, self.feature_views or RANDOM_VIEWS)
        self._set("feature_views", views if self.cache_features else None)
        return self
