"""Figures are looked at by people: the files are real images, and what they say is read back from the figure."""

import csv
import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from sklearn.metrics import precision_recall_fscore_support

from meamtm.tracking import confusion_figure, curves_figure, per_class_table


def some_counts(num_classes: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.poisson(0.3, (num_classes, num_classes)) + np.diag(generator.poisson(30, num_classes))


@pytest.mark.parametrize("num_classes", [2, 10, 60])
def test_confusion_figure_is_an_image_with_every_class_on_both_axes(tmp_path: Path, num_classes: int) -> None:
    classes = [f"class {number}" for number in range(num_classes)]
    figure = confusion_figure(some_counts(num_classes), classes, tmp_path / "confusion.png")
    height, width, _ = imread(tmp_path / "confusion.png").shape
    assert (width, height) == tuple(round(120 * side_in) for side_in in figure.get_size_inches())
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    assert [tick.get_text() for tick in axes.get_xticklabels()] == classes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == classes


@pytest.mark.parametrize("num_classes", [2, 10, 20, 60])
def test_class_names_in_confusion_figure_do_not_overlap(tmp_path: Path, num_classes: int) -> None:
    classes = [f"a long class name {number}" for number in range(num_classes)]
    axes = confusion_figure(some_counts(num_classes), classes, tmp_path / "confusion.png").axes[0]
    boxes = [tick.get_window_extent() for tick in axes.get_yticklabels()]
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in itertools.pairwise(boxes))
    assert min(tick.get_fontsize() for tick in axes.get_yticklabels()) >= 7


def test_confusion_figure_shows_shares_of_rows_and_counts_of_cells(tmp_path: Path) -> None:
    matrix = np.array([[3, 1], [0, 400]])
    axes = confusion_figure(matrix, ["rare", "common"], tmp_path / "confusion.png").axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.75, 0.25], [0, 1]])
    assert sorted(text.get_text() for text in axes.texts) == ["1", "3", "400"]
    assert axes.get_title() == "404 clips, 99.8% right"


def test_counts_give_way_to_colours_when_there_are_many_classes(tmp_path: Path) -> None:
    axes = confusion_figure(some_counts(60), [str(number) for number in range(60)], tmp_path / "c.png").axes[0]
    assert not axes.texts


def test_class_that_never_occurs_is_drawn_as_an_empty_row(tmp_path: Path) -> None:
    axes = confusion_figure(np.array([[5, 0], [0, 0]]), ["heard", "unheard"], tmp_path / "c.png").axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), [[1, 0], [0, 0]])


def test_any_class_name_can_be_drawn(tmp_path: Path) -> None:
    classes = ["$5 bill$", "犬", "x" * 200, r"\frac{", ""]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = confusion_figure(some_counts(5), classes, tmp_path / "confusion.png")
    assert len(figure.axes[0].get_yticklabels()[2].get_text()) == 24


def test_per_class_table_agrees_with_scikit_learn(tmp_path: Path) -> None:
    matrix = some_counts(7)
    matrix[:, 2] = 0  # never predicted
    matrix[4, :] = 0  # never occurs
    matrix[:, 5] = matrix[5, :] = 0  # neither: of such a class nothing was asked
    true, predicted = (axis.repeat(matrix.ravel()) for axis in np.indices(matrix.shape).reshape(2, -1))
    expected = precision_recall_fscore_support(true, predicted, labels=range(7), zero_division=0)
    rows = per_class_table(matrix, [f"c{number}" for number in range(7)], tmp_path / "classes.csv")
    for column, values in zip(("precision", "recall", "f1", "support"), expected, strict=True):
        np.testing.assert_allclose([row[column] for row in rows[:-1]], values, atol=1e-6)
        there = matrix.sum(0) + matrix.sum(1) > 0
        total = sum(values) if column == "support" else np.mean(np.array(values)[there])
        assert rows[-1][column] == pytest.approx(total, abs=1e-6)


def test_per_class_table_ends_with_macro_and_keeps_odd_names(tmp_path: Path) -> None:
    per_class_table(np.array([[1, 1], [0, 2]]), ['rain, "heavy"', "犬"], tmp_path / "classes.csv")
    with (tmp_path / "classes.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ['rain, "heavy"', "犬", "macro"]
    assert rows[0] == {"class": 'rain, "heavy"', "precision": "1.0", "recall": "0.5", "f1": "0.666667", "support": "2"}


def test_curves_draw_losses_and_scores_by_epoch(tmp_path: Path) -> None:
    rows = [
        {"step": s, "time": 1e9 + s, "train/loss": 2 / s, "valid/accuracy": s / 10, "time/epoch_s": 3.0}
        for s in (1, 2, 3)
    ]
    rows[1] |= {"valid/loss": 1.5}  # a quantity that is not measured at every epoch
    figure = curves_figure(rows, tmp_path / "curves.png")
    drawn = {line.get_label(): line.get_xydata().tolist() for axes in figure.axes for line in axes.lines}
    assert drawn == {
        "train/loss": [[1, 2], [2, 1], [3, 2 / 3]],
        "valid/loss": [[2, 1.5]],
        "valid/accuracy": [[1, 0.1], [2, 0.2], [3, 0.3]],
    }
    assert [(axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes] == [("epoch", "loss"), ("epoch", "score")]
    assert imread(tmp_path / "curves.png").shape[:2] == (432, 1080)


def test_curves_of_a_run_that_measured_nothing_are_empty(tmp_path: Path) -> None:
    figure = curves_figure([], tmp_path / "curves.png")
    assert not any(axes.lines for axes in figure.axes)


def test_no_scratch_file_is_left(tmp_path: Path) -> None:
    curves_figure([], tmp_path / "a" / "curves.png")
    per_class_table(np.eye(2, dtype=int), ["a", "b"], tmp_path / "a" / "classes.csv")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["classes.csv", "curves.png"]
