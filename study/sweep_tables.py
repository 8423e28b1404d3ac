"""The tables of a grid, whose rows are compared over the seeds, and of a search, whose trials are ranked."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import style
from matplotlib.figure import Figure

from common.figures import STYLE, VERMILLION, save, wrap
from common.markdown import markdown_table, text
from common.records.read import Record
from common.statistics import LEAST_SEEDS, SIGNIFICANT, Comparison, compare, interval, smallest_difference, spread
from study.groups import AGAINST, TECHNIQUES, Group, identical
from study.sweep_spec import Sweep

COLUMNS = {"validation": "validation ACC", "acc": "test ACC", "auc": "test AUC", "views": "test ACC, 8 views"}
NOTE = (
    "± is the standard deviation over the seeds (n - 1). Differences are to the first row, or to the row that is "
    "named, seed by seed. "
    "Intervals are t intervals over the seeds alone: they do not tell how the numbers would change with other "
    "tiles. p is the paired t test's with Holm's correction over the rows; the verdict is by it, at "
    f"{SIGNIFICANT}. Not decided means: these seeds could not see a difference. There may be one."
)
IDENTICAL = (
    "Identical: the selected networks of both rows give the same outputs, so there is nothing to test. For "
    "example, early stopping changes nothing where no run stops early."
)
STATES = ("finished", "elsewhere", "pruned", "failed")  # of trials; elsewhere: another machine has the records
Rows = Mapping[str, Group]  # the finished runs of each row of a grid; the others are compared with the first row


def grid_table(rows: Rows) -> list[str]:
    """The scores of every row and its difference in test ACC, and what these seeds could not see."""
    first, *others = rows
    against = {row: AGAINST[row] if AGAINST.get(row) in rows else first for row in others}
    same = {row for row, other in against.items() if identical(rows[row], rows[other])}
    comparisons = compare({row: group.by_seed("acc") for row, group in rows.items()}, same, against)
    lines = []
    for row, group in rows.items():
        one = comparisons.get(row)
        cells = [_mean_sd(group, score) for score in COLUMNS] + (_difference(one) if one else ["", "", ""])
        if against.get(row, first) != first:
            cells[len(COLUMNS)] += f" against '{text(rows[against[row]].title)}'"
        lines.append([text(group.title), str(len(group.records)), *cells])
    columns = ["row", "seeds", *COLUMNS.values(), "difference in test ACC [95 % interval]", "p (Holm)", "verdict"]
    found = markdown_table(columns, "lrrrrrrrl", lines)
    if views := rows[first].by_seed("views"):  # no training: outside the family of Holm's correction
        change, p, _ = _difference(compare({"one": rows[first].by_seed("acc"), "8": views})["8"])
        p = f", p = {p}".replace("= <", "<") if p else ""
        found += ["", f"8 views of each test tile (flips, quarter turns) instead of one, first row: {change}{p}."]
    tested = [one.differences for one in comparisons.values() if not math.isnan(one.p_holm)]
    if pooled := math.sqrt(sum(one.sd**2 for one in tested) / max(len(tested), 1)):
        smallest = smallest_difference(pooled, min(one.n for one in tested), len(tested))
        found += [
            "",
            f"These seeds could show a difference in test ACC of {smallest:.3f} or more (in 8 of 10 such studies, "
            "at Holm's most severe step, with the pooled spread of these paired differences).",
        ]
    return [*found, "", NOTE, *(["", IDENTICAL] if same else [])]


def _difference(one: Comparison) -> list[str]:
    values = one.differences
    p = "" if math.isnan(one.p_holm) else "< 0.001" if one.p_holm < 0.001 else f"{one.p_holm:.3f}"
    return [interval(values.mean, values.low, values.high, digits=3, sign="+"), p, one.verdict]


def _mean_sd(group: Group, score: str) -> str:
    over_seeds = group.spread(score)
    if over_seeds is None:
        return ""
    return f"{over_seeds.mean:.3f}" + (f" ± {over_seeds.sd:.3f}" if over_seeds.n > 1 else "")


def caption(name: str, runs: Sequence[Record]) -> str:
    """The data, tiles, seeds and commit of the runs, and a warning where they cannot be compared."""
    tiles, parts = runs[0].summary["tiles"], sorted({run.summary["tiles"]["train"] for run in runs})
    seeds = sorted({run.config["seed"] for run in runs})
    titles = sorted({run.summary["dataset"] for run in runs})
    words = (
        f"**{name}**: {' / '.join(titles)}; {' / '.join(f'{n:,}' for n in parts)} training, {tiles['val']:,} "
        f"validation and {tiles['test']:,} test tiles; seeds: {', '.join(map(str, seeds))}."
    )
    if any(run.summary["synthetic"] for run in runs):
        words += " The tiles are generated: these are no results on PathMNIST."
    # Each number of training tiles, which a learning curve varies, has its own title and fingerprint.
    if max(len(titles), len({run.summary["data_fingerprint"] for run in runs})) > len(parts):
        words += " **The runs come from different data sets: they cannot be compared.**"
    for what in ("commit", "device"):
        values = sorted({str(run.facts.get(what)) for run in runs})
        words += f" {what.capitalize()}: {text(values[0])}." if len(values) == 1 else ""
        words += f" **The runs come from different {what}s: {text(', '.join(values))}.**" * (len(values) > 1)
    return words


def draw_grid(path: Path, rows: Rows) -> None:
    """A dot per seed, and the mean with its interval, of every row: validation ACC beside test ACC."""
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(7.4, 1.6 + 0.38 * len(rows)))
        panels = figure.subplots(1, 2, sharey=True)
        for axes, score in zip(panels, ("validation", "acc"), strict=True):
            for place, group in enumerate(rows.values()):
                values = [*group.by_seed(score).values()]
                over_seeds = spread(values)
                axes.plot(values, [place] * len(values), "o", color=VERMILLION, alpha=0.5, markersize=4)
                bounds = [over_seeds.low, over_seeds.high]  # NaN draws nothing
                axes.plot(bounds, [place + 0.25] * 2, color="black", linewidth=1.5)
                axes.plot(over_seeds.mean, place + 0.25, "D", color="black", markersize=4)
                if place == 0:
                    axes.axvline(over_seeds.mean, color="#888888", linestyle="--", linewidth=1, zorder=0)
            axes.set_xlabel(COLUMNS[score])
            axes.grid(axis="y", visible=False)
        names = [TECHNIQUES.get(row, row.replace("_", " ")) for row in rows]
        panels[0].set_yticks(range(len(rows)), [wrap(name, 32) for name in names], fontsize=9)
        panels[0].invert_yaxis()
        explained = (
            f"dots: one seed each; diamond: mean and, from {LEAST_SEEDS} seeds on, 95 % interval; "
            "dashed: the first row's mean"
        )
        figure.suptitle(wrap(explained, 85), fontsize=9)
        save(figure, path)


@dataclass(frozen=True)
class Ended:
    """A trial that has ended. Its parameters, and its metric by epoch, are those of its run's own records."""

    run_id: str
    state: str  # one of STATES
    params: Mapping[str, Any]
    metric: Mapping[int, float]
    dataset: str | None


