"""The report's own figures: a run's learning rate, augmentations, validation against test, calibration."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from common.data import phantom
from common.data.augment import build_augmentation
from common.data.pathmnist import CLASS_NAMES
from common.figures import STYLE, confusion, curve, save, wrap
from common.finetune.weights import SCRATCH
from common.records.read import Record
from common.records.run import TITLES
from common.statistics import interval
from common.training.metrics import Estimate
from study.curves import COLOURS, GREY, draw_curves, draw_summary
from study.forecast import LOWER_IS_BETTER, Forecast
from study.groups import NETWORKS, TECHNIQUES, Group, named
from study.learning_curve import Curve, n_tiles

SHOWN = {
    "none": "original",
    "ta_wide": "TrivialAugment",
    "ta_wide_scaled": "TrivialAugment,\nshifts that fit",
    "auto": "AutoAugment",
    "stain": "stain",
}
SHOWN_TILE, DRAWS = 5, 12  # of the generated tiles, one with a structure that shows a shift
TASK_MARKERS = {"Task 1": "o", "Task 3": "s", "Task 5": "D"}
CALIBRATION_BINS = 10
MARKERS = "os^v*PX"  # of the recipes of one colour
LEAST_TILES = 50  # of a bin: the share of right ones among fewer tiles is mostly chance


def draw(folder: Path, content: Mapping[str, Any]) -> None:
    """Draw the figures that the page shows beside the runs' figures, into fig/report/ of the study's folder.

    `content` holds the facts of study/report_facts.py.
    """
    to, tasks, ablation = folder / "fig" / "report", content["tasks"], content["ablation"]
    title = str(next(iter(tasks.values())).first.summary["dataset"])
    if content["forecast"].correlations:
        scatter(to / "forecast.png", content["forecast"], title)
    if content["curves"]:
        learning_curve(to / "learning_curve.png", content["curves"])
    compared = {kind: part.records for kind, part in content["compared"].items()}
    for task, group in tasks.items():
        name = task.replace(" ", "").lower()
        drawn = compared if task == "Task 5" else {task: group.records}
        network = NETWORKS.get(group.first.config["model_name"], group.first.config["model_name"])
        draw_curves(to / f"{name}-curves.png", drawn, f"{network} · {title}")
        matrices = [record.summary["best"]["confusion_matrix"] for record in group.records]
        seeds = f"{len(matrices)} seeds together" if len(matrices) > 1 else "one seed"
        confusion(
            to / f"{name}-confusion.png",
            np.sum(matrices, axis=0),
            list(group.recalls()),
            title=f"{group.title} · test tiles, {seeds} · {title}",
        )
    draw_summary(to / "summary.png", *summary_rows(content), title)
    scores = {task: _scores(group) for task, group in tasks.items()}
    calibration(to / "calibration.png", scores, title)
    if ablation:
        run = next(iter(ablation.values())).first
        augmentations(to / "augmentations.png", run.config["size"])
        curve(
            to / "learning_rate.png",
            [row["lr"] for row in run.history],
            ylabel="Learning rate at the epoch's end",
            title=f"Task 4, the reference · {run.summary['dataset']}",
            colour=COLOURS["Task 4"],
        )


def summary_rows(
    content: Mapping[str, Any],
) -> tuple[list[tuple[str, str, Estimate, Estimate | None, list[float]]], list[tuple[str, float]]]:
    """The rows of the figure at the top of the page: our groups of runs, then published scores."""
    groups: list[tuple[str, str, Group]] = []
    for task, group in content["tasks"].items():
        if task != "Task 5":
            groups.append((f"{task}: {group.title}", task, group))
    if content["ablation"]:
        row = content["best_row"]
        best = content["ablation"][row]
        tiles = best.first.summary["tiles"]["train"]
        groups.append((f"Task 4, best row ({tiles:,} tiles): {TECHNIQUES.get(row, row)}", "Task 4", best))
    groups += [(f"Task 5: {group.title}", kind, group) for kind, group in content["compared"].items()]
    groups += [
        (f"Further: {group.title}", TITLES[group.first.facts["task"]], group) for group in content["further"]
    ]
    groups += [(f"Baseline: {group.title}", "", group) for group in content["baselines"]]
    ours = [
        (name, key, acc, group.score("tta", "acc"), list(group.by_seed("best", "acc").values()))
        for name, key, group in groups
        if (acc := group.score("best", "acc"))
    ]
    others = [
        (f"{other.source}: {other.network}, {other.size}\u00a0px", other.acc)
        for task, group in content["tasks"].items()
        if group.full
        for other in content["references"][task]
    ]
    return ours, others


def augmentations(path: Path, size: int) -> None:
    """Draw one row per augmentation of a generated tile of `size` pixels: DRAWS draws; no data file is needed."""
    tiles, _ = phantom.generate("train", len(CLASS_NAMES), size)
    images = torch.from_numpy(tiles[SHOWN_TILE]).permute(2, 0, 1).repeat(DRAWS, 1, 1, 1)
    with style.context(["default", STYLE, {"axes.grid": False}]):
        figure = Figure(figsize=(8, 0.72 * len(SHOWN) + 0.4))
        grid = figure.subplots(len(SHOWN), DRAWS, squeeze=False)
        for line, (name, title) in zip(grid, SHOWN.items(), strict=True):
            changed = build_augmentation(name)(images, torch.Generator().manual_seed(0))
            for axes, tile in zip(line, changed, strict=True):
                axes.imshow(tile.permute(1, 2, 0).numpy(), interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
            line[0].set_ylabel(title, rotation=0, ha="right", va="center")
        figure.suptitle(
            f"A phantom tile (generated, {size} px), and {DRAWS} draws of each augmentation", fontsize=9
        )
        save(figure, path)


def scatter(path: Path, found: Forecast, title: str) -> None:
    """Draw the test ACC against each validation score, one dot per run, with the rank correlation above it."""
    recipes = _recipes(found)
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(6.4, 6 + 0.22 * len(recipes)))
        panels = figure.subplots(2, 2, sharey=True)
        for column, (axes, (name, correlation)) in enumerate(
            zip(panels.flat, found.correlations.items(), strict=True), start=1
        ):
            for label, (runs, look) in recipes.items():
                accuracies, scores = np.concatenate(runs)[:, [0, column]].T
                axes.plot(scores, accuracies, linestyle="", markersize=5, alpha=0.7, label=wrap(label, 76), **look)
            sign = " (correlation: sign turned)" if name == LOWER_IS_BETTER else ""
            axes.set_xlabel(name[0].upper() + name[1:] + sign)
            shown = interval(correlation.value, correlation.low, correlation.high, 2)
            axes.set_title(f"rank correlation {shown}")
        for axes in panels[:, 0]:
            axes.set_ylabel("Test ACC")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center")
        figure.suptitle(f"One dot per run · hollow: fewer training tiles · {title}", fontsize=10)
        save(figure, path)


def _recipes(found: Forecast) -> dict[str, tuple[list[np.ndarray], dict[str, Any]]]:
    """The scores of each recipe's runs, and how to draw them: hollow if the runs have fewer training tiles."""
    most = max(map(n_tiles, (group.first for group in found.groups)))
    recipes: dict[str, tuple[list[np.ndarray], dict[str, Any]]] = {}
    markers = {colour: iter(MARKERS) for colour in COLOURS.values()}
    for group, values in zip(found.groups, found.values, strict=True):
        run, fewer = group.first, n_tiles(group.first) < most
        title = f"{group.title.split(' with')[0]}, recipes on fewer tiles" if fewer else group.title
        if title not in recipes:
            colour = colour_of(run)
            look = {"color": colour, "markerfacecolor": "none" if fewer else colour}
            recipes[title] = [], {**look, "marker": next(markers[colour], "o")}
        recipes[title][0].append(values)
    return recipes


