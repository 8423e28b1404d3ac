"""Tiles/s while training: a plain PyTorch loop, this project's loop, and the ceiling without any data work.

    python -m bench.throughput    # on the GPU if there is one, else on the CPU

- plain: what a tutorial would write: medmnist's PathMNIST (PIL images), torchvision's transforms tile by tile, a
  shuffling DataLoader with the best of several numbers of workers, fp32, PyTorch's default optimiser.
- ours: `Trainer.train_epoch` with the configuration of task1.py and of train.py.
- ceiling: forward, backward and step on one batch that lies on the device, with the precision and the memory
  format of ours.

All three use the same network, batch size, augmentation and loss, on phantom tiles. They take turns, so that other
work on the machine slows all of them alike. Each runs in a separate process, so that the settings of one do not
change another.
"""

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import medmnist
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import get_model
from torchvision.transforms import v2

import task1
import train
from bench.shared import save, separate_process, spread, trainer_of
from common.config import TrainingConfig
from common.data import phantom
from common.data.dataset import Split
from common.data.pathmnist import official_file
from common.training.device import Compute

REPEATS = 5
SIZES = (28, 64)
GPU_TILES = 89_996  # the tiles of a repeat on a GPU: those of PathMNIST
CPU_STEPS = {"task1": 20, "train": 3}  # the steps of a repeat on a CPU
CONFIGS: dict[str, type[TrainingConfig]] = {"task1": task1.Task1Config, "train": train.TrainConfig}
TRANSFORMS = {
    "none": [],
    "ta_wide": [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), v2.TrivialAugmentWide()],
}


class PathMNIST(medmnist.PathMNIST):
    """medmnist's data set for any number of tiles; medmnist expects the official number."""

    def __len__(self) -> int:
        return len(self.imgs)


def rate(epoch: Callable[[], int], device: torch.device) -> float:
    """Tiles/s of an epoch, which returns the number of its tiles."""
    started = time.perf_counter()
    tiles = epoch()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return tiles / (time.perf_counter() - started)


def plain_loop(config: TrainingConfig, root: Path, workers: int, device: torch.device) -> Callable[[], float]:
    """The loop of a tutorial. Its workers are persistent: only the first epoch includes their start."""
    erasing = [v2.RandomErasing(0.1)] if config.augmentation == "ta_wide" else []
    transform = v2.Compose(
        [
            *TRANSFORMS[config.augmentation],
            *(v2.ToImage(), v2.ToDtype(torch.float32, scale=True)),
            v2.Normalize([0.5] * 3, [0.5] * 3),
            *erasing,
        ]
    )
    tiles = PathMNIST("train", transform=transform, root=str(root), size=config.size)
    loader = DataLoader(
        tiles,
        batch_size=config.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        drop_last=True,
    )
    torch.manual_seed(0)
    model = get_model(config.model_name, num_classes=9).to(device).train()
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    optimizer = kind(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)

    def epoch() -> int:
        seen = 0
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.squeeze(1).long().to(device)
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            seen += len(labels)
        return seen

    return lambda: rate(epoch, device)


def plain_way(config: TrainingConfig, root: Path) -> tuple[Callable[[], float], int]:
    """The plain loop with the best of several worker counts, and that count."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cores = os.cpu_count() or 1
    loops = {workers: plain_loop(config, root, workers, device) for workers in {0, 1, cores // 2, cores}}
    for loop in loops.values():
        loop()
    workers = max(loops, key=lambda number: loops[number]())
    return loops[workers], workers


def our_way(config: TrainingConfig, root: Path) -> tuple[Callable[[], float], int]:
    """The project's epoch, as `Trainer.fit` runs it, and 0 workers."""
    trainer = trainer_of(config, read_tiles(root / official_file(config.size).name), root / "ours")

    def epoch() -> int:
        trainer.train_epoch(1)
        return len(trainer.splits.train)

    return lambda: rate(epoch, trainer.compute.device), 0


def ceiling_way(config: TrainingConfig, root: Path) -> tuple[Callable[[], float], int]:
    """Training on the same batch again and again, and 0 workers."""
    trainer = trainer_of(config, read_tiles(root / official_file(config.size).name), root / "ceiling")
    compute, tiles, model, optimizer = trainer.compute, trainer.splits.train, trainer.model, trainer.optimizer
    inputs, labels = tiles.inputs(torch.arange(config.batch_size, device=tiles.index_device))
    model.train()
    steps = len(tiles) // config.batch_size

    def epoch() -> int:
        for _ in range(steps):
            with compute.autocast():
                loss = nn.functional.cross_entropy(model(inputs), labels, label_smoothing=config.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return steps * config.batch_size

    return lambda: rate(epoch, compute.device), 0


WAYS = {"plain": plain_way, "ours": our_way, "ceiling": ceiling_way}
measure: Callable[[], float]  # in a way's process: tiles/s of one repeat


def prepare(way: str, config: TrainingConfig, root: Path) -> int:
    """Build a way in this process and warm it up; returns the number of its workers."""
    global measure
    measure, workers = WAYS[way](config, root)
    measure()
    return workers


def repeat() -> float:
    """Tiles/s of one repeat of the way that this process has prepared."""
    return measure()


def write_tiles(path: Path, n_tiles: int, size: int) -> None:
    """A file in the layout of the official one, with phantom training tiles and no others."""
    images, labels = zip(*phantom.generate("train", n_tiles, size), strict=True)
    np.savez(
        path,
        train_images=np.concatenate(images),
        train_labels=np.concatenate(labels).astype(np.uint8)[:, None],
    )


def read_tiles(path: Path) -> Split:
    """The same tiles as this project holds them."""
    with np.load(path, allow_pickle=False) as file:
        images, labels = file["train_images"], file["train_labels"]
    return Split(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels[:, 0]).long())


def measured(task: str, config: TrainingConfig, root: Path) -> dict[str, Any]:
    """A row: tiles/s of every way, and the ratios of ours to the others within a turn."""
    processes: dict[str, ProcessPoolExecutor] = {way: separate_process() for way in WAYS}
    # One after the other: warming up takes all cores.
    workers = {way: process.submit(prepare, way, config, root).result() for way, process in processes.items()}
    turns = []
    for _ in range(REPEATS):
        turns.append({way: process.submit(repeat).result() for way, process in processes.items()})
    for process in processes.values():
        process.shutdown()
    return {
        "task": task,
        "model": config.model_name,
        "size": config.size,
        "batch_size": config.batch_size,
        "augmentation": config.augmentation,
        "plain_workers": workers["plain"],
        **{way: spread([turn[way] for turn in turns]) for way in WAYS},
        "ours/plain": spread([turn["ours"] / turn["plain"] for turn in turns]),
        "ours/ceiling": spread([turn["ours"] / turn["ceiling"] for turn in turns]),
    }


def main() -> None:
    compute = Compute.of("auto", "auto")
    rows = []
    for size in SIZES:
        for task, config_class in CONFIGS.items():
            config = config_class(dataset="phantom", size=size, run_id="bench")
            n_tiles = GPU_TILES if compute.device.type == "cuda" else CPU_STEPS[task] * config.batch_size
            with tempfile.TemporaryDirectory() as folder:
                write_tiles(Path(folder, official_file(size).name), n_tiles, size)
                row = measured(task, config, Path(folder))
            rates = ", ".join(f"{way} {row[way]['median']:,.0f}" for way in WAYS)
            print(f"{config.model_name} {size} px: {rates} tiles/s", flush=True)
            rows.append(row)
    save("throughput", compute, rows)


if __name__ == "__main__":
    main()
