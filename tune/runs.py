"""A study's MLflow runs: its own, and below it one for each trial. Ray is not imported here."""

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from meamtm.config import RunConfig, flatten, signature
from meamtm.errors import ServiceError
from meamtm.tracking import MEMO, MLflowSink, Status, has_all, resolve_uri
from tune.history import OUTCOMES, point_of, trained
from tune.plan import Plan

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

logger = logging.getLogger(__name__)
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


def start_child(parent: MLflowSink, trial: "FrozenTrial", run: RunConfig, tags: Mapping[str, str]) -> MLflowSink:
    """Opens a trial's MLflow run below the study's, or continues it; raises ServiceError where nobody answers."""
    from meamtm.training.run import run_folder

    folder = run_folder(run)
    sink = MLflowSink(
        parent.uri, parent.experiment, run.name, parent_run_id=parent.run_id, folder=folder, close_wait_s=CLOSE_WAIT_S
    )
    tags = {**tags, "signature": signature(run), "optuna.trial": str(trial.number), "folder": str(folder)}
    sink.start(flatten(run), tags, from_step=trial.last_step or 0)
    return sink


def end_child(sink: MLflowSink, outcome: str, error: str) -> None:
    """Ends a trial's MLflow run truthfully."""
    sink.tag({"outcome": outcome, **({"error": error} if error else {})})
    sink.close("FAILED" if outcome == "failed" else "FINISHED")


def is_recorded(plan: Plan) -> bool:
    """Whether MLflow, where it is wanted, has taken all of a study and of the trials that it knows of."""
    if not plan.base.tracking.mlflow:
        return True
    uri = resolve_uri(plan.base.tracking)
    return all(has_all(memo.parent, uri) for memo in (plan.folder / MEMO, *plan.folder.glob(f"trials/*/{MEMO}")))


def send_trials(plan: Plan, study: "Study", parent: MLflowSink, tags: Mapping[str, str]) -> None:
    """Sends what MLflow has not taken of trials that have ended; one that is still away costs a warning."""
    from meamtm.training.run import absolute, run_folder

    for trial in trained(study):
        run = absolute(plan.trial(trial.number, point_of(trial)))
        if has_all(run_folder(run), parent.uri):
            continue
        try:
            sink = start_child(parent, trial, run, tags)
        except ServiceError as error:
            logger.warning("%s; it lacks a part of %s, which the same command sends later", error, run.name)
            return
        outcome = OUTCOMES[trial.state.name]
        end_child(sink, outcome, trial.user_attrs.get("error", "") if outcome == "failed" else "")


def end_all(sinks: Iterable[MLflowSink], status: Status) -> None:
    """Closes several runs side by side, so that a slow server costs one wait and not one for each."""
    sinks = list(sinks)
    if sinks:
        with ThreadPoolExecutor(len(sinks)) as pool:
            list(pool.map(lambda sink: sink.close(status), sinks))
