"""A study's MLflow runs: its own, and below it one for each trial. Ray is not imported here."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from meamtm.config import RunConfig, flatten, run_name, signature
from meamtm.errors import ServiceError
from meamtm.tracking import MLflowSink, Status, has_all, resolve_uri, warn_of_rest
from tune.history import OUTCOMES, Outcome, ended, point_of, repeat_of, seed_of
from tune.plan import Plan
from tune.result import Result

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

ENDS: dict[Outcome, Status] = {"complete": "FINISHED", "pruned": "FINISHED", "failed": "FAILED"}
CLOSE_WAIT_S = 4.0
"""A study that is told to stop has ten seconds for everything; what a slow server misses is sent when it resumes."""


def start_parent(plan: Plan, run_id: str | None, tags: Mapping[str, str]) -> MLflowSink:
    """Opens the study's own MLflow run, or continues it; raises ServiceError where nobody answers."""
    sink = MLflowSink(
        resolve_uri(plan.base.tracking),
        plan.base.tracking.experiment,
        plan.name,
        run_id=run_id,
        folder=plan.folder,
        close_wait_s=CLOSE_WAIT_S,
    )
    params = {key: value for key, value in flatten(plan.config).items() if not key.startswith(("space.", "set."))}
    sink.start(params, {**tags, "study": plan.name, "signature": plan.signature})
    return sink


def start_child(
    parent: MLflowSink, trial: "FrozenTrial", run: RunConfig, tags: Mapping[str, str], from_step: int
) -> MLflowSink:
    """Opens a trial's MLflow run below the study's, or continues it; raises ServiceError where nobody answers."""
    from meamtm.training.run import run_folder

    folder = run_folder(run)
    sink = MLflowSink(
        parent.uri, parent.experiment, run.name, parent_run_id=parent.run_id, folder=folder, close_wait_s=CLOSE_WAIT_S
    )
    tags = {**tags, "signature": signature(run), "optuna.trial": str(trial.number), "folder": str(folder)}
    if (repeat := repeat_of(trial)) is not None:
        tags["optuna.repeats"] = str(repeat.number)
    sink.start(flatten(run), tags, from_step=from_step)
    return sink


def end_child(sink: MLflowSink, outcome: Outcome, error: str) -> None:
    """Ends a trial's MLflow run truthfully."""
    sink.tag({"outcome": outcome, **({"error": error} if error else {})})
    sink.close(ENDS[outcome])


def is_recorded(plan: Plan, done: Result) -> bool:
    """Whether MLflow, where it is wanted, has taken all of a finished study, its trials and the best one's run."""
    if not plan.base.tracking.mlflow:
        return True
    uri = resolve_uri(plan.base.tracking)
    ends: dict[Path, Status] = {plan.folder: "FINISHED", Path(done.run_folder): "FINISHED"}
    for row in done.rows:
        if row.state in OUTCOMES:
            run = plan.trial(row.number, row.point, row.seed)
            ends[Path(run.runs_dir).resolve() / run_name(run)] = ENDS[OUTCOMES[row.state]]
    return all(has_all(folder, uri, end) for folder, end in ends.items() if folder.exists())


def send_trials(plan: Plan, study: "Study", parent: MLflowSink, tags: Mapping[str, str]) -> None:
    """Sends what MLflow has not taken of trials that have ended; one that is still away costs a warning."""
    from meamtm.training.run import absolute, run_folder

    for trial in ended(study):
        outcome = OUTCOMES[trial.state.name]
        run = absolute(plan.trial(trial.number, point_of(trial), seed_of(trial)))
        folder = run_folder(run)
        if not folder.exists() or has_all(folder, parent.uri, ENDS[outcome]):
            continue
        try:
            sink = start_child(parent, trial, run, tags, from_step=plan.num_epochs)
        except ServiceError as error:
            warn_of_rest(run.name, error)
            return
        end_child(sink, outcome, trial.user_attrs.get("error", "") if outcome == "failed" else "")


def end_all(sinks: Iterable[MLflowSink], status: Status) -> None:
    """Closes several runs side by side, so that a slow server costs one wait and not one for each."""
    sinks = list(sinks)
    if sinks:
        with ThreadPoolExecutor(len(sinks)) as pool:
            list(pool.map(lambda sink: sink.close(status), sinks))
