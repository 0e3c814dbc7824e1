"""A study, finished or still running -> tables for the screen, and a CSV and figures in its report folder."""

import csv
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.table import Table
from rich.text import Text

from meamtm.config import Value, differences, write_yaml
from meamtm.errors import ConfigError
from meamtm.files import whole_file
from tune.config import mode_of
from tune.history import open_study, rows, stages
from tune.plan import Plan
from tune.result import Result, Row, pareto_front

if TYPE_CHECKING:
    from optuna import Study
    from rich.console import RenderableType

FEWEST_TRIALS = 5
"""Below so many, importances would be noise alone."""
BEST_FEW = 5
"""The fewest best trials that PED-ANOVA tells from all, by its authors' advice; of less than ten trials it is half."""
ENOUGH_TRIALS = 20
"""Below so many, they are a hint."""
MOST_AXES = 10
"""So many keys stand side by side in the figure of parallel coordinates, those that matter most."""
MOST_KEYS = 6
"""So many searched keys of a trial are shown on a line; trials.csv has all."""


def report(plan: Plan) -> "RenderableType":
    """Writes the report of a study as far as it has come, and returns its tables."""
    if not (plan.folder / "optuna.db").exists():
        raise ConfigError(f"{plan.folder}: no such study yet; start it by python -m tune, with the same words")
    study = open_study(plan)
    files = write_report(plan, study)
    return Group(
        trials_table(rows(study), plan.config.metric),
        *_front_table(rows(study), plan.config.metric),
        *_finalists_table(rows(study), plan.config.metric),
        *(_importance_table(stage, at) for stage, at in stages(study, plan).items()),
        Text(f"{len(files)} files in {plan.folder / 'report'}"),
    )


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
    front = _front_table(result.rows, result.objective)
    finalists = _finalists_table(result.rows, result.objective, result.best)
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
        cells = [row.number, row.state.lower(), row.value, row.epochs, round(row.elapsed_s or 0), describe(row.point)]
        if is_frugal:
            cells[3:3] = [f"{row.cost:.3g}" if row.cost is not None else ""]
        style = "bold green" if row.number == best else "red" if row.state == "FAIL" else ""
        table.add_row(*map(_number, cells), style=style)
    return table


def _front_table(trials: Sequence[Row], objective: str) -> "list[RenderableType]":
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
        table.add_row(*map(_number, cells), _front_file(row.number))
    return [Text(), table]


def _finalists_table(trials: Sequence[Row], objective: str, best: int | None = None) -> "list[RenderableType]":
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


