"""Tiles/s while training: a plain PyTorch loop, this project's loop, and the ceiling without any data work.

    python -m bench.throughput            # the GPU, if there is one, else the CPU
    python -m bench.throughput --quick    # two repeats: to see that it runs

(a) The plain loop is what a user would write: medmnist's PathMNIST (PIL images), torchvision's transforms tile by
tile, a shuffling DataLoader with the best of several worker counts, fp32, PyTorch's default optimiser. (b) is
`Trainer.train_epoch` with the configuration of task1.py and of train.py. (c) repeats forward, backward and step
on one batch that lies on the device, in (b)'s precision and memory format. The three take turns, so that a busy
machine slows all of them alike; each runs in a separate process, so that no one profits from another's settings.
Same network, batch size, augmentation and loss; the tiles are phantom ones.

Writes bench/results/throughput-<device>.json (a list of rows) and .md (a table).
"""

import contextlib
import io
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
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
from bench.tiles import official_arrays, trainer_of
from common import data
from common.compute import Compute
from common.config import TrainingConfig
from common.data import Split
from common.tracking import provenance

RESULTS = Path(__file__).parent / "results"
REPEATS = 5
SIZES = (28, 64)
# Steps that a repeat takes on a CPU; a GPU gets a whole PathMNIST of tiles.
CPU_STEPS = {"task1": 20, "train": 3}
CONFIGS: dict[str, type[TrainingConfig]] = {"task1": task1.Task1Config, "train": train.TrainConfig}
TRANSFORMS = {
    "none": [],
    "ta_wide": [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), v2.TrivialAugmentWide()],
}


class PathMNIST(medmnist.PathMNIST):
    """medmnist's data set with as many tiles as its file has; its own insists on the official number."""

    def __len__(self) -> int:
        return len(self.imgs)


def rate(work: Callable[[], int], device: torch.device) -> float:
    """Tiles/s of something that returns how many tiles it took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    tiles = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return tiles / (time.perf_counter() - started)


def plain_loop(config: TrainingConfig, root: Path, workers: int, device: torch.device) -> Callable[[], float]:
    """The loop of a tutorial; persistent workers, so that only the first epoch pays for their start."""
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
    """The project's epoch, as `fit` runs it; without workers."""
    trainer = trainer_of(config, read_tiles(root), root / "ours")

    def epoch() -> int:
        trainer.train_epoch(1)
        return len(trainer.splits.train)

    return lambda: rate(epoch, trainer.compute.device), 0


def ceiling_way(config: TrainingConfig, root: Path) -> tuple[Callable[[], float], int]:
    """Nothing but the network: the same batch again and again; without workers."""
    trainer = trainer_of(config, read_tiles(root), root / "ceiling")
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


def write_tiles(root: Path, config: TrainingConfig, n_tiles: int) -> None:
    """A file of the official layout with phantom training tiles only."""
    np.savez(root / data.official_name(config.size), **official_arrays({"train": n_tiles}, config.size))


def read_tiles(root: Path) -> Split:
    """The same tiles as this project holds them."""
    (path,) = root.glob("*.npz")
    with np.load(path, allow_pickle=False) as file:
        images, labels = file["train_images"], file["train_labels"]
    return Split(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels[:, 0]).long())


WAYS = {"plain": plain_way, "ours": our_way, "ceiling": ceiling_way}


def serve(connection: Connection, way: str, config: TrainingConfig, root: Path) -> None:
    """A way's process: tells its worker count once it is warm, then tiles/s whenever it is asked."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(EOFError):  # progress bars; the end
        run, workers = WAYS[way](config, root)
        run()
        connection.send(workers)
        while True:
            connection.recv()
            connection.send(run())


def measured(task: str, config: TrainingConfig, root: Path, repeats: int) -> dict[str, Any]:
    """A row: medians and ranges of tiles/s, and of the ratios within a turn."""
    row: dict[str, Any] = {
        "task": task,
        "model": config.model_name,
        "size": config.size,
        "batch_size": config.batch_size,
        "augmentation": config.augmentation,
        "device": Compute.of("auto", "auto").name,
        "repeats": repeats,
    }
    processes = multiprocessing.get_context("spawn")
    connections = {}
    for way in WAYS:  # one after the other: warming up takes all cores
        connections[way], theirs = processes.Pipe()
        processes.Process(target=serve, args=(theirs, way, config, root)).start()
        theirs.close()  # so that a process that dies is the end of its pipe
        workers = connections[way].recv()
        if way == "plain":
            row["plain_workers"] = workers
    turns = []
    for _ in range(repeats):
        turn = {}
        for way, connection in connections.items():
            connection.send(None)
            turn[way] = connection.recv()
        turns.append(turn)
    for connection in connections.values():
        connection.close()
    for way in WAYS:
        row[way] = statistics.median(turn[way] for turn in turns)
        row[f"{way}_range"] = [min(turn[way] for turn in turns), max(turn[way] for turn in turns)]
    for name, other in (("ours", "plain"), ("ours", "ceiling")):
        ratios = [turn[name] / turn[other] for turn in turns]
        row[f"{name}/{other}"] = statistics.median(ratios)
        row[f"{name}/{other}_range"] = [min(ratios), max(ratios)]
    return row


def table(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    lines = [
        f"Tiles/s while training, {first['device']}; {versions}; commit {first['commit']}. Medians of "
        f"{first['repeats']} interleaved turns, the range in brackets. Plain: medmnist, PIL, DataLoader, fp32.",
        "",
        "| network | batch | size | plain (workers) | ours | ceiling | ours / plain | ours / ceiling |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratios = [
            f"{row[name]:.2f} ({row[f'{name}_range'][0]:.2f} to {row[f'{name}_range'][1]:.2f})"
            for name in ("ours/plain", "ours/ceiling")
        ]
        lines.append(
            f"| {row['model']} | {row['batch_size']} | {row['size']} | {row['plain']:,.0f} "
            f"({row['plain_workers']}) | {row['ours']:,.0f} | {row['ceiling']:,.0f} | {ratios[0]} | {ratios[1]} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    repeats = 2 if "--quick" in sys.argv else REPEATS
    facts = provenance(("torch", "torchvision", "medmnist", "numpy"))
    cuda = torch.cuda.is_available()
    rows = []
    for size in SIZES:
        for task, config_class in CONFIGS.items():
            config = config_class(dataset="phantom", size=size, run_id="bench")
            with tempfile.TemporaryDirectory() as folder:
                write_tiles(Path(folder), config, 89_996 if cuda else CPU_STEPS[task] * config.batch_size)
                row = measured(task, config, Path(folder), repeats)
            rows.append({**row, "versions": facts["versions"], "commit": facts["commit"]})
            print(
                f"{row['model']} {row['size']} px: plain {row['plain']:,.0f}, ours {row['ours']:,.0f}, ceiling "
                f"{row['ceiling']:,.0f} tiles/s; ours/plain {row['ours/plain']:.2f}, ours/ceiling "
                f"{row['ours/ceiling']:.2f}",
                flush=True,
            )
    if repeats == REPEATS:
        stem = f"throughput-{'cuda' if cuda else 'cpu'}"
        (RESULTS / f"{stem}.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        (RESULTS / f"{stem}.md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
