"""The figures that compare runs show every run, their mean, and every score with its interval."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from example_records import row
from matplotlib.figure import Figure

from common.records.read import Record
from common.training.metrics import Estimate
from study import curves


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    figures: list[Figure] = []
    monkeypatch.setattr(curves, "save", lambda figure, path: figures.append(figure))
    return figures


def record(accuracies: list[float], best: int) -> Record:
    """A run of at most 4 epochs."""
    history: list[dict[str, Any]] = [
        {**row(epoch, acc), "validate/acc": acc} for epoch, acc in enumerate(accuracies, start=1)
    ]
    return Record(Path(), {"config": {"n_epochs": 4}}, {"best": {"epoch": best}}, history)


def test_curves_show_every_run_its_best_epoch_its_early_stop_and_the_mean(drawn: list[Figure]) -> None:
    long = record([0.2, 0.6, 0.7, 0.8], 4)
    short = record([0.4, 0.8, 0.5], 2)
    curves.draw_curves(Path("x.png"), {"Task 1": [long, short]}, "a title")
    axes = drawn[0].axes[2]
    lines = {(line.get_marker(), tuple(line.get_xdata())): list(line.get_ydata()) for line in axes.lines}
    assert lines["None", (1, 2, 3, 4)] == [0.2, 0.6, 0.7, 0.8]
    thin, mean = (line for line in axes.lines if list(line.get_xdata()) == [1, 2, 3])
    assert list(thin.get_ydata()) == [0.4, 0.8, 0.5]
    np.testing.assert_allclose(mean.get_ydata(), [0.3, 0.7, 0.6])
    assert mean.get_linewidth() > 2 * thin.get_linewidth()
    assert lines["D", (4,)] == [0.8]
    assert lines["D", (2,)] == [0.8]
    assert lines["|", (3,)] == [0.5]
    assert sum(line.get_marker() == "|" for line in axes.lines) == 1
    assert drawn[0].legends[0].get_texts()[0].get_text() == "Task 1 (thick: mean of 2 seeds)"


def test_the_summary_shows_every_score_with_its_interval_beside_published_ones(drawn: list[Figure]) -> None:
    ours = [
        ("Task 1: a network", "Task 1", Estimate(0.8, 0.7, 0.9), Estimate(0.85, 0.75, 0.95), [0.8, 0.8]),
        ("Baseline: colours", "", Estimate(0.5, 0.4, 0.6), None, [0.5]),
        ("two seeds", "", Estimate(0.65, math.nan, math.nan), None, [0.6, 0.7]),
    ]
    curves.draw_summary(Path("x.png"), ours, [("a paper", 0.93)], "a title")
    axes = drawn[0].axes[0]
    shown = [(list(line.get_xdata()), list(line.get_ydata()), line.get_color()) for line in axes.lines]
    blue, grey = curves.COLOURS["Task 1"], curves.GREY
    for expected in (
        ([0.7, 0.9], [0, 0], blue),
        ([0.8], [0], blue),
        ([0.75, 0.95], [0.25, 0.25], blue),
        ([0.85], [0.25], blue),
        ([0.4, 0.6], [1, 1], grey),
        ([0.5], [1], grey),
        ([0.6, 0.7], [2, 2], grey),
        ([0.93], [3], "black"),
    ):
        assert expected in shown
    assert ([0.8, 0.8], [0, 0], blue) not in shown  # the interval is there
    assert axes.get_xlim() == pytest.approx((0.45, 0.96))
    assert "An interval that ends at the frame is longer" in drawn[0].get_suptitle()  # 0.4 of the baseline
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "Task 1: a network",
        "Baseline: colours",
        "two seeds",
        "a paper",
    ]
