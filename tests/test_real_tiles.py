"""The official PathMNIST file: its content, its parts, and that the networks learn from it."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import task1
import train
from common.cli import parse
from common.data.dataset import Dataset, Split, load_dataset, stratified_part
from common.training.metrics import accuracy, auc

FILE = Path(os.environ.get("PATHMNIST_ROOT", "/nowhere"), "pathmnist.npz")
PUBLISHED = Path(os.environ.get("PATHMNIST_PUBLISHED", "/nowhere"), "resnet18_28_3_test.csv")
MD5 = "a8b06965200029087d5bd730944a56c1"
CLASS_COUNTS = {
    "train": [9366, 9509, 10360, 10401, 8006, 12182, 7886, 9401, 12885],
    "val": [1041, 1057, 1152, 1156, 890, 1354, 877, 1045, 1432],
    "test": [1338, 847, 339, 634, 1035, 592, 741, 421, 1233],
}
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="needs real tiles: pathmnist.npz in $PATHMNIST_ROOT")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data root with a link to the file: the arrays are unpacked once, and not beside the file."""
    folder = tmp_path_factory.mktemp("real")
    (folder / "pathmnist.npz").symlink_to(FILE.resolve())
    yield folder
    shutil.rmtree(folder)  # 250 MB


def test_the_official_file_has_the_official_counts(root: Path) -> None:
    dataset = load_dataset("pathmnist", 28, root)
    assert dataset.fingerprint == MD5
    assert dataset.title == "PathMNIST (89,996 training tiles, 28 px)"
    for split, counts in CLASS_COUNTS.items():
        tiles = getattr(dataset, split)
        assert tiles.images.shape == (sum(counts), 3, 28, 28)
        assert tiles.labels.bincount().tolist() == counts


GENTLE = ["--augmentation=dihedral", "--ema_decay=0.99"]  # some 230 steps are too few for TrivialAugment
SHORT = ["--size=28", "--input_size=28", "--train_tiles=1800", "--device=cpu", "--wandb=disabled", "--run_id=r"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "keys", "least"),
    [
        (task1, ["--n_epochs=3"], 0.6),
        (train, ["--n_epochs=8", "--lr_warmup_epochs=1", "--batch_size=64", *GENTLE], 0.58),
    ],
    ids=["task1.py", "train.py"],
)
def test_a_short_training_learns_real_tissue(
    script: ModuleType, keys: list[str], least: float, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train half a minute on one core; the ACC on 2,000 validation tiles must exceed a bound.

    Measured ACC of task1.py: mean .674, standard deviation .007 (5 seeds); of train.py: .666, .012 (3 seeds). A
    logistic regression on the mean colour of all training tiles has .538: a network above the bound knows more.
    """

    def with_fewer_tiles_to_score(*arguments: Any) -> Dataset:
        dataset, parts = load_dataset(*arguments), {}
        for name, n_tiles in {"val": 2000, "test": 500}.items():
            whole = getattr(dataset, name)
            chosen = torch.from_numpy(stratified_part(whole.labels.numpy(), n_tiles))
            parts[name] = Split(whole.images[chosen], whole.labels[chosen])
        return dataclasses.replace(dataset, **parts)

    monkeypatch.setattr("common.training.loop.load_dataset", with_fewer_tiles_to_score)
    config_class = task1.Task1Config if script is task1 else train.TrainConfig
    where = [f"--data_root={root}", f"--output_dir={tmp_path}", "--test=False"]
    script.main(parse(config_class, [*SHORT, *keys, *where]))
    summary = json.loads((tmp_path / "runs/r/summary.json").read_text())
    assert summary["dataset"] == "PathMNIST (1,800 of 89,996 training tiles, 28 px)"
    assert summary["validate"]["validate/acc"] > least


@pytest.mark.skipif(
    not PUBLISHED.exists(), reason="needs MedMNIST's published predictions: a folder in $PATHMNIST_PUBLISHED"
)
def test_the_metrics_of_the_published_predictions_are_the_published_scores(root: Path) -> None:
    targets = load_dataset("pathmnist", 28, root).test.labels.numpy()
    index, probabilities = np.split(np.loadtxt(PUBLISHED, delimiter=","), [1], axis=1)
    assert index[:, 0].tolist() == list(range(7180))
    assert round(accuracy(probabilities.argmax(1), targets), 4) == 0.9102
    assert round(auc(probabilities, targets), 3) == 0.990
