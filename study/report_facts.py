"""What the template of report.md may use: the records of a study as typed facts, and the published scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import UsageError
from common.pathmnist import COUNTS
from common.statistics import Comparison, compare, interval
from study.ablation import identical_rows
from study.forecast import LEAST_GROUPS, LEAST_RUNS, LOWER_IS_BETTER, forecast
from study.groups import Group, grouped
from study.report_selection import Study


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
        Published("Yue and Li 2024", "MedMamba-T from scratch", 224, 0.953, 0.997),
    ],
    "Task 5": [
        Published("coursework, one seed", "MobileNetV3-Large fine-tuned", 64, 0.9123, 0.9889),
        Published("Doerrich et al. 2025, 3 seeds, ACC ± 0.007", "ResNet-18 fine-tuned", 64, 0.934, 0.994),
    ],
}


def facts(study: Study) -> dict[str, Any]:
    """The template's variables. Raises UsageError or Fault naming the first record that is missing."""
    chosen = study.selection
    tasks = {title: Group(records) for title, records in study.trained().items()}
    attribution = study.attribution() if "task2" in chosen else None
    ablation = {row: Group(records) for row, records in study.ablation().items()} if "task4" in chosen else {}
    compared = {kind: Group(records) for kind, records in study.compared().items()} if "task5" in chosen else {}
    baselines = grouped(
        study.runs("baselines", study.named("baselines", "runs")) if "baselines" in chosen else []
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
        "forecast": forecast(grouped(record for record in study.read.values() if record.history)),
        "lower_is_better": LOWER_IS_BETTER,
        "least_runs": LEAST_RUNS,
        "least_groups": LEAST_GROUPS,
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
