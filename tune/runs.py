"""A study's MLflow runs: its own, and below it one for each trial. Ray is not imported here."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from meamtm.config import RunConfig, flatten, run_folder, run_name, signature
from meamtm.errors import ServiceError
from meamtm.tracking import MLflowSink, Status, has_all, read_rows, resolve_uri, warn_of_rest, write_rows
from tune.folds import Folds
from tune.history import OUTCOMES, Outcome, ended, point_of, repeat_of, seed_of
from tune.plan import Plan
from tune.result import Result

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

ENDS: dict[Outcome, Status] = {
    "complete": "FINISHED",
    "pruned": "FINISHED",
    "failed": "FAILED",
    "rejected": "FAILED",
}
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
    plan: Plan, parent: MLflowSink, trial: "FrozenTrial", tags: Mapping[str, str], from_step: int
) -> MLflowSink:
    """Opens a trial's MLflow run below the study's, or continues it; raises ServiceError where nobody answers."""
    from meamtm.training.run import absolute

    run = absolute(plan.trial(trial.number, point_of(trial), seed_of(trial)))
    folder = run_folder(run)
    _gather_folds(plan, run, folder)
    sink = MLflowSink(
        parent.uri, parent.experiment, run.name, parent_run_id=parent.run_id, folder=folder, close_wait_s=CLOSE_WAIT_S
    )
    tags = {**tags, "signature": signature(run), "optuna.trial": str(trial.number), "folder": str(folder)}
    if (repeat := repeat_of(trial)) is not None:
        tags["optuna.repeats"] = str(repeat.number)
    sink.start(flatten(run), tags, from_step=from_step)
    return sink


def _gather_folds(plan: Plan, run: RunConfig, folder: Path) -> None:
    """Brings what the folds of a trial have recorded together in its own folder, where MLflow's record is kept from."""
    if not plan.config.inner_folds:
        return
    folds, gathered = Folds(plan.config.metric, plan.base.num_epochs), []
    for one in plan.runs(run):
        rows = read_rows(run_folder(one) / "metrics.jsonl")
        gathered += [folds.epoch(row) for row in rows]
        if not rows or rows[-1]["step"] < plan.base.num_epochs:
            break
        folds.end(rows[-1])
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "metrics.jsonl", [row | {"step": int(row["epoch"])} for row in gathered])


def end_child(sink: MLflowSink, outcome: Outcome, error: str) -> None:
    """Ends a trial's MLflow run truthfully."""
    sink.tag({"outcome": outcome, **({"error": error} if error else {})})
    sink.close(ENDS[outcome])


def is_recorded(plan: Plan, done: Result) -> bool:
    """Whether MLflow, where it is wanted, has taken all of a finished study, its trials and the best one's run."""
    if not plan.base.tracking.mlflow:
        return True
    uri = resolve_uri(plan.base.tracking)
    ends: dict[Path, Status] = {
        folder: "FINISHED" for folder in (plan.folder, Path(done.run_folder)) if folder.exists()
    }
    for row in done.rows:
        if row.state in OUTCOMES:
            run = plan.trial(row.number, row.point, row.seed)
            if _has_begun(plan, run):
                ends[run_folder_of(run)] = ENDS[OUTCOMES[row.state]]
    return all(has_all(folder, uri, end) for folder, end in ends.items())


def _has_begun(plan: Plan, run: RunConfig) -> bool:
    """Whether a trial has left anything; one that failed at once has nothing to show."""
    return any(run_folder_of(one).exists() for one in (run, *plan.runs(run)))


def run_folder_of(run: RunConfig) -> Path:
    """Names a run's folder from wherever one stands, as `meamtm.training.run.absolute` would have it, without torch."""
    return Path(run.runs_dir).expanduser().resolve() / run_name(run)


def send_trials(plan: Plan, study: "Study", parent: MLflowSink, tags: Mapping[str, str]) -> None:
    """Sends what MLflow has not taken of trials that have ended; one that is still away costs a warning."""
    for trial in ended(study):
        outcome = OUTCOMES[trial.state.name]
        run = plan.trial(trial.number, point_of(trial), seed_of(trial))
        if not _has_begun(plan, run) or has_all(run_folder_of(run), parent.uri, ENDS[outcome]):
            continue
        try:
            sink = start_child(plan, parent, trial, tags, from_step=plan.num_epochs)
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
