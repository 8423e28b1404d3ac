"""Rank the trials of a search: a table, and figures of its parameters."""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from matplotlib import colormaps, style
from matplotlib.figure import Figure
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from common.errors import UsageError
from common.figures import BLUE, STYLE, save
from common.files import write_csv, write_text
from common.markdown import markdown_table
from common.records.read import read_json, run_folder
from study.search import Search
from study.sweep_file import Range, Sweep

STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
LABEL: dict[str, Any] = {
    "fontsize": 8,
    "ha": "center",
    "va": "center",
    "bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
}
FANOVA_SEEDS = 5


def rank(search: Search) -> None:
    """Write the trials, best first, as table.md and table.csv, draw both figures, and print where they are."""
    sweep, folder, output_dir = search.records.sweep, search.records.folder, search.records.output_dir
    ended = search.ended()
    if not ended:
        raise UsageError(f"no trial of {sweep.name} has ended yet")
    ended.sort(key=lambda trial: _order(trial, sweep))
    lines = [
        {"rank": place, "run_id": search.run_id(trial), **_line(trial, sweep)}
        for place, trial in enumerate(ended, start=1)
    ]
    write_csv(folder / "table.csv", lines)
    # On this machine; with a database, other machines have the records of their trials.
    records = [run_folder(output_dir, search.run_id(trial)) / "config.json" for trial in ended]
    titles = {read_json(path)["dataset"] for path in records if path.exists()}
    data = " / ".join(sorted(titles)) or "no trial has loaded its data"
    written = [folder / "table.csv", folder / "table.md"]
    figures = output_dir / "fig" / "task4"
    finished = [trial for trial in ended if trial.state == TrialState.COMPLETE]
    again = ""
    if finished:
        command = shlex.join(["python", sweep.program, *sweep.recipe(finished[0].params)])
        again = f"The best trial's configuration, on all training tiles: `{command}`\n"
        written.append(figures / f"{sweep.name}-parallel-coordinates.png")
        draw_parallel_coordinates(written[-1], ended, sweep, data)
    write_text(folder / "table.md", f"{_markdown(sweep, lines, data)}\n{again}")
    several = sweep.swept and len({trial.value for trial in finished}) > 1
    shares = importances(search.study) if several else []
    importance = figures / f"{sweep.name}-importance.png"
    if len({max(share, key=share.__getitem__) for share in shares}) == 1:
        written.append(importance)
        draw_importance(
            importance, shares, f"{sweep.name} · {data}\n{len(finished)} finished trials", sweep.metric
        )
    else:
        importance.unlink(missing_ok=True)  # it shows fewer trials than the table
        print(
            f"{sweep.name}: {len(finished)} finished trials do not tell which parameter is the most important one"
        )
    print(f"{sweep.name}: {len(ended)} trials, {len(finished)} finished; best first by {sweep.metric}:")
    for path in written:
        print(f"  {path}")
    print(again, end="")


def _order(trial: FrozenTrial, sweep: Sweep) -> tuple[int, float]:
    """The key to sort by: finished, then pruned, then failed trials, and the best ones first."""
    best = sweep.best(trial.intermediate_values.values())
    value = math.inf if best is None else -best if sweep.maximize else best
    return list(STATES).index(trial.state), value


def _line(trial: FrozenTrial, sweep: Sweep) -> dict[str, Any]:
    """A trial's values for the table. It has no test scores: nobody may choose a trial by them."""
    epochs, best = trial.intermediate_values, sweep.best(trial.intermediate_values.values())
    return {
        "state": STATES[trial.state],
        sweep.metric or "": best,
        "best epoch": next((epoch for epoch in sorted(epochs) if epochs[epoch] == best), None),
        "epochs": len(epochs),
        **trial.params,
    }