def ranked(sweep: Sweep, trials: Iterable[Ended]) -> list[Ended]:
    """Finished, then pruned, then failed trials, and the best ones first."""

    def place(trial: Ended) -> tuple[int, float]:
        best = sweep.best(trial.metric.values())
        value = math.inf if best is None else -best if sweep.maximize else best
        return STATES.index(trial.state), value

    return sorted(trials, key=place)


def search_table(sweep: Sweep, trials: Sequence[Ended]) -> list[str]:
    """The trials in this order. They have no test scores: nobody may choose a trial by them."""
    lines = []
    for rank, trial in enumerate(trials, start=1):
        best = sweep.best(trial.metric.values())
        epoch = next((epoch for epoch in sorted(trial.metric) if trial.metric[epoch] == best), None)
        params = [trial.params.get(name) for name in sweep.swept]
        lines.append(list(map(_cell, [rank, trial.run_id, trial.state, best, epoch, len(trial.metric), *params])))
    data = " / ".join(sorted({trial.dataset for trial in trials if trial.dataset}))
    fixed = ", ".join(f"{name} {value}" for name, value in sweep.fixed.items()) or "none"
    words = (
        f"**{sweep.name}**: {data or 'no trial has loaded its data'}; {len(lines)} trials of a {sweep.method} "
        f"search, the best over a trial's epochs of {sweep.metric_name}; keys that all share: {text(fixed)}. A "
        "pruned trial was stopped early; its value is the best of the epochs before."
    )
    columns = ["rank", "run_id", "state", sweep.metric_name, "best epoch", "epochs", *sweep.swept]
    return [words, "", *markdown_table(columns, "l" * len(columns), lines)]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else text(value)
