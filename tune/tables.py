"""What `python -m tune` answers with: trials, the front, finalists, importances; a finished study's summary."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from meamtm.config import Value
from tune.config import mode_of
from tune.importance import FEWEST_TRIALS, Stage
from tune.result import Result, Row, pareto_front

if TYPE_CHECKING:
    from rich.console import RenderableType

ENOUGH_TRIALS = 20
"""Below so many, they are a hint."""
MOST_KEYS = 6
"""So many searched keys of a trial are shown on a line; trials.csv has all."""


def summary(result: Result) -> "RenderableType":
    """What a finished study found: its trials, the best configuration, and where everything is."""
    best = result.best_row
    found = Table(title="best", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    found.add_row("trial", f"{best.number}   {result.objective} {_number(best.value)}")
    for key, value in best.point.items():
        found.add_row(key, _number(value))
    for key, value in (result.test or {}).items():
        found.add_row(Text(key, style="bold"), Text(_number(value), style="bold green"))
    if result.test is None:
        found.add_row("test", "none: data.test_fold is null")
    places = Table(title="where", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, place in _places(result).items():
        places.add_row(name, Text(place, overflow="fold"))
    trials = trials_table(result.rows, result.objective, result.best)
    front = front_table(result.rows, result.objective)
    finalists = finalists_table(result.rows, result.objective, result.best)
    return Group(trials, *front, *finalists, Text(), found, Text(), places)


def _places(result: Result) -> dict[str, str]:
    from meamtm.tracking import how_to_open

    folder = _short(result.folder)
    places = {
        "checkpoint": _short(result.checkpoint),
        "use it": f"meamtm predict {_short(result.checkpoint)} SOUND.wav",
        "configuration": f"{folder}/best.yaml, for meamtm train",
        "report": f"{folder}/report",
    }
    if result.mlflow_uri is not None:
        places["MLflow"] = how_to_open(result.mlflow_uri, result.mlflow_run_id)
    return places


def trials_table(trials: Sequence[Row], objective: str, best: int | None = None) -> Table:
    """One line per trial: number, end, objective, epochs, seconds, and the searched keys with their values."""
    table = Table(title="trials", title_justify="left", header_style="bold", padding=(0, 1))
    is_frugal = any(row.cost is not None for row in trials)
    for name in ("trial", "end", objective, *(["cost"] if is_frugal else []), "epochs", "s"):
        table.add_column(name, no_wrap=True, justify="left" if name == "end" else "right")
    table.add_column("searched")
    for row in trials:
        if row.repeats is not None:
            continue
        seconds = round(row.elapsed_s) if row.elapsed_s is not None else None
        cells = [row.number, row.state.lower(), row.value, row.epochs, seconds, describe(row.point)]
        if is_frugal:
            cells[3:3] = [f"{row.cost:.3g}" if row.cost is not None else ""]
        style = "bold green" if row.number == best else "red" if row.state == "FAIL" else ""
        table.add_row(*map(_number, cells), style=style)
    return table


def front_table(trials: Sequence[Row], objective: str) -> "list[RenderableType]":
    """The Pareto front, what each of its trials gives away, and where its configuration lies."""
    front = pareto_front(trials, mode_of(objective))
    if not front:
        return []
    table = Table(title="Pareto front", title_justify="left", header_style="bold", padding=(0, 1))
    for name in ("trial", objective, "behind", "cost", "of the best's"):
        table.add_column(name, no_wrap=True, justify="right")
    table.add_column("configuration, in report", overflow="fold")
    best = front[0]
    for row in front:
        behind = f"{abs((row.value or 0.0) - (best.value or 0.0)):.3g}"
        cells = [row.number, row.value, behind, f"{row.cost:.3g}", f"{(row.cost or 0.0) / (best.cost or 1.0):.0%}"]
        table.add_row(*map(_number, cells), front_file(row.number))
    return [Text(), table]


def finalists_table(trials: Sequence[Row], objective: str, best: int | None = None) -> "list[RenderableType]":
    """What finalists were worth in the search, which was luck in part, and with other seeds."""
    again: dict[int, list[float]] = {}
    for row in trials:
        if row.repeats is not None and row.state == "COMPLETE" and row.value is not None:
            again.setdefault(row.repeats, []).append(row.value)
    if not again:
        return []
    table = Table(title="finalists, with other seeds", title_justify="left", header_style="bold", padding=(0, 1))
    for name in ("trial", f"{objective} in the search", "mean", "std", "runs"):
        table.add_column(name, no_wrap=True, justify="right")
    for number, values in again.items():
        searched = next(row.value for row in trials if row.number == number)
        cells = [
            number,
            searched,
            statistics.fmean(values),
            statistics.stdev(values) if len(values) > 1 else "",
            len(values),
        ]
        table.add_row(*map(_number, cells), style="bold green" if number == best else "")
    return [Text(), table]


def describe(point: Mapping[str, Value]) -> str:
    """Searched keys and values in a few words; of a wide space the first ones, in the study file's order."""
    words = [f"{key} {_number(value)}" for key, value in list(point.items())[:MOST_KEYS]]
    more = len(point) - len(words)
    return ", ".join([*words, *([f"{more} more"] if more else [])])


def importance_table(name: str, stage: Stage) -> "RenderableType":
    """Which keys matter among trials as they are at one stage."""
    num_trials, shares = len(stage.study.trials), stage.importances
    if not shares and num_trials < FEWEST_TRIALS:
        return Text(
            f"importances {name}: {num_trials} trials came so far, and {FEWEST_TRIALS} are the fewest that tell"
        )
    if not shares:
        return Text(f"importances {name}: all {num_trials} trials are worth the same, which tells nothing")
    hint = "a hint: " if num_trials < ENOUGH_TRIALS else ""
    title = f"importances {name} ({hint}{num_trials} trials)"
    table = Table("key", *shares, title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for key in dict.fromkeys(key for found in shares.values() for key in found):
        bars = (f"{found[key]:.2f} {'█' * round(20 * found[key])}" if key in found else "" for found in shares.values())
        table.add_row(key, *bars)
    return table


def front_file(number: int | str) -> str:
    """Name of the configuration of a trial on the Pareto front."""
    return f"pareto-trial-{number}.yaml"


def _number(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _short(path: str) -> str:
    """A path as seen from here, where that is shorter."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return path
