"""What the tests share. None uses the network; only medmnist writes outside temporary folders (~/.medmnist)."""

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.figure import Figure

from common.config import TrainingConfig
from common.data.batches import device_splits
from common.data.dataset import Dataset, Split
from common.records.run import Run
from common.training.device import Compute
from common.training.loop import Trainer
from common.training.models import build_model

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
ROOT = Path(__file__).resolve().parent.parent
CPU = Compute(torch.device("cpu"), torch.float32)
MODEL = "mobilenet_v3_small"  # small and quick; has BatchNorm and dropout
SMALL_RUN: dict[str, Any] = {
    "dataset": "phantom",
    "size": 28,
    "input_size": 28,
    "n_epochs": 3,
    "batch_size": 32,
    "run_id": "r",
    "wandb": "disabled",  # also before `isolated`, in fixtures of a module
}


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Run each test without W&B, and without the user's data, cache folder and API key."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("PATHMNIST_ROOT", raising=False)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("NETRC", os.devnull)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # The networks are too small to gain from a second thread, and lose much time where cores are busy.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def phantom_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root that all tests share, so that each small phantom is generated once."""
    return tmp_path_factory.mktemp("phantom")


def coloured_tiles(n_tiles: int, size: int, seed: int) -> Split:
    """Tiles with one colour per class, plus noise: a network learns them in a few steps. Every class occurs."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n_tiles) % 9
    colours = torch.randint(60, 200, (9, 1, 1, 3), generator=torch.Generator().manual_seed(0))
    noise = torch.randint(-50, 51, (n_tiles, size, size, 3), generator=rng)
    images = (colours[labels] + noise).to(torch.uint8)
    return Split(images.permute(0, 3, 1, 2), labels)


@pytest.fixture(scope="session")
def tiny() -> Dataset:
    """A data set on which a small network trains in a second."""
    return Dataset(
        name="phantom",
        size=28,
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
    compute: Compute = CPU,
    lr_factors: Mapping[str, float] = {},
    **keys: Any,
) -> Trainer:
    """The trainer of `model`, or of a small network."""
    config = TrainingConfig(**{**SMALL_RUN, "model_name": MODEL, "output_dir": folder, **keys})
    if model is None:
        torch.manual_seed(config.seed)
        model = build_model(config.model_name, 9, config.input_size)
    splits = device_splits(dataset, config, compute.device)
    run = Run("task1", config, dataset, compute.name)
    return Trainer(model, splits, config, compute, run, lr_factors=lr_factors)


@pytest.fixture
def write_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A function that writes a sweep file `try.yaml` for the fake program: its content, with more `parameters`."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("study.processes.PAUSE", 0.05)
    program = str(ROOT / "tests" / "fake_program.py")

    def write(content: Mapping[str, Any], parameters: Mapping[str, Any] | None = None) -> Path:
        path = tmp_path / "try.yaml"
        together = {**content["parameters"], **(parameters or {})}
        path.write_text(yaml.safe_dump({"program": program, **content, "parameters": together}, sort_keys=False))
        return path

    return write


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that the test saves."""
    seen: list[Figure] = []
    save = Figure.savefig

    def remember(figure: Figure, *arguments: Any, **options: Any) -> None:
        save(figure, *arguments, **options)
        seen.append(figure)

    monkeypatch.setattr(Figure, "savefig", remember)
    return seen
