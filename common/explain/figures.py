"""The figures of Task 2: tiles and maps enlarged without smoothing, panels of methods, curves of the checks.

Tiles are (H, W, 3) uint8, maps (H, W) float32. Importing this module loads matplotlib, as common/figures.py does.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from common.explain.checks import CONTROLS, FRACTIONS, RANDOMISATION_LIMIT
from common.explain.maps import METHODS
from common.explain.tiles import Explained
from common.figures import NO_TICKS, PALETTE, PICTURES, VERMILLION, drawing, wrap

# The line of each method, in Okabe and Ito's colours, and of each control, in grey and black.
LINES: dict[str, dict[str, Any]] = {
    name: {"color": colour, "marker": marker, "markersize": 4, "label": METHODS[name].title}
    for name, colour, marker in zip(METHODS, PALETTE, "osD^v", strict=False)
}
LINES["random"] = {"color": "#777777", "linestyle": "--", "label": CONTROLS["random"]}
LINES["sobel"] = {"color": "black", "linestyle": ":", "label": CONTROLS["sobel"]}
POSITIVE_MAP, SIGNED_MAP = "inferno", "PuOr_r"
MAIN = 5  # tiles in the main figure
ROBUST_PERCENTILE = 99.0  # a map's colour scale ends here, so that one extreme pixel does not darken the rest


def draw(
    output_dir: Path,
    facts: Mapping[str, Any],
    shown: Sequence[Explained],
    checks: Mapping[str, Any],
    means: Mapping[str, Sequence[NDArray[Any]]],
) -> dict[str, Path]:
    """Draw two figures for each tile in `shown` and five of the run, and return the run's figures by name.

    `facts` are task2.py's, `checks` and `means` those of `check_methods`.
    """
    for one in shown:
        tile_and_saliency(output_dir, one, "phantom, " * facts["synthetic"])
    names = ("methods", "all_methods", "means", "randomisation", "removal")
    figures = {name: output_dir / "fig" / "task2" / f"{facts['run_id']}-{name}.png" for name in names}
    network, n = facts["network"], checks["n"]
    title = f"{network}; test tiles; class explained: the predicted one"
    methods_panel(figures["methods"], shown[:MAIN], title)
    methods_panel(figures["all_methods"], shown, title)
    title = f"{network}; {n['randomisation']} test tiles"
    mean_maps(figures["means"], means, title)
    randomisation(figures["randomisation"], checks["methods"], title)
    orders = {**checks["methods"], **checks["controls"]}
    removal_curves(figures["removal"], orders, f"{network}; {n['removal']} test tiles")
    return figures


def tile_and_saliency(output_dir: Path, explained: Explained, mark: str) -> None:
    """Draw a tile and its saliency map as two PNG files of the same layout; `mark` stands before the words."""
    by_hand = {**PICTURES, "figure.constrained_layout.use": False}  # both with their picture at the same place
    for part in ("input", "saliency"):
        with drawing(output_dir / explained.row[part], (2.4, 2.9), by_hand) as figure:
            axes = figure.add_axes((0.04, 0.22, 0.92, 0.76), **NO_TICKS)
            if part == "input":
                axes.imshow(explained.tile, interpolation="nearest")
                words = wrap(f"predicted: {explained.predicted} ({explained.probability:.2f})", 42)
                words = f"{mark}true: {explained.label}\n{words}"
                figure.text(0.5, 0.1, words, ha="center", va="center", fontsize=7)
            else:
                image = _heat(axes, explained.maps["saliency"], signed=False)
                place = figure.add_axes((0.1, 0.15, 0.8, 0.035))
                bar = figure.colorbar(image, cax=place, orientation="horizontal", extend="max")
                bar.ax.tick_params(labelsize=6)
                words = wrap(f"{mark}|∂ logit of {explained.predicted} / ∂ input|", 45)
                bar.set_label(words, fontsize=6, loc="left")


def methods_panel(path: Path, rows: Sequence[Explained], title: str) -> None:
    """Draw one row per tile: the tile, then its map by every method. Each map has a separate colour scale."""
    with drawing(path, (8, 1.12 * len(rows) + 0.9), PICTURES) as figure:
        grid = _grid(figure, len(rows), ["Input", *(method.title for method in METHODS.values())])
        for line, row in zip(grid, rows, strict=True):
            line[0].imshow(row.tile, interpolation="nearest")
            result = "p ="
            if row.label != row.predicted:
                line[0].spines[:].set(visible=True, color=VERMILLION, linewidth=2)
                result = f"→ {row.predicted}"
            words = "\n".join(wrap(part, 20) for part in (row.label, f"{result} {row.probability:.2f}"))
            line[0].set_ylabel(f"{row.index:05d}\n{words}", fontsize=6.5, rotation=0, ha="right", va="center")
            for axes, (name, method) in zip(line[1:], METHODS.items(), strict=True):
                _heat(axes, row.maps[name], method.signed)
        figure.suptitle(wrap(title, 105), fontsize=9)
        words = "Bright, or orange: the pixel speaks for the class (Saliency and SmoothGrad: for or against it); "
        words += f"purple: against it.\nEach map's scale ends at its {ROBUST_PERCENTILE:.0f}th percentile. "
        words += "A black map has no positive value. A tile in a frame is classified wrongly."
        figure.supxlabel(words, fontsize=8)


def mean_maps(path: Path, means: Mapping[str, Sequence[NDArray[Any]]], title: str) -> None:
    """Draw each method's mean map of the trained network, and below it that of the network with random weights."""
    with drawing(path, (8, 4), PICTURES) as figure:
        grid = _grid(figure, 2, [METHODS[name].title for name in means])
        for column, both in zip(grid.T, means.values(), strict=True):
            for axes, map_ in zip(column, both, strict=True):
                _heat(axes, map_, signed=False)
        grid[0, 0].set_ylabel("trained", fontsize=9)
        grid[1, 0].set_ylabel("random weights", fontsize=9)
        figure.suptitle(wrap(f"Mean absolute maps; {title}", 105), fontsize=9)
        words = "Bright here: bright in most tiles, whatever they show.\n"
        figure.supxlabel(f"{words}Also bright with random weights: it comes from the architecture.", fontsize=8)


