"""A study, finished or still running -> tables for the screen, and a CSV and figures in its report folder."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from meamtm.config import differences, write_yaml
from meamtm.errors import ConfigError
from meamtm.files import whole_file
from tune.history import open_study, rows
from tune.importance import Stage, find_stages
from tune.plan import Plan
from tune.result import Row, pareto_front
from tune.tables import finalists_table, front_file, front_table, importance_table, trials_table

if TYPE_CHECKING:
    from optuna import Study
    from rich.console import RenderableType

MOST_AXES = 10
"""So many keys stand side by side in the figure of parallel coordinates, those that matter most."""


def report(plan: Plan) -> "RenderableType":
    """Writes the report of a study as far as it has come, and returns its tables."""
    if not (plan.folder / "optuna.db").exists():
        raise ConfigError(f"{plan.folder}: no such study yet; start it by python -m tune, with the same words")
    study = open_study(plan)
    stages = find_stages(plan, study)
    files = write_report(plan, study, stages)
    return Group(
        trials_table(rows(study), plan.config.metric),
        *front_table(rows(study), plan.config.metric),
        *finalists_table(rows(study), plan.config.metric),
        *(importance_table(name, stage) for name, stage in stages.items()),
        Text(f"{len(files)} files in {plan.folder / 'report'}"),
    )


def write_report(plan: Plan, study: "Study", stages: Mapping[str, Stage]) -> list[Path]:
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
    titles = {name: f"{name}, {len(stage.study.trials)} trials" for name, stage in stages.items()}
    shares = {
        f"{way}\n{titles[name]}": found for name, stage in stages.items() for way, found in stage.importances.items()
    }
    shown = list(next(iter(shares.values()), plan.space.ranges))[:MOST_AXES]
    axes = {key: plan.space.ranges[key] for key in shown}
    files += [parallel_figure(trials, axes, objective, folder / "parallel.png")]
    for key, searched in plan.space.ranges.items():
        files.append(slice_figure(trials, key, searched, objective, folder / f"slice-{key}.png"))
    if {RATE, DEPTH} <= plan.space.ranges.keys():
        panels = {titles[name]: rows(stage.study) for name, stage in stages.items()}
        files.append(sensitivity_figure(panels, RATE, DEPTH, objective, folder / "sensitivity.png"))
    if (page := write_page(plan, study, shown, folder / "interactive.html")) is not None:
        files.append(page)
    if plan.config.cost is not None:
        files.append(pareto_figure(trials, objective, plan.config.mode, plan.config.cost, folder / "pareto.png"))
        files += _write_front(plan, trials, folder)
    if shares:
        files.append(importance_figure(shares, folder / "importances.png"))
    return files


def _write_front(plan: Plan, trials: Sequence[Row], folder: Path) -> list[Path]:
    """Writes a configuration for each trial of the Pareto front, since what is cheap enough is the user's choice."""
    for path in folder.glob(front_file("*")):
        path.unlink(missing_ok=True)  # of an earlier report, whose front this is no more
    files = []
    for row in pareto_front(trials, plan.config.mode):
        path = folder / front_file(row.number)
        place = f"{plan.config.studies_dir}/{plan.name}/{folder.name}/{path.name}"
        found = (
            f"{plan.name}, trial {row.number}: {plan.config.metric} {row.value:.4f}, {row.cost:.4g} {plan.config.cost}"
        )
        write_yaml(path, differences(plan.chosen(row.point)), f"meamtm train {place}\n{found}")
        files.append(path)
    return files


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
