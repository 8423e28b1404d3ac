"""Tiles on the computing device: batches of indices, augmentation, and the network's inputs."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from common.config import TrainingConfig
from common.data.augment import build_augmentation, dihedral_view, to_device
from common.data.dataset import Dataset, Split, resize
from common.data.shift import shifted

EVALUATION_BATCH = 512  # tiles of up to 64 pixels; of larger ones fewer: see `at_once`
RESIDENT_SHARE = 0.6  # of a GPU's free memory, or of a CPU's whole memory for features; the network needs the rest

Batch = tuple[torch.Tensor, torch.Tensor]  # tiles or inputs, and labels


class Tiles(Protocol):
    """A split as training and evaluation use it: tiles, or features that were computed from them.

    Indices (B,) int64 on the CPU choose tiles. Inputs (B, …) float32 and labels (B,) int64 are on the
    computing device. A network can score `at_once` tiles in one batch.
    """

    at_once: int

    def __len__(self) -> int:
        """The number of tiles."""

    def inputs(self, indices: torch.Tensor, rng: torch.Generator | None = None) -> Batch:
        """Inputs and labels of these tiles. With `rng`, a CPU generator, each tile is augmented at random."""

    def views(self, indices: torch.Tensor) -> tuple[Iterable[torch.Tensor], torch.Tensor]:
        """Inputs of the 8 dihedral views of these tiles, one view after the other, and the tiles' labels."""


@dataclass(frozen=True)
class Splits:
    """The tiles of a run. `shifted` gives the name of each shift and the validation tiles under it.

    `test` and `shifted` are functions, so that these tiles take no memory of a GPU before they are scored.
    """

    train: Tiles
    val: Tiles
    test: Callable[[], Tiles]
    shifted: Callable[[], Iterator[tuple[str, Tiles]]]


class DeviceTiles:
    """`Tiles` on the computing device or, where they do not fit there, in the memory-mapped file.

    Inputs are (B, 3, input_size, input_size) in -1..1. A tile is resized before it is augmented.
    """

    def __init__(self, split: Split, device: torch.device, input_size: int, augmentation: str = "none") -> None:
        self.device, self.augment, self.input_size = device, build_augmentation(augmentation), input_size
        images, labels, self.at_once = split.images, split.labels, at_once(input_size)
        if device.type == "cuda" and images.nbytes <= RESIDENT_SHARE * free_memory(device):
            images, labels = images.to(device), labels.to(device)
        self.tiles, self.labels = images.permute(0, 2, 3, 1), labels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: torch.Tensor) -> Batch:
        """Tiles (B, 3, input_size, input_size) uint8 in channels_last order, labels (B,) int64, on the device."""
        indices = to_device(indices, self.labels.device)
        # Copies whole rows of the (N, H, W, 3) file: on a CPU ten times as fast as images[indices].
        images = self.tiles.index_select(0, indices).permute(0, 3, 1, 2)
        labels = self.labels.index_select(0, indices)
        if self.labels.device != self.device:
            images, labels = images.pin_memory(), labels.pin_memory()
        images = images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return resize(images, self.input_size), labels.to(self.device, non_blocking=True)

    def inputs(self, indices: torch.Tensor, rng: torch.Generator | None = None) -> Batch:
        images, labels = self.batch(indices)
        return normalise(self.augment(images, rng) if rng else images), labels

    def views(self, indices: torch.Tensor) -> tuple[Iterable[torch.Tensor], torch.Tensor]:
        images, labels = self.batch(indices)
        return (normalise(dihedral_view(images, view)) for view in range(8)), labels


def device_splits(dataset: Dataset, config: TrainingConfig, device: torch.device) -> Splits:
    """A data set's splits as `DeviceTiles`; only training tiles are augmented."""

    def plain(split: Split) -> DeviceTiles:
        return DeviceTiles(split, device, config.input_size)

    return Splits(
        train=DeviceTiles(dataset.train, device, config.input_size, config.augmentation),
        val=plain(dataset.val),
        test=lambda: plain(dataset.test),
        shifted=lambda: ((name, plain(split)) for name, split in shifted(dataset.val, config.input_size)),
    )


def free_memory(device: torch.device) -> int:
    """The bytes that a GPU has left, with those that PyTorch keeps for later tensors."""
    torch.cuda.empty_cache()  # else the system counts these as used
    return torch.cuda.mem_get_info(device)[0]


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Change uint8 (N, 3, H, W) in 0..255 to float32 in -1..1: the coursework's mean .5 and std .5."""
    return images.float().div_(127.5).sub_(1.0)


def at_once(side: int, tiles: int = EVALUATION_BATCH) -> int:
    """How many inputs of `side` pixels fit where `tiles` inputs of 64 pixels fit; at most `tiles`."""
    return max(1, tiles * 64**2 // max(64, side) ** 2)


def batches(n_tiles: int, batch_size: int, shuffle: torch.Generator | None = None) -> list[torch.Tensor]:
    """Cut 0..n_tiles-1 into batches of int64 indices, in order or shuffled.

    There are as few batches as `batch_size` allows, and their sizes differ by at most one tile: a last batch of
    few tiles would make BatchNorm's running statistics worse, and a batch of one tile cannot train BatchNorm.
    Shuffled batches all have one size, for which a GPU prepares its kernels once: to fill the last ones, some
    indices, fewer than there are batches, come twice.
    """
    order = torch.randperm(n_tiles, generator=shuffle) if shuffle else torch.arange(n_tiles)
    n_batches = max(1, min(math.ceil(n_tiles / batch_size), n_tiles // 2))
    if shuffle:
        order = torch.cat([order, order[: -n_tiles % n_batches]])
    return list(order.tensor_split(n_batches))
