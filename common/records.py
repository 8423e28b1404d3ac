"""The records that a run leaves in runs/<run_id>/, read in one place."""

import csv
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import Fault, first_line

METRICS = ("train/loss", "validate/loss", "validate/auc", "validate/acc", "validate/balanced_acc")
COLUMNS = ("epoch", *METRICS, "lr", "tiles_per_second", "seconds")  # of history.csv


@dataclass(frozen=True)
class Record:
    """A finished run: its configuration and facts, its scores, and its epochs."""

    folder: Path
    facts: Mapping[str, Any]  # config.json
    summary: Mapping[str, Any]  # summary.json
    history: Sequence[Mapping[str, float]]  # history.csv

    @classmethod
    def read(cls, output_dir: Path, run_id: str) -> "Record":
        """The record of a finished run; Fault where a file is missing or damaged."""
        folder = run_folder(output_dir, run_id)
        facts, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
        return cls(folder, facts, summary, read_history(folder / "history.csv"))

    @property
    def run_id(self) -> str:
        """The run's name."""
        return str(self.summary["run_id"])

    @property
    def config(self) -> Mapping[str, Any]:
        """The run's keys."""
        content: Mapping[str, Any] = self.facts["config"]
        return content

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of scores.npz, which `Trainer.test` describes; Fault where it is missing or damaged."""
        path = self.folder / "scores.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise Fault(f"{path}: not a readable record ({first_line(error)})") from error

    @property
    def scores(self) -> dict[str, float]:
        """The scores of the selected epoch's weights; `tta test/…`, over 8 views, where the run has them."""
        scores = {name: self.summary["validate"][name] for name in ("validate/auc", "validate/acc")}
        scores |= {name: self.summary[name] for name in ("test/auc", "test/acc")}
        if "tta" in self.summary:
            scores |= {f"tta test/{name}": self.summary["tta"][name]["value"] for name in ("auc", "acc")}
        return scores


def run_folder(output_dir: Path, run_id: str) -> Path:
    """Where a run's records are."""
    return output_dir / "runs" / run_id


def is_finished(output_dir: Path, run_id: str) -> bool:
    """Whether the run's records are complete: summary.json is written last."""
    return (run_folder(output_dir, run_id) / "summary.json").exists()


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a history.csv, one per epoch; Fault where it is missing or damaged."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError) as error:
        raise Fault(f"{path}: not a readable record ({first_line(error)})") from error


def read_json(path: Path) -> Any:
    """The content of a record; Fault where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Fault(f"{path}: not a readable record ({first_line(error)})") from error