def colour_of(run: Record) -> str:
    """The colour of a run's network, the same in every figure; baselines are grey."""
    if "baseline" in run.config:
        return GREY
    return COLOURS["from scratch" if run.config.get("weights") == SCRATCH else TITLES[run.facts["task"]]]


def learning_curve(path: Path, curves: Sequence[Curve]) -> None:
    """Draw test and validation ACC against the number of training tiles, one line per recipe, with intervals."""
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(8, 4.2 + 0.22 * len(curves)))
        panels = figure.subplots(1, 2, sharey=True)
        scores = {"Test ACC": ("best", "acc"), "Validation ACC": ("validate", "validate/acc")}
        for axes, (name, score) in zip(panels, scores.items(), strict=True):
            markers = {colour: iter(MARKERS) for colour in (*COLOURS.values(), GREY)}
            for curve in curves:
                estimates = [group.score(*score) for group in curve.groups]
                values, low, high = np.array([(one.value, one.low, one.high) for one in estimates if one]).T
                colour = colour_of(curve.groups[0].first)
                axes.errorbar(
                    curve.tiles,
                    values,
                    yerr=[values - low, high - values],
                    color=colour,
                    marker=next(markers[colour], "o"),
                    markersize=5,
                    capsize=3,
                    linewidth=1.5,
                    linestyle="--" if "baseline" in curve.groups[0].first.config else "-",
                    label=curve.title,
                )
            tiles = sorted({number for curve in curves for number in curve.tiles})
            axes.set_xscale("log")
            axes.set_xticks(tiles, [f"{number:,}" for number in tiles], rotation=30)
            axes.minorticks_off()
            axes.set(xlabel="Training tiles (logarithmic)", ylabel=name)
        first = curves[0].groups[0].first
        figure.suptitle(f"{first.summary['dataset'].split(' (')[0]}, {first.config['size']} px", fontsize=10)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center")
        save(figure, path)


def calibration(path: Path, scores: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str) -> None:
    """Draw accuracy against confidence on test tiles, one line per task, over the tiles of all seeds together.

    `scores` hold (N, C) probabilities and (N,) targets. A dot stands at the mean confidence of its bin; its area
    grows with the bin's share of the tiles. A bin of fewer than LEAST_TILES tiles is left out.
    """
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(6.4, 5))
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color="#888888", linestyle="--", linewidth=1, label="calibrated")
        for task, (probabilities, targets) in scores.items():
            confidence = probabilities.max(axis=1)
            correct = probabilities.argmax(axis=1) == targets
            bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
            filled, counts = np.unique(bins, return_counts=True)
            filled, counts = filled[counts >= LEAST_TILES], counts[counts >= LEAST_TILES]
            sure, right = (
                [values[bins == number].mean() for number in filled] for values in (confidence, correct)
            )
            axes.plot(sure, right, color=COLOURS[task], marker=TASK_MARKERS[task], label=named(task))
            axes.scatter(sure, right, s=800 * counts / counts.sum(), color=COLOURS[task], alpha=0.25)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set(xlabel="Probability of the predicted class", ylabel="Share of these that are right")
        axes.set_title(f"Test tiles of all seeds · {title}")
        axes.legend()
        save(figure, path)


def _scores(group: Group) -> tuple[np.ndarray, np.ndarray]:
    """The test probabilities and targets of all seeds, one after the other."""
    targets = [record.arrays()["targets"] for record in group.records]
    return np.concatenate(group.probabilities()), np.concatenate(targets)
