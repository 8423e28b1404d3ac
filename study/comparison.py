"""Fine-tuned runs and runs from scratch: when they converge, their scores, and the differences."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.files import write_json
from common.records.read import Record, run_folder
from common.statistics import Spread, compare, spread
from study.figures import draw_curves
from study.groups import CONVERGED_WITHIN, convergence_epoch

CONVERGENCE = "convergence epoch"
FACTS = ("dataset", "synthetic", "data_fingerprint", "tiles", "device", "weights")


def compare_runs(name: str, tuned: Sequence[str], scratch: Sequence[str], output_dir: Path) -> dict[str, Any]:
    """Compare finished runs, one of each kind per seed; write and print the comparison, and return its content.

    Writes runs/<name>/comparison.json and fig/task5/<name>-comparison.png. Raises Fault where a record is missing.
    """
    groups = {
        kind: [Record.read(output_dir, run_id) for run_id in run_ids]
        for kind, run_ids in (("from scratch", scratch), ("fine-tuned", tuned))
    }
    content = comparison(groups)
    model_name, dataset = groups["fine-tuned"][0].config["model_name"], content["dataset"]
    figure = output_dir / "fig" / "task5" / f"{name}-comparison.png"
    draw_curves(figure, groups, f"Task 5 · {model_name} · {dataset}")
    path = run_folder(output_dir, name) / "comparison.json"
    write_json(path, content)
    for kind, runs in content["runs"].items():
        converged = content["over_seeds"][CONVERGENCE][kind]["mean"]
        parts = [f"converged at epoch {converged:.3g}"]
        if late := sum(run["censored"] for run in runs):
            parts.append(f"({late} of {len(runs)} only at the last epoch)")
        for metric, kinds in content["over_seeds"].items():
            if metric != CONVERGENCE:
                mean, sd = kinds[kind]["mean"], kinds[kind]["sd"]
                parts.append(f"{metric} {mean:.4f}" + ("" if sd is None else f" ± {sd:.4f}"))
        print(f"{kind}, {len(runs)} seed{'s' if len(runs) > 1 else ''}: {'  '.join(parts)}")
    print(f"{dataset}; comparison in {path}, figure:\n  {figure}")
    return content


def comparison(groups: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """The content of comparison.json: each run, each kind over its seeds, and fine-tuned minus from scratch.

    Differences are paired by seed. A convergence epoch is `censored` where it is the run's last epoch: more epochs
    might have raised the best ACC, and with it the epoch of convergence.
    """
    numbers = {
        kind: {run.config["seed"]: {CONVERGENCE: convergence_epoch(run.history), **run.scores} for run in runs}
        for kind, runs in groups.items()
    }
    everything = [found for by_seed in numbers.values() for found in by_seed.values()]
    values = {
        metric: {kind: {seed: found[metric] for seed, found in numbers[kind].items()} for kind in groups}
        for metric in everything[0]
        if all(metric in found for found in everything)
    }
    over_seeds = {
        metric: {kind: spread(list(by_seed.values())) for kind, by_seed in kinds.items()}
        for metric, kinds in values.items()
    }
    summary = groups["fine-tuned"][0].summary
    return {
        **{name: summary[name] for name in FACTS},
        "convergence_rule": (
            f"first epoch whose validation ACC is within {CONVERGED_WITHIN:g} of the run's best validation ACC"
        ),
        "runs": {kind: [_record(run) for run in runs] for kind, runs in groups.items()},
        "over_seeds": {
            metric: {kind: _plain(found) for kind, found in kinds.items()} for metric, kinds in over_seeds.items()
        },
        "differences": {metric: _difference(kinds) for metric, kinds in values.items()},
    }


def _difference(kinds: Mapping[str, Mapping[int, float]]) -> dict[str, float | None]:
    """Fine-tuned minus scratch over the seeds, and the paired t test's p value."""
    tuning = compare(kinds)["fine-tuned"]
    return {**_plain(tuning.differences), "p": None if math.isnan(tuning.p) else tuning.p}


def _plain(values: Spread) -> dict[str, float | None]:
    """For JSON, with null in place of NaN."""
    return {name: None if math.isnan(value) else value for name, value in asdict(values).items()}


def _record(run: Record) -> dict[str, Any]:
    """A run in comparison.json; its test scores have intervals."""
    summary = run.summary
    return {
        "run_id": run.run_id,
        "seed": run.config["seed"],
        "convergence_epoch": convergence_epoch(run.history),
        "censored": convergence_epoch(run.history) == len(run.history),
        "best_epoch": summary["best"]["epoch"],
        "epochs": len(run.history),
        **{name: summary["validate"][name] for name in ("validate/acc", "validate/auc")},
        **{f"test/{score}": summary["best"][score] for score in ("auc", "acc")},
        **{f"tta test/{score}": summary["tta"][score] for score in ("auc", "acc") if "tta" in summary},
        "wall_seconds": summary["wall_seconds"],
    }
