"""The features of a frozen network, computed once for every tile and kept in memory to train the head on them."""

import math
import os
from collections.abc import Callable, Sequence
from functools import partial

import torch

from common.cli import UsageError, progress
from common.config import TrainingConfig
from common.data.augment import build_augmentation, dihedral_view, to_device
from common.data.batches import (
    EVALUATION_BATCH,
    RESIDENT_SHARE,
    Batch,
    DeviceTiles,
    Splits,
    free_memory,
    normalise,
)
from common.data.dataset import Dataset, Split
from common.data.shift import shifted
from common.finetune.network import FineTunedNetwork
from common.training.loop import generator

CACHING_BATCH = 256
N_VIEWS = 8  # of a training tile, the first not augmented; flips and quarter turns have no more
View = Callable[[torch.Tensor], torch.Tensor]  # uint8 (B, 3, H, W) to the same


class CachedFeatures:
    """`Tiles` of which only the features are kept, on the device that trains.

    `features` (views, N, …) float32 hold views of every tile, the first not augmented; `labels` are (N,) int64.
    """

    def __init__(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        self.features, self.labels, self.at_once = features, labels, EVALUATION_BATCH

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, indices: torch.Tensor, rng: torch.Generator | None = None) -> Batch:
        """Features (B, …) of the first view, or with `rng` of a random view of each tile, and labels (B,)."""
        indices = to_device(indices, self.labels.device)
        labels = self.labels.index_select(0, indices)
        if rng is None:
            return self.features[0].index_select(0, indices), labels
        # The same numbers as `dihedral` draws, so that training with and without a cache sees the same views.
        view = torch.randint(len(self.features), (len(indices),), generator=rng)
        return self.features[to_device(view, self.labels.device), indices], labels

    def views(self, indices: torch.Tensor) -> Batch:
        """Features (views, B, …) of every view, and labels (B,)."""
        indices = to_device(indices, self.labels.device)
        return self.features.index_select(1, indices), self.labels.index_select(0, indices)


@torch.no_grad()
def cache_features(model: FineTunedNetwork, tiles: DeviceTiles, views: Sequence[View]) -> CachedFeatures:
    """Run each view of each tile through the frozen part once, in float32."""
    model.eval()
    features = torch.empty(len(views), len(tiles), *model.feature_shape, device=tiles.device)
    labels = torch.empty(len(tiles), dtype=torch.int64, device=tiles.device)
    with progress(desc="features", total=len(views) * len(tiles), unit=" tiles", leave=False) as bar:
        for part in torch.split(torch.arange(len(tiles)), CACHING_BATCH):
            images, labels[part] = tiles.batch(part)
            for number, view in enumerate(views):
                inputs = torch.split(normalise(view(images)), tiles.at_once)
                features[number, part] = torch.cat(list(map(model.features, inputs)))
                bar.update(len(part))
    return CachedFeatures(features, labels)


def cached_splits(
    model: FineTunedNetwork, dataset: Dataset, config: TrainingConfig, device: torch.device
) -> Splits:
    """The features of all splits; from then on the model takes features instead of tiles.

    Training tiles have `N_VIEWS` views of their augmentation, test tiles all 8 dihedral views where `tta` needs
    them, others one view, not augmented. Raises UsageError where all of them need too much memory.
    """
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    turned: list[View] = [partial(dihedral_view, view=number) for number in range(N_VIEWS)]
    plain, views = turned[:1], turned
    if config.augmentation == "none":
        views = plain
    elif config.augmentation != "dihedral":
        augment = build_augmentation(config.augmentation)
        rngs = [generator(config.seed, number, "views") for number in range(1, N_VIEWS)]
        views = [*plain, *(lambda images, rng=rng: augment(images, rng) for rng in rngs)]
    test_views = turned if config.tta else plain
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        memory = free_memory(device)
    n_features = len(views) * len(dataset.train) + len(dataset.val)
    n_features += config.test * len(test_views) * len(dataset.test)
    size = 4 * n_features * math.prod(model.feature_shape)  # float32
    if size > RESIDENT_SHARE * memory:
        problem = f"the features of all tiles take {size / 1e9:.1f} GB of {memory / 1e9:.1f} GB of memory"
        remedy = "with another --run_id, lower --train_tiles, or use --tta=False or --train_part=all"
        raise UsageError(f"{problem}; {remedy}")

    def cached(split: Split, views: Sequence[View] = plain) -> CachedFeatures:
        return cache_features(model, DeviceTiles(split, device, config.input_size), views)

    print("computing the features of training and validation tiles, once for all epochs", flush=True)
    train, val = cached(dataset.train, views), cached(dataset.val)
    model.takes_features = True
    return Splits(
        train,
        val,
        lambda: cached(dataset.test, test_views),
        lambda: ((name, cached(split)) for name, split in shifted(dataset.val, config.input_size)),
    )
