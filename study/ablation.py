"""The results of a finished grid: each row's mean over its seeds, and its difference from the first row."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

from common.errors import UsageError
from common.figures import STYLE, VERMILLION, save, wrap
from common.files import write_csv, write_text
from common.markdown import markdown_table
from common.records.read import Record
from common.statistics import LEAST_SEEDS, SIGNIFICANT, Comparison, Spread, compare, interval, mean_sd, spread
from study.groups import TECHNIQUES
from study.trials import Trial, TrialRecords

METRICS = {"validate/acc": "validation ACC", "test/acc": "test ACC", "test/auc": "test AUC"}
IDENTICAL = (
    "Identical: the selected networks of both rows give the same recorded outputs after as many epochs. "
    "There is nothing to test, and Holm's correction does not count the row. For example, early stopping changes "
    "nothing where no run stops early."
)
COMPARED = ("pairs", "difference", "difference low", "difference high", "p", "p holm", "verdict")
Rows = Mapping[str, Mapping[int, Mapping[str, float]]]  # row → seed → metric → value


def report(trials: Sequence[Trial], records: TrialRecords) -> None:
    """Write runs.csv and, where the grid has seeds, table.md, table.csv and the figure; print where they are."""
    name, folder = records.sweep.name, records.folder
    runs = {
        trial.run_id: Record.read(records.output_dir, trial.run_id)
        for trial in trials
        if records.is_finished(trial)
    }
    if not runs:
        raise UsageError(f"no run of {name} is finished yet")
    rows = _by_row(trials, runs) if "seed" in records.sweep.swept else {}
    write_csv(folder / "runs.csv", [_run(trial, runs[trial.run_id]) for trial in trials if trial.run_id in runs])
    written = [folder / "runs.csv"]
    if rows:
        scores = _scores(rows)
        identical = identical_rows(rows)
        comparisons = {metric: compare(_values(scores, metric), identical) for metric in METRICS}
        write_csv(folder / "table.csv", _table(scores, comparisons))
        text = [_caption(name, list(runs.values())), "", *_markdown(scores, comparisons)]
        missing: dict[str, list[str]] = {}
        for trial in trials:
            if trial.run_id not in runs:
                missing.setdefault(_row(trial), []).append(str(trial.values["seed"]))
        if missing:
            seeds = ", ".join(f"{row} ({', '.join(numbers)})" for row, numbers in missing.items())
            n_missing = len(trials) - len(runs)
            text += [
                "",
                f"**Incomplete**: {n_missing} of {len(trials)} runs are missing, with the seeds: {seeds}.",
            ]
        write_text(folder / "table.md", "\n".join(text) + "\n")
        figure = records.output_dir / "fig" / "task4" / f"{name}.png"
        _draw(figure, scores, " / ".join(_titles(runs.values())))
        written += [folder / "table.csv", folder / "table.md", figure]
    print(f"{name}: {len(runs)} of {len(trials)} runs are finished")
    for path in written:
        print(f"  {path}")


def identical_rows(rows: Mapping[str, Sequence[Record]]) -> set[str]:
    """The rows whose selected networks give, with every common seed, the first row's recorded outputs.

    A row with another number of epochs is another training, even if it selected the same network.
    """
    reference, *others = rows
    first = {run.config["seed"]: run for run in rows[reference]}

    def same(run: Record, twin: Record) -> bool:
        if run.scores != twin.scores or len(run.history) != len(twin.history):
            return False
        one, other = run.arrays(), twin.arrays()
        return all(np.array_equal(one[name], other[name]) for name in ("best_logits", "validate_logits"))

    found = set()
    for row in others:
        pairs = [(run, first[run.config["seed"]]) for run in rows[row] if run.config["seed"] in first]
        if all(same(*pair) for pair in pairs):
            found.add(row)
    return found


def _row(trial: Trial) -> str:
    """The name of a trial's row: what it varies, but for the seed."""
    return ", ".join(str(value) for name, value in trial.values.items() if name != "seed") or "all runs"


def _run(trial: Trial, run: Record) -> dict[str, Any]:
    """A run's line in runs.csv."""
    summary = run.summary
    scores = ("validate/acc", "validate/auc", "test/auc", "test/acc", "tta test/auc", "tta test/acc")
    return {
        "run_id": trial.run_id,
        **trial.values,
        "dataset": summary["dataset"],
        "commit": run.facts.get("commit"),
        "best epoch": summary["best"]["epoch"],
        "epochs trained": len(run.history),
        "stopped": summary["stopped"],
        **{name: run.scores.get(name) for name in scores},
        "wall_seconds": summary["wall_seconds"],
    }


