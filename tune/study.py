"""A plan -> a finished study: search, then retrain the best on train + validation and test it once.

The study's folder is its only memory. The same command continues what was interrupted, and recognises what is done
without starting Ray."""

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from meamtm.config import differences, write_yaml
from meamtm.data.packed import digest_of
from meamtm.errors import ConfigError, MeamtmError
from meamtm.screen import loss
from meamtm.tracking import hide_password, resolve_uri, warn_of_rest
from meamtm.training.lock import held
from tune.checks import check_data, check_digest, check_teachers, digest_of_trials
from tune.finalists import choose, enqueue_finalists, missing_repeats, repeats, waiting_repeats
from tune.history import (
    REJECTED_IN_A_ROW,
    open_study,
    point_of,
    refused,
    requeue,
    rows,
    too_large,
    trained,
    value_of,
)
from tune.interrupt import between_steps, interruptible, stop_asked
from tune.plan import Plan
from tune.result import Result, read_result, write_result
from tune.runs import is_recorded, send_trials

if TYPE_CHECKING:
    from optuna import Study

    from meamtm.distributed import Heard
    from meamtm.tracking import Metrics, MLflowSink

Tell = Callable[[str], None]
RECORD_WAIT_S = 60.0
"""For the report's figures to arrive, over a slow link too, when all is done."""


def run_study(plan: Plan, tell: Tell) -> Result:
    """Runs what is missing of a study and returns what it found; `tell` takes lines for the user.

    Raises KeyboardInterrupt when told to stop, after ending every MLflow run; the next call continues. BusyError while
    another process runs the study."""
    if (done := read_result(plan)) is not None and done.covers(plan.config) and done.is_there:
        if (digest := digest_of(plan.base.data.path)) is not None:  # what was found can be read without it
            check_digest(plan, done.data_digest or digest_of_trials(plan, done.rows), digest)
        if not is_recorded(plan, done) or _is_recorded_elsewhere(plan, done):
            with interruptible():
                done = _complete_record(plan, done)
        if plan.config.time_budget_s is not None and done.num_ended < plan.config.trials:
            tell(
                f"{plan.name}: {done.num_ended} of {plan.config.trials} trials ended before "
                f"time_budget_s={plan.config.time_budget_s:g} was up or nothing new was left to try; with another "
                "value of it, or other trials, the study goes on"
            )
        return done
    with interruptible():
        tags = check_data(plan)
        check_teachers(plan)
        with held(plan.folder):
            return _run(plan, tags, tell)


def _run(plan: Plan, tags: Mapping[str, str], tell: Tell) -> Result:
    study, digest = open_study(plan), tags["data_digest"]
    check_digest(plan, study.user_attrs.get("data_digest") or digest_of_trials(plan, rows(study)), digest)
    study.set_user_attr("data_digest", digest)
    plan.write()
    requeue(study)
    with (parent := _open_parent(plan, study, tags)) or nullcontext():
        search_and_finalists(plan, study, parent, tags, tell)
        result = _conclude(plan, study, parent, tell)
        if parent is not None:
            _record(plan, study, result, parent, tags)
        write_result(plan, result)
        if parent is not None:
            parent.close("FINISHED", RECORD_WAIT_S)
        return result


def search_and_finalists(
    plan: Plan, study: "Study", parent: "MLflowSink | None", tags: Mapping[str, str], tell: Tell
) -> None:
    """Runs the trials that are missing, unless the same command has had its time or found nothing new to try, and then
    the finalists again."""
    in_vain, began_s, budget_s = 0, time.monotonic(), plan.config.time_budget_s
    asked = [plan.config.trials, budget_s]
    while (missing := plan.config.trials - len(trained(study))) > 0 and study.user_attrs.get("searched") != asked:
        tell(f"{plan.name}: {missing} of {plan.config.trials} trials to go")
        before = len(refused(study))
        left_s = None if budget_s is None else max(1.0, budget_s - (time.monotonic() - began_s))
        num_trials = missing + len(waiting_repeats(study))  # which an earlier command left
        _driver()(_within(plan, left_s), parent, tags, tell, num_trials)
        num_refused = len(refused(study)) - before
        if plan.config.trials - len(trained(study)) > num_refused:
            # The time is up, or nothing new is left to try. The same command does not search again, if there is a best.
            if choose(study, plan) is not None:
                study.set_user_attr("searched", asked)
            break
        in_vain = in_vain + num_refused if num_refused == missing else 0
        if in_vain >= REJECTED_IN_A_ROW:
            raise too_large(study)
    enqueue_finalists(study, plan)
    if (num_repeats := len(waiting_repeats(study))) > 0:
        tell(f"{plan.name}: the best trials train again with other seeds, {num_repeats} runs")
        _driver()(_within(plan, None), parent, tags, tell, num_repeats)
        if missing_ones := missing_repeats(study, plan):
            tell(
                f"{plan.name}: {len(missing_ones)} of these runs failed, and the choice is made without them; to train "
                f"them again, remove {plan.folder / 'result.json'} and give the same command"
            )


def _driver() -> "Callable[[Plan, MLflowSink | None, Mapping[str, str], Tell, int], None]":
    """Loads Ray, and with it what runs trials. Some of these libraries swallow whatever their imports raise, so a
    signal is heeded afterwards."""
    with between_steps():
        from tune.driver import run_trials
    return run_trials


