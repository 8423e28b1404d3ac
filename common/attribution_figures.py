"""The pictures of Task 2: tiles and maps enlarged without smoothing, panels of methods, the checks' curves.

Tiles are (H, W, 3) uint8, maps (H, W) float. As with common/figures.py, importing this loads matplotlib.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from common.attribution import METHODS
from common.attribution_checks import CONTROLS, FRACTIONS, STAGES
from common.figures import BLUE, STYLE, VERMILLION, save, wrap

# Okabe and Ito's colours, as in common/figures.py, one a method; the controls are grey and black.
COLOURS = dict(zip(METHODS, (BLUE, VERMILLION, "#009E73", "#CC79A7", "#E69F00"), strict=True))
CONTROL_LINES = {"random": ("#777777", "--"), "sobel": ("black", ":")}
MARKERS = dict(zip(METHODS, "osD^v", strict=True))
POSITIVE_MAP, SIGNED_MAP = "inferno", "PuOr_r"
ROBUST_PERCENTILE = 99.0  # a map's colour scale ends here, so that one extreme pixel does not darken the rest


@dataclass(frozen=True)
class Explained:
    """A tile with its place in the test split, its classes in words, and its maps by method."""

    index: int
    tile: NDArray[np.uint8]
    label: str
    predicted: str
    probability: float  # of the predicted class
    maps: Mapping[str, NDArray[Any]]

    @property
    def correct(self) -> bool:
        """Whether the prediction is the label."""
        return self.label == self.predicted


def tile_and_saliency(input_path: Path, saliency_path: Path, explained: Explained, target: str) -> None:
    """Draw one tile and its saliency map into two PNG files of the same layout, to stand side by side."""
    for path, map_ in ((input_path, None), (saliency_path, explained.maps["saliency"])):
        with style.context(["default", STYLE, {"axes.grid": False, "figure.constrained_layout.use": False}]):
            figure = Figure(figsize=(2.4, 2.9))
            axes = figure.add_axes((0.04, 0.22, 0.92, 0.76))
            _bare(axes)
            if map_ is None:
                axes.imshow(explained.tile, interpolation="nearest")
                words = f"predicted: {explained.predicted} ({explained.probability:.2f})"
                words = f"true: {explained.label}\n{wrap(words, 42)}"
                figure.text(0.5, 0.1, words, ha="center", va="center", fontsize=7)
            else:
                image = _heat(axes, map_, signed=False)
                bar = figure.colorbar(
                    image, cax=figure.add_axes((0.1, 0.15, 0.8, 0.035)), orientation="horizontal", extend="max"
                )
                bar.ax.tick_params(labelsize=6)
                bar.set_label(wrap(f"|∂ logit of {target} / ∂ input|", 45), fontsize=6, linespacing=0.9)
            save(figure, path)


def methods_panel(path: Path, rows: Sequence[Explained], *, title: str) -> None:
    """Draw a row a tile: the tile, then its map by every method, each on a colour scale of its own."""
    columns = ["Input", *(method.title for method in METHODS.values())]
    with style.context(["default", STYLE, {"axes.grid": False}]):
        figure = Figure(figsize=(8, 1.12 * len(rows) + 0.9))
        grid = figure.subplots(len(rows), len(columns), squeeze=False)
        for axes, name in zip(grid[0], columns, strict=True):
            axes.set_title(wrap(name, 12), fontsize=9)
        for line, row in zip(grid, rows, strict=True):
            _tile(line[0], row)
            for axes, (name, method) in zip(line[1:], METHODS.items(), strict=True):
                _bare(axes)
                _heat(axes, row.maps[name], method.signed)
        figure.suptitle(wrap(title, 105), fontsize=9)
        figure.supxlabel(
            "Bright, or orange: the pixel speaks for the class (Saliency and SmoothGrad: for or against it); "
            f"purple: against it.\nEach map's scale ends at its {ROBUST_PERCENTILE:.0f}th percentile. "
            "A tile in a frame is classified wrongly.",
            fontsize=8,
        )
        save(figure, path)


def class_grid(
    path: Path,
    names: Sequence[str],
    right: Sequence[Explained | None],
    wrong: Sequence[Explained | None],
    *,
    title: str,
) -> None:
    """Draw a row a class: a tile of it that the network gets right and one it gets wrong, each with its map."""
    with style.context(["default", STYLE, {"axes.grid": False}]):
        figure = Figure(figsize=(6.4, 1.12 * len(names) + 0.9))
        grid = figure.subplots(len(names), 4, squeeze=False)
        for axes, words in zip(grid[0], ("right", "saliency", "wrong", "saliency"), strict=True):
            axes.set_title(words, fontsize=9)
        for line, name, *pair in zip(grid, names, right, wrong, strict=True):
            for (left, heat), row in zip((line[:2], line[2:]), pair, strict=True):
                _bare(heat)
                if row is None:
                    _bare(left)
                    left.text(0.5, 0.5, "none", ha="center", va="center", fontsize=8, transform=left.transAxes)
                else:
                    _tile(left, row, with_label=False)
                    _heat(heat, row.maps["saliency"], signed=False)
                    if not row.correct:
                        left.set_ylabel(wrap(f"taken for {row.predicted}", 16), fontsize=7, rotation=0, ha="right")
                        left.yaxis.label.set_verticalalignment("center")
            line[0].set_ylabel(wrap(name, 16), fontsize=8, rotation=0, ha="right", va="center")
        figure.suptitle(wrap(title, 90), fontsize=9)
        save(figure, path)


def randomisation(
    path: Path, correlations: Mapping[str, Mapping[str, Mapping[str, float]]], *, title: str
) -> None:
    """Draw each method's mean rank correlation with the trained network's maps, as more layers are random.

    `correlations[method][stage]` holds value, low and high. Edges do not depend on the network: they stay at 1.
    """
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(6.4, 4.4))
        axes = figure.add_subplot()
        for name, stages in correlations.items():
            _band(axes, range(len(STAGES) + 1), [_ONE, *(stages[stage] for stage in STAGES)], name)
        colour, line = CONTROL_LINES["sobel"]
        axes.axhline(1, color=colour, linestyle=line, label=f"{CONTROLS['sobel']} (no network)")
        axes.set_xticks(range(len(STAGES) + 1), ["none", *STAGES])
        axes.set(
            xlabel="Initialised afresh, from the last layer back to …",
            ylabel="Rank correlation with the trained map",
            ylim=(-0.3, 1.05),
        )
        axes.set_title(wrap(title, 90), fontsize=9)
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
        save(figure, path)


def removal_curves(path: Path, report: Mapping[str, Mapping[str, Any]], *, title: str) -> None:
    """Draw the mean deletion and insertion curves of every method and both controls, with 95 % bands."""
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(8, 4.4))
        panels = figure.subplots(1, 2, sharey=True)
        for axes, kind, better in zip(panels, ("deletion", "insertion"), ("lower", "higher"), strict=True):
            for name, order in report.items():
                _band(axes, FRACTIONS, order[f"{kind}_curve"], name)
            axes.set(title=f"{kind.capitalize()} ({better} is better)", ylim=(0, 1))
            axes.xaxis.set_major_formatter(PercentFormatter(1))
            axes.set_xlabel("Pixels blurred away" if kind == "deletion" else "Pixels brought back")
        panels[0].set_ylabel("Probability of the explained class")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
        figure.suptitle(wrap(title, 110), fontsize=9)
        save(figure, path)


_ONE = {"value": 1.0, "low": 1.0, "high": 1.0}


def _band(axes: Axes, places: Sequence[float], estimates: Sequence[Mapping[str, float]], name: str) -> None:
    low, middle, high = ([estimate[end] for estimate in estimates] for end in ("low", "value", "high"))
    if name in CONTROLS:
        colour, line = CONTROL_LINES[name]
        axes.plot(places, middle, color=colour, linestyle=line, label=CONTROLS[name])
    else:
        colour = COLOURS[name]
        axes.plot(places, middle, color=colour, marker=MARKERS[name], markersize=4, label=METHODS[name].title)
    axes.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)


def _tile(axes: Axes, row: Explained, with_label: bool = True) -> None:
    _bare(axes)
    axes.imshow(row.tile, interpolation="nearest")
    if with_label:
        words = f"{row.index:05d}\n{row.label}"
        words += f"\np = {row.probability:.2f}" if row.correct else f"\n→ {row.predicted} {row.probability:.2f}"
        words = "\n".join(wrap(line, 20) for line in words.splitlines())
        axes.set_ylabel(words, fontsize=6.5, rotation=0, ha="right", va="center")
    if not row.correct:
        axes.spines[:].set(visible=True, color=VERMILLION, linewidth=2)


def _heat(axes: Axes, map_: NDArray[Any], signed: bool) -> AxesImage:
    limit = float(np.percentile(np.abs(map_), ROBUST_PERCENTILE)) or float(np.abs(map_).max()) or 1.0
    return axes.imshow(
        map_,
        cmap=SIGNED_MAP if signed else POSITIVE_MAP,
        vmin=-limit if signed else 0,
        vmax=limit,
        interpolation="nearest",
    )


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