def _by_row(trials: Sequence[Trial], runs: Mapping[str, Record]) -> dict[str, list[Record]]:
    """The finished runs of each row; UsageError where the first row, the reference, has none."""
    rows: dict[str, list[Record]] = {}
    for trial in trials:  # also the unfinished ones: else another row could become the first one
        row = rows.setdefault(_row(trial), [])
        if trial.run_id in runs:
            row.append(runs[trial.run_id])
    reference, first = next(iter(rows.items()))
    if not first:
        raise UsageError(f"no run of {reference} is finished yet: the other rows are compared with it")
    return {row: found for row, found in rows.items() if found}


def _scores(rows: Mapping[str, Sequence[Record]]) -> Rows:
    """The scores of the runs by seed.

    The last row holds the reference's test scores over 8 views of each tile, where its runs have them.
    """
    scores = {row: {run.config["seed"]: run.scores for run in found} for row, found in rows.items()}
    reference, first = next(iter(scores.items()))
    if _over_views(first.values(), "test/acc"):
        scores[f"{reference}, 8 views"] = {
            seed: {name: run[f"tta {name}"] for name in METRICS if f"tta {name}" in run}
            for seed, run in first.items()
        }
    return scores


def _values(rows: Rows, metric: str) -> dict[str, dict[int, float]]:
    """A metric of each row by seed, without the rows that do not have it."""
    return {
        row: {seed: scores[metric] for seed, scores in seeds.items()}
        for row, seeds in rows.items()
        if all(metric in scores for scores in seeds.values())
    }


def _table(rows: Rows, comparisons: Mapping[str, Mapping[str, Comparison]]) -> list[dict[str, Any]]:
    """The lines of table.csv: the numbers of table.md with full precision."""
    lines, values_of = [], {metric: _values(rows, metric) for metric in METRICS}
    for row, seeds in rows.items():
        line: dict[str, Any] = {"row": row, "n": len(seeds)}
        for metric in METRICS:
            found = values_of[metric].get(row)
            over_seeds = spread([*found.values()]) if found else None
            for name in ("mean", "sd", "low", "high"):
                line[f"{metric} {name}"] = getattr(over_seeds, name) if over_seeds else None
            cells: list[Any] = [None] * len(COMPARED)  # of the first row
            if comparison := comparisons[metric].get(row):
                values = comparison.differences
                cells = [values.n, values.mean, values.low, values.high]
                cells += [comparison.p, comparison.p_holm, comparison.verdict]
            line |= {f"{metric} {name}": cell for name, cell in zip(COMPARED, cells, strict=True)}
        for metric in ("test/acc", "test/auc"):
            views = _over_views(seeds.values(), metric)
            line |= {f"{metric} 8 views mean": views.mean if views else None}
            line |= {f"{metric} 8 views sd": views.sd if views else None}
        lines.append(line)
    return lines


def _markdown(rows: Rows, comparisons: Mapping[str, Mapping[str, Comparison]]) -> list[str]:
    """The scores with the differences in test ACC, then the differences in the other metrics."""
    scores, values_of = [], {metric: _values(rows, metric) for metric in METRICS}
    for row, seeds in rows.items():
        values = [values_of[metric].get(row) for metric in METRICS]
        cells = [mean_sd(spread([*found.values()])) if found else "" for found in values]
        views = _over_views(seeds.values(), "test/acc")
        scores.append([row, str(len(seeds)), *cells, mean_sd(views) if views else ""])
    lines = markdown_table(["row", "seeds", *METRICS.values(), "test ACC, 8 views"], "lrrrrr", scores)
    columns = ["row", "pairs", "difference [95 % interval]", "p", "p (Holm)", "verdict"]
    for metric in ("test/acc", "validate/acc", "test/auc"):
        lines += ["", f"Difference in {METRICS[metric]} to `{next(iter(rows))}`, seed by seed:", ""]
        compared = [[row, *_cells(comparison)] for row, comparison in comparisons[metric].items()]
        lines += markdown_table(columns, "lrrrrl", compared)
    return [
        *lines,
        "",
        "± is the standard deviation over the seeds (n - 1). Intervals are t intervals over the seeds alone: "
        "they do not tell how the numbers would change with other tiles. p is the paired t test's, then with "
        f"Holm's correction over the rows; the verdict is by the corrected one, at {SIGNIFICANT}. 8 views: the "
        "same networks' predictions averaged over each test tile's flips and quarter turns.",
        *(["", IDENTICAL] if any(comparison.identical for comparison in comparisons["test/acc"].values()) else []),
    ]


