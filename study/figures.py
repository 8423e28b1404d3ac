"""The figures of the page: the ladder, curves over the epochs, learning curves, augmentations."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator

from common.data.augment import build_augmentation
from common.data.dataset import Split
from common.data.shift import shifted
from common.figures import NO_TICKS, PALETTE, PICTURES, drawing, wrap
from common.records.read import Record
from common.records.run import AXIS_LABELS
from study.facts import PUBLISHED, cost
from study.groups import Group

GREY = "#777777"
COLOURS = {"resnet18": PALETTE[0], "mobilenet_v3_large": PALETTE[1]}  # from scratch, in every figure
TUNED, SCRATCH = PALETTE[2], PALETTE[3]  # a network with pretrained weights, and others without
PANELS = {**AXIS_LABELS, "validate/loss": "Validation loss (cross-entropy, nats)"}
MARKERS = "os^v*PX"
STYLES = 2 * ("-", "--", ":", "-.")  # of the recipes of one colour, as their markers
AIM = 0.9  # of the coursework
OPERATIONS = {"ta_wide": "TrivialAugment", "stain": "stain"}
CHANGES = {"lab_statistics": "other staining", "gamma": "other brightness", "chromatic_noise": "colour noise"}
DRAWS = 6


def colour_of(record: Record) -> str:
    """The colour of a run's network, the same in every figure; baselines are grey."""
    config = record.config
    if "model_name" not in config:
        return GREY
    return COLOURS.get(config["model_name"], SCRATCH) if config.get("weights", "none") == "none" else TUNED


def draw_ladder(path: Path, rows: Mapping[str, Group], aim: float | None = None) -> None:
    """Draw the test ACC of every row with its interval and its cost, sorted; published scores on the same axis.

    `aim`, which only this study's page gives, adds its line, the published scores and the best row's 8 views.
    """
    rungs = []
    for group in rows.values():
        config = group.first.config
        price = cost(config["model_name"], group.side)[1] if "model_name" in config else 0
        if over := group.spread("acc"):
            words = ", one seed" if aim and price and over.n == 1 else ""
            rungs.append((over, group.name + words, price, colour_of(group.first)))
    best = max(rows.values(), key=lambda group: fmean(group.by_seed("acc").values()))
    if aim and (views := best.spread("views")):
        price = 8 * cost(best.first.config["model_name"], best.side)[1]
        rungs.append((views, f"{best.name}, mean of 8 views", price, colour_of(best.first)))
    rungs.sort(key=lambda rung: rung[0].mean)
    published = (one for part in PUBLISHED.values() for one in part) if aim else ()
    others = sorted((acc, f"{network}, {sides}") for network, sides, acc, _ in published)
    names = [wrap(name, 48) for name in (*(name for _, name in others), *(rung[1] for rung in rungs))]
    height = 0.08 + 0.14 * max(2, *(name.count("\n") + 1 for name in names))  # of a row, in inches
    with drawing(path, (8, 1.5 + height * len(names))) as figure:
        axes = figure.add_subplot()
        for place, (over, _, price, colour) in enumerate(rungs, start=len(others)):
            axes.plot([over.low, over.high], [place, place], color=colour, linewidth=2)
            axes.plot(over.mean, place, "o", color=colour, markersize=7)
            words = f"{price / 1e6:,.0f} M" if price else ""
            axes.annotate(words, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=9)
        for place, (acc, _) in enumerate(others):
            axes.plot(acc, place, "s", color="black", markersize=5)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set_ylim(-0.7, len(names) - 0.4)
        ends = [end for over, *_ in rungs for end in (over.low, over.mean, over.high) if end == end]  # no NaN
        axes.set_xlim(min(ends) - 0.02, min(1.0, max(ends) + 0.02))
        axes.grid(axis="y", visible=False)
        data = sorted({str(group.first.summary["dataset"]) for group in rows.values()})
        axes.set_xlabel(wrap(f"Test ACC, {'; '.join(data)}", 80))  # so a phantom says that it is one
        if aim:
            axes.axhline(len(others) - 0.5, color="#BBBBBB", linewidth=0.8)
            axes.axvline(aim, color="black", linestyle="--", linewidth=1)
            axes.annotate(f"the aim: {aim:g}", (aim, -0.6), xytext=(-4, 0), textcoords="offset points", ha="right")
        explained = (
            "dot: mean over the seeds, with its 95 % interval from three seeds on (a short one hides behind it)"
        )
        explained += " · square: published" if aim else ""
        figure.suptitle(f"{explained}\non the right: multiply-adds for one tile", fontsize=9)


