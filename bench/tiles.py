"""Tiles for the measurements: a file in the layout of PathMNIST's official one, and a trainer of given tiles."""

import contextlib
import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from common import phantom
from common.compute import Compute
from common.config import TrainingConfig
from common.data import Dataset, Split
from common.models import build_model
from common.pathmnist import CLASS_NAMES
from common.tiles import DeviceTiles, Splits
from common.tracking import Run
from common.training import Trainer


def official_arrays(counts: Mapping[str, int], size: int) -> dict[str, NDArray[np.uint8]]:
    """For each split its `<split>_images`, (n, size, size, 3), and `<split>_labels`, (n, 1)."""
    arrays = {}
    for split, count in counts.items():
        images, labels = zip(*phantom.generate(split, count, size), strict=True)
        arrays[f"{split}_images"] = np.concatenate(images)
        arrays[f"{split}_labels"] = np.concatenate(labels).astype(np.uint8)[:, None]
    return arrays


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
