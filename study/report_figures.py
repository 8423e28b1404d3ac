"""The report's own figures: a run's learning rate, augmentations, validation against test, calibration."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from common import phantom
from common.augment import build_augmentation
from common.figures import BLUE, STYLE, VERMILLION, curve, save
from common.metrics import softmax
from study.report_facts import Group

SHOWN = {
    "none": "original",
    "ta_wide": "TrivialAugment",
    "auto": "AutoAugment",
    "dihedral": "flips and turns",
    "stain": "stain",
}
TILES, SIZE = 9, 64
TASK_COLOURS = {"Task 1": BLUE, "Task 3": VERMILLION, "Task 5": "#009E73"}  # Okabe and Ito's
TASK_MARKERS = {"Task 1": "o", "Task 3": "s", "Task 5": "D"}
CALIBRATION_BINS = 10


def draw(folder: Path, content: Mapping[str, Any]) -> None:
    """Draw the figures that the page shows beside the runs' figures, into fig/report/ of the study's folder.

    `content` holds the facts of study/report_facts.py.
    """
    to, tasks, ablation = folder / "fig" / "report", content["tasks"], content["ablation"]
    title = str(next(iter(tasks.values())).first.summary["dataset"])
    gap(to / "gap.png", tasks, ablation, title)
    scores = {task: _scores(group) for task, group in tasks.items()}
    calibration(to / "calibration.png", scores, title)
    if ablation:
        augmentations(to / "augmentations.png")
        run = next(iter(ablation.values())).first
        curve(
            to / "learning_rate.png",
            [row["lr"] for row in run.history],
            ylabel="Learning rate at the epoch's end",
            title=f"{run.run_id} · {run.summary['dataset']}",
        )


def augmentations(path: Path) -> None:
    """Draw one row per augmentation of the same generated tiles, one of each class; no data file is needed."""
    tiles, _ = next(iter(phantom.generate("train", TILES, SIZE)))
    images = torch.from_numpy(tiles).permute(0, 3, 1, 2)
    with style.context(["default", STYLE, {"axes.grid": False}]):
        figure = Figure(figsize=(8, 0.95 * len(SHOWN) + 0.5))
        grid = figure.subplots(len(SHOWN), TILES, squeeze=False)
        for line, (name, title) in zip(grid, SHOWN.items(), strict=True):
            changed = build_augmentation(name)(images, torch.Generator().manual_seed(0))
            for axes, tile in zip(line, changed, strict=True):
                axes.imshow(tile.permute(1, 2, 0).numpy(), interpolation="nearest")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
            line[0].set_ylabel(title, rotation=0, ha="right", va="center")
        figure.suptitle(f"phantom tiles (generated, {SIZE} px), and one draw of each augmentation", fontsize=9)
        save(figure, path)


def gap(path: Path, tasks: Mapping[str, Group], ablation: Mapping[str, Group], title: str) -> None:
    """Draw validation against test ACC, one dot per run, and the line on which they are equal."""

    def accuracies(group: Group) -> tuple[list[float], list[float]]:
        validation, test = group.by_seed("validate", "validate/acc"), group.by_seed("best", "acc")
        return list(validation.values()), list(test.values())

    with style.context(["default", STYLE]):
        figure = Figure(figsize=(6.4, 5))
        axes = figure.add_subplot()
        for place, group in enumerate(ablation.values()):
            label = None if place else "Task 4, every row"
            axes.plot(*accuracies(group), "o", color="#999999", markersize=4, label=label)
        for task, group in tasks.items():
            axes.plot(*accuracies(group), TASK_MARKERS[task], color=TASK_COLOURS[task], label=task)
        low, high = min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])
        axes.plot([low, high], [low, high], "--", color="#888888", linewidth=1, label="test = validation")
        axes.set(xlabel="Validation ACC of the selected epoch", ylabel="Test ACC")
        axes.set_title(f"One dot per run · {title}")
        axes.legend()
        save(figure, path)


def calibration(path: Path, scores: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str) -> None:
    """Draw accuracy against confidence on test tiles, one line per task, over the tiles of all seeds together.

    `scores` hold (N, C) probabilities and (N,) targets. A dot stands at the mean confidence of its bin; its area
    grows with the bin's share of the tiles.
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
            sure, right = (
                [values[bins == number].mean() for number in filled] for values in (confidence, correct)
            )
            axes.plot(sure, right, color=TASK_COLOURS[task], marker=TASK_MARKERS[task], label=task)
            axes.scatter(sure, right, s=800 * counts / counts.sum(), color=TASK_COLOURS[task], alpha=0.25)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set(xlabel="Probability of the predicted class", ylabel="Share of these that are right")
        axes.set_title(f"Test tiles of all seeds · {title}")
        axes.legend()
        save(figure, path)


def _scores(group: Group) -> tuple[np.ndarray, np.ndarray]:
    """The test probabilities and targets of all seeds, one after the other."""
    arrays = [record.arrays() for record in group.records]
    probabilities = [softmax(one["best_logits"]) for one in arrays]
    return np.concatenate(probabilities), np.concatenate([one["targets"] for one in arrays])
