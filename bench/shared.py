"""What the measurements share: separate processes, a trainer of given tiles, and records in bench/results/."""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from common.config import TrainingConfig
from common.data.batches import DeviceTiles, Splits
from common.data.dataset import Dataset, Split
from common.data.pathmnist import CLASS_NAMES
from common.files import write_json
from common.records.run import Run, provenance
from common.training.device import Compute
from common.training.loop import Trainer
from common.training.models import build_model

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "torchvision", "medmnist", "numpy")


def separate_process() -> ProcessPoolExecutor:
    """One fresh process, which starts with the first job that is submitted."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def trainer_of(config: TrainingConfig, split: Split, folder: Path) -> Trainer:
    """The trainer that task1.py and train.py build, on these training tiles; its records go to `folder`."""
    compute = Compute.of(config.device, config.precision)
    compute.prepare_process()
    torch.manual_seed(config.seed)
    model = build_model(config.model_name, len(CLASS_NAMES), config.size)
    tiles = DeviceTiles(split, compute.device, config.augmentation)
    dataset = Dataset("phantom", config.size, CLASS_NAMES, split, split, split, fingerprint="bench")
    config = dataclasses.replace(config, output_dir=folder, wandb="disabled")
    with contextlib.redirect_stdout(io.StringIO()):
        run = Run("task1", config, dataset, compute.name)
    return Trainer(model, Splits(tiles, tiles, lambda: tiles, lambda: iter(())), config, compute, run)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and range of repeated measurements."""
    return {"median": statistics.median(values), "range": [min(values), max(values)]}


def save(name: str, compute: Compute, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Write the rows of a measurement, with device, commit and versions, to bench/results/."""
    content = {"device": compute.name, **provenance(PACKAGES), **facts, "rows": rows}
    write_json(RESULTS / f"{name}-{compute.device.type}.json", content)


def saved(name: str) -> Iterator[dict[str, Any]]:
    """The records of a measurement: one for each kind of device that has been measured."""
    for path in sorted(RESULTS.glob(f"{name}-*.json")):
        yield json.loads(path.read_text(encoding="utf-8"))
