"""The rows of the page: runs that differ in their seed alone, and their scores over the seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean

import numpy as np

from common.cli import BOOKKEEPING, Fault
from common.records.read import Record, input_size_of, read_json
from common.statistics import ROUNDING, Spread, compare, spread
from common.training.metrics import recalls

NETWORKS = {
    "resnet18": "ResNet-18",
    "mobilenet_v3_large": "MobileNetV3-Large",
    "tf_efficientnet_lite0": "EfficientNet-Lite0",
    "tf_efficientnet_lite1": "EfficientNet-Lite1",
}
TECHNIQUES = {  # rows of the ablation
    "combined": "all techniques of Task 3",
    "without_augmentation": "without data augmentation",
    "without_early_stopping": "without early stopping",
    "without_label_smoothing": "without label smoothing",
    "without_lr_strategy": "with a constant learning rate",
    "without_lr_warmup": "without warm-up of the learning rate",
    "with_weight_decay": "with strong weight decay",
    "with_scaled_shifts": "with TrivialAugmentWide whose shifts fit the tile",
    "with_stain": "with stain augmentation added to TrivialAugment",
    "with_stain_only": "with stain augmentation, without that of Task 3",
    "with_ema": "with averaged weights (EMA)",
    "with_all": "with stain augmentation and averaged weights",
}
AGAINST = {  # rows that are not compared with the first row, but with another one
    "with_stain_only": "without_augmentation",
    "with_all": "with_stain_only",
}
CONVERGED_WITHIN = 0.005
# Keys in which runs of one row may differ. Record.origin has the number of tiles.
APART = {"seed", "run_id", "train_tiles"} | BOOKKEEPING
SCORES = {  # of a run, by their names on the page: where they stand in summary.json
    "acc": ("best", "acc"),
    "auc": ("best", "auc"),
    "balanced": ("best", "balanced_acc"),
    "views": ("tta", "acc"),
    "validation": ("validate", "validate/acc"),
    "staining": ("shifted", "lab_statistics"),
    "brightness": ("shifted", "gamma"),
    "noise": ("shifted", "chromatic_noise"),
}
# Of each row of this study: the patterns of its runs' ids, and its recipe in words.
ROWS = {
    "colour": ("mean_rgb-89996-*", "logistic regression on the mean colour"),
    "neighbours": ("neighbours-89996-*", "nearest neighbours on colour and gradient statistics"),
    "boosting": ("boosting-89996-*", "boosted trees on colour and gradient statistics"),
    "task1": ("task1-*", "Task 1: ResNet-18"),
    "task1_64": ("task1_64-*", "Task 1: ResNet-18"),
    "combined": ("combined-*", "Task 3: MobileNetV3-Large, the coursework's configuration"),
    "combined_64": ("combined_64-*", "Task 3: MobileNetV3-Large, the coursework's configuration"),
    "chosen": ("chosen-*", "Task 3: MobileNetV3-Large, the recipe of the trials"),
    "scaled": ("scaled-*", "Task 3: MobileNetV3-Large, the final recipe"),
    "best_scratch": ("best_scratch-*", "ResNet-18, the final recipe"),
    "frozen_64": ("frozen_64-*", "Task 5: EfficientNet-Lite1, only the classifier trained"),
    "frozen_128": ("frozen_128-*", "Task 5: EfficientNet-Lite1, only the classifier trained"),
    "tuned": ("tuned-*", "Task 5: EfficientNet-Lite1, all layers fine-tuned"),
    "tuned_112": ("tuned_112-*", "Task 5: EfficientNet-Lite1, all layers fine-tuned"),
    "tuned_scratch": ("tuned_scratch-*", "Task 5: EfficientNet-Lite1 from scratch, the same recipe"),
    "long_scratch": ("long_scratch-*", "Task 5: EfficientNet-Lite1 from scratch, trained longer"),
}
ABLATION_RUNS = ("ablation-*", "ablation_64-*")  # the first one that has runs; the new one is not complete
CURVES = {  # rows that were also trained on fewer tiles, and the patterns of all their runs
    "task1_64": "learning_curve_task1_64-* task1_64-*",
    "scaled": "learning_curve_scaled-* scaled-*",
    "frozen_64": "learning_curve_frozen_64-* frozen_64-*",
    "colour": "mean_rgb-*",
    "neighbours": "neighbours-*",
    "boosting": "boosting-*",
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
        configs = [{**one.config, **one.origin} for one in self.records]
        for name in sorted(set().union(*configs) - APART):
            if len({str(config.get(name) or None) for config in configs}) > 1:  # an older run may lack a key
                raise Fault(f"the runs {runs} differ in {name}, not in the seed alone: move one out of the folder")

    @property
    def first(self) -> Record:
        """The run that stands for all of them in words and figures."""
        return self.records[0]

    @property
    def seeds(self) -> list[int]:
        return [record.config["seed"] for record in self.records]

    @property
    def side(self) -> int:
        """The side of the inputs in pixels."""
        return input_size_of(self.first.config)

    @property
    def sides(self) -> str:
        """The side of the tiles, and that of the inputs where it is another one."""
        tile = self.first.config["size"]
        return f"{tile} px" if tile == self.side else f"{tile} → {self.side} px"

    @property
    def name(self) -> str:
        """The recipe in words, with the sides."""
        return f"{self.title}, {self.sides}"

    @property
    def tiles(self) -> int:
        return int(self.first.summary["tiles"]["train"])

    @property
    def matrices(self) -> list[list[list[int]]]:
        """The confusion matrix of each run: a row per true class, a column per predicted one."""
        return [record.summary["best"]["confusion_matrix"] for record in self.records]

    def by_seed(self, score: str) -> dict[int, float]:
        """One of SCORES of every seed whose record has it."""
        part, name = SCORES[score]
        found = {}
        for record in self.records:
            value = record.summary.get(part, {}).get(name)
            if value is not None:
                found[record.config["seed"]] = value["value"] if isinstance(value, Mapping) else value
        return found

    def spread(self, score: str) -> Spread | None:
        """One of SCORES over the seeds; None where a record lacks it."""
        values = self.by_seed(score)
        return spread(list(values.values())) if len(values) == len(self.records) else None

    def minus(self, other: "Group", score: str) -> Spread | None:
        """The differences of a score from another group's, seed by seed; None without a common seed."""
        found = compare({"other": other.by_seed(score), "this": self.by_seed(score)})
        return found["this"].differences if found else None

    def recalls(self) -> dict[str, float]:
        """The mean over seeds of each class's recall on test tiles; NaN for a class without tiles."""
        means = np.mean([recalls(matrix) for matrix in self.matrices], axis=0)
        return dict(zip(self.first.summary["best"]["auc_per_class"], means.tolist(), strict=True))

    def mistaken(self, name: str) -> tuple[str, float]:
        """The class for which test tiles of class `name` are most often taken, and their share; of all seeds."""
        classes = list(self.first.summary["best"]["auc_per_class"])
        label = classes.index(name)
        row = np.sum(self.matrices, axis=0)[label]
        wrong = np.where(np.arange(len(row)) == label, -1, row)
        return classes[wrong.argmax()], float(wrong.max() / row.sum())


