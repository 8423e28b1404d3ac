"""Figures are readable PNG files of the right size and content, the same each time."""

import re

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.image import imread

from common import figures
from common.data.pathmnist import CLASS_NAMES

TITLE = "Task 1 · ResNet-18 · phantom (9,000 training tiles, 28 px) · seed 0"
NAMES = list(CLASS_NAMES)
MATRIX = np.random.default_rng(0).integers(1, 40, size=(9, 9)) + 1200 * np.eye(9, dtype=np.int64)


def draw_curve(path, values=(0.9, 0.95, 0.94), title=TITLE, best_epoch=2):
    figures.curve(path, values, ylabel="Validation AUC", title=title, best_epoch=best_epoch)


def draw_confusion(path, matrix=MATRIX, names=NAMES, title=TITLE):
    figures.confusion(path, matrix, names, title=title)


@pytest.mark.parametrize(("draw", "height"), [(draw_curve, 600), (draw_confusion, 870)])
def test_the_same_input_gives_the_same_png_with_any_style_of_the_user(tmp_path, draw, height):
    path = tmp_path / "new" / "one.png"
    draw(path)
    pixels = imread(path)
    assert pixels.shape[:2] == (height, 960)
    assert pixels.std() > 0.05
    with mpl.rc_context({"font.size": 20, "lines.linewidth": 9, "axes.facecolor": "red"}):
        draw(tmp_path / "two.png")
    assert path.read_bytes() == (tmp_path / "two.png").read_bytes()
    assert mpl.__version__.encode() not in path.read_bytes()


def test_the_curve_is_labelled_and_its_epochs_start_at_one(tmp_path, drawn):
    draw_curve(tmp_path / "curve.png", [0.9, 0.95, 0.94], best_epoch=2)
    axes = drawn[0].axes[0]
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == (TITLE, "Epoch", "Validation AUC")
    line, vertical, marker = axes.get_lines()
    assert list(line.get_xdata()) == [1, 2, 3]
    assert list(line.get_ydata()) == [0.9, 0.95, 0.94]
    assert list(vertical.get_xdata()) == [2, 2]
    assert (list(marker.get_xdata()), list(marker.get_ydata())) == ([2], [0.95])
    assert axes.get_legend().get_texts()[0].get_text() == "selected: epoch 2 (0.95)"


def test_a_dollar_in_a_title_is_no_mathematics(tmp_path, drawn):
    draw_curve(tmp_path / "figure.png", title="from a$^$b.pth")  # as mathematics, this would be an error
    assert drawn[0].axes[0].get_title() == "from a$^$b.pth"


def test_a_title_breaks_neither_within_a_seed_nor_within_a_number_of_pixels():
    text = "phantom (28 px tiles, 64 px inputs) · ResNet-18, 28 → 64 px · seed 0"
    for width in range(10, 60):
        found = re.findall(r"28 → 64 px|\d+ px|seed \d", figures.wrap(text, width))
        assert found == ["28 px", "64 px", "28 → 64 px", "seed 0"]


def test_the_cells_hold_counts_and_the_colours_row_shares(tmp_path, drawn):
    draw_confusion(tmp_path / "confusion.png", np.array([[1500, 500], [0, 0]]), ["adipose", "debris"])
    axes = drawn[0].axes[0]
    cells = {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts}
    assert cells == {
        (0, 0): ("1,500", "black"),
        (1, 0): ("500", "white"),
        (0, 1): ("0", "white"),
        (1, 1): ("0", "white"),
    }
    np.testing.assert_array_equal(axes.get_images()[0].get_array(), [[0.75, 0.25], [0, 0]])
    assert (axes.get_ylabel(), axes.get_xlabel(), axes.get_title()) == ("True class", "Predicted class", TITLE)


def test_long_class_names_and_titles_fit(tmp_path, drawn):
    title = "Task 1 · EfficientNet-B0 pretrained on ImageNet · PathMNIST (89,996 training tiles, 224 px) · seed 0"
    draw_confusion(tmp_path / "confusion.png", title=title)
    axes = drawn[0].axes[0]
    page = axes.figure.bbox
    assert axes.get_window_extent().width > 0.55 * page.width  # the names leave enough room for the matrix
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels(), axes.title, axes.xaxis.label, axes.yaxis.label):
        box = text.get_window_extent()
        assert page.x0 <= box.x0 < box.x1 <= page.x1
        assert page.y0 <= box.y0 < box.y1 <= page.y1
