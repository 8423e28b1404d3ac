"""The features of a frozen network, computed once for every tile and kept in memory to train the head on them."""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

import torch
from tqdm import tqdm

from common.cli import UsageError
from common.data.augment import build_augmentation, dihedral_view
from common.data.batches import RESIDENT_SHARE, Batch, DeviceTiles, Splits, normalise
from common.data.dataset import Dataset, Split
from common.data.shift import SHIFTS, shifted
from common.finetune.keys import FineTuningConfig
from common.finetune.network import FineTunedNetwork
from common.training.device import Compute
from common.training.loop import generator

C = TypeVar("C", bound=FineTuningConfig)

CACHING_BATCH = 256
View = Callable[[torch.Tensor], torch.Tensor]  # uint8 (B, 3, H, W) to the same


class CachedFeatures:
    """`Tiles` of which only the features are kept, on the device that trains.

    `features` (views, N, …) float32 hold one or more views of every tile, the first of them not augmented;
    `labels` are (N,) int64.
    """

    def __init__(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        self.features, self.labels = features, labels
        self.index_device = features.device

    def __len__(self) -> int:
        return len(self.labels)

    def inputs(self, indices: torch.Tensor, draws: torch.Generator | None = None) -> Batch:
        """Features (B, …) of the first view, or with `draws` of a random view of each tile, and labels (B,)."""
        n_views = len(self.features)
        labels = self.labels.index_select(0, indices)
        if draws is None or n_views == 1:
            return self.features[0].index_select(0, indices), labels
        # The augmentation `dihedral` samples its 8 views in the same way: both use the same view of a tile.
        view = torch.randint(n_views, (len(indices),), generator=draws)
        return self.features[view.to(self.index_device, non_blocking=True), indices], labels

    def views(self, indices: torch.Tensor) -> Batch:
        """Features (views, B, …) of every view, and labels (B,)."""
        return self.features.index_select(1, indices), self.labels.index_select(0, indices)


@torch.no_grad()
def cache_features(
    model: FineTunedNetwork, tiles: DeviceTiles, views: Sequence[View], compute: Compute
) -> CachedFeatures:
    """Run every view of every tile through the frozen part of the network once."""
    model.eval()
    device = compute.device
    features = torch.empty(len(views), len(tiles), *model.feature_shape, device=device)
    labels = torch.empty(len(tiles), dtype=torch.int64, device=device)
    with tqdm(desc="features", total=len(views) * len(tiles), unit=" tiles", leave=False, disable=None) as bar:
        for part in torch.split(torch.arange(len(tiles)), CACHING_BATCH):
            images, labels[part] = tiles.batch(part.to(tiles.index_device))
            for number, view in enumerate(views):
                inputs = normalise(view(images))  # outside autocast, which would round the augmentation
                with compute.autocast():
                    features[number, part] = model.features(inputs).float()
                bar.update(len(part))
    return CachedFeatures(features, labels)


def cached_splits(model: FineTunedNetwork, dataset: Dataset, config: FineTuningConfig, compute: Compute) -> Splits:
    """The features of all splits; from then on the model takes features instead of tiles.

    Training tiles have `feature_views` views, test tiles all 8 dihedral views where `tta` needs them; all other
    tiles have one view, which is not augmented.
    """
    model.to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    turned: list[View] = [partial(dihedral_view, view=number) for number in range(8)]
    plain = turned[:1]

    def augmented(number: int) -> View:
        augment, stream = build_augmentation(config.augmentation), generator(config.seed, number, "views")
        return lambda images: augment(images, stream)

    def cached(split: Split, views: Sequence[View]) -> CachedFeatures:
        tiles = DeviceTiles(split, compute.device, config.input_size)
        return cache_features(model, tiles, views, compute)

    print("computing the features of all tiles, once for all epochs", flush=True)
    random = [*plain, *(augmented(number) for number in range(1, config.feature_views or 1))]
    train = cached(dataset.train, turned if config.augmentation == "dihedral" else random)
    val = cached(dataset.val, plain)
    test = cached(dataset.test, turned if config.tta else plain)
    foreign = [(name, cached(split, plain)) for name, split in shifted(dataset.val, config.input_size)]
    model.takes_features = True
    return Splits(train, val, lambda: test, lambda: iter(foreign))


def decide_caching(config: C, feature_shape: Sequence[int], dataset: Dataset, device: torch.device) -> C:
    """Set `cache_features`, for all runs of a command: True unless the features do not fit into memory.

    `feature_shape` is that of one view of one tile. Where the features do not fit, one line is printed; it is a
    UsageError where `cache_features` is True.
    """
    views = (config.feature_views or 1) * len(dataset.train) + (1 + len(SHIFTS)) * len(dataset.val)
    views += (8 if config.tta else 1) * len(dataset.test)
    size, free = 4 * views * math.prod(feature_shape), free_memory(device)  # float32
    if size <= RESIDENT_SHARE * free:
        return config.replaced(cache_features=True)
    problem = f"the features of all tiles take {size / 1e9:.1f} GB, more than {RESIDENT_SHARE:.0%} of the "
    problem += f"{free / 1e9:.1f} GB of free memory"
    if config.cache_features:
        raise UsageError(f"--cache_features: {problem}; lower --input_size or --feature_views, or leave it out")
    print(f"features are not cached: {problem}")
    return config.replaced(cache_features=False, feature_views=None)


def free_memory(device: torch.device) -> int:
    """The bytes of memory that the device has left; for a CPU those that the system can give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, KeyError), open("/proc/meminfo", encoding="ascii") as file:
        return int(dict(line.split(":") for line in file)["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # only Linux says what is free
