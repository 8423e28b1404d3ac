"""Made-up records of a run that has all the files of a real one: for tests of whatever reads them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.data.pathmnist import CLASS_NAMES
from common.files import write_csv, write_json

TILES = {"train": 90, "val": 10, "test": 18}
CONFIG = {
    "data_root": "data",
    "output_dir": "out",
    "seed": 0,
    "dataset": "phantom",
    "size": 28,
    "train_tiles": 90,
    "run_id": "r",
    "model_name": "resnet18",
    "select_on": "validate/acc",
}


def facts(config: Mapping[str, Any] = CONFIG, task: str = "task1") -> dict[str, Any]:
    """The content of config.json."""
    return {
        "config": dict(config),
        "task": task,
        "run_id": config["run_id"],
        "dataset": "phantom (90 training tiles, 28 px)",
        "synthetic": True,
        "data_fingerprint": "f",
        "tiles": TILES,
        "device": "a CPU",
        "commit": "abc",
        "started": "2026-01-01T00:00:00+00:00",
    }


def row(epoch: int, acc: float = 0.5) -> dict[str, float]:
    """The row of an epoch in history.csv."""
    losses = {"train/loss": 1.0, "validate/loss": 1.0}
    scores = {f"validate/{name}": acc for name in ("auc", "acc", "balanced_acc")}
    return {"epoch": epoch, **losses, **scores, "lr": 0.001, "tiles_per_second": 10.0, "seconds": 9.0}


def outputs() -> dict[str, np.ndarray]:
    """The arrays of scores.npz; all outputs are 0."""
    tests = {"best_logits": np.zeros((TILES["test"], len(CLASS_NAMES)))}
    targets = {"targets": np.zeros(TILES["test"], np.uint8), "validate_targets": np.zeros(TILES["val"], np.uint8)}
    return {**tests, **targets, "validate_classes": np.zeros(TILES["val"], np.uint8)}


def scored(
    history: Sequence[Mapping[str, float]], best: int | None = None, auc: float = 0.5, acc: float = 0.5
) -> dict[str, Any]:
    """What `Trainer.test` returns; `best` is the number of the best epoch, without it the last one."""
    scores = {
        "epoch": best or len(history),
        "n": TILES["test"],
        "auc": {"value": auc, "low": auc, "high": auc},
        "acc": {"value": acc, "low": acc, "high": acc},
        "balanced_acc": {"value": acc},
        "auc_per_class": dict.fromkeys(CLASS_NAMES, auc),
        "confusion_matrix": np.diag([2] * len(CLASS_NAMES)).tolist(),
    }
    return {
        "test/auc": auc,
        "test/acc": acc,
        "best": scores,
        "validate": history[(best or len(history)) - 1],
        "shifted": {},
        "select_on": "validate/acc",
        "stopped": "all epochs done",
        "wall_seconds": 1.0,
    }


def summary(
    facts: Mapping[str, Any], history: Sequence[Mapping[str, float]], auc: float = 0.5, acc: float = 0.5
) -> dict[str, Any]:
    """The content of summary.json; the last epoch is the best one."""
    shared = ("task", "run_id", "dataset", "synthetic", "data_fingerprint", "tiles", "device")
    return {**{name: facts[name] for name in shared}, **scored(history, auc=auc, acc=acc)}


def write_run(output_dir: Path, config: Mapping[str, Any] = CONFIG, task: str = "task1") -> Path:
    """Write the records of a finished run; returns their folder."""
    folder, history = output_dir / "runs" / config["run_id"], [row(1, 0.4), row(2)]
    write_json(folder / "config.json", facts(config, task))
    write_csv(folder / "history.csv", history)
    np.savez_compressed(folder / "scores.npz", **outputs())  # type: ignore[arg-type]
    write_json(folder / "summary.json", summary(facts(config, task), history))
    return folder
