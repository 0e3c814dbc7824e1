"""Counts and curves -> figures and a table that a person can read, from 2 to 60 classes.

matplotlib's objects are used directly: pyplot would keep every figure alive and ask for a screen."""

import csv
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Num

from meamtm.files import whole_file
from meamtm.tracking.sink import Metrics

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure

MOST_COUNTED = 20
"""Classes up to which every cell shows its count; beyond, the numbers would be too small to read."""

SCORES = ("precision", "recall", "f1", "support")


def confusion_figure(
    matrix: Num[np.ndarray, "label label"], classes: Sequence[str], path: Path, counted: str = "clips"
) -> "matplotlib.figure.Figure":
    """Draws what is `counted` by true class (row) and predicted class (column); a row's colours are its shares, so rows
    compare."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    num_classes = len(classes)
    side_in = float(np.clip(2.2 + 0.34 * num_classes, 4.6, 17.0))
    figure = Figure(figsize=(side_in + 0.8, side_in), layout="constrained")
    axes = figure.add_subplot()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    norm = PowerNorm(0.5, vmin=0, vmax=1)  # on a linear scale, a confusion of one clip in thirty is invisible
    image = axes.imshow(shares, norm=norm, cmap="Blues", interpolation="nearest")
    names = [_label(name) for name in classes]
    size = 9 if num_classes <= MOST_COUNTED else 7
    axes.set_xticks(range(num_classes), names, rotation=90, fontsize=size)
    axes.set_yticks(range(num_classes), names, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    accuracy = matrix.trace() / max(matrix.sum(), 1)
    axes.set_title(f"{matrix.sum():g} {counted}, {accuracy:.1%} right", fontsize=11)
    if num_classes <= MOST_COUNTED:
        _write_counts(axes, matrix, shares)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    _save(figure, path)
    return figure


def per_class(matrix: Num[np.ndarray, "label label"], classes: Sequence[str]) -> list[dict[str, str | float]]:
    """Gives precision, recall, F1 and support of each class, and as `macro` their plain means over the classes that are
    there, true or predicted.

    A class that was never predicted has precision 0, and one that never occurs recall 0."""
    right = np.diagonal(matrix).astype(float)
    support, predicted = matrix.sum(axis=1), matrix.sum(axis=0)
    precision, recall = right / np.maximum(predicted, 1), right / np.maximum(support, 1)
    f1 = 2 * right / np.maximum(support + predicted, 1)
    scores = np.stack([precision, recall, f1, support], axis=1)  # (label, score)
    there = support + predicted > 0
    last = [*scores[there, :3].mean(axis=0), support.sum()]
    return [
        {"class": name, **{key: round(float(value), 6) for key, value in zip(SCORES, values, strict=True)}}
        for name, values in zip([*classes, "macro"], [*scores, last], strict=True)
    ]


def per_class_table(
    matrix: Num[np.ndarray, "label label"], classes: Sequence[str], path: Path
) -> list[dict[str, str | float]]:
    """Writes the scores of each class as CSV, and returns its rows."""
    rows = per_class(matrix, classes)
    with whole_file(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=["class", *SCORES])
        writer.writeheader()
        writer.writerows({**row, "support": f"{row['support']:g}"} for row in rows)
    return rows


def curves_figure(rows: Sequence[Metrics], path: Path) -> "matplotlib.figure.Figure":
    """Draws losses on the left and scores between 0 and 1 on the right, by epoch; rows as `read_rows` gives them."""
    from matplotlib.figure import Figure

    keys = dict.fromkeys(key for row in rows for key in row if "/" in key)
    losses = [key for key in keys if key.endswith("/loss")]
    scores = [key for key in keys if key.rpartition("/")[2] in ("accuracy", "macro_f1", "map")]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_curves(left, rows, losses, "loss")
    _draw_curves(right, rows, scores, "score")
    left.set_ylim(bottom=0)
    right.set_ylim(0, 1)
    _save(figure, path)
    return figure


def folds_figure(by_fold: Mapping[int, Sequence[float]], score: str, path: Path) -> "matplotlib.figure.Figure":
    """Draws each run's score by the fold that it was tested on, each fold's mean, and the mean of all."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 + 0.7 * len(by_fold), 3.6), layout="constrained")
    axes = figure.add_subplot()
    every = [value for values in by_fold.values() for value in values]
    axes.axhline(float(np.mean(every)), color="tab:orange", linewidth=1.6, label=f"mean {np.mean(every):.3f}")
    for place, values in enumerate(by_fold.values()):
        axes.plot([place] * len(values), values, "o", color="tab:blue", alpha=0.6, markersize=5)
        axes.hlines(float(np.mean(values)), place - 0.25, place + 0.25, color="tab:blue", linewidth=1.6)
    axes.set_xticks(range(len(by_fold)), [str(fold) for fold in by_fold])
    axes.set_xlabel("test fold")
    axes.set_ylabel(score)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    _save(figure, path)
    return figure


def _draw_curves(axes: "matplotlib.axes.Axes", rows: Sequence[Metrics], keys: Sequence[str], label: str) -> None:
    for key in keys:
        points = [(row["step"], row[key]) for row in rows if key in row]
        axes.plot(
            *zip(*points, strict=True), label=key, linewidth=1.6, marker="o" if len(points) < 20 else "", markersize=3
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if keys:
        axes.legend(frameon=False)


def _write_counts(
    axes: "matplotlib.axes.Axes", matrix: Num[np.ndarray, "label label"], shares: Num[np.ndarray, "label label"]
) -> None:
    """Writes each count that is not zero, white on dark cells."""
    for true, predicted in np.argwhere(matrix > 0):
        colour = "white" if shares[true, predicted] > 0.3 else "black"
        text = f"{matrix[true, predicted]:g}"
        axes.text(predicted, true, text, ha="center", va="center", color=colour, fontsize=8)


def _label(name: str) -> str:
    """Shortens a class name; a dollar sign would begin a formula."""
    return (name if len(name) <= 24 else f"{name[:23]}…").replace("$", r"\$")


def _save(figure: "matplotlib.figure.Figure", path: Path) -> None:
    with whole_file(path) as scratch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a script that the font lacks shows boxes
        figure.savefig(scratch, dpi=120, format=path.suffix.removeprefix("."))
