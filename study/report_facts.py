"""What the template of report.md may use: the records of a study as typed facts, and the published scores."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from common.data.pathmnist import COUNTS
from common.errors import UsageError
from common.explain.checks import judge
from common.records.read import Record
from common.statistics import LEAST_SEEDS, SIGNIFICANT, Comparison, Spread, compare, counted, interval, spread
from common.training.metrics import Estimate, recalls
from study.ablation import identical_rows
from study.forecast import LEAST_GROUPS, LEAST_RUNS, LOWER_IS_BETTER, SHIFTED, USUAL, forecast
from study.groups import FOUND, NETWORKS, TECHNIQUES, Group, averaged, distinct, grouped, named, nearest, share
from study.learning_curve import learning_curves, n_tiles
from study.report_selection import Study, parameters


@dataclass(frozen=True)
class Published:
    """Scores that others report on the full PathMNIST: all training tiles, the official test split."""

    source: str
    network: str
    size: int  # tile side in pixels
    acc: float
    auc: float


REFERENCES = {  # by task, the coursework's first
    "Task 1": [
        Published("coursework, one seed", "ResNet-18 from scratch", 64, 0.8951, 0.9803),
        Published("Yang et al. 2023", "ResNet-18 from scratch", 28, 0.907, 0.983),
    ],
    "Task 3": [
        Published("coursework, one seed", "MobileNetV3-Large from scratch", 64, 0.9132, 0.9876),
        Published("Yang et al. 2023", "ResNet-50 from scratch", 28, 0.911, 0.990),
    ],
    "Task 5": [
        Published("coursework, one seed", "MobileNetV3-Large fine-tuned", 64, 0.9123, 0.9889),
        Published(
            "Doerrich et al. 2025, 3 seeds, ACC ± 0.005", "VGG16 fine-tuned (padded to 224 px)", 28, 0.889, 0.986
        ),
        Published(
            "Doerrich et al. 2025, 3 seeds, ACC ± 0.011", "VGG16 fine-tuned (padded to 224 px)", 64, 0.938, 0.993
        ),
    ],
}


@dataclass(frozen=True)
class Provenance:
    """Where records come from: when they were started, their tasks, and the versions of each package."""

    commit: str
    python: str
    started: list[str] = field(default_factory=list)
    tasks: dict[str, None] = field(default_factory=dict)
    versions: dict[str, dict[str, None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Analysed:
    """The runs of a task in the record of study/analysis.py.

    `only_right` are the mean numbers of tiles that only ours or only the published network classifies rightly,
    `p` is the largest p of McNemar's exact tests, one per run. `matched` has, for each matching of colours, the
    runs with checkpoints, their test ACC and the share of the gap between test and validation ACC that closes.
    """

    group: Group
    only_right: Mapping[str, float]
    p: float
    verdict: str
    matched: Mapping[str, tuple[Group, Estimate, Spread]]

    @classmethod
    def of(cls, group: Group, analysis: Mapping[str, Any]) -> "Analysed":
        """What the record contains about these runs."""
        runs = [record.run_id for record in group.records]
        pairs = [analysis["published"]["only_right"][run] for run in runs] if analysis["published"] else []
        p = max((mcnemar(**pair) for pair in pairs), default=math.nan)
        directions = {"better" if pair["ours"] > pair["theirs"] else "worse" for pair in pairs}
        matched = {}
        for name, scores in analysis["matched"].items():
            after, shares = [], []
            scored = [record for record in group.records if record.run_id in scores]
            for record in scored:
                after.append(scores[record.run_id]["acc"])
                before, goal = (record.scores[score] for score in ("test/acc", "validate/acc"))
                shares.append((after[-1] - before) / (goal - before) if goal != before else math.nan)
            if scored:
                matched[name] = Group(scored), share(spread(after)), spread(shares)
        return cls(
            group,
            {whose: fmean(pair[whose] for pair in pairs) for whose in ("ours", "theirs") if pairs},
            p,
            directions.pop() if len(directions) == 1 and p < SIGNIFICANT else "cannot be decided",
            matched,
        )


def mcnemar(ours: int, theirs: int) -> float:
    """The p value of McNemar's exact test of two networks, from the tiles that only one of them gets right."""
    from scipy.stats import binomtest  # half a second of import

    return float(binomtest(ours, ours + theirs).pvalue) if ours + theirs else 1.0