class Runs:
    """The finished runs of a folder; `read` has the records of those that were asked for, each of them checked."""

    def __init__(self, folder: Path, check: Callable[[Record], None] = lambda record: None) -> None:
        self.folder, self.check, self.read = folder, check, dict[str, Record]()
        paths = sorted((folder / "runs").glob("*/summary.json"))
        found = {path.parent.name: read_json(path, "wall_seconds") for path in paths}
        self.hours = sum(summary["wall_seconds"] for summary in found.values()) / 3600
        self.scored = [run_id for run_id, summary in found.items() if "best" in summary]

    def record(self, run_id: str) -> Record:
        """The record of a run, which is read and checked once."""
        if run_id not in self.read:
            self.read[run_id] = Record.read(self.folder, run_id)
            self.check(self.read[run_id])
        return self.read[run_id]

    def matching(self, patterns: str) -> list[Record]:
        """The finished runs whose ids match one of the patterns, by seed."""
        ids = [run for run in self.scored if any(fnmatchcase(run, pattern) for pattern in patterns.split())]
        return sorted(map(self.record, ids), key=lambda record: record.config["seed"])

    def groups(self) -> dict[str, Group]:
        """The rows of ROWS that have finished runs."""
        rows = ((name, title, self.matching(runs)) for name, (runs, title) in ROWS.items())
        return {name: Group(title, records) for name, title, records in rows if records}

    def ablation(self) -> dict[str, Group]:
        """The rows of the ablation by their names in train.py, the reference first; empty without it."""
        for pattern in ABLATION_RUNS:
            rows: dict[str, list[Record]] = {name: [] for name in TECHNIQUES}
            for record in self.matching(pattern):
                row = record.config.get("ablation", "")
                if record.run_id == f"{pattern[:-1]}{row}-{record.config['seed']}":
                    rows.setdefault(row, []).append(record)
            if reference := rows["combined"]:
                titles = {name: TECHNIQUES.get(name, name.replace("_", " ")) for name in rows}
                phantom = _phantom(reference[0])
                return {name: Group(titles[name] + phantom, records) for name, records in rows.items() if records}
        return {}

    def curves(self) -> dict[str, list[Group]]:
        """The recipes that were trained on several numbers of tiles, each with a group per number."""
        found: dict[str, dict[int, list[Record]]] = {}
        for row, runs in CURVES.items():
            for record in self.matching(runs.split()[0]) and self.matching(runs):  # both patterns, or none
                parts = found.setdefault(Group(ROWS[row][1] + _phantom(record), [record]).name, {})
                parts.setdefault(record.summary["tiles"]["train"], []).append(record)
        return {
            title: [Group(title, parts[tiles]) for tiles in sorted(parts)]
            for title, parts in found.items()
            if len(parts) > 1
        }

    def recipes(self) -> dict[str, Group]:
        """Runs that differ in the seed alone, without those of `ablation` and `curves`."""
        others = [*self.ablation().values(), *(group for curve in self.curves().values() for group in curve)]
        ids = (record.run_id for group in others for record in group.records)
        elsewhere = {run_id for run_id in ids if run_id.startswith(("ablation", "learning_curve"))}
        found: dict[str, dict[int, Record]] = {}
        records = [self.record(run) for run in self.scored if run not in elsewhere]
        for record in sorted(records, key=lambda record: record.summary["started"]):
            same = {name: value for name, value in record.config.items() if name not in APART and value}
            group = found.setdefault(f"{record.origin} {sorted(same.items())}", {})
            group[record.config["seed"]] = record  # of repeated runs the last one
        ordered = [[runs[seed] for seed in sorted(runs)] for runs in found.values()]
        titles = [described(runs[0]) for runs in ordered]
        names = [f", run {runs[0].run_id}" if titles.count(described(runs[0])) > 1 else "" for runs in ordered]
        groups = [Group(title + name, runs) for title, name, runs in zip(titles, names, ordered, strict=True)]
        groups.sort(key=lambda group: -fmean(group.by_seed("acc").values()))
        return {group.first.run_id: group for group in groups}


