"""The study's Optuna file: which trials there were, how each of them ended, and which is the best.

Only the driver of a study writes to it, so one SQLite file is enough on a cluster too. Ray is not imported here."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from meamtm.config import Value
from tune.plan import Plan
from tune.result import Row
from tune.space import decode

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

Outcome = Literal["complete", "pruned", "failed"]
OUTCOMES: dict[str, Outcome] = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
"""By the name of Optuna's state."""


def open_storage(plan: Plan) -> "RDBStorage":
    """Opens the study's file, which is made where there is none."""
    import optuna
    from optuna.storages import RDBStorage

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it tells of every study and trial on its own
    plan.folder.mkdir(parents=True, exist_ok=True)
    # A report that reads meanwhile holds the file for moments only; the writer waits for it instead of failing.
    return RDBStorage(f"sqlite:///{plan.folder / 'optuna.db'}", engine_kwargs={"connect_args": {"timeout": 60}})


def open_study(plan: Plan) -> "Study":
    """Opens the Optuna study, which is made where there is none."""
    import optuna

    direction = "maximize" if plan.config.mode == "max" else "minimize"
    return optuna.create_study(
        storage=open_storage(plan), study_name=plan.name, direction=direction, load_if_exists=True
    )


def judge(result: Mapping[str, Any] | None, objective: str, epochs: int) -> Outcome:
    """Says how a trial ended from what it reported last; one that did not reach its last epoch was stopped early."""
    value = (result or {}).get(objective)
    if not result or result.get("failure") or value is None or not math.isfinite(value):
        return "failed"
    return "complete" if result.get("epoch", 0) >= epochs else "pruned"


def trained(study: "Study") -> "list[FrozenTrial]":
    """Finished trials that trained, which is what `trials` counts; suggestions that were rejected did not."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished() and not is_rejected(trial)]


def failed(study: "Study") -> "list[FrozenTrial]":
    """Trials that failed."""
    return [trial for trial in trained(study) if trial.state.name == "FAIL"]


def is_rejected(trial: "FrozenTrial") -> bool:
    """Whether a suggestion was refused before training."""
    return "rejected" in trial.user_attrs


def requeue(study: "Study") -> int:
    """Puts trials that a dead driver left RUNNING back in line and returns how many.

    Optuna asks waiting trials first and gives them the values that they had, under the same number; since a run's
    folder follows from its configuration, each goes on from its own newest checkpoint."""
    from optuna.trial import TrialState

    left = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in left:
        study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
    return len(left)


def settle(study: "Study") -> None:
    """Ends trials that a time budget cut short: PRUNED with what they measured, or, without that, back in line."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.intermediate_values:
            study._storage.set_trial_user_attr(trial._trial_id, "stopped_by", "time_budget_s")
            study.tell(trial.number, state=TrialState.PRUNED)
        else:
            study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)


def best(study: "Study", mode: str) -> "FrozenTrial | None":
    """The best trial of those that trained to their end, or, where none did, of those that were stopped early."""
    for state in ("COMPLETE", "PRUNED"):
        trials = [trial for trial in trained(study) if trial.state.name == state and trial.value is not None]
        if trials:
            sign = 1 if mode == "max" else -1
            return max(trials, key=lambda trial: (sign * (trial.value or 0.0), -trial.number))
    return None


def point_of(trial: "FrozenTrial") -> dict[str, Value]:
    """A trial's searched keys and their values."""
    return {key: decode(value) for key, value in trial.params.items()}


def rows(study: "Study") -> tuple[Row, ...]:
    """All trials but rejected suggestions, in order."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if not is_rejected(trial)]
    return tuple(_row(trial) for trial in sorted(trials, key=lambda trial: trial.number))


def _row(trial: "FrozenTrial") -> Row:
    return Row(
        number=trial.number,
        state=trial.state.name,
        value=trial.value if trial.value is not None else trial.intermediate_values.get(trial.last_step or 0),
        epochs=trial.last_step or 0,
        elapsed_s=trial.duration.total_seconds() if trial.duration is not None else None,
        point=point_of(trial) or {key: decode(v) for key, v in trial.system_attrs.get("fixed_params", {}).items()},
        error=trial.user_attrs.get("error") if trial.state.name == "FAIL" else None,
    )
