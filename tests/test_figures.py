"""Figures are readable PNG files of the right size and content, the same each time, complete or absent."""

import re

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from common import figures
from common.data.pathmnist import CLASS_NAMES
from common.explain.figures import tile_and_saliency
from common.explain.tiles import Explained

TITLE = "Task 1 · ResNet-18 · phantom (9,000 training tiles, 28 px) · seed 0"
NAMES = list(CLASS_NAMES)
MATRIX = np.random.default_rng(0).integers(1, 40, size=(9, 9)) + 1200 * np.eye(9, dtype=np.int64)


def draw_curve(path, values=(0.9, 0.95, 0.94), ylabel="Validation AUC", title=TITLE, best_epoch=2):
    figures.curve(path, values, ylabel=ylabel, title=title, best_epoch=best_epoch)


def draw_confusion(path, matrix=MATRIX, names=NAMES, title=TITLE):
    figures.confusion(path, matrix, names, title=title)


@pytest.fixture
def drawn(monkeypatch):
    """The axes of each figure that the test saves, after its layout."""
    seen = []
    save = Figure.savefig

    def remember(self, *arguments, **options):
        save(self, *arguments, **options)
        seen.append(self.axes[0])

    monkeypatch.setattr(Figure, "savefig", remember)
    return seen


@pytest.mark.parametrize(("draw", "height"), [(draw_curve, 600), (draw_confusion, 870)])
def test_a_figure_is_a_readable_png_of_its_size(tmp_path, draw, height):
    path = tmp_path / "new" / "figure.png"
    draw(path)
    pixels = imread(path)
    assert pixels.shape[:2] == (height, 960)
    assert pixels.std() > 0.05
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("draw", [draw_curve, draw_confusion])
def test_the_same_input_gives_the_same_bytes_with_any_style_of_the_user(tmp_path, draw):
    draw(tmp_path / "one.png")
    with mpl.rc_context({"font.size": 20, "lines.linewidth": 9, "axes.facecolor": "red"}):
        draw(tmp_path / "two.png")
        assert mpl.rcParams["font.size"] == 20
    content = (tmp_path / "one.png").read_bytes()
    assert content == (tmp_path / "two.png").read_bytes()
    assert mpl.__version__.encode() not in content


def test_the_curve_is_labelled_and_its_epochs_start_at_one(tmp_path, drawn):
    draw_curve(tmp_path / "curve.png", [0.9, 0.95, 0.94], best_epoch=2)
    [axes] = drawn
    assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) == (TITLE, "Epoch", "Validation AUC")
    line, vertical, marker = axes.get_lines()
    assert line.get_xdata().tolist() == [1, 2, 3]
    assert line.get_ydata().tolist() == [0.9, 0.95, 0.94]
    assert list(vertical.get_xdata()) == [2, 2]
    assert (list(marker.get_xdata()), list(marker.get_ydata())) == ([2], [0.95])
    assert axes.get_legend().get_texts()[0].get_text() == "selected: epoch 2 (0.95)"


def test_without_a_selected_epoch_there_is_one_line_with_markers_and_no_legend(tmp_path, drawn):
    draw_curve(tmp_path / "curve.png", [0.9], best_epoch=None)  # a single epoch is a dot
    (line,) = drawn[0].get_lines()
    assert line.get_marker() == "o"
    assert drawn[0].get_legend() is None


@pytest.mark.parametrize("draw", [draw_curve, draw_confusion])
def test_a_dollar_in_a_title_is_no_mathematics(tmp_path, drawn, draw):
    draw(tmp_path / "figure.png", title="from a$^$b.pth")  # as mathematics, this would be an error
    assert drawn[0].get_title() == "from a$^$b.pth"


def test_a_title_breaks_neither_within_a_seed_nor_within_a_number_of_pixels():
    text = "phantom (28 px tiles, 64 px inputs) · seed 0"
    for width in range(10, 60):
        assert re.findall(r"\d+ px|seed \d", figures.wrap(text, width)) == ["28 px", "64 px", "seed 0"]


@pytest.mark.parametrize("epochs", [1, 2, 7, 150])
def test_epoch_ticks_are_whole_and_few(tmp_path, drawn, epochs):
    draw_curve(tmp_path / "curve.png", np.linspace(0, 1, epochs), best_epoch=None)
    [axes] = drawn
    left, right = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if left <= tick <= right]
    assert 1 <= len(ticks) <= 12
    assert all(tick == round(tick) and 1 <= tick <= epochs for tick in ticks)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_leaves_a_gap(tmp_path, drawn, value):
    values = np.array([0.5, 0.4, value, 0.2])
    draw_curve(tmp_path / "gap.png", values, best_epoch=3)
    np.testing.assert_array_equal(drawn[0].get_lines()[0].get_ydata(), [0.5, 0.4, np.nan, 0.2])
    assert drawn[0].get_legend().get_texts()[0].get_text() == "selected: epoch 3 (no value)"
    np.testing.assert_equal(values, [0.5, 0.4, value, 0.2])  # the caller's values do not change


def test_the_cells_hold_counts_and_the_colours_row_shares(tmp_path, drawn):
    matrix = np.array([[1500, 500], [0, 0]])
    draw_confusion(tmp_path / "confusion.png", matrix, ["adipose", "debris"])
    [axes] = drawn
    cells = {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts}
    assert cells == {
        (0, 0): ("1,500", "black"),
        (1, 0): ("500", "white"),
        (0, 1): ("0", "white"),
        (1, 1): ("0", "white"),
    }
    np.testing.assert_array_equal(axes.get_images()[0].get_array(), [[0.75, 0.25], [0, 0]])
    assert (axes.get_ylabel(), axes.get_xlabel(), axes.get_title()) == ("True class", "Predicted class", TITLE)


def boxes_overlap(labels):
    boxes = [label.get_window_extent() for label in labels]
    return any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_long_class_names_and_titles_fit(tmp_path, drawn):
    title = "Task 1 · EfficientNet-B0 pretrained on ImageNet · PathMNIST (89,996 training tiles, 224 px) · seed 0"
    draw_confusion(tmp_path / "confusion.png", title=title)
    [axes] = drawn
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text().replace("\n", " ").replace("- ", "-") for label in labels] == NAMES
        assert not boxes_overlap(labels)
    page = axes.figure.bbox
    assert axes.get_window_extent().width > 0.55 * page.width  # the names leave enough room for the matrix
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels(), axes.title, axes.xaxis.label, axes.yaxis.label):
        box = text.get_window_extent()
        assert page.x0 <= box.x0 < box.x1 <= page.x1
        assert page.y0 <= box.y0 < box.y1 <= page.y1


def test_the_longest_names_fit_under_a_tile_and_its_map(tmp_path, drawn):
    name = max(NAMES, key=len)
    tile = np.zeros((28, 28, 3), np.uint8)
    explained = Explained("r", 0, tile, name, name, 0.5, {"saliency": np.ones((28, 28), np.float32)})
    tile_and_saliency(tmp_path, explained, target=name)
    for axes, text in ((drawn[0], drawn[0].figure.texts[0]), (drawn[1], drawn[1].figure.axes[1].xaxis.label)):
        page, box = axes.figure.bbox, text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= page.width
        assert 0 <= box.y0 < box.y1 < axes.get_window_extent().y0
