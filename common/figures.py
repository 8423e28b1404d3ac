"""The figures of a run as PNG files: a curve over the epochs and a confusion matrix.

Importing this module loads matplotlib, so callers import it when they draw. Figures are drawn without pyplot: they
need no display. With the same versions of matplotlib and its libraries, the same input gives the same bytes.
"""

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from common.files import atomic_path

# Okabe and Ito's colours, which colour-blind readers can distinguish (https://jfly.uni-koeln.de/color/).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BLUE, VERMILLION = PALETTE[:2]
# A report shows a figure 700 pixels wide: 6.4 inches at 150 dots leave room for sharper screens.
STYLE: dict[str, Any] = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "axes.axisbelow": True,
    "legend.edgecolor": "none",
    "text.parse_math": False,  # a `$` in a name is a letter
}
NO_GRID = {"axes.grid": False}
PICTURES = {**NO_GRID, "axes.spines.left": False, "axes.spines.bottom": False}
NO_TICKS: dict[str, Any] = {"xticks": [], "yticks": []}  # of such axes


@contextmanager
def drawing(path: Path, size: tuple[float, float], style_changes: Mapping[str, Any] = {}) -> Iterator[Figure]:
    """A figure of `size` in inches, in STYLE; at the end, it becomes a PNG file without matplotlib's version."""
    with style.context(["default", STYLE, dict(style_changes)]):
        figure = Figure(figsize=size)
        yield figure
        FigureCanvasAgg(figure)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})


def curve(path: Path, values: Sequence[float], *, ylabel: str, title: str, best_epoch: int) -> None:
    """Draw one value per epoch against its number, from 1, into the PNG file `path`; the best epoch is marked."""
    epochs = range(1, len(values) + 1)
    with drawing(path, (6.4, 4)) as figure:
        axes = figure.add_subplot()
        axes.plot(epochs, values, color=BLUE, marker="o", markersize=4)
        axes.set(title=wrap(title, 75), xlabel="Epoch", ylabel=ylabel, xlim=(0.5, len(values) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
        height = values[best_epoch - 1]
        label = f"selected: epoch {best_epoch} ({height:.4g})"
        axes.axvline(best_epoch, color=VERMILLION, linestyle="--", linewidth=1)
        axes.plot(best_epoch, height, "D", color=VERMILLION, markersize=7, label=label)
        axes.legend()


def confusion(path: Path, matrix: NDArray[Any], class_names: Sequence[str], *, title: str) -> None:
    """Draw a (C, C) matrix of tile counts, rows the true classes, into the PNG file `path`.

    A cell shows its count; its colour is the share of its row, the true class's tiles.
    """
    # A class without tiles has shares of 0, not 0/0.
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    names = [wrap(name, 16) for name in class_names]
    with drawing(path, (6.4, 5.8), NO_GRID) as figure:
        axes = figure.add_subplot()
        image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1)
        for (row, column), count in np.ndenumerate(matrix):
            # On viridis' brighter colours, of luminance above 0.18, black text has more contrast than white.
            ink = "black" if shares[row, column] > 0.43 else "white"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=ink, fontsize=8)
        axes.set(title=wrap(title, 75), xlabel="Predicted class", ylabel="True class")
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        bar = figure.colorbar(image, shrink=0.8, format=PercentFormatter(1))
        bar.set_label("Share of the true class's tiles")


def wrap(text: str, width: int) -> str:
    """The text in lines of about `width` letters; parts as `28 → 64 px` and `seed 0` stay together."""
    joined = re.sub(r"(?<=seed) (?=\d)|(?<=\d) (?=px|→)|(?<=→) (?=\d)", "\N{NO-BREAK SPACE}", text)
    return textwrap.fill(joined, width, break_long_words=False).replace("\N{NO-BREAK SPACE}", " ")
