"""The figures that compare runs: their curves over the epochs, and the test ACC of all networks of a study."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.figures import BLUE, GREEN, PURPLE, STYLE, VERMILLION, save, wrap
from common.records.read import Record
from common.records.run import AXIS_LABELS
from common.training.metrics import Estimate

COLUMNS = ("train/loss", "validate/auc", "validate/acc")
COLOURS = {  # a network has the same colour in every figure
    "Task 1": BLUE,
    "Task 3": VERMILLION,
    "Task 4": VERMILLION,
    "Task 5": GREEN,
    "fine-tuned": GREEN,
    "from scratch": PURPLE,
}
GREY = "#777777"


def draw_curves(path: Path, groups: Mapping[str, Sequence[Record]], title: str) -> None:
    """Training loss, validation AUC and ACC by epoch: a thin line per run, a thick one for the mean.

    `groups` are keys of COLOURS. A diamond marks the epoch whose weights a run keeps, a bar the end of a run that
    early stopping ended. The mean ends with the shortest run.
    """
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(9.6, 3.6))
        panels = figure.subplots(1, len(COLUMNS))
        for axes, column in zip(panels, COLUMNS, strict=True):
            for name, runs in groups.items():
                colour = COLOURS[name]
                curves = [np.array([row[column] for row in run.history]) for run in runs]
                for run, values in zip(runs, curves, strict=True):
                    axes.plot(np.arange(1, len(values) + 1), values, color=colour, alpha=0.4, linewidth=0.9)
                    best = run.summary["best"]["epoch"]
                    axes.plot(best, values[best - 1], "D", color=colour, markersize=4, alpha=0.8)
                    if len(values) < run.config["n_epochs"]:  # stopped early
                        axes.plot(len(values), values[-1], "|", color=colour, markersize=12, markeredgewidth=1.5)
                shortest = min(map(len, curves))
                mean = np.mean([values[:shortest] for values in curves], axis=0)
                label = f"{name} (thick: mean of {len(runs)} seeds)" if len(runs) > 1 else f"{name} (one seed)"
                axes.plot(np.arange(1, shortest + 1), mean, color=colour, linewidth=2.2, label=label)
            axes.set(title=wrap(AXIS_LABELS[column], 34), xlabel="Epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle(title, fontsize=10)
        save(figure, path)


def draw_summary(
    path: Path,
    ours: Sequence[tuple[str, str, Estimate, Estimate | None, Sequence[float]]],
    others: Sequence[tuple[str, float]],
    title: str,
) -> None:
    """The test ACC of every row with its interval, also over 8 views, and the published figures.

    A row of `ours` is a name, a key of COLOURS (any other is grey), the ACC, the ACC over 8 views, and the ACC of
    each seed, which is shown where the mean has no interval. A row of `others` is a name and the ACC.
    """
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(8, 1.3 + 0.38 * (len(ours) + len(others))))
        axes = figure.add_subplot()
        for place, (_, key, acc, views, seeds) in enumerate(ours):
            colour = COLOURS.get(key, GREY)
            if np.isnan(acc.low):
                axes.plot(seeds, [place] * len(seeds), "|", color=colour, markersize=10, markeredgewidth=2)
            axes.plot([acc.low, acc.high], [place, place], color=colour, linewidth=2)
            axes.plot(acc.value, place, "o", color=colour, markersize=7)
            if views:
                axes.plot([views.low, views.high], [place + 0.25] * 2, color=colour, linewidth=1)
                axes.plot(views.value, place + 0.25, "o", color=colour, markersize=6, markerfacecolor="white")
        for place, (_, value) in enumerate(others, start=len(ours)):
            axes.plot(value, place, "s", color="black", markersize=5)
        names = [name for name, *_ in ours] + [name for name, _ in others]
        axes.set_yticks(range(len(names)), [wrap(name, 54) for name in names], fontsize=9)
        axes.axhline(len(ours) - 0.5, color="#BBBBBB", linewidth=0.8)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("Test ACC")
        explained = "dot: one view of each tile, with its 95 % interval; hollow: 8 views"
        explained += "; bars: the two seeds" if any(np.isnan(acc.low) for _, _, acc, *_ in ours) else ""
        explained += "; square: others' figures" if others else ""
        points = [acc.value for *_, acc, views, _ in ours for acc in (acc, views or acc)] + [
            acc for _, acc in others
        ]
        points += [seed for *_, seeds in ours for seed in seeds]
        left, right = min(points) - 0.05, max(points) + 0.03
        axes.set_xlim(left, right)  # the interval of a few seeds may be wider than all that is of interest
        if any(acc.low < left or acc.high > right for _, _, acc, *_ in ours):
            explained += "\nAn interval that ends at the frame is longer: see the table."
        figure.suptitle(f"{title}\n{explained}", fontsize=10)
        save(figure, path)
