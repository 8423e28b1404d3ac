"""The rows of the page: runs that differ in their seed alone, and their scores over the seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from common.cli import Fault
from common.config import TrainingConfig
from common.records.read import Record, input_size_of, is_finished, read_json
from common.statistics import Spread, compare, spread
from common.training.metrics import Estimate, recalls

NETWORKS = {
    "resnet18": "ResNet-18",
    "mobilenet_v3_large": "MobileNetV3-Large",
    "tf_efficientnet_lite0": "EfficientNet-Lite0",
}
TECHNIQUES = {  # rows of the ablation
    "combined": "reference",
    "combined, 8 views": "with 8 views at test time",
    "without_augmentation": "without data augmentation",
    "without_early_stopping": "without early stopping",
    "without_label_smoothing": "without label smoothing",
    "without_lr_strategy": "with a constant learning rate",
    "without_lr_warmup": "without warm-up of the learning rate",
    "with_weight_decay": "with strong weight decay",
    "with_scaled_shifts": "with TrivialAugmentWide whose shifts fit the tile",
    "with_stain": "with stain augmentation added",
    "with_stain_only": "with stain augmentation instead of the reference's",
    "with_ema": "with averaged weights (EMA)",
    "with_all": "with stain augmentation and averaged weights",
}
CONVERGED_WITHIN = 0.005
REFERENCE = "combined"  # the row of the ablation with which the others are compared
# Keys in which runs of one row may differ: the seed, where and how a run is kept; only older runs have dry_run.
# The number of training tiles stands in the summary, too, and there it is never None.
APART = {"seed", "run_id", "device", "scratch", "n_seeds", "train_tiles", "dry_run"} | TrainingConfig.bookkeeping()
SCORES = {  # of a run, by their names on the page: where they stand in summary.json
    "acc": ("best", "acc"),
    "auc": ("best", "auc"),
    "balanced": ("best", "balanced_acc"),
    "views": ("tta", "acc"),
    "validation": ("validate", "validate/acc"),
    "staining": ("shifted", "lab_statistics"),
    "brightness": ("shifted", "gamma"),
    "noise": ("shifted", "chromatic_noise"),
    "calibration": ("best", "expected_calibration_error"),
}


@dataclass(frozen=True)
class Row:
    """A row of this study: the patterns of its runs' ids, separated by spaces, and its recipe in words.

    Tables and figures show a row with `until` only until that other row has a finished run.
    """

    runs: str
    title: str
    until: str = ""


# A row without a finished run is not shown.
ROWS = {
    "colour": Row("mean_rgb-89996-*", "logistic regression on the mean colour"),
    "neighbours": Row("neighbours-89996-*", "nearest neighbours on colour and gradient statistics"),
    "boosting": Row("boosting-89996-*", "boosted trees on colour and gradient statistics"),
    "task1": Row("task1-*", "Task 1: ResNet-18"),
    "task1_64": Row("task1_64-*", "Task 1: ResNet-18"),
    "combined": Row("combined-*", "Task 3: MobileNetV3-Large, the coursework's configuration"),
    "combined_64": Row("combined_64-*", "Task 3: MobileNetV3-Large, the coursework's configuration"),
    "chosen": Row("chosen-*", "Task 3: MobileNetV3-Large, the chosen recipe"),
    "best_scratch": Row("best_scratch-*", "the best network from scratch"),
    "frozen_64": Row("frozen_64-*", "Task 5: only the classifier is trained"),
    "frozen_128": Row("frozen_128-*", "Task 5: only the classifier is trained"),
    "tuned": Row("tuned-*", "Task 5: all layers fine-tuned"),
    "tuned_scratch": Row("tuned_scratch-*", "Task 5: the same network from scratch"),
    "long_scratch": Row("long_scratch-*", "Task 5: from scratch, trained longer"),
    # Runs of an earlier version, whose tiles were resized after their augmentation:
    "old_tuned": Row("task5 task5-seed*", "Task 5: EfficientNet-Lite0, all layers fine-tuned", "tuned"),
    "old_scratch": Row("task5-scratch*", "Task 5: EfficientNet-Lite0 from scratch", "tuned"),
}
ABLATIONS = ("ablation_64-*", "ablation-*")  # the first one that has runs
CURVES = {
    "ResNet-18 from scratch": Row("learning_curve_task1_64-* task1_64-*", ""),
    "MobileNetV3-Large from scratch, the chosen recipe": Row("learning_curve_chosen-* chosen-*", ""),
    "fine-tuned": Row("learning_curve_tuned-* tuned-*", ""),
    "logistic regression on the mean colour": Row("mean_rgb-*", ""),
    "nearest neighbours": Row("neighbours-*", ""),
    "boosted trees": Row("boosting-*", ""),
    # Of the earlier version:
    "ResNet-18 from scratch, 28 px": Row("learning_curve_task1-* task1-*", "", "task1_64"),
    "MobileNetV3-Large from scratch, stain augmentation, 28 px": Row(
        "learning_curve_with_all-* with_all-*", "", "chosen"
    ),
    "EfficientNet-Lite0, only the last layer trained": Row("learning_curve_lite0-* lite0-head-*", "", "tuned"),
}


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, in the order of their seeds; `title` is their recipe in words."""

    title: str
    records: Sequence[Record]

    def __post_init__(self) -> None:
        """Raise Fault where two runs have the same seed, or differ in more than the seed."""
        runs = ", ".join(record.run_id for record in self.records)
        if len(set(self.seeds)) < len(self.records):
            raise Fault(f"of the runs {runs}, two have the same seed: move one of them out of the folder")
        configs = [
            {**record.config, "training tiles": record.summary["tiles"]["train"]} for record in self.records
        ]
        for name in set().union(*configs) - APART:
            if len({str(config.get(name)) for config in configs}) > 1:
                raise Fault(f"the runs {runs} differ in {name}, not in the seed alone")

    @property
    def first(self) -> Record:
        """The run that stands for all of them in words and figures."""
        return self.records[0]

    @property
    def seeds(self) -> list[int]:
        """The seeds of the runs."""
        return [record.config["seed"] for record in self.records]

    @property
    def side(self) -> int:
        """The side of the inputs in pixels."""
        return input_size_of(self.first.config)

    @property
    def tiles(self) -> int:
        """The number of training tiles."""
        return int(self.first.summary["tiles"]["train"])

    def by_seed(self, score: str) -> dict[int, float]:
        """One of SCORES of every seed whose record has it."""
        found = {}
        for record in self.records:
            part, name = SCORES[score]
            value = record.summary.get(part, {}).get(name)
            if value is None and score == "balanced":  # older records lack it
                value = float(np.nanmean(recalls(record.summary[part]["confusion_matrix"])))
            if value is not None:
                found[record.config["seed"]] = value["value"] if isinstance(value, Mapping) else value
        return found

    def spread(self, score: str) -> Spread | None:
        """One of SCORES over the seeds; None where a record lacks it."""
        values = self.by_seed(score)
        return spread(list(values.values())) if len(values) == len(self.records) else None

    def over_tiles(self, score: str) -> Estimate | None:
        """The score of a single run with its interval over the test tiles; None where the record has none."""
        part, name = SCORES[score]
        value = self.first.summary.get(part, {}).get(name)
        return Estimate(**value) if isinstance(value, Mapping) and len(self.records) == 1 else None

    def minus(self, other: "Group", score: str) -> Spread | None:
        """The differences of a score from another group's, seed by seed; None without a common seed."""
        found = compare({"other": other.by_seed(score), "this": self.by_seed(score)})
        return found["this"].differences if found else None

    def recalls(self) -> dict[str, float]:
        """The mean over seeds of each class's recall on test tiles; NaN for a class without tiles."""
        scores = [record.summary["best"] for record in self.records]
        means = np.mean([recalls(one["confusion_matrix"]) for one in scores], axis=0)
        return dict(zip(scores[0]["auc_per_class"], means.tolist(), strict=True))

    def mistaken(self, name: str) -> tuple[str, float]:
        """The class for which test tiles of class `name` are most often taken, and their share; of all seeds."""
        scores = [record.summary["best"] for record in self.records]
        names = list(scores[0]["auc_per_class"])
        row = np.sum([one["confusion_matrix"] for one in scores], axis=0)[names.index(name)]
        wrong = np.where(np.arange(len(row)) == names.index(name), -1, row)
        return names[wrong.argmax()], float(wrong.max() / row.sum())


