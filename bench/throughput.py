"""Tiles/s while training: a plain PyTorch loop, this project's loop, and the ceiling without any data work.

    python -m bench.throughput            # the GPU, if there is one, else the CPU
    python -m bench.throughput --quick    # two repeats: to see that it runs

(a) The plain loop is what a user would write: medmnist's PathMNIST (PIL images), torchvision's transforms tile by
tile, a shuffling DataLoader with the best of several worker counts, fp32, PyTorch's default optimiser. (b) is
`train_one_epoch` with the configuration that task1.py and train.py have. (c) repeats forward, backward and step
on one batch that lies on the device, in (b)'s precision and memory format. All three take turns, so that whatever
else the machine does falls on them alike. Same network, batch size, augmentation and loss; the tiles are phantom
ones.

Writes bench/results/throughput-<device>.json (a list of rows) and .md (a table).
"""

import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from common import phantom
from common.compute import Compute
from common.config import TrainingConfig
from common.data import DeviceTiles, Split
from common.models import build_model, normalise
from common.tracking import provenance
from common.training import build_optimizer, train_one_epoch

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


@dataclass(frozen=True)
class Case:
    """One network at one size, ready to be trained in three ways; each way gives tiles/s."""

    task: str
    config: TrainingConfig
    ways: dict[str, Callable[[], float]]
    workers: int


def rate(work: Callable[[], int], device: torch.device) -> float:
    """Tiles/s of something that returns how many tiles it took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    tiles = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return tiles / (time.perf_counter() - started)


def plain_way(config: TrainingConfig, root: Path, workers: int, device: torch.device) -> Callable[[], float]:
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


def our_way(config: TrainingConfig, tiles: DeviceTiles, compute: Compute) -> Callable[[], float]:
    """The project's epoch, as `fit` runs it."""
    torch.manual_seed(0)
    model = build_model(config.model_name, 9, config.size)
    model.to(compute.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(model, config)

    def epoch() -> int:
        train_one_epoch(model, tiles, optimizer, 1, config, compute)
        return len(tiles)

    return lambda: rate(epoch, compute.device)


def ceiling_way(config: TrainingConfig, tiles: DeviceTiles, compute: Compute) -> Callable[[], float]:
    """Nothing but the network: the same batch again and again."""
    torch.manual_seed(0)
    model = build_model(config.model_name, 9, config.size)
    model.to(compute.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = build_optimizer(model, config)
    indices = torch.arange(config.batch_size, device=tiles.index_device)
    images, labels = tiles.batch(indices)
    inputs = normalise(images)
    steps = len(tiles) // config.batch_size

    def epoch() -> int:
        for _ in range(steps):
            with compute.autocast():
                loss = nn.functional.cross_entropy(model(inputs), labels, label_smoothing=config.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return steps * config.batch_size

    return lambda: rate(epoch, compute.device)


def cases(compute: Compute, folder: Path) -> Iterator[Case]:
    """Each task at each size; the worker count is the best of a short trial, which also warms everything up."""
    for size in SIZES:
        for task, config_class in CONFIGS.items():
            config = config_class(dataset="phantom", size=size, run_id="bench")
            cuda = compute.device.type == "cuda"
            n_tiles = 89_996 if cuda else CPU_STEPS[task] * config.batch_size
            blocks = list(phantom.generate("train", n_tiles, size))
            images = np.concatenate([block for block, _ in blocks])
            labels = np.concatenate([block for _, block in blocks])
            root = folder / f"{task}-{size}"
            root.mkdir()
            name = "pathmnist.npz" if size == 28 else f"pathmnist_{size}.npz"
            np.savez(root / name, train_images=images, train_labels=labels.astype(np.uint8)[:, None])
            tiles = DeviceTiles(
                Split(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)), compute.device
            )
            cores = os.cpu_count() or 1
            candidates = sorted({0, cores // 2, cores} if cores > 1 else {0, 1})
            plain = {workers: plain_way(config, root, workers, compute.device) for workers in candidates}
            for way in plain.values():
                way()
            workers = max(plain, key=lambda number: plain[number]())
            ways = {
                "plain": plain[workers],
                "ours": our_way(config, tiles, compute),
                "ceiling": ceiling_way(config, tiles, compute),
            }
            for way in (ways["ours"], ways["ceiling"]):
                way()
            yield Case(task, config, ways, workers)


def measured(case: Case, repeats: int, device: str) -> dict[str, Any]:
    """A row: medians and ranges of tiles/s, and of the ratios within a turn."""
    turns = [{name: way() for name, way in case.ways.items()} for _ in range(repeats)]
    row: dict[str, Any] = {
        "task": case.task,
        "model": case.config.model_name,
        "size": case.config.size,
        "batch_size": case.config.batch_size,
        "augmentation": case.config.augmentation,
        "device": device,
        "plain_workers": case.workers,
        "repeats": repeats,
    }
    for name in case.ways:
        row[name] = statistics.median(turn[name] for turn in turns)
        row[f"{name}_range"] = [min(turn[name] for turn in turns), max(turn[name] for turn in turns)]
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
    compute = Compute.of("auto", "auto")
    facts = provenance(("torch", "torchvision", "medmnist", "numpy"))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(compute, Path(folder)):
            with contextlib.redirect_stderr(io.StringIO()):  # the progress bars
                row = measured(case, repeats, compute.name)
            rows.append({**row, "versions": facts["versions"], "commit": facts["commit"]})
            print(
                f"{row['model']} {row['size']} px: plain {row['plain']:,.0f}, ours {row['ours']:,.0f}, ceiling "
                f"{row['ceiling']:,.0f} tiles/s; ours/plain {row['ours/plain']:.2f}, ours/ceiling "
                f"{row['ours/ceiling']:.2f}",
                flush=True,
            )
    if repeats == REPEATS:
        stem = f"throughput-{compute.device.type}"
        (RESULTS / f"{stem}.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
        (RESULTS / f"{stem}.md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