def importances(compared: "Study") -> dict[str, dict[str, float]]:
    """How much each key decides, by two ways of looking at one of the study's `stages`; empty where there are too few
    trials, or where all are worth the same.

    fANOVA: what share of the objective's variation a key explains (Hutter 2014); keys that exist in all trials only.
    PED-ANOVA: whether a key tells the best tenth, or the best few, from all (Watanabe 2023). Largest first."""
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances
    from optuna.study import StudyDirection

    num_trials = len(compared.trials)
    if num_trials < FEWEST_TRIALS or len({trial.values[0] for trial in compared.trials}) == 1:
        return {}
    best = max(0.1, min(0.5, BEST_FEW / num_trials))
    sign = -1 if compared.directions[0] is StudyDirection.MAXIMIZE else 1  # PED-ANOVA takes low values for good ones
    ways = {
        "fANOVA": FanovaImportanceEvaluator(seed=0),
        "PED-ANOVA": PedAnovaImportanceEvaluator(target_quantile=best),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optuna's, of keys that exist in some trials only, and of that sign
        return {
            way: get_param_importances(
                compared, evaluator=evaluator, target=lambda trial: sign * (trial.values or [])[0]
            )
            for way, evaluator in ways.items()
        }


def write_report(plan: Plan, study: "Study") -> list[Path]:
    """Writes trials.csv and the figures, and returns their paths."""
    from tune.figures import (
        LOOKS,
        history_figure,
        importance_figure,
        parallel_figure,
        pareto_figure,
        sensitivity_figure,
        slice_figure,
    )
    from tune.interactive import DEPTH, RATE, write_page

    folder, objective = plan.folder / "report", plan.config.metric
    folder.mkdir(parents=True, exist_ok=True)
    files = [_write_csv(rows(study), plan, folder / "trials.csv")]
    trials = [row for row in rows(study) if row.repeats is None]
    if not any(row.state in LOOKS and row.value is not None for row in trials):
        return files
    files += [history_figure(trials, objective, plan.config.mode, folder / "history.png")]
    compared = stages(study, plan)
    titles = {stage: f"{stage}, {len(at.trials)} trials" for stage, at in compared.items()}
    shares = {
        f"{way}\n{titles[stage]}": found for stage, at in compared.items() for way, found in importances(at).items()
    }
    shown = list(next(iter(shares.values()), plan.space.ranges))[:MOST_AXES]
    axes = {key: plan.space.ranges[key] for key in shown}
    files += [parallel_figure(trials, axes, objective, folder / "parallel.png")]
    for key, searched in plan.space.ranges.items():
        files.append(slice_figure(trials, key, searched, objective, folder / f"slice-{key}.png"))
    if {RATE, DEPTH} <= plan.space.ranges.keys():
        panels = {titles[stage]: rows(at) for stage, at in compared.items()}
        files.append(sensitivity_figure(panels, RATE, DEPTH, objective, folder / "sensitivity.png"))
    if (page := write_page(plan, study, shown, folder / "interactive.html")) is not None:
        files.append(page)
    if plan.config.cost is not None:
        files.append(pareto_figure(trials, objective, plan.config.mode, plan.config.cost, folder / "pareto.png"))
        files += _write_front(plan, trials, folder)
    if shares:
        files.append(importance_figure(shares, folder / "importances.png"))
    return files


def _importance_table(stage: str, compared: "Study") -> "RenderableType":
    """Which keys matter among trials as they are at one stage."""
    num_trials, shares = len(compared.trials), importances(compared)
    if not shares:
        return Text(
            f"importances {stage}: {num_trials} trials came so far, and {FEWEST_TRIALS} are the fewest that tell"
        )
    hint = "a hint: " if num_trials < ENOUGH_TRIALS else ""
    title = f"importances {stage} ({hint}{num_trials} trials)"
    table = Table("key", *shares, title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for key in dict.fromkeys(key for found in shares.values() for key in found):
        bars = (f"{found[key]:.2f} {'█' * round(20 * found[key])}" if key in found else "" for found in shares.values())
        table.add_row(key, *bars)
    return table


def _write_front(plan: Plan, trials: Sequence[Row], folder: Path) -> list[Path]:
    """Writes a configuration for each trial of the Pareto front, since what is cheap enough is the user's choice."""
    for path in folder.glob(_front_file("*")):
        path.unlink(missing_ok=True)  # of an earlier report, whose front this is no more
    files = []
    for row in pareto_front(trials, plan.config.mode):
        path = folder / _front_file(row.number)
        place = f"{plan.config.studies_dir}/{plan.name}/{folder.name}/{path.name}"
        found = (
            f"{plan.name}, trial {row.number}: {plan.config.metric} {row.value:.4f}, {row.cost:.4g} {plan.config.cost}"
        )
        write_yaml(path, differences(plan.chosen(row.point)), f"meamtm train {place}\n{found}")
        files.append(path)
    return files


def _front_file(number: int | str) -> str:
    """Name of the configuration of a trial on the Pareto front."""
    return f"pareto-trial-{number}.yaml"


def _write_csv(trials: Sequence[Row], plan: Plan, path: Path) -> Path:
    keys = list(dict.fromkeys(key for row in trials for key in row.point))
    with whole_file(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        measured = plan.metrics
        writer.writerow(["trial", "repeats", "seed", "end", *measured, "epochs", "elapsed_s", *keys, "error"])
        for row in trials:
            point = [row.point.get(key, "") for key in keys]
            values = [row.value, row.cost][: len(measured)]
            ran = [row.number, row.repeats, row.seed, row.state.lower(), *values, row.epochs, row.elapsed_s]
            writer.writerow([*ran, *point, row.error or ""])
    return path


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