def randomisation(path: Path, methods: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Draw each method's mean rank correlation with the trained network's maps, while more layers are random.

    Edges do not depend on the network: they stay at 1.
    """
    with drawing(path, (6.4, 4.6)) as figure:
        axes = figure.add_subplot()
        axes.axhspan(-RANDOMISATION_LIMIT, RANDOMISATION_LIMIT, color="#EAF3EA", zorder=0)
        words = " a method passes if its last interval lies in this band"
        axes.text(0, -RANDOMISATION_LIMIT, words, fontsize=8, va="bottom")
        for name, result in methods.items():
            estimates = [{"value": 1.0, "low": 1.0, "high": 1.0}, *result["randomisation"].values()]
            _line(axes, np.arange(len(estimates)), estimates, name)
        axes.axhline(1, **LINES["sobel"])
        axes.set_xticks(range(len(estimates)), ["none", *result["randomisation"]])
        axes.set_xlabel("Random weights: in the head, then also in layers with maps of … pixels")
        axes.set(ylabel="Rank correlation with the trained map", ylim=(-0.6, 1.05))
        axes.set_title(wrap(title, 90), fontsize=9)
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)


def removal_curves(path: Path, report: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """Draw the mean deletion and insertion curves of every method and both controls, with their intervals."""
    with drawing(path, (8, 4.4)) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, kind, better in zip(panels, ("deletion", "insertion"), ("lower", "higher"), strict=True):
            for number, (name, order) in enumerate(report.items()):
                _line(axes, np.array(FRACTIONS) + 0.004 * (number - 3), order[f"{kind}_curve"], name)
            axes.set(title=f"{kind.capitalize()} ({better} is better)", ylim=(0, 1))
            axes.xaxis.set_major_formatter(PercentFormatter(1))
            axes.set_xlabel("Pixels blurred away" if kind == "deletion" else "Pixels brought back")
        panels[0].set_ylabel("Probability of the explained class")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
        figure.suptitle(wrap(f"{title}; bars: 95\N{NO-BREAK SPACE}% intervals over tiles", 110), fontsize=9)


def _line(axes: Axes, places: NDArray[Any], estimates: Sequence[Mapping[str, float]], name: str) -> None:
    """Draw the means of a method or a control, with thin bars for their intervals."""
    value, low, high = (np.array([estimate[end] for estimate in estimates]) for end in ("value", "low", "high"))
    axes.plot(places, value, **LINES[name])
    axes.vlines(places, low, high, color=LINES[name]["color"], linewidth=1, alpha=0.6)


def _grid(figure: Figure, n_rows: int, titles: Sequence[str]) -> NDArray[Any]:
    """Axes for pictures, (n_rows, len(titles)), with a title above each column."""
    grid: NDArray[Any] = figure.subplots(n_rows, len(titles), squeeze=False, subplot_kw=NO_TICKS)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(wrap(title, 12), fontsize=9)
    return grid


def _heat(axes: Axes, map_: NDArray[Any], signed: bool) -> AxesImage:
    limit = float(np.percentile(np.abs(map_), ROBUST_PERCENTILE)) or float(np.abs(map_).max()) or 1.0
    colours, lowest = (SIGNED_MAP, -limit) if signed else (POSITIVE_MAP, 0)
    return axes.imshow(map_, cmap=colours, vmin=lowest, vmax=limit, interpolation="nearest")