def _within(plan: Plan, budget_s: float | None) -> Plan:
    """Gives the same study another time to search."""
    return replace(plan, config=plan.config.model_copy(update={"time_budget_s": budget_s}))


def _is_recorded_elsewhere(plan: Plan, done: Result) -> bool:
    return plan.base.tracking.mlflow and done.mlflow_uri != hide_password(resolve_uri(plan.base.tracking))


def _complete_record(plan: Plan, done: Result) -> Result:
    """Sends MLflow what it has not taken of a finished study, and says where it is now; whatever prevents that costs a
    warning."""
    from meamtm.training.run import absolute, send_rest

    try:
        with held(plan.folder):
            study, tags = open_study(plan), check_data(plan)
            with (parent := _open_parent(plan, study, tags)) or nullcontext():
                assert parent is not None, "nothing is missing where MLflow is not wanted"
                _record(plan, study, done, parent, tags)
                parent.close("FINISHED", RECORD_WAIT_S)
            done = replace(done, mlflow_uri=hide_password(parent.uri), mlflow_run_id=parent.run_id)
            write_result(plan, done)
            if Path(done.run_folder).exists():
                send_rest(absolute(plan.chosen(done.best_row.point)))
    except MeamtmError as error:
        warn_of_rest(plan.name, error)
    return done


def _conclude(plan: Plan, study: "Study", parent: "MLflowSink | None", tell: Tell) -> Result:
    from meamtm.distributed import connected_for_now, run_all
    from tune.importance import find_stages
    from tune.report import write_report

    trial = choose(study, plan)
    if trial is None:
        raise ConfigError(
            f"{plan.name}: no trial has measured {plan.config.metric} so far; the same command goes on, or raise "
            "time_budget_s or trials"
        )
    config = plan.chosen(point_of(trial))
    found = f"{plan.name}, trial {trial.number}: {plan.config.metric} {value_of(trial):.4f}"
    if again := repeats(study, trial.number):
        found += f", {statistics.fmean(again):.4f} with other seeds"
    header = f"meamtm train {plan.config.studies_dir}/{plan.name}/best.yaml\n{found}"
    write_yaml(plan.folder / "best.yaml", differences(config), header)
    tell(f"trial {trial.number} is the best; it trains again, {_on_what(plan)}and is tested once")
    with connected_for_now(), stop_asked() as should_stop:  # the next study's cluster may be another
        (outcome,) = run_all([config], _epoch_lines(config.num_epochs, tell), should_stop)
    result = Result(
        study=plan.name,
        folder=str(plan.folder),
        objective=plan.config.metric,
        trials=plan.config.trials,
        time_budget_s=plan.config.time_budget_s,
        rows=rows(study),
        best=trial.number,
        run_folder=str(outcome.folder),
        checkpoint=str(outcome.checkpoint),
        test=dict(outcome.evaluation.metrics) if outcome.evaluation is not None else None,
        mlflow_uri=hide_password(parent.uri) if parent else None,
        mlflow_run_id=parent.run_id if parent else None,
        finalists=plan.config.finalists,
        finalist_seeds=plan.config.finalist_seeds,
        data_digest=study.user_attrs["data_digest"],
    )
    write_report(plan, study, find_stages(plan, study))
    return result


def _record(plan: Plan, study: "Study", result: Result, parent: "MLflowSink", tags: Mapping[str, str]) -> None:
    """Shows in MLflow what the study found, and what MLflow has not taken of its trials."""
    found = {"best/value": result.best_row.value or 0.0, **(result.test or {})}
    if again := repeats(study, result.best):
        found["best/value_with_other_seeds"] = statistics.fmean(again)
    parent.log(found, step=len(result.rows))
    for path in (plan.folder / "best.yaml", plan.folder / "study.yaml", *sorted((plan.folder / "report").glob("*"))):
        parent.artifact(path)
    send_trials(plan, study, parent, tags)


def _on_what(plan: Plan) -> str:
    """Where folds hold clips out for validation, the best trial trains on these too."""
    from meamtm.data.cache import open_clips

    has_split = open_clips(plan.base.data, plan.base.mel.sample_rate_hz).has_split
    return "" if has_split else "on train + validation, "


def _open_parent(plan: Plan, study: "Study", tags: Mapping[str, str]) -> "MLflowSink | None":
    """Opens the study's MLflow run, or continues it, and ends what a dead driver left RUNNING below it."""
    if not plan.base.tracking.mlflow:
        return None
    from meamtm.tracking import finish_orphans
    from tune.runs import start_parent

    known = study.user_attrs.get("mlflow_run_id")
    parent = start_parent(plan, known, tags)
    if known is not None and parent.run_id == known:
        finish_orphans(parent.uri, parent_run_id=known)
    study.set_user_attr("mlflow_run_id", parent.run_id)
    return parent


def _epoch_lines(epochs: int, tell: Tell) -> "Heard":
    """Tells the user about ten times how far a run is."""

    def show(_number: int, metrics: "Metrics", step: int) -> None:
        if step == epochs or step % max(1, epochs // 10) == 0:
            tell(f"epoch {step}/{epochs}  {loss(metrics)}")

    return show