def _caption(name: str, runs: Sequence[Record]) -> str:
    """The data, tiles, resolution and seeds of the numbers, and a warning where the runs cannot be compared."""
    tiles, parts = runs[0].summary["tiles"], sorted({run.summary["tiles"]["train"] for run in runs})
    seeds = sorted({run.config["seed"] for run in runs})
    text = (
        f"**{name}**: {' / '.join(_titles(runs))}; {' / '.join(f'{n:,}' for n in parts)} training, "
        f"{tiles['val']:,} validation and {tiles['test']:,} test tiles of {runs[0].config['size']} pixels; seeds: "
        f"{', '.join(map(str, seeds))}; intervals are over seeds."
    )
    if any(run.summary["synthetic"] for run in runs):
        text += " The tiles are generated: these are no results on PathMNIST."
    commits = sorted({str(run.facts.get("commit")) for run in runs})
    text += f" Commit {commits[0]}." if len(commits) == 1 else ""
    # Each number of training tiles, which a learning curve varies, has its own title and fingerprint.
    if max(len(_titles(runs)), len({run.summary["data_fingerprint"] for run in runs})) > len(parts):
        text += " **The runs come from different data sets: they cannot be compared.**"
    if len(commits) > 1:
        text += f" **The runs come from different commits: {', '.join(commits)}.**"
    return text


def _titles(runs: Iterable[Record]) -> list[str]:
    """The data sets' names, that with the fewest training tiles first."""
    ordered = sorted(runs, key=lambda run: (run.summary["tiles"]["train"], run.summary["dataset"]))
    return list(dict.fromkeys(run.summary["dataset"] for run in ordered))


def _over_views(runs: Collection[Mapping[str, float]], metric: str) -> Spread | None:
    """A test metric over the 8 views of each tile; None where a run lacks it."""
    name = f"tta {metric}"
    return spread([run[name] for run in runs]) if all(name in run for run in runs) else None


def _cells(comparison: Comparison) -> list[str]:
    values = comparison.differences
    difference = interval(values.mean, values.low, values.high, sign="+")
    return [str(values.n), difference, _p(comparison.p), _p(comparison.p_holm), comparison.verdict]


def _p(p: float) -> str:
    if math.isnan(p):  # no test: see `compare`
        return ""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _draw(path: Path, rows: Rows, title: str) -> None:
    """A dot per seed, and the mean with its interval, of every row: validation ACC beside test ACC."""
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(7.4, 1.6 + 0.38 * len(rows)))
        panels = figure.subplots(1, 2, sharey=True)
        for axes, metric in zip(panels, ("validate/acc", "test/acc"), strict=True):
            places = {row: place for place, row in enumerate(rows)}
            for row, found in _values(rows, metric).items():
                place, values = places[row], [*found.values()]
                over_seeds = spread(values)
                axes.plot(values, [place] * len(values), "o", color=VERMILLION, alpha=0.5, markersize=4)
                bounds = [over_seeds.low, over_seeds.high]  # NaN draws nothing
                axes.plot(bounds, [place + 0.25] * 2, color="black", linewidth=1.5)
                axes.plot(over_seeds.mean, place + 0.25, "D", color="black", markersize=4)
                if place == 0:
                    axes.axvline(over_seeds.mean, color="#888888", linestyle="--", linewidth=1, zorder=0)
            axes.set_xlabel(METRICS[metric])
            axes.grid(axis="y", visible=False)
        names = [TECHNIQUES.get(row, row.replace("_", " ")) for row in rows]
        panels[0].set_yticks(range(len(rows)), [wrap(name, 32) for name in names], fontsize=9)
        panels[0].invert_yaxis()
        interval_from = f"from {LEAST_SEEDS} seeds on, 95 % interval"
        explained = f"dots: one seed each; diamond: mean and, {interval_from}; dashed: the first row's mean"
        figure.suptitle(f"{wrap(title, 85)}\n{wrap(explained, 85)}", fontsize=9)
        save(figure, path)