@dataclass
class Runs:
    """The finished runs of a folder; each is read once. `read` has those that were asked for."""

    folder: Path
    read: dict[str, Record] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """List the finished runs."""
        paths = sorted((self.folder / "runs").glob("*/config.json"))
        self.finished = [path.parent.name for path in paths if is_finished(self.folder, path.parent.name)]

    def record(self, run_id: str) -> Record:
        """The record of a run."""
        if run_id not in self.read:
            self.read[run_id] = Record.read(self.folder, run_id)
        return self.read[run_id]

    def matching(self, patterns: str) -> list[Record]:
        """The finished runs whose ids match one of the patterns, by seed."""
        ids = [run for run in self.finished if any(fnmatchcase(run, pattern) for pattern in patterns.split())]
        return sorted(map(self.record, ids), key=lambda record: record.config["seed"])

    def groups(self) -> dict[str, Group]:
        """The rows of ROWS that have finished runs."""
        found = {name: (row, self.matching(row.runs)) for name, row in ROWS.items()}
        return {name: Group(row.title, records) for name, (row, records) in found.items() if records}

    def ablation(self) -> dict[str, Group]:
        """The rows of the ablation by their names in train.py, the reference first; empty without runs."""
        rows: dict[str, list[Record]] = {}
        for record in next(filter(None, map(self.matching, ABLATIONS)), []):
            rows.setdefault(record.config["ablation"], []).append(record)
        known = [name for name in TECHNIQUES if name in rows]
        order = [*known, *(name for name in rows if name not in known)]
        return {name: Group(TECHNIQUES.get(name, name.replace("_", " ")), rows[name]) for name in order}

    def curves(self) -> dict[str, list[Group]]:
        """The recipes that were trained on several numbers of tiles, each with a group per number."""
        curves = {}
        for title, row in CURVES.items():
            records = [] if row.until and self.matching(ROWS[row.until].runs) else self.matching(row.runs)
            parts: dict[int, list[Record]] = {}
            for record in records:
                parts.setdefault(record.summary["tiles"]["train"], []).append(record)
            if len(parts) > 1:
                curves[title] = [Group(title, parts[tiles]) for tiles in sorted(parts)]
        return curves

    def recipes(self) -> dict[str, Group]:
        """The finished runs that have test scores, but a sweep's, as groups that differ in the seed alone."""
        sweeps = tuple(f"{path.name}-" for path in (self.folder / "sweeps").glob("*/"))
        found: dict[str, list[Record]] = {}
        for run_id in self.finished:
            summary = read_json(self.folder / "runs" / run_id / "summary.json")
            if "best" in summary and not run_id.startswith(sweeps):
                record = self.record(run_id)
                same = {name: value for name, value in record.config.items() if name not in APART}
                found.setdefault(f"{summary['tiles']['train']} {sorted(same.items())}", []).append(record)
        groups = []
        for records in found.values():
            distinct = {record.config["seed"]: record for record in records}  # of repeated runs the last one
            groups.append(Group(described(records[0]), [distinct[seed] for seed in sorted(distinct)]))
        groups.sort(key=lambda group: -group.by_seed("acc")[group.seeds[0]])
        return {group.first.run_id: group for group in groups}