def _phantom(record: Record) -> str:
    """What a run's title says of generated tiles."""
    return ", phantom" if record.summary["synthetic"] else ""


def described(record: Record) -> str:
    """A run's recipe in words."""
    config, generated = record.config, _phantom(record)
    if "baseline" in config:
        return f"{record.summary['title']}{generated}"
    name = config["model_name"].removeprefix("timm:")
    part = config.get("train_part", "all")
    start = "fine-tuned" if part == "all" else f"pretrained, only its {part} trained"
    start = "from scratch" if config.get("weights", "none") == "none" else start
    added = [f"{config['augmentation']} augmentation"] if config.get("augmentation", "none") != "none" else []
    added += ["averaged weights"] if config.get("ema_decay") else []
    added += [f"row {config['ablation']}"] if config.get("ablation", "combined") != "combined" else []
    return f"{NETWORKS.get(name, name)} {start}" + (f", {' and '.join(added)}" if added else "") + generated


def convergence_epoch(history: Sequence[Mapping[str, float]]) -> int:
    """The first epoch, counted from 1, whose validation ACC is within 0.5 points (0.005) of the run's best one.

    Raises ValueError for an empty history.
    """
    accuracies = [row["validate/acc"] for row in history]
    # In floating point 0.920 - 0.915 is above 0.005.
    reached = max(accuracies) - CONVERGED_WITHIN - ROUNDING
    return next(epoch for epoch, accuracy in enumerate(accuracies, start=1) if accuracy >= reached)
