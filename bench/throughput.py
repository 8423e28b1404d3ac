"""Tiles/s while training: this project's loop beside the loop of a tutorial. Fills the table of docs/speed.md.

    python -m bench.throughput              # on the GPU if there is one, else on the CPU: 15 minutes of two cores
    python -m bench.throughput --repeats 3  # fewer turns

- plain: medmnist's PathMNIST (PIL images), torchvision's transforms tile by tile, a shuffling DataLoader with the
  best of several numbers of workers, fp32, PyTorch's default optimiser.
- ours: `Trainer.train_epoch` with the configuration of task1.py and of train.py.

Both have the same network, batch size, augmentation, loss and input side, on phantom tiles of that side. They take
turns, each in a process of its own, so that other work on the machine slows both alike.
"""

import contextlib
import io
import json
import multiprocessing
import os
import statistics
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
from common.cli import Keys, key, run_script
from common.config import TrainingConfig
from common.data import phantom
from common.data.batches import DeviceTiles, Splits
from common.data.dataset import Dataset, Split
from common.data.pathmnist import CLASS_NAMES
from common.files import read_text, write_json, write_text
from common.markdown import filled, markdown_table
from common.records.run import Run, provenance
from common.training.device import Compute
from common.training.loop import Trainer
from common.training.models import build_model

FOLDER = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
SIDE = 64
GPU_TILES = 89_996  # the tiles of a turn on a GPU: those of PathMNIST
CPU_STEPS = {"task1": 20, "train": 3}  # the steps of a turn on a CPU
CONFIGS: dict[str, type[TrainingConfig]] = {"task1": task1.Task1Config, "train": train.TrainConfig}


class BenchConfig(Keys):
    """How long to measure."""

    repeats: int = key(5, "turns of both loops", ge=1, le=1000)


class PathMNIST(medmnist.PathMNIST):
    """medmnist's data set for any number of tiles; medmnist expects the official number."""

    def __len__(self) -> int:
        return len(self.imgs)


def plain_loop(config: TrainingConfig, root: Path, workers: int, device: torch.device) -> Callable[[], int]:
    """An epoch of a tutorial's loop, which returns its tiles. Only the first one includes the workers' start."""
    wide = config.augmentation == "ta_wide"
    transform = v2.Compose(
        [
            *([v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), v2.TrivialAugmentWide()] if wide else []),
            *(v2.ToImage(), v2.ToDtype(torch.float32, scale=True)),
            v2.Normalize([0.5] * 3, [0.5] * 3),
            *([v2.RandomErasing(0.1)] if wide else []),
        ]
    )
    loader = DataLoader(
        PathMNIST("train", transform=transform, root=str(root), size=config.size),
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
            criterion(model(images), labels).backward()
            optimizer.step()
            seen += len(labels)
        return seen

    return epoch


def our_loop(config: TrainingConfig, root: Path, compute: Compute) -> Callable[[], int]:
    """An epoch as `Trainer.fit` runs it, which returns its tiles."""
    compute.prepare_process()
    with np.load(root / "pathmnist_64.npz", allow_pickle=False) as file:
        images, labels = file["train_images"], file["train_labels"]
    split = Split(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels[:, 0]).long())
    torch.manual_seed(config.seed)
    model = build_model(config.model_name, len(CLASS_NAMES), config.input_size)
    tiles = DeviceTiles(split, compute.device, config.input_size, config.augmentation)
    dataset = Dataset("phantom", config.size, CLASS_NAMES, split, split, split, fingerprint="bench")
    with contextlib.redirect_stdout(io.StringIO()):
        run = Run("task1", config, dataset, compute.name)
    trainer = Trainer(model, Splits(tiles, tiles, lambda: tiles, lambda: iter(())), config, compute, run)

    def epoch() -> int:
        trainer.train_epoch(1)
        return len(split)

    return epoch


measured: Callable[[], int]  # in a loop's own process: its epoch


