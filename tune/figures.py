"""Trials -> pictures: how the search went, what each key does to the objective, and which keys matter.

matplotlib's objects are used directly: pyplot would keep every figure alive and ask for a screen."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from meamtm.files import whole_file
from tune.result import Row, pareto_front
from tune.space import Range, encode

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOKS: dict[str, dict[str, Any]] = {
    "PRUNED": {"color": "0.65", "label": "stopped early"},
    "COMPLETE": {"color": "C0", "label": "trained to its end"},
}


def history_figure(rows: Sequence[Row], objective: str, mode: str, path: Path) -> Path:
    """Draws every trial's objective in order, and the best so far of those that trained to their end."""
    figure, axes = _figure()
    for state, look in LOOKS.items():
        numbers = [row.number for row in rows if row.state == state]
        axes.plot(numbers, _values(rows, state), "o", **look)
    ended = [row.number for row in rows if row.state == "COMPLETE"]
    best = (np.maximum if mode == "max" else np.minimum).accumulate(_values(rows, "COMPLETE"))
    axes.step(ended, best, where="post", color="C1", label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel(objective)
    axes.legend(frameon=False)
    return _save(figure, path)


def slice_figure(rows: Sequence[Row], key: str, searched: Range, objective: str, path: Path) -> Path:
    """Draws the objective against one key; trials in which the key does not exist are left out."""
    figure, axes = _figure()
    there = [row for row in rows if key in row.point]
    for state, look in LOOKS.items():
        places = [_place(row.point[key], searched) for row in there if row.state == state]
        axes.plot(places, _values(there, state), "o", **look)
    _mark_axis(axes, searched)
    axes.set_xlabel(key)
    axes.set_ylabel(objective)
    axes.legend(frameon=False)
    return _save(figure, path)


def pareto_figure(rows: Sequence[Row], objective: str, mode: str, cost: str, path: Path) -> Path:
    """Draws the objective against cost, and the trials that no cheaper one equals."""
    from matplotlib.ticker import EngFormatter

    figure, axes = _figure()
    ended = [(row.cost, row.value) for row in rows if row.cost is not None and row.value is not None]
    axes.plot(*np.array(ended).reshape(-1, 2).T, "o", color="0.65", label="trials")
    front = pareto_front(rows, mode)[::-1]  # the cheapest first
    at = np.array([(row.cost, row.value) for row in front]).reshape(-1, 2)
    axes.step(*at.T, "o-", where="post", color="C0", label="Pareto front")
    for row, place in zip(front, at, strict=True):
        axes.annotate(str(row.number), tuple(place), (3, 3), textcoords="offset points", fontsize=7)
    _make_log(axes)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel(
        {"macs": "multiply-adds of a clip, without its spectrogram", "params": "parameters", "tokens": "tokens"}[cost]
    )
    axes.set_ylabel(objective)
    axes.legend(frameon=False)
    return _save(figure, path)


def sensitivity_figure(stages: Mapping[str, Sequence[Row]], key: str, group: str, objective: str, path: Path) -> Path:
    """Draws the objective against one key, a colour for each value of another, side by side for each stage of the
    search; a line joins the medians of each third of a decade."""
    figure, panels = _panels(len(stages))
    values = sorted({row.point[group] for rows in stages.values() for row in rows if group in row.point})  # type: ignore[reportArgumentType]
    for axes, (title, rows) in zip(panels, stages.items(), strict=True):
        for number, value in enumerate(values):
            mine = [row for row in rows if key in row.point and row.point.get(group) == value]
            at, found = np.array([row.point[key] for row in mine], float), np.array([row.value for row in mine], float)
            part = np.floor(3 * np.log10(at))
            medians = [(10 ** ((third + 0.5) / 3), np.median(found[part == third])) for third in np.unique(part)]
            axes.plot(at, found, "o", color=f"C{number}", alpha=0.5)
            axes.plot(*np.reshape(medians, (-1, 2)).T, "-", color=f"C{number}", label=f"{group} {value}")
        axes.set_xlabel(key)
        axes.set_title(title, fontsize=9)
        _make_log(axes)
    for axes in panels[1:]:
        axes.sharex(panels[0])
    panels[0].set_ylabel(objective)
    if values:
        panels[0].legend(frameon=False)
    return _save(figure, path)


def importance_figure(views: Mapping[str, Mapping[str, float]], path: Path) -> Path:
    """Draws how much each key decides, side by side for each way of looking at it; keys in the order of the first."""
    names = list(dict.fromkeys(name for shares in views.values() for name in shares))[::-1]
    figure, panels = _panels(len(views), height_in=1.2 + 0.32 * len(names))
    for axes, (title, shares) in zip(panels, views.items(), strict=True):
        axes.barh(names, [shares.get(name, 0.0) for name in names], color="C0")
        axes.margins(y=0.01)
        axes.set_xlabel("importance")
        axes.set_title(title, fontsize=9)
    return _save(figure, path)


def parallel_figure(rows: Sequence[Row], ranges: Mapping[str, Range], objective: str, path: Path) -> Path:
    """Draws every trial as a line through its values, coloured by its objective; a missing key runs below."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure, axes = _figure(width_in=3 + 1.3 * len(ranges))
    measured = sorted((row.value, row.number, row) for row in rows if row.state in LOOKS and row.value is not None)
    norm = Normalize(measured[0][0], measured[-1][0])
    for value, _, row in measured:
        heights = [_height(row.point[key], searched) if key in row.point else -0.12 for key, searched in ranges.items()]
        axes.plot(heights, color=colormaps["viridis"](norm(value)), lw=1.4 if row.state == "COMPLETE" else 0.6)
    for position, searched in enumerate(ranges.values()):
        for corner in searched.corners():
            at = (position, _height(corner, searched))
            axes.annotate(_text(corner), at, (3, 2), textcoords="offset points", fontsize=7)
    axes.set_xticks(range(len(ranges)), list(ranges), rotation=30, ha="right", fontsize=8)
    axes.set_yticks([])
    axes.grid(axis="x", color="0.8")
    figure.colorbar(ScalarMappable(norm, "viridis"), ax=axes, label=objective)
    return _save(figure, path)


def _values(rows: Sequence[Row], state: str) -> list[float]:
    return [row.value if row.value is not None else np.nan for row in rows if row.state == state]


def _place(value: Any, searched: Range) -> float:
    """Where a value lies on the axis of its key: itself, or the position of a choice."""
    if searched.choice is None:
        return float(value)
    return float([encode(choice) for choice in searched.choice].index(encode(value)))


def _height(value: Any, searched: Range) -> float:
    """Where a value lies between its range's ends, 0 to 1."""
    ends = [_place(corner, searched) for corner in (searched.corners()[0], searched.corners()[-1])]
    at, low, high = (np.log(x) if searched.log_uniform else x for x in (_place(value, searched), *ends))
    return float((at - low) / (high - low)) if high > low else 0.5


def _mark_axis(axes: "Axes", searched: Range) -> None:
    if searched.log_uniform is not None:
        _make_log(axes)
    if searched.choice is not None:
        axes.set_xticks(range(len(searched.choice)), [_text(choice) for choice in searched.choice])
        axes.set_xlim(-0.5, len(searched.choice) - 0.5)


def _make_log(axes: "Axes") -> None:
    """Counts x in decades, with numbers at 1, 2 and 5 of each; all of them would overlap."""
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(encode(value)).removeprefix("json:")


def _figure(width_in: float = 6.0, height_in: float = 4.0) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    return figure, figure.add_subplot()


def _panels(count: int, height_in: float = 4.0) -> "tuple[Figure, Sequence[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.0 + 4.0 * count, height_in), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def _save(figure: "Figure", path: Path) -> Path:
    with whole_file(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")
    return path
