"""Fine-tuned runs beside runs from scratch: when they converge, what they score, and what sets them apart."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_json
from common.records import Record, run_folder
from common.statistics import Spread, compare, spread
from common.tracking import AXIS_LABELS

CONVERGED_WITHIN = 0.005
COLUMNS = ("train/loss", "validate/auc", "validate/acc")
METRICS = ("convergence epoch", "validate/auc", "validate/acc", "test/auc", "test/acc")
TTA_METRICS = ("tta test/auc", "tta test/acc")  # of each tile's averaged views, where all runs have them


def convergence_epoch(history: Sequence[Mapping[str, float]]) -> int:
    """The first epoch whose validation ACC is within 0.5 points (0.005) of the run's best one, counted from 1.

    Raises ValueError for an empty history.
    """
    accuracies = [row["validate/acc"] for row in history]
    # Accuracies are shares of tiles: a hair's breadth keeps 0.915 within 0.005 of 0.920 in floating point.
    reached = max(accuracies) - CONVERGED_WITHIN - 1e-9
    return next(epoch for epoch, accuracy in enumerate(accuracies, start=1) if accuracy >= reached)


def compare_runs(name: str, tuned: Sequence[str], scratch: Sequence[str], output_dir: Path) -> dict[str, Any]:
    """Write and say the comparison of finished runs, one of each kind a seed; returns what is written.

    runs/<name>/comparison.json and fig/task5/<name>-comparison.png. Differences are fine-tuned minus scratch,
    paired by seed. Raises Fault where a record is missing.
    """
    groups = {
        kind: [_read(output_dir, run_id) for run_id in run_ids]
        for kind, run_ids in (("from scratch", scratch), ("fine-tuned", tuned))
    }
    first = groups["fine-tuned"][0]["summary"]
    metrics = _metrics([run for runs in groups.values() for run in runs])
    values = {
        metric: {kind: {run["seed"]: run[metric] for run in runs} for kind, runs in groups.items()}
        for metric in metrics
    }
    content = {
        "dataset": first["dataset"],
        "synthetic": first["synthetic"],
        "data_fingerprint": first["data_fingerprint"],
        "tiles": first["tiles"],
        "device": first["device"],
        "weights": first["weights"],
        "convergence_rule": (
            f"first epoch whose validation ACC is within {CONVERGED_WITHIN:g} of the run's best validation ACC"
        ),
        "runs": {kind: [_record(run) for run in runs] for kind, runs in groups.items()},
        "over_seeds": {
            metric: {kind: _plain(spread(list(by_seed.values()))) for kind, by_seed in kinds.items()}
            for metric, kinds in values.items()
        },
        "differences": {metric: _difference(kinds) for metric, kinds in values.items()},
    }
    figure = output_dir / "fig" / "task5" / f"{name}-comparison.png"
    _draw(figure, groups, f"{groups['fine-tuned'][0]['config']['model_name']} · {first['dataset']}")
    path = run_folder(output_dir, name) / "comparison.json"
    write_json(path, content)
    for kind, runs in groups.items():
        print(f"{kind}, {len(runs)} seed{'s' if len(runs) > 1 else ''}: " + _in_words(runs))
    print(f"{first['dataset']}; comparison in {path}, figure:\n  {figure}")
    return content


def _difference(kinds: Mapping[str, Mapping[int, float]]) -> dict[str, float | None]:
    """Fine-tuned minus scratch over the seeds, and the paired t test's p value."""
    comparison = compare(kinds)["fine-tuned"]
    return {**_plain(comparison.differences), "p": None if math.isnan(comparison.p) else comparison.p}


def _plain(values: Spread) -> dict[str, float | None]:
    """For JSON, where what one seed cannot tell is null."""
    return {name: None if math.isnan(value) else value for name, value in asdict(values).items()}


def _read(output_dir: Path, run_id: str) -> dict[str, Any]:
    """What the comparison needs of a finished run."""
    record = Record.read(output_dir, run_id)
    summary, config, history = record.summary, record.config, record.history
    return {
        "summary": summary,
        "config": config,
        "history": history,
        "seed": config["seed"],
        "convergence epoch": convergence_epoch(history),
        **{metric: summary["validate"][metric] for metric in ("validate/auc", "validate/acc")},
        **{metric: summary[metric] for metric in ("test/auc", "test/acc")},
        **{f"tta test/{score}": summary["tta"][score]["value"] for score in ("auc", "acc") if "tta" in summary},
    }


def _metrics(runs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The metrics that all these runs have."""
    return METRICS + tuple(metric for metric in TTA_METRICS if all(metric in run for run in runs))


def _record(run: Mapping[str, Any]) -> dict[str, Any]:
    summary = run["summary"]
    return {
        "run_id": summary["run_id"],
        "seed": run["seed"],
        "convergence_epoch": run["convergence epoch"],
        "best_epoch": summary["best"]["epoch"],
        "epochs": len(run["history"]),
        "validate/acc": run["validate/acc"],
        "validate/auc": run["validate/auc"],
        **{f"test/{score}": summary["best"][score] for score in ("auc", "acc")},
        **{f"tta test/{score}": summary["tta"][score] for score in ("auc", "acc") if "tta" in summary},
        "wall_seconds": summary["wall_seconds"],
    }


def _in_words(runs: Sequence[Mapping[str, Any]]) -> str:
    parts = [f"converged at epoch {statistics.fmean(run['convergence epoch'] for run in runs):.3g}"]
    for metric in _metrics(runs)[1:]:
        over_seeds = spread([run[metric] for run in runs])
        parts.append(f"{metric} {over_seeds.mean:.4f}" + (f" ± {over_seeds.sd:.4f}" if len(runs) > 1 else ""))
    return "  ".join(parts)


def _draw(path: Path, groups: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> None:
    """Three panels, training loss, validation AUC and ACC: a thin line a run, a thick one for the kind's mean."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from common.figures import BLUE, STYLE, VERMILLION, save, wrap

    with style.context(["default", STYLE]):
        figure = Figure(figsize=(6.4, 8.5))
        panels = figure.subplots(3, 1, sharex=True)
        for axes, column in zip(panels, COLUMNS, strict=True):
            for (kind, runs), colour in zip(groups.items(), (VERMILLION, BLUE), strict=True):
                curves = [np.array([row[column] for row in run["history"]]) for run in runs]
                for curve in curves:
                    axes.plot(np.arange(1, len(curve) + 1), curve, color=colour, alpha=0.3, linewidth=0.8)
                shortest = min(len(curve) for curve in curves)  # early stopping may end runs apart
                mean = np.mean([curve[:shortest] for curve in curves], axis=0)
                converged = statistics.fmean(run["convergence epoch"] for run in runs)
                seeds = f"mean of {len(runs)} seeds, " if len(runs) > 1 else ""
                label = f"{kind} ({seeds}converged at epoch {converged:.3g})"
                axes.plot(np.arange(1, shortest + 1), mean, color=colour, linewidth=2, label=label)
                if column == "validate/acc":
                    axes.axvline(converged, color=colour, linestyle="--", linewidth=1)
            axes.set_ylabel(wrap(AXIS_LABELS[column], 30))
        panels[0].legend()
        panels[-1].set_xlabel("Epoch (dashed: convergence, ACC within 0.5 points of the best)")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.suptitle(wrap(f"Task 5 · {title}", 75), fontsize=10)
        save(figure, path)
