"""Tiles/s while training: this project's loop beside the loop of a tutorial. Fills the table of docs/speed.md.

    python -m bench.throughput    # on the GPU if there is one, else on the CPU: 4 minutes of two quiet cores

- plain: medmnist's PathMNIST (PIL images), torchvision's transforms tile by tile, a shuffling DataLoader with the
  best of several numbers of workers, fp32, PyTorch's default optimiser.
- ours: `Trainer.train_epoch` with the configuration of task1.py and of train.py.

Both have the same network, batch size, augmentation, loss and input side, on phantom tiles of that side. They take
turns, so that other work on the machine slows both alike. They share a process, so that what
`Compute.prepare_process` gains helps the plain loop, too.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from common.cli import Keys, run_script  # before torch: common/__init__.py sets how its threads wait

# isort: split
import medmnist
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler
from torchvision.models import get_model
from torchvision.transforms import v2

import task1
import train
from common.config import TrainingConfig
from common.data import pathmnist
from common.data.batches import device_splits
from common.data.dataset import Dataset, load_dataset
from common.files import read_text, write_json, write_text
from common.markdown import markdown_table
from common.records.read import read_json
from common.records.run import Run, provenance
from common.training.device import Compute
from common.training.loop import Trainer
from common.training.models import build_model
from study.report import BLOCK

FOLDER = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
SIDE = 64
TURNS = 5
CPU_TILES, GPU_TILES = 1536, 89_996  # of a turn; on a GPU as many as PathMNIST has
Loop = Callable[[], object]  # trains one epoch


def plain_loop(config: TrainingConfig, compute: Compute, workers: int) -> Loop:
    """An epoch of a tutorial's loop. Only the first one includes the workers' start."""
    wide = config.augmentation == "ta_wide"
    flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), v2.TrivialAugmentWide()] if wide else []
    erasing = [v2.RandomErasing(0.1)] if wide else []
    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    transform = v2.Compose([*flips, *tensor, *erasing])
    loader = DataLoader(
        medmnist.PathMNIST("train", transform=transform, root=str(config.data_root), size=SIDE),
        batch_size=config.batch_size,
        # `shuffle=True` would ask for the length, which medmnist gives for the official number of tiles alone.
        sampler=SubsetRandomSampler(range(config.train_tiles)),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=compute.device.type == "cuda",
        drop_last=True,
    )
    model = get_model(config.model_name, num_classes=9).to(compute.device).train()
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    optimizer = kind(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)

    def epoch() -> None:
        for images, labels in loader:
            images, labels = images.to(compute.device, non_blocking=True), labels.squeeze(1).long()
            optimizer.zero_grad()
            criterion(model(images), labels.to(compute.device)).backward()
            optimizer.step()

    return epoch


def our_loop(config: TrainingConfig, dataset: Dataset, compute: Compute) -> Loop:
    """An epoch as `Trainer.fit` runs it."""
    compute.prepare_process()
    model = build_model(config.model_name, len(pathmnist.CLASS_NAMES), config.input_size)
    splits = device_splits(dataset, config, compute.device)
    trainer = Trainer(model, splits, config, compute, Run("task1", config, dataset, compute.name))
    return lambda: trainer.train_epoch(1)


def seconds(loop: Loop) -> float:
    """The time of one epoch."""
    started = time.perf_counter()
    loop()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(config: TrainingConfig, compute: Compute) -> dict[str, Any]:
    """A row of the table: tiles/s of both loops, and their ratio turn by turn."""
    dataset = load_dataset("phantom", SIDE, config.data_root, config.train_tiles)
    images, labels = dataset.train.images.permute(0, 2, 3, 1).numpy(), dataset.train.labels.numpy()
    path = config.data_root / f"pathmnist_{SIDE}.npz"
    np.savez(path, train_images=images, train_labels=labels.astype(np.uint8)[:, None])
    ours, cores = our_loop(config, dataset, compute), os.cpu_count() or 1
    torch.backends.cudnn.allow_tf32 = True  # as a tutorial's loop has it; ours computes in bf16 on such GPUs
    plain = {workers: plain_loop(config, compute, workers) for workers in {0, 1, cores // 2, cores}}
    for loop in (ours, *plain.values()):
        seconds(loop)  # the first epoch warms up
    best = min(plain, key=lambda workers: seconds(plain[workers]))
    turns = [[len(labels) / seconds(loop) for loop in (plain[best], ours)] for _ in range(TURNS)]
    rates = {"plain": [one[0] for one in turns], "ours": [one[1] for one in turns]}
    rates["ratio"] = [one[1] / one[0] for one in turns]
    return {
        "network": f"{config.model_name}, batch {config.batch_size}, augmentation {config.augmentation}",
        "workers": best,
        **{name: {"median": median(all_), "range": [min(all_), max(all_)]} for name, all_ in rates.items()},
    }


def table() -> list[str]:
    """The lines of docs/speed.md's table, from the records of every kind of device that was measured."""
    rows = []
    for record in map(read_json, sorted(FOLDER.glob("*.json"))):
        for row in record["rows"]:
            numbers = [f"{row[way]['median']:,.0f}" for way in ("plain", "ours")]
            low, high = row["ratio"]["range"]
            ratio = f"{row['ratio']['median']:.2f} ({low:.2f} to {high:.2f})"
            rows.append([row["network"], record["device"], *numbers, ratio])
    return markdown_table([f"{SIDE} px inputs", "device", "plain loop", "ours", "ours / plain"], "llrrr", rows)


def filled(page: str) -> str:
    """docs/speed.md with the table between its comments."""
    return BLOCK.sub(lambda _: "\n".join(["<!-- bench: begin -->", *table(), "<!-- bench: end -->"]), page)


def main(config: Keys) -> None:
    """Measure both tasks, write the record, fill the page."""
    compute, rows = Compute.of("auto", "auto"), []
    keys = {"dataset": "phantom", "size": SIDE, "wandb": "disabled"}
    keys["train_tiles"] = GPU_TILES if compute.device.type == "cuda" else CPU_TILES
    with tempfile.TemporaryDirectory() as folder:  # tiles are drawn once
        for run_id, kind in (("task1", task1.Task1Config), ("task3", train.TrainConfig)):
            rows.append(compare(kind(**keys, run_id=run_id, data_root=folder, output_dir=folder), compute))
            print(f"{rows[-1]['network']}: ours / plain {rows[-1]['ratio']['median']:.2f}", flush=True)
    source = provenance(("torch", "torchvision", "numpy"))
    facts = {"device": compute.name, "dataset": "phantom", "repeats": TURNS, **source}
    write_json(FOLDER / f"throughput-{compute.device.type}.json", {**facts, "rows": rows})
    write_text(PAGE, filled(read_text(PAGE)))


if __name__ == "__main__":
    run_script(main, Keys)