def _markdown(sweep: Sweep, lines: Sequence[dict[str, Any]], data: str) -> str:
    fixed = ", ".join(f"{name} {value}" for name, value in sweep.fixed.items()) or "none"
    caption = (
        f"**{sweep.name}**: {data}; {len(lines)} trials of a {sweep.method} search, the best over a trial's "
        f"epochs of {sweep.metric}; keys that all share: {fixed}. A pruned trial was stopped early; its value "
        "is the best of the epochs before."
    )
    rows = [[_cell(value) for value in line.values()] for line in lines]
    return "\n".join([caption, "", *markdown_table(list(lines[0]), "l" * len(lines[0]), rows)]) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw_parallel_coordinates(path: Path, trials: Sequence[FrozenTrial], sweep: Sweep, data: str) -> None:
    """A line per trial through its parameters to the metric: coloured if it finished, else grey."""
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    scores = [trial.value or 0.0 for trial in finished]
    scales = {**sweep.swept, str(sweep.metric): Range("uniform", min(scores), max(scores))}
    places = range(len(scales))
    with style.context(["default", STYLE, {"axes.grid": False}]):
        figure = Figure(figsize=(6.4, 4.2))
        axes = figure.add_subplot()
        for trial in trials:
            heights = [_height(trial.params[name], values) for name, values in sweep.swept.items()]
            if trial.state == TrialState.COMPLETE:
                heights.append(_height(trial.value, scales[str(sweep.metric)]))
                axes.plot(places, heights, color=colormaps["viridis"](heights[-1]), linewidth=1.5, alpha=0.8)
            else:
                axes.plot(places[:-1], heights, color="#BBBBBB", linewidth=0.8, zorder=1)
        for place, values in enumerate(scales.values()):
            axes.axvline(place, color="#888888", linewidth=0.8, zorder=0)
            for value in (values.low, values.high) if isinstance(values, Range) else values:
                axes.text(place, _height(value, values), _cell(value).replace(",", ",\n"), **LABEL)
        axes.set_xticks(places, [name.replace("_", "\n") for name in scales], fontsize=9)
        axes.set_yticks([])
        axes.spines[["left", "bottom"]].set_visible(False)
        other = len(trials) - len(finished)
        axes.set_title(f"{sweep.name} · {data}\n{len(finished)} finished trials, {other} pruned or failed (grey)")
        save(figure, path)


def _height(value: Any, values: tuple[Any, ...] | Range) -> float:
    """The position of a value on its axis, from 0 to 1."""
    if not isinstance(values, Range):
        return values.index(value) / max(len(values) - 1, 1)
    scale = math.log if values.distribution == "log_uniform_values" else float
    low, high = scale(values.low), scale(values.high)
    return 0.5 if low == high else (scale(value) - low) / (high - low)


def importances(optuna_study: optuna.Study) -> list[dict[str, float]]:
    """For each seed of the random forest: the share of the variance that each parameter explains (fANOVA).

    Functional ANOVA: Hutter, Hoos, Leyton-Brown 2014. With few trials, the result depends on the seed.
    In simulated searches of four parameters, all 5 seeds had the same most important parameter in 3 of 8 searches
    of 4 trials, and in 8 of 8 searches of 12, 20 and 40 trials; shares still differed by 0.1 between seeds.
    """
    return [
        get_param_importances(optuna_study, evaluator=FanovaImportanceEvaluator(seed=seed))
        for seed in range(FANOVA_SEEDS)
    ]


def draw_importance(path: Path, shares: Sequence[Mapping[str, float]], title: str, metric: str | None) -> None:
    """A bar per parameter: its mean share of the metric's variance, and the range over the estimate's seeds."""
    names = sorted(shares[0], key=lambda name: -sum(share[name] for share in shares))
    values = np.array([[share[name] for name in names] for share in shares])
    mean = values.mean(axis=0)
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(6.4, 1.4 + 0.3 * len(names)))
        axes = figure.add_subplot()
        bars = axes.barh(names, mean, color=BLUE, xerr=[mean - values.min(axis=0), values.max(axis=0) - mean])
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(f"share of the variance of {metric}\n(fANOVA; mean and range of {len(shares)} seeds)")
        axes.set_title(title)
        save(figure, path)