def described(record: Record) -> str:
    """A run's recipe in words."""
    config = record.config
    if "baseline" in config:
        return str(record.summary["title"])
    name = config["model_name"].removeprefix("timm:")
    pretrained = config.get("weights", "none") != "none"
    words = [NETWORKS.get(name, name), "fine-tuned" if pretrained else "from scratch"]
    added = [f"{config['augmentation']} augmentation"] if config.get("augmentation", "none") != "none" else []
    added += ["averaged weights"] if config.get("ema_decay") else []
    return " ".join(words) + (f", {' and '.join(added)}" if added else "")


def convergence_epoch(history: Sequence[Mapping[str, float]]) -> int:
    """The first epoch, counted from 1, whose validation ACC is within 0.5 points (0.005) of the run's best one.

    Raises ValueError for an empty history.
    """
    accuracies = [row["validate/acc"] for row in history]
    # In floating point 0.920 - 0.915 is above 0.005; 1e-9 is far below one tile's share of an ACC.
    reached = max(accuracies) - CONVERGED_WITHIN - 1e-9
    return next(epoch for epoch, accuracy in enumerate(accuracies, start=1) if accuracy >= reached)


def identical(group: Group, other: Group) -> bool:
    """Whether the runs with a common seed gave the same outputs: early stopping stopped none of them."""
    twins = {record.config["seed"]: record for record in other.records}
    pairs = [(one, twins[one.config["seed"]]) for one in group.records if one.config["seed"] in twins]
    return bool(pairs) and all(
        np.array_equal(one.arrays()["best_logits"], twin.arrays()["best_logits"]) for one, twin in pairs
    )