def turn() -> float:
    """Tiles/s of one epoch of this process's loop."""
    started = time.perf_counter()
    tiles = measured()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return tiles / (time.perf_counter() - started)


def prepare(way: str, config: TrainingConfig, root: Path) -> int:
    """Build a loop in this process and warm it up; returns the number of its workers."""
    global measured
    compute, cores = Compute.of("auto", "auto"), os.cpu_count() or 1
    if way == "ours":
        measured = our_loop(config, root, compute)
        turn()
        return 0
    rates = {}
    for workers in {0, 1, cores // 2, cores}:
        measured = plain_loop(config, root, workers, compute.device)
        turn()
        rates[workers] = turn()
    best = max(rates, key=rates.__getitem__)
    measured = plain_loop(config, root, best, compute.device)
    turn()
    return best


def spread(values: list[float]) -> dict[str, Any]:
    """Median and range of repeated measurements."""
    return {"median": statistics.median(values), "range": [min(values), max(values)]}


def compare(task: str, repeats: int, n_tiles: Callable[[TrainingConfig], int]) -> dict[str, Any]:
    """A row of the table: tiles/s of both loops, and their ratio turn by turn."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = CONFIGS[task](dataset="phantom", size=SIDE, run_id="bench", output_dir=root, wandb="disabled")
        images, labels = phantom.generate("train", n_tiles(config), SIDE)
        arrays = {"images": images, "labels": labels.astype(np.uint8)[:, None]}
        np.savez(root / "pathmnist_64.npz", **{f"train_{name}": array for name, array in arrays.items()})
        spawn = multiprocessing.get_context("spawn")
        processes = {way: ProcessPoolExecutor(1, spawn) for way in ("plain", "ours")}
        # One after the other: warming up takes all cores.
        workers = {way: process.submit(prepare, way, config, root).result() for way, process in processes.items()}
        turns = [
            {way: process.submit(turn).result() for way, process in processes.items()} for _ in range(repeats)
        ]
        for process in processes.values():
            process.shutdown()
    return {
        "network": f"{config.model_name}, batch {config.batch_size}, augmentation {config.augmentation}",
        "workers": workers["plain"],
        **{way: spread([one[way] for one in turns]) for way in processes},
        "ratio": spread([one["ours"] / one["plain"] for one in turns]),
    }


def table() -> list[str]:
    """The lines of docs/speed.md's table, from the records of every kind of device that was measured."""
    rows = []
    for path in sorted(FOLDER.glob("*.json")):
        record = json.loads(read_text(path))
        for row in record["rows"]:
            numbers = [f"{row[way]['median']:,.0f}" for way in ("plain", "ours")]
            low, high = row["ratio"]["range"]
            ratio = f"{row['ratio']['median']:.2f} ({low:.2f} to {high:.2f})"
            rows.append([row["network"], record["device"], *numbers, ratio])
    return markdown_table(["64 px inputs", "device", "plain loop", "ours", "ours / plain"], "llrrr", rows)


def main(config: BenchConfig) -> None:
    """Measure both tasks, write the record, fill the page."""
    compute = Compute.of("auto", "auto")

    def n_tiles(keys: TrainingConfig) -> int:
        task = "train" if isinstance(keys, train.TrainConfig) else "task1"
        return GPU_TILES if compute.device.type == "cuda" else CPU_STEPS[task] * keys.batch_size

    rows = []
    for task in CONFIGS:
        rows.append(compare(task, config.repeats, n_tiles))
        print(f"{rows[-1]['network']}: ours / plain {rows[-1]['ratio']['median']:.2f}", flush=True)
    facts = {"device": compute.name, "repeats": config.repeats, **provenance(("torch", "torchvision", "numpy"))}
    write_json(FOLDER / f"throughput-{compute.device.type}.json", {**facts, "rows": rows})
    write_text(PAGE, filled(read_text(PAGE), "bench", table()))


if __name__ == "__main__":
    run_script(main, BenchConfig)
