"""What the template of report.md may use: the records of a study as typed facts, and the published scores."""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.config import TrainingConfig
from common.errors import UsageError
from common.metrics import Estimate, recalls
from common.pathmnist import COUNTS
from common.records import Record
from common.statistics import Comparison, Spread, compare, interval, spread
from study.ablation import identical_rows
from study.report_selection import Study


@dataclass(frozen=True)
class Published:
    """Scores that others report on the full PathMNIST: all training tiles, the official test split."""

    source: str
    network: str
    size: int  # tile side in pixels
    acc: float
    auc: float


# Keys in which runs of one row may differ: the seed, and where and how a run is kept.
APART = {"seed", "run_id", "scratch", "n_seeds"} | TrainingConfig.bookkeeping()
REFERENCES = {  # by task, the coursework's first
    "Task 1": [
        Published("coursework, one seed", "ResNet-18 from scratch", 64, 0.8951, 0.9803),
        Published("Yang et al. 2023", "ResNet-18 from scratch", 28, 0.907, 0.983),
    ],
    "Task 3": [
        Published("coursework, one seed", "MobileNetV3-Large from scratch", 64, 0.9132, 0.9876),
        Published("Yue and Li 2024", "MedMamba-T from scratch", 224, 0.953, 0.997),
    ],
    "Task 5": [
        Published("coursework, one seed", "MobileNetV3-Large fine-tuned", 64, 0.9123, 0.9889),
        Published("Doerrich et al. 2025, 3 seeds, ACC ± 0.007", "ResNet-18 fine-tuned", 64, 0.934, 0.994),
    ],
}


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    records: Sequence[Record]

    def __post_init__(self) -> None:
        """Raise UsageError where two runs have the same seed, or differ in more than the seed."""
        seeds = [record.config["seed"] for record in self.records]
        runs = ", ".join(record.run_id for record in self.records)
        if len(set(seeds)) < len(seeds):
            raise UsageError(f"report.toml: of the runs {runs}, two have the same seed; name one per seed")
        configs = [record.config for record in self.records]
        for name in set().union(*configs) - APART:
            if len({str(config.get(name)) for config in configs}) > 1:
                raise UsageError(f"report.toml: the runs {runs} differ in {name}, not in the seed alone")

    @property
    def first(self) -> Record:
        """The run that stands for all of them in figures and in words."""
        return self.records[0]

    @property
    def single(self) -> list["Group"]:
        """Every run as a group of one."""
        return [Group([record]) for record in self.records]

    @property
    def full(self) -> bool:
        """Whether the scores compare with the published ones: trained on all tiles of PathMNIST."""
        summary = self.first.summary
        return not summary["synthetic"] and summary["tiles"]["train"] == COUNTS["train"]

    def by_seed(self, *keys: str) -> dict[int, float]:
        """A number of summary.json, such as ("best", "acc"), for every seed whose record has it."""
        found = {record.config["seed"]: _look_up(record.summary, keys) for record in self.records}
        return {seed: estimate.value for seed, estimate in found.items() if estimate}

    def spread(self, *keys: str) -> Spread:
        """A number of summary.json over the seeds."""
        return spread(list(self.by_seed(*keys).values()))

    def score(self, *keys: str) -> Estimate | None:
        """The mean over seeds of a score from 0 to 1, with its t interval; None where a record lacks the score.

        One seed: the score as recorded, with its interval over test tiles; NaN where the record has none.
        """
        if len(self.by_seed(*keys)) < len(self.records):
            return None
        if len(self.records) == 1:
            return _look_up(self.first.summary, keys)
        over = self.spread(*keys)
        return Estimate(over.mean, max(over.low, 0), min(over.high, 1))

    def difference(self, after: Sequence[str], before: Sequence[str]) -> Comparison:
        """One number of summary.json minus another one, seed by seed."""
        return compare({"before": self.by_seed(*before), "after": self.by_seed(*after)})["after"]

    def recalls(self) -> dict[str, float]:
        """The mean over seeds of each class's recall on test tiles; NaN for a class without tiles."""
        scores = [record.summary["best"] for record in self.records]
        means = np.mean([recalls(one["confusion_matrix"]) for one in scores], axis=0)
        return dict(zip(scores[0]["auc_per_class"], means.tolist(), strict=True))

    def areas(self) -> dict[str, float]:
        """The mean over seeds of each class's AUC against the others; NaN for a class without tiles."""
        scores = [record.summary["best"]["auc_per_class"] for record in self.records]
        means = np.mean([list(one.values()) for one in scores], axis=0, dtype=float)
        return dict(zip(scores[0], means.tolist(), strict=True))