def facts(study: Study) -> dict[str, Any]:
    """The template's variables. Raises UsageError or Fault naming the first record that is missing."""
    chosen = study.selection
    tasks = {title: Group(records) for title, records in study.trained().items()}
    attributions = list(map(study.attribution, study.explained()))
    ablation = {row: Group(records) for row, records in study.ablation().items()} if "task4" in chosen else {}
    compared = {kind: Group(records) for kind, records in study.compared().items()} if "task5" in chosen else {}
    search = study.search()
    trials = study.provenance(search)
    found = next((trial["config"] for trial in trials if trial["run_id"] == search[0]["run_id"]), None)
    further, baselines = (
        grouped(study.runs(section, study.named(section, "runs")), found) if section in chosen else []
        for section in ("networks", "baselines")
    )
    winner = next((group for group in further if group.name == FOUND), None)
    scored = (*tasks.values(), *ablation.values(), *compared.values(), *further)
    networks = distinct(record for group in scored for record in group.records)
    extra = study.learning_curve()
    curves = learning_curves(study.read.values()) if extra else []
    if len({record.summary["synthetic"] for record in study.read.values()}) > 1:
        raise UsageError("report.toml: generated tiles and tiles of PathMNIST cannot stand on one page")
    if len({record.config["size"] for record in study.read.values()}) > 1:
        raise UsageError("report.toml: tiles of different sizes cannot stand on one page")
    numbers = sorted(set(map(n_tiles, networks)))
    within = {
        n: forecast(grouped((run for run in networks if n_tiles(run) == n), found)) for n in numbers if numbers[1:]
    }
    groups = {title: {title: group} for title, group in tasks.items()} | {"Task 4": ablation, "Task 5": compared}
    sources = {
        task: [record.facts for group in parts.values() for record in group.records]
        for task, parts in groups.items()
    }
    sources["Learning curve"] = [record.facts for record in extra]
    sources["Further networks"] = [record.facts for group in further for record in group.records]
    sources["Baselines"] = [record.facts for group in baselines for record in group.records]
    sources["Task 2"] = attributions
    analysis = study.analysis()
    sources["Analysis"] = [analysis] if analysis else []
    sources["Matched colours"] = list(analysis["kept"].values()) if analysis else []
    analysed = {}
    for task, group in tasks.items():
        runs = [record for record in group.records if analysis and record.run_id in analysis["runs"]]
        if analysis and runs:
            analysed[task] = Analysed.of(Group(runs), analysis)
    sources["Task 4, search"] = trials
    return {
        "study": study,
        "tasks": tasks,
        "attribution": next(iter(attributions), None),
        "attributions": [(Group([study.read[record["run_id"]]]), record) for record in attributions],
        "ablation": ablation,
        "best_row": max(
            ablation, key=lambda row: ablation[row].spread("validate", "validate/acc").mean, default=None
        ),
        "verdicts": verdicts(ablation),
        "judge": judge,
        "search": search,
        "parameters": parameters,
        "searched": next(iter(trials), None),  # its data is that of all trials
        "winner": winner,
        "winning": compared_with(tasks.get("Task 3"), winner),
        "compared": compared,
        "comparison": study.comparison() if compared else None,
        "further": further,
        "averaged": averaged,
        "named": named,
        "nearest": nearest,
        "counted": counted,
        "baselines": baselines,
        # By test ACC: a network that passes here is better than every baseline.
        "strongest": max(baselines, key=lambda group: group.spread("best", "acc").mean, default=None),
        "curves": curves,
        "curve_tiles": sorted({tiles for curve in curves for tiles in curve.tiles}),
        "networks": NETWORKS,
        "techniques": TECHNIQUES,
        "analysis": analysis,
        "analysed": analysed,
        "rescued": rescued,
        "recalls": recalls,
        "forecast": forecast(grouped(networks, found)),
        # Of the runs with as many training tiles, where there are enough of several numbers of tiles.
        "forecasts": {n: found for n, found in within.items() if found.correlations},
        "lower_is_better": LOWER_IS_BETTER,
        "usual_score": USUAL,
        "shifted_score": SHIFTED,
        "least_seeds": LEAST_SEEDS,
        "least_runs": LEAST_RUNS,
        "least_groups": LEAST_GROUPS,
        "tuning": compared_with(compared.get("from scratch"), compared.get("fine-tuned")),
        "sources": together(sources),
        "references": REFERENCES,
        "official": COUNTS,
        "interval": interval,
    }


def compared_with(reference: Group | None, group: Group | None) -> Comparison | None:
    """The test ACC of a group compared with another one's, seed by seed; None without a common seed.

    None, too, where their numbers of training tiles differ.
    """
    if not reference or not group or n_tiles(reference.first) != n_tiles(group.first):
        return None
    by_seed = {name: one.by_seed("best", "acc") for name, one in (("reference", reference), ("group", group))}
    return compare(by_seed).get("group")


def rescued(group: Group, others: Iterable[Group]) -> tuple[int, dict[str, float]]:
    """How many test tiles every run of the group gets wrong; by recipe, the share of them that others get right.

    A share is the mean over the seeds of the other recipe.
    """

    def right(record: Record) -> np.ndarray:
        arrays = record.arrays()
        return np.asarray(arrays["best_logits"].argmax(axis=1) == arrays["targets"])

    hard = ~np.any([right(record) for record in group.records], axis=0)
    if not hard.any():
        return 0, {}
    return int(hard.sum()), {
        other.title: fmean(right(record)[hard].mean() for record in other.records) for other in others
    }


def together(sources: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Provenance]:
    """The provenance of the records of each task; those with the same commit and Python stand together."""
    found: dict[tuple[str, str], Provenance] = {}
    for task, records in sorted(sources.items()):
        for record in records:
            commit, python = str(record.get("commit")), str(record.get("python"))
            same = found.setdefault((commit, python), Provenance(commit, python))
            same.tasks[task] = None
            same.started.append(str(record.get("started")))
            for name, version in record.get("versions", {}).items():
                same.versions.setdefault(name, {})[version] = None
    return list(found.values())


def verdicts(ablation: Mapping[str, Group]) -> dict[str, Comparison]:
    """The test ACC of each row compared with the first row's, and over 8 views, as in the sweep's table."""
    if not ablation:
        return {}
    reference, group = next(iter(ablation.items()))
    values = {row: group.by_seed("best", "acc") for row, group in ablation.items()}
    if group.score("tta", "acc"):
        values[f"{reference}, 8 views"] = group.by_seed("tta", "acc")
    return compare(values, identical_rows({row: group.records for row, group in ablation.items()}))
