import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from common import figures

NAMES = ("adipose", "smooth muscle", "colorectal adenocarcinoma epithelium")
TITLE = "Task 1 · resnet18 · phantom (9,000 training tiles, 28 px) · seed 0"


def pixels(path: Path) -> np.ndarray:
    """The picture as (height, width, 4) float32; fails on a file that is no whole PNG."""
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    return np.asarray(matplotlib.image.imread(path))


def draw_curve(path: Path, values: list[float], best_epoch: int | None = None) -> np.ndarray:
    figures.curve(path, values, ylabel="Validation ACC", title=TITLE, best_epoch=best_epoch)
    return pixels(path)


def test_a_curve_is_wider_than_a_report_and_shows_its_values(tmp_path: Path) -> None:
    rising = draw_curve(tmp_path / "rising.png", [0.1, 0.5, 0.9])
    falling = draw_curve(tmp_path / "falling.png", [0.9, 0.5, 0.1])
    marked = draw_curve(tmp_path / "marked.png", [0.1, 0.5, 0.9], best_epoch=2)
    assert rising.shape[1] >= 900
    assert not np.array_equal(rising, falling)
    assert not np.array_equal(rising, marked)


def test_a_single_epoch_shows_a_marker(tmp_path: Path) -> None:
    image = draw_curve(tmp_path / "single.png", [0.5])
    blue = np.array([int(figures.BLUE[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    assert (np.abs(image[..., :3] - blue).max(axis=2) < 0.02).sum() > 20


def test_a_value_that_is_not_finite_leaves_a_gap(tmp_path: Path) -> None:
    gap = draw_curve(tmp_path / "gap.png", [0.1, math.nan, 0.9, math.inf, 0.5])
    whole = draw_curve(tmp_path / "whole.png", [0.1, 0.5, 0.9, 0.7, 0.5])
    assert not np.array_equal(gap, whole)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        draw_curve(tmp_path / f"{name}-curve.png", [0.3, 0.4], best_epoch=2)
        figures.confusion(tmp_path / f"{name}-matrix.png", np.eye(3, dtype=int), NAMES, title=TITLE)
    for figure in ("curve", "matrix"):
        assert (tmp_path / f"one-{figure}.png").read_bytes() == (tmp_path / f"two-{figure}.png").read_bytes()


def test_a_confusion_matrix_colours_shares_of_the_true_class(tmp_path: Path) -> None:
    def draw(matrix: list[list[int]]) -> np.ndarray:
        figures.confusion(tmp_path / "matrix.png", np.array(matrix), NAMES, title=TITLE)
        return pixels(tmp_path / "matrix.png")

    once, tenfold = draw([[1, 0, 0], [0, 1, 0], [0, 0, 1]]), draw([[9, 0, 0], [0, 9, 0], [0, 0, 9]])
    # The same shares, so the same colours: only the digits differ.
    assert 0 < (once != tenfold).any(axis=2).mean() < 0.01
    empty_row = draw([[0, 0, 0], [0, 1, 0], [0, 0, 1]])
    assert (once != empty_row).any(axis=2).mean() > 0.01


def test_wrong_input_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no epoch 4 among 3 values"):
        draw_curve(tmp_path / "curve.png", [1.0, 2.0, 3.0], best_epoch=4)
    with pytest.raises(ValueError, match="does not fit 3 class names"):
        figures.confusion(tmp_path / "matrix.png", np.eye(4), NAMES, title=TITLE)
    assert not list(tmp_path.iterdir())