def draw_curves(path: Path, groups: Mapping[str, Sequence[Record]], title: str) -> None:
    """Draw losses, validation AUC and ACC by epoch: a thin line per run, a thick one for the mean of several.

    A large marker shows the epoch whose weights a run keeps. The mean ends with the shortest run.
    """
    labels = [wrap(f"{name}, {len(runs)} seeds" if runs[1:] else name, 90) for name, runs in groups.items()]
    with drawing(path, (9.6, 6.6 + 0.22 * sum(label.count("\n") + 1 for label in labels))) as figure:
        panels = figure.subplots(2, 2).flat
        ordered = ("train/loss", "validate/loss", "validate/auc", "validate/acc")
        for axes, column in zip(panels, ordered, strict=True):
            looks = {colour: zip(MARKERS, STYLES, strict=False) for colour in (*PALETTE, GREY)}
            for label, runs in zip(labels, groups.values(), strict=True):
                colour = colour_of(runs[0])
                marker, style = next(looks[colour], ("o", "-"))
                curves = [np.array([row[column] for row in run.history]) for run in runs]
                for run, values in zip(runs, curves, strict=True):
                    axes.plot(np.arange(1, len(values) + 1), values, color=colour, alpha=0.4, linewidth=0.9)
                    best = int(run.summary["validate"]["epoch"])
                    axes.plot(best, values[best - 1], marker, color=colour, markersize=7, alpha=0.8)
                shortest = min(map(len, curves))
                mean = np.mean([values[:shortest] for values in curves], axis=0)
                look = {"color": colour, "linewidth": 2, "linestyle": style, "marker": marker, "markersize": 4}
                axes.plot(np.arange(1, shortest + 1), mean, label=label, **look)
            axes.set(title=wrap(PANELS[column], 50), xlabel="Epoch")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", frameon=False)
        mean = " · thick: mean, while all seeds train" if any(len(runs) > 1 for runs in groups.values()) else ""
        figure.suptitle(wrap(f"{title} · large marker: the epoch whose weights are kept{mean}", 110), fontsize=10)


def draw_learning_curve(path: Path, curves: Mapping[str, Sequence[Group]]) -> None:
    """Draw test and validation ACC against the number of training tiles, a line per recipe, with intervals."""
    with drawing(path, (8, 4.2 + 0.22 * len(curves))) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        first = [str(groups[0].first.summary["dataset"]).partition(" (")[0] for groups in curves.values()]
        scores = {"Test ACC": "acc", "Validation ACC": "validation"}
        for axes, (name, score) in zip(panels, scores.items(), strict=True):
            markers = {colour: iter(MARKERS) for colour in (*PALETTE, GREY)}
            for number, (title, groups) in enumerate(curves.items()):
                found = [group.spread(score) for group in groups]
                means, low, high = np.array([(one.mean, one.low, one.high) for one in found if one]).T
                colour, baseline = colour_of(groups[0].first), "baseline" in groups[0].first.config
                look = {"color": colour, "marker": next(markers[colour], "o"), "markersize": 5, "capsize": 3}
                look |= {"linestyle": "--" if baseline else "-", "label": title}
                tiles = [group.tiles * 1.02**number for group in groups]  # so that no bar hides another one
                bars = np.nan_to_num([means - low, high - means])
                axes.errorbar(tiles, means, yerr=bars, **look)
            tiles = sorted({group.tiles for groups in curves.values() for group in groups})
            axes.set_xscale("log")
            axes.set_xticks(tiles, [f"{number:,}" for number in tiles], rotation=30)
            axes.minorticks_off()
            axes.set(xlabel=f"Training tiles of {', '.join(sorted(set(first)))} (logarithmic)", ylabel=name)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", frameon=False)


def draw_augmentations(path: Path, original: torch.Tensor) -> None:
    """Draw a tile (3, H, W) uint8, and DRAWS draws of each augmentation and of each change of colours."""
    images, rows = original.repeat(DRAWS, 1, 1, 1), dict[str, torch.Tensor]()
    for name, title in OPERATIONS.items():
        rows[title] = build_augmentation(name)(images, torch.Generator().manual_seed(0))
    for name, split in shifted(Split(images, torch.zeros(DRAWS)), original.shape[-1]):
        rows[CHANGES[name]] = split.images
    with drawing(path, (8, 1.05 * len(rows) + 0.4), PICTURES) as figure:
        grid = figure.subplots(len(rows), DRAWS + 1, squeeze=False, subplot_kw=NO_TICKS)
        for line, (title, changed) in zip(grid, rows.items(), strict=True):
            for axes, image in zip(line[1:], changed, strict=True):
                axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
            line[1].set_ylabel(title, rotation=0, ha="right", va="center")
        grid[0, 0].imshow(original.permute(1, 2, 0).numpy(), interpolation="nearest")
        grid[0, 0].set_title("original", fontsize=9)
