"""The report's own figures: a run's learning rate, augmentations, validation against test, calibration."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from common import phantom
from common.augment import build_augmentation
from common.figures import BLUE, STYLE, VERMILLION, curve, save
from common.metrics import softmax
from common.records import Record
from study.report_selection import Study

SHOWN = ("none", "ta_wide", "auto", "dihedral", "stain")
TILES, SIZE = 9, 64
TASK_COLOURS = {"Task 1": BLUE, "Task 3": VERMILLION, "Task 5": "#009E73"}  # Okabe and Ito's
TASK_MARKERS = {"Task 1": "o", "Task 3": "s", "Task 5": "D"}
CALIBRATION_BINS = 10


def draw(study: Study) -> None:
    """Draw what the sections of the study show beside the runs' own figures, into fig/report/."""
    folder, everything = study.folder / "fig" / "report", study.trained()
    first = next(iter(everything.values()))[0]
    title = str(first.summary["dataset"])
    gap(folder / "gap.png", everything, study.ablation(), title)
    scores = {task: _scores(study, records) for task, records in everything.items()}
    calibration(folder / "calibration.png", scores, title)
    if "task4" in study.selection:
        augmentations(folder / "augmentations.png")
        run = study.runs("task3")[0]
        curve(
            folder / "learning_rate.png",
            [row["lr"] for row in run.history],
            ylabel="Learning rate at the epoch's end",
            title=f"{run.run_id} · {title}",
        )


def augmentations(path: Path) -> None:
    """Draw a row an augmentation over the same generated tiles, one of each class; nothing needs to be on disk."""
    tiles, _ = next(iter(phantom.generate("train", TILES, SIZE)))
    images = torch.from_numpy(tiles).permute(0, 3, 1, 2)
    with style.context(["default", STYLE, {"axes.grid": False}]):
        figure = Figure(figsize=(8, 0.95 * len(SHOWN) + 0.5))
        grid = figure.subplots(len(SHOWN), TILES, squeeze=False)
        for line, name in zip(grid, SHOWN, strict=True):
            changed = build_augmentation(name)(images, torch.Generator().manual_seed(0))
            for axes, tile in zip(line, changed, strict=True):
                axes.imshow(tile.permute(1, 2, 0).numpy(), interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
            line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        figure.suptitle(f"phantom tiles (generated, {SIZE} px), and one draw of each augmentation", fontsize=9)
        save(figure, path)


def gap(
    path: Path,
    everything: Mapping[str, Sequence[Record]],
    ablation: Mapping[str, Sequence[Record]],
    title: str,
) -> None:
    """Draw a dot a run, validation against test ACC, and the line on which they would be equal."""
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(6.4, 5))
        axes = figure.add_subplot()
        others = [record for records in ablation.values() for record in records]
        if others:
            axes.plot(*_accuracies(others), "o", color="#999999", markersize=4, label="Task 4, every row")
        for task, records in everything.items():
            validation, test = _accuracies(records)
            axes.plot(validation, test, TASK_MARKERS[task], color=TASK_COLOURS[task], label=task)
        low, high = min(axes.get_xlim()[0], axes.get_ylim()[0]), max(axes.get_xlim()[1], axes.get_ylim()[1])
        axes.plot([low, high], [low, high], "--", color="#888888", linewidth=1, label="test = validation")
        axes.set(xlabel="Validation ACC of the selected epoch", ylabel="Test ACC", title=f"A dot a run · {title}")
        axes.legend()
        save(figure, path)


def calibration(path: Path, scores: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str) -> None:
    """Draw accuracy against confidence on test tiles, a line a task, over its seeds' tiles together.

    `scores` hold (N, C) probabilities and (N,) targets. A bin's dot stands at its mean confidence; its area grows
    with the bin's share of the tiles.
    """
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(6.4, 5))
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color="#888888", linestyle="--", linewidth=1, label="calibrated")
        for task, (probabilities, targets) in scores.items():
            confidence = probabilities.max(axis=1)
            correct = probabilities.argmax(axis=1) == targets
            bins = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
            counts = np.bincount(bins, minlength=CALIBRATION_BINS)
            full = counts > 0
            sure, right = (
                np.bincount(bins, weights=values, minlength=CALIBRATION_BINS)[full] / counts[full]
                for values in (confidence, correct)
            )
            axes.plot(sure, right, color=TASK_COLOURS[task], marker=TASK_MARKERS[task], label=task)
            axes.scatter(sure, right, s=800 * counts[full] / counts.sum(), color=TASK_COLOURS[task], alpha=0.25)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set(xlabel="Probability of the predicted class", ylabel="Share of these that are right")
        axes.set_title(f"Test tiles of all seeds · {title}")
        axes.legend()
        save(figure, path)


def _accuracies(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    validation = [record.summary["validate"]["validate/acc"] for record in records]
    return validation, [record.summary["test/acc"] for record in records]


def _scores(study: Study, records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Every seed's test probabilities and targets, one after the other."""
    parts = []
    for record in records:
        with np.load(study.folder / "runs" / record.run_id / "scores.npz", allow_pickle=False) as file:
            parts.append((softmax(file["best_logits"]), file["targets"]))
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
