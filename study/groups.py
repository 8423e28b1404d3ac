"""Runs that differ in their seed alone, and their scores over the seeds."""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config import TrainingConfig
from common.data.pathmnist import COUNTS
from common.errors import UsageError
from common.finetune.weights import SCRATCH
from common.records.read import Record
from common.statistics import Comparison, Spread, compare, spread
from common.training.metrics import Estimate, accuracy_estimate, recalls, softmax

NETWORKS = {
    "resnet18": "ResNet-18",
    "mobilenet_v3_large": "MobileNetV3-Large",
    "tf_efficientnet_lite0": "EfficientNet-Lite0",
}
TECHNIQUES = {  # rows of the ablation
    "combined": "reference",
    "combined, 8 views": "with 8 views at test time",
    "without_augmentation": "without data augmentation",
    "without_lr_strategy": "with a constant learning rate",
    "without_lr_warmup": "without warm-up of the learning rate",
    "with_weight_decay": "with strong weight decay",
    "with_scaled_shifts": "with TrivialAugmentWide whose shifts fit the tile",
    "with_stain": "with stain augmentation added",
    "with_stain_only": "with stain augmentation instead of the reference's",
    "with_ema": "with averaged weights (EMA)",
    "with_all": "with stain augmentation and averaged weights",
}
TUNED = {"head": "last layer fine-tuned", "classifier": "classifier fine-tuned", "all": "fine-tuned"}
FOUND = "the search's best recipe"
# Keys in which runs of one row may differ: the seed, where and how a run is kept; only older runs have dry_run.
APART = {"seed", "run_id", "scratch", "n_seeds", "dry_run"} | TrainingConfig.bookkeeping()


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone; `name` says what their configuration does not tell of their recipe."""

    records: Sequence[Record]
    name: str = ""

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
    def title(self) -> str:
        """The recipe in words."""
        config = self.first.config
        if "baseline" in config:
            return str(self.first.summary["title"])
        network = NETWORKS.get(config["model_name"], config["model_name"])
        if config.get("weights", SCRATCH) != SCRATCH:
            return f"{network}, {TUNED[config['train_part']]}"
        if self.name:
            return f"{network} from scratch, {self.name}"
        row = config.get("ablation", "combined")
        if "ablation" not in config and "weights" not in config:  # of Task 1
            augmentation = config["augmentation"].replace(",", " and ")
            parts = [f"{augmentation} augmentation"] * (augmentation != "none")
            parts += ["averaged weights"] * bool(config["ema_decay"])
            title = f"{network} from scratch" + (f" with {' and '.join(parts)}" if parts else "")
            return title + (f", resized to {config['resize_to']} px" if config["resize_to"] else "")
        return f"{network} from scratch" + ("" if row == "combined" else f" {TECHNIQUES.get(row, row)}")

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

        One seed: the score as recorded, with its interval over test tiles; NaN where the record has none. The mean
        of two seeds has no interval: NaN.
        """
        if len(self.by_seed(*keys)) < len(self.records):
            return None
        if len(self.records) == 1:
            return _look_up(self.first.summary, keys)
        return share(self.spread(*keys))

    def difference(self, after: Sequence[str], before: Sequence[str]) -> Comparison:
        """One number of summary.json minus another one, seed by seed."""
        return compare({"before": self.by_seed(*before), "after": self.by_seed(*after)})["after"]

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

    def confidence(self) -> float:
        """The mean over seeds of the mean probability of the predicted class on test tiles."""
        return fmean(one.max(axis=1).mean() for one in self.probabilities())

    def probabilities(self, scores: str = "best") -> list[NDArray[np.float64]]:
        """Each run's probabilities of the test tiles, (N, classes); `scores` "tta": over the 8 views."""
        return [softmax(record.arrays()[f"{scores}_logits"]) for record in self.records]

    def ensemble(self, scores: str = "best") -> Estimate:
        """The test ACC of the mean of all runs' probabilities, with its interval over the test tiles."""
        return accuracy_estimate(np.mean(self.probabilities(scores), axis=0), self.first.arrays()["targets"])

    def areas(self) -> dict[str, float]:
        """The mean over seeds of each class's AUC against the others; NaN for a class without tiles."""
        scores = [record.summary["best"]["auc_per_class"] for record in self.records]
        means = np.mean([list(one.values()) for one in scores], axis=0, dtype=float)
        return dict(zip(scores[0], means.tolist(), strict=True))


def averaged(groups: Sequence[Group]) -> Spread:
    """The test ACC of the mean of the groups' probabilities, seed by seed, over the seeds that they all have."""
    seeds = [[record.config["seed"] for record in group.records] for group in groups]
    found = [group.probabilities("best") for group in groups]
    targets = groups[0].first.arrays()["targets"]
    means = [
        np.mean([runs[of.index(seed)] for runs, of in zip(found, seeds, strict=True)], axis=0)
        for seed in sorted(set.intersection(*map(set, seeds)))
    ]
    return spread([accuracy_estimate(mean, targets).value for mean in means])


def named(task: str) -> str:
    """The name of a task; of Task 5's two networks, it is the fine-tuned one that stands for the task."""
    return f"{task} (fine-tuned)" if task == "Task 5" else task


def share(over: Spread) -> Estimate:
    """The mean of scores from 0 to 1 and its interval, cut to these; NaN ends stay."""
    return Estimate(over.mean, *np.clip((over.low, over.high), 0, 1).tolist())


def nearest(group: Group, others: Mapping[str, Group]) -> tuple[str, dict[str, Any]]:
    """The name of the other group with the most similar recipe, and the keys with other values in this one."""
    config, changes = group.first.config, {}
    for name, other in others.items():
        theirs = other.first.config
        keys = [key for key in {**config, **theirs} if key not in (*APART, "ablation")]
        changes[name] = {key: config.get(key) for key in keys if config.get(key) != theirs.get(key)}
    name = min(changes, key=lambda name: len(changes[name]))
    return name, changes[name]


def grouped(records: Iterable[Record], found: Mapping[str, Any] | None = None) -> list[Group]:
    """The runs that differ in their seed alone, as groups in the order of their first runs.

    `found` is the configuration of a search's best trial: the group that has it, on any tiles, is named FOUND.
    """

    def recipe(config: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in config.items() if name not in {*APART, "train_tiles"}}

    return [
        Group(same, FOUND if found and recipe(same[0].config) == recipe(found) else "")
        for same in alike(records, APART)
    ]


def distinct(records: Iterable[Record]) -> list[Record]:
    """The runs without those that repeat the recipe and the seed of an earlier one."""
    return [same[0] for same in alike(records, APART - {"seed"})]


def alike(records: Iterable[Record], apart: Collection[str]) -> list[list[Record]]:
    """The runs that differ in the keys `apart` alone, together, in the order of their first runs."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        same = {name: value for name, value in record.config.items() if name not in apart}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(record)
    return list(groups.values())


def _look_up(summary: Mapping[str, Any], keys: Sequence[str]) -> Estimate | None:
    """A number of summary.json; None where it has none. Older records lack balanced ACC: it is computed."""
    value: Any = summary
    for key in keys:
        if key == "balanced_acc" and key not in value:
            value = float(np.nanmean(recalls(value["confusion_matrix"])))
        elif (value := value.get(key)) is None:
            return None
    return Estimate(**value) if isinstance(value, Mapping) else Estimate(value, math.nan, math.nan)
