"""The records that a run leaves in runs/<run_id>/, read and checked in one place."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import Fault, first_line
from common.files import open_regular, read_text

METRICS = ("train/loss", "validate/loss", "validate/auc", "validate/acc", "validate/balanced_acc")
COLUMNS = ("epoch", *METRICS, "lr", "tiles_per_second", "seconds")  # of history.csv
REMEDY = "restore this file, or run the script that wrote it again under another --run_id"


@dataclass(frozen=True)
class Record:
    """A finished run: its configuration and facts, its scores, and its epochs."""

    folder: Path
    facts: Mapping[str, Any]  # config.json
    summary: Mapping[str, Any]  # summary.json
    history: Sequence[Mapping[str, float]]  # history.csv

    @classmethod
    def read(cls, output_dir: Path, run_id: str) -> "Record":
        """The record of a finished run; Fault where a file is missing, damaged, or of another run or task."""
        folder = run_folder(output_dir, run_id)
        facts, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
        history = read_history(folder / "history.csv")
        problem = history_problem(history)
        if not history and "epoch" in summary["best"]:  # only a baseline, which is no network, has none
            problem = "no epochs"
        if problem:
            raise unreadable(folder / "history.csv", problem)
        if summary["task"] != facts["task"]:
            raise unreadable(
                folder / "summary.json", f"task: it is {summary['task']}, in config.json {facts['task']}"
            )
        return cls(folder, facts, summary, history)

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
        tiles, n_classes = self.summary["tiles"], len(self.summary["best"]["auc_per_class"])
        try:
            with open_regular(path) as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in {*archive.files, "best_logits", "targets"}}
            for name, values in arrays.items():
                n_tiles = tiles["val" if name.startswith(("validate_", "shifted_")) else "test"]
                shape, kinds = ((n_tiles, n_classes), "f") if name.endswith("_logits") else ((n_tiles,), "ui")
                if values.shape != shape or values.dtype.kind not in kinds:
                    found = f"the shape {values.shape} and dtype {values.dtype}"
                    raise ValueError(f"{name} has {found}, not the shape {shape}")
                right = np.isfinite(values) if name.endswith("_logits") else (values >= 0) & (values < n_classes)
                if not right.all():
                    raise ValueError(f"{name} has values that are not finite, or no class")
        except Exception as error:  # zipfile, zlib and numpy raise many types
            raise unreadable(path, error) from error
        return arrays

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


def checkpoint_folder(output_dir: Path, run_id: str) -> Path:
    """Where a run's checkpoints are; best.pt has the weights of its best epoch."""
    return output_dir / "checkpoints" / run_id


def is_finished(output_dir: Path, run_id: str) -> bool:
    """Whether the run's records are complete: summary.json is written last."""
    return (run_folder(output_dir, run_id) / "summary.json").exists()


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a history.csv, one per epoch; Fault where it is missing or damaged.

    The columns may be those of another program's runs; `history_problem` checks those of ours.
    """
    try:
        rows = [{name: float(value) for name, value in row.items()} for row in read_table(path)]
        if [row.get("epoch") for row in rows] != list(range(1, len(rows) + 1)):
            raise ValueError("epoch: the epochs do not count from 1")
    except ValueError as error:
        raise unreadable(path, error) from error
    return rows


def read_table(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV file, each with the values by column; Fault where it is missing or damaged."""
    try:
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True))
        if any(None in row or None in row.values() for row in rows):
            raise ValueError("the lines have different numbers of values")
    except (OSError, ValueError, csv.Error) as error:
        raise unreadable(path, error) from error
    return rows


def history_problem(rows: Any) -> str | None:
    """What is wrong with the epochs of one of our runs, in words, with the key; None where nothing is."""
    from common.records.schemas import HISTORY

    return _problem(HISTORY, rows, strict=False)  # in a table even the epoch is a float


def read_json(path: Path) -> Any:
    """The content of a record of a run, whose keys, types and ranges are those of `common.records.schemas`.

    Raises Fault where it is missing, damaged, or in the folder of another run.
    """
    from common.records.schemas import BY_FILE

    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from error
    if problem := _problem(BY_FILE[path.name], content, strict=True):
        raise unreadable(path, problem)
    if content.get("run_id", path.parent.name) != path.parent.name:
        raise unreadable(path, f"run_id: it is of run {content['run_id']}")
    return content


def _problem(adapter: Any, content: Any, strict: bool) -> str | None:
    from pydantic import ValidationError

    try:
        adapter.validate_python(content, strict=strict, extra="allow")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(map(str, first["loc"]))
        return f"{key}: {first['msg']}" if key else str(first["msg"])
    return None


def unreadable(path: Path, problem: Exception | str) -> Fault:
    """The error for a record that cannot be used."""
    reason = problem if isinstance(problem, str) else first_line(problem)
    return Fault(f"{path}: not a readable record ({reason}); {REMEDY}")
