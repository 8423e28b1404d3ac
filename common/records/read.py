"""The records that a run leaves in runs/<run_id>/, read and checked in one place.

A record may have more than the keys named here, so that later versions of the project can add to it.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from common.cli import Fault, first_line
from common.data.pathmnist import CLASS_NAMES
from common.files import digest, read_text

REMEDY = "restore this file, or move the run out of runs/ and checkpoints/ and start it again"


class RunKeys(BaseModel, strict=True):
    """The keys of a run that pages show or sort by."""

    seed: int
    size: int
    train_tiles: int | None
    model_name: str = ""
    augmentation: str = ""
    lr: float = 0.0
    n_epochs: int = 0


class Facts(BaseModel, strict=True):
    """What pages show of config.json and summary.json, facts that are not computed again."""

    config: RunKeys
    dataset: str
    data_fingerprint: str
    synthetic: bool
    tiles: dict[str, int]
    device: str
    commit: str | None
    started: str
    wall_seconds: float
    validation: dict[str, float] = Field(alias="validate")


@dataclass(frozen=True)
class Record:
    """A finished run with test scores: its configuration, facts and scores, and its epochs."""

    folder: Path
    summary: Mapping[str, Any]  # config.json and summary.json
    history: Sequence[Mapping[str, float]]  # history.csv

    @classmethod
    def read(cls, output_dir: Path, run_id: str) -> "Record":
        """A finished run; Fault where a file is damaged, two differ in a fact, or there are no test scores."""
        folder = run_folder(output_dir, run_id)
        facts, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
        if "best" not in summary:
            raise Fault(f"{folder}: the run has no test scores (--test=False); train it without this key")
        for name in facts.keys() & summary.keys():
            if summary[name] != facts[name]:
                problem = f"{name}: it is {summary[name]}, in config.json {facts[name]}"
                raise unreadable(folder / "summary.json", problem)
        summary = {**facts, **summary}
        try:
            Facts.model_validate(summary)
        except ValidationError as error:
            first = error.errors()[0]
            problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
            raise unreadable(folder / "config.json", problem) from None
        history, config = read_history(folder / "history.csv"), summary["config"]
        # A baseline has no epochs, and a run that may stop early has at least its best one.
        n_epochs = 0 if config.get("early_stopping_patience") else config.get("n_epochs", 0)
        if len(history) < (n_epochs or summary["validate"].get("epoch", 0)):
            raise unreadable(folder / "history.csv", "it lacks epochs")
        return cls(folder, summary, history)

    @property
    def run_id(self) -> str:
        return str(self.summary["run_id"])

    @property
    def config(self) -> Mapping[str, Any]:
        return dict(self.summary["config"])

    @property
    def origin(self) -> dict[str, Any]:
        """What a run started from, beside its keys: its tiles and its weights."""
        found = {"training tiles": self.summary["tiles"]["train"], "data set": self.summary["data_fingerprint"]}
        return {**found, "file of weights": self.summary.get("weights", {}).get("sha256")}

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays of scores.npz, which `scores_of` describes; Fault where it is missing or damaged."""
        arrays = read_arrays(self.folder / "scores.npz")
        shape = (self.summary["tiles"]["test"], len(CLASS_NAMES))
        if [arrays[name].shape for name in ("best_logits", "targets") if name in arrays] != [shape, shape[:1]]:
            problem = f"its outputs do not have the shape {shape}: tiles of summary.json, classes of pathmnist.py"
            raise unreadable(self.folder / "scores.npz", problem)
        return arrays


def run_folder(output_dir: Path, run_id: str) -> Path:
    """Where a run's records are."""
    return output_dir / "runs" / run_id


def checkpoint_folder(output_dir: Path, run_id: str) -> Path:
    """Where a run's checkpoints are; best.pt has the weights of its best epoch."""
    return output_dir / "checkpoints" / run_id


def input_size_of(config: Mapping[str, Any]) -> int:
    """The side in pixels of a run's inputs; earlier versions of the project called it `resize_to`."""
    return int(config.get("input_size") or config.get("resize_to") or config["size"])


def is_finished(output_dir: Path, run_id: str) -> bool:
    """Whether the run's records are complete: summary.json is written last."""
    return (run_folder(output_dir, run_id) / "summary.json").exists()


def best_weights(output_dir: Path, run_id: str) -> Path:
    """A run's best.pt; Fault where it is missing, or is not the one that the run had when it finished."""
    path = checkpoint_folder(output_dir, run_id) / "best.pt"
    if not (path.exists() and is_finished(output_dir, run_id)):
        raise Fault(f"{path}: no checkpoint of a finished run; train first, or name another run")
    found = digest(path)
    if read_json(run_folder(output_dir, run_id) / "summary.json").get("best_sha256", found) != found:
        raise Fault(f"{path}: not the weights with which run {run_id} finished; restore them, or train again")
    return path


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a scores.npz; Fault where it is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return dict(archive)
    except Exception as error:  # a damaged file makes zipfile and numpy raise many types
        raise unreadable(path, error) from error


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a history.csv, one per epoch, of any columns; Fault where it is missing or damaged."""
    try:
        lines = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
        rows = [{name: float(value) for name, value in line.items()} for line in lines]
        if [row.get("epoch") for row in rows] != list(range(1, len(rows) + 1)):
            raise ValueError("epoch: the epochs do not count from 1")
    except (OSError, TypeError, ValueError, csv.Error) as error:  # TypeError: lines of different lengths
        raise unreadable(path, error) from error
    return rows


def read_json(path: Path, *names: str) -> Any:
    """The content of a JSON record of a run.

    Raises Fault where it is damaged, lacks one of the keys `names`, or is in the folder of another run.
    """
    try:
        content = json.loads(read_text(path))
        if not isinstance(content, dict):
            raise ValueError("it is no JSON object")
        if lacking := [name for name in names if name not in content]:
            raise ValueError(f"{lacking[0]}: it is missing")
        if content.get("run_id", path.parent.name) != path.parent.name:
            raise ValueError(f"run_id: it is of run {content['run_id']}")
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    return content


def unreadable(path: Path, problem: Exception | str) -> Fault:
    """The error for a record that cannot be used."""
    return Fault(f"{path}: not a readable record ({first_line(problem)}); {REMEDY}")
