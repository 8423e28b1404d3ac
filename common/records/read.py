"""The records that a run leaves in runs/<run_id>/, read and checked in one place.

A record may have more than its model here names, so that later versions of the project can add to it.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
from pydantic import Field, FiniteFloat, PositiveInt, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # Python 3.11 has none that pydantic can use

from common.cli import Fault, first_line
from common.files import digest, read_text

METRICS = ("train/loss", "validate/loss", "validate/auc", "validate/acc", "validate/balanced_acc")
COLUMNS = ("epoch", *METRICS, "lr", "tiles_per_second", "seconds")  # of history.csv
REMEDY = "restore this file, or run the script that wrote it again under another --run_id"

Share = Annotated[float, Field(ge=0, le=1)]


class Keys(TypedDict):
    seed: int
    dataset: str
    size: PositiveInt
    train_tiles: PositiveInt | None


class Shared(TypedDict):
    task: str
    run_id: str
    dataset: str
    synthetic: bool
    data_fingerprint: str
    tiles: dict[str, PositiveInt]  # of each split
    device: str


class Facts(Shared):
    config: Keys
    started: str


class Estimate(TypedDict):
    value: Share
    low: Share
    high: Share


class Scores(TypedDict):
    n: PositiveInt
    auc: Estimate
    acc: Estimate
    auc_per_class: dict[str, Share | None]
    confusion_matrix: list[list[int]]


class Summary(Shared):
    best: NotRequired[Scores]  # after --test=False there are no test scores
    last: NotRequired[Scores]
    tta: NotRequired[Scores]
    validate: dict[str, FiniteFloat]
    shifted: dict[str, Share]
    wall_seconds: FiniteFloat


MODELS: dict[str, TypeAdapter[Any]] = {"config.json": TypeAdapter(Facts), "summary.json": TypeAdapter(Summary)}


@dataclass(frozen=True)
class Record:
    """A finished run with test scores: its configuration and facts, its scores, and its epochs."""

    folder: Path
    facts: Mapping[str, Any]  # config.json
    summary: Mapping[str, Any]  # summary.json
    history: Sequence[Mapping[str, float]]  # history.csv

    @classmethod
    def read(cls, output_dir: Path, run_id: str) -> "Record":
        """The record of a finished run.

        Raises Fault where a file is missing or damaged, where the files contradict each other, or where the run
        has no test scores.
        """
        folder = run_folder(output_dir, run_id)
        facts, summary = read_json(folder / "config.json"), read_json(folder / "summary.json")
        if "best" not in summary:
            raise Fault(f"{folder}: the run has no test scores (--test=False); train it without this key")
        for name in facts.keys() & summary.keys():
            if summary[name] != facts[name]:
                problem = f"{name}: it is {summary[name]}, in config.json {facts[name]}"
                raise unreadable(folder / "summary.json", problem)
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
        shape = (self.summary["tiles"]["test"], len(self.summary["best"]["auc_per_class"]))
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = dict(archive)
            if arrays["best_logits"].shape != shape or arrays["targets"].shape != shape[:1]:
                raise ValueError(f"its outputs do not have the shape {shape} of summary.json")
        except Exception as error:  # a damaged file makes zipfile and numpy raise many types
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


def input_size_of(config: Mapping[str, Any]) -> int:
    """The side in pixels of a run's inputs; earlier versions of the project called it `resize_to`."""
    return int(config.get("input_size") or config.get("resize_to") or config["size"])


def is_finished(output_dir: Path, run_id: str) -> bool:
    """Whether the run's records are complete: summary.json is written last."""
    return (run_folder(output_dir, run_id) / "summary.json").exists()


def best_weights(output_dir: Path, run_id: str) -> Path:
    """The best.pt of a run. Whoever reads the weights of a run takes their path from here.

    Raises Fault where the file is missing, or is not the one that the run had when it finished.
    """
    path, summary = checkpoint_folder(output_dir, run_id) / "best.pt", {}
    if is_finished(output_dir, run_id):
        summary = read_json(run_folder(output_dir, run_id) / "summary.json")
    try:
        found = digest(path)
    except FileNotFoundError:
        raise Fault(f"{path}: no such checkpoint; train first, or name another --run_id") from None
    if summary.get("best_sha256", found) != found:
        raise Fault(f"{path}: not the weights with which run {run_id} finished; restore them, or train again")
    return path


def read_history(path: Path) -> list[dict[str, float]]:
    """The rows of a history.csv, one per epoch; Fault where it is missing or damaged.

    The columns may be those of another program's runs.
    """
    try:
        lines = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
        rows = [{name: float(value) for name, value in line.items()} for line in lines]
        if [row.get("epoch") for row in rows] != list(range(1, len(rows) + 1)):
            raise ValueError("epoch: the epochs do not count from 1")
    except (OSError, TypeError, ValueError, csv.Error) as error:  # TypeError: lines of different lengths
        raise unreadable(path, error) from error
    return rows


def read_json(path: Path) -> Any:
    """The content of a JSON record of a run; that of config.json and summary.json is checked.

    Raises Fault where it is missing, damaged, or in the folder of another run.
    """
    try:
        content = json.loads(read_text(path))
        model = MODELS.get(path.name, TypeAdapter(dict[str, Any]))
        model.validate_python(content, strict=True, extra="allow")
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if content.get("run_id", path.parent.name) != path.parent.name:
        raise unreadable(path, f"run_id: it is of run {content['run_id']}")
    return content


def unreadable(path: Path, problem: Exception | str) -> Fault:
    """The error for a record that cannot be used."""
    reason = problem if isinstance(problem, str) else first_line(problem)
    if isinstance(problem, ValidationError):  # its first line names no key
        first = problem.errors()[0]
        reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return Fault(f"{path}: not a readable record ({reason}); {REMEDY}")