def grouped(records: Iterable[Record], apart: Collection[str] = APART) -> list[Group]:
    """The runs that differ in the keys `apart` alone, as groups in the order of their first runs."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        same = {name: value for name, value in record.config.items() if name not in apart}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(record)
    return [Group(records) for records in groups.values()]


def facts(study: Study) -> dict[str, Any]:
    """The template's variables. Raises UsageError or Fault naming the first record that is missing."""
    chosen = study.selection
    tasks = {title: Group(records) for title, records in study.trained().items()}
    attribution = study.attribution() if "task2" in chosen else None
    ablation = {row: Group(records) for row, records in study.ablation().items()} if "task4" in chosen else {}
    compared = {kind: Group(records) for kind, records in study.compared().items()} if "task5" in chosen else {}
    baselines = grouped(
        study.runs("baselines", study.named("baselines", "runs", list)) if "baselines" in chosen else []
    )
    if len({record.summary["synthetic"] for record in study.read.values()}) > 1:
        raise UsageError("report.toml: generated tiles and tiles of PathMNIST cannot stand on one page")
    if len({record.config["size"] for record in study.read.values()}) > 1:
        raise UsageError("report.toml: tiles of different sizes cannot stand on one page")
    by_kind = {kind: group.by_seed("best", "acc") for kind, group in compared.items()}
    groups = {title: {title: group} for title, group in tasks.items()} | {"Task 4": ablation, "Task 5": compared}
    sources = {
        task: [record.facts for group in parts.values() for record in group.records]
        for task, parts in groups.items()
    }
    sources["Baselines"] = [record.facts for group in baselines for record in group.records]
    sources["Task 2"] = [attribution] if attribution else []
    search = study.search()
    sources["Task 4, search"] = [study.provenance(trial["run_id"]) for trial in search]
    return {
        "study": study,
        "tasks": tasks,
        "attribution": attribution,
        "ablation": ablation,
        "best_row": max(
            ablation, key=lambda row: ablation[row].spread("validate", "validate/acc").mean, default=None
        ),
        "verdicts": verdicts(ablation),
        "search": search,
        "compared": compared,
        "comparison": study.comparison() if compared else None,
        "baselines": baselines,
        "best_baseline": max(
            baselines, key=lambda group: group.spread("validate", "validate/acc").mean, default=None
        ),
        "tuning": compare(by_kind)["fine-tuned"] if compared else None,
        "sources": sources,
        "references": REFERENCES,
        "official": COUNTS,
        "interval": interval,
    }


def verdicts(ablation: Mapping[str, Group]) -> dict[str, Comparison]:
    """The test ACC of each row compared with the first row's, and over 8 views, as in the sweep's table."""
    if not ablation:
        return {}
    reference, group = next(iter(ablation.items()))
    values = {row: group.by_seed("best", "acc") for row, group in ablation.items()}
    if group.score("tta", "acc"):
        values[f"{reference}, 8 views"] = group.by_seed("tta", "acc")
    return compare(values, identical_rows({row: group.records for row, group in ablation.items()}))


def _look_up(summary: Mapping[str, Any], keys: Sequence[str]) -> Estimate | None:
    """A number of summary.json; None where it has none. Older records lack balanced ACC: it is computed."""
    value: Any = summary
    for key in keys:
        if key == "balanced_acc" and key not in value:
            value = float(np.nanmean(recalls(value["confusion_matrix"])))
        elif (value := value.get(key)) is None:
            return None
    return Estimate(**value) if isinstance(value, Mapping) else Estimate(value, math.nan, math.nan)
