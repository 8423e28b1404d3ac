"""Shared by the tests: nothing leaves the temporary folders, nothing asks the network."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from common.compute import Compute
from common.config import TrainingConfig
from common.data import Dataset, Split
from common.models import build_model
from common.tiles import Tiles, device_splits
from common.tracking import Run
from common.training import Trainer

ROOT = Path(__file__).resolve().parent.parent
CPU = Compute(torch.device("cpu"), torch.float32)
MODEL = "mobilenet_v3_small"  # small and quick; has BatchNorm and dropout
SMALL_RUN: dict[str, Any] = {"dataset": "phantom", "size": 28, "n_epochs": 3, "batch_size": 32, "run_id": "r"}


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No W&B, no user's cache folder, no API key of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("NETRC", os.devnull)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # The tests' networks are too small to gain from a second thread, and lose much where cores are busy.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root shared by the tests, so that each small phantom is made once."""
    return tmp_path_factory.mktemp("phantom")


def coloured_tiles(n_tiles: int, size: int, seed: int) -> Split:
    """Tiles whose class is their colour plus noise: learnt in a few steps. Every class appears."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.arange(n_tiles) % 9
    colours = torch.randint(60, 200, (9, 1, 1, 3), generator=torch.Generator().manual_seed(0))
    noise = torch.randint(-50, 51, (n_tiles, size, size, 3), generator=draws)
    images = (colours[labels] + noise).to(torch.uint8)
    return Split(images.permute(0, 3, 1, 2), labels)


@pytest.fixture(scope="session")
def tiny() -> Dataset:
    """A data set that trains in a second."""
    return Dataset(
        name="phantom",
        size=28,
        class_names=tuple(f"class {label}" for label in range(9)),
        train=coloured_tiles(130, 28, 1),
        val=coloured_tiles(45, 28, 2),
        test=coloured_tiles(63, 28, 3),
        fingerprint="tiny",
    )


def trainer_of(
    dataset: Dataset,
    folder: Path,
    model: torch.nn.Module | None = None,
    *,
    train: Tiles | None = None,
    compute: Compute = CPU,
    lr_factors: dict[str, float] | None = None,
    **keys: Any,
) -> Trainer:
    """The trainer of a small network, or of `model`, on the data set, or on the training tiles `train`."""
    config = TrainingConfig(**{**SMALL_RUN, "model_name": MODEL, "output_dir": folder, **keys})
    if model is None:
        torch.manual_seed(config.seed)
        model = build_model(config.model_name, 9, config.input_size)
    splits = device_splits(dataset, compute.device, config.augmentation, config.resize_to)
    if train is not None:
        splits = dataclasses.replace(splits, train=train)
    run = Run("task1", config, dataset, compute.name)
    return Trainer(model, splits, config, compute, run, lr_factors=lr_factors)
