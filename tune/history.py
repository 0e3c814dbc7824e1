"""The study's Optuna file: which trials there were, how each of them ended, and which is the best.

Only the driver of a study writes to it, so one SQLite file is enough on a cluster too. Ray is not imported here."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from meamtm.config import Value
from meamtm.errors import ConfigError
from tune.plan import Plan
from tune.result import Row
from tune.space import decode

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial, Trial

Outcome = Literal["complete", "pruned", "failed", "rejected"]
REJECTED_IN_A_ROW = 50
"""Suggestions over the limits or made before, or trials too large, one after another, before a search ends."""
OUTCOMES: dict[str, Outcome] = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
"""By the name of Optuna's state; what was rejected is PRUNED too, and marked."""


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
    from optuna.study import StudyDirection

    directions = [StudyDirection.MAXIMIZE if mode == "max" else StudyDirection.MINIMIZE for mode in plan.modes]
    return optuna.create_study(
        storage=open_storage(plan), study_name=plan.name, directions=directions, load_if_exists=True
    )


def judge(result: Mapping[str, Any] | None, objective: str, epochs: int) -> Outcome:
    """Says how a trial ended from what it reported last; one that did not reach its last epoch was stopped early, one
    that exceeds its memory is rejected."""
    if result and "excess" in result:
        return "rejected"
    value = (result or {}).get(objective)
    if not result or result.get("failure") or value is None or not math.isfinite(value):
        return "failed"
    return "complete" if result.get("epoch", 0) >= epochs else "pruned"


class Repeat(NamedTuple):
    """A finalist's trial that trains again with another seed."""

    number: int
    """Of the trial that it repeats."""
    seed: int


def repeat_of(trial: "Trial | FrozenTrial") -> Repeat | None:
    """Says which trial this one repeats, if any."""
    found = trial.user_attrs.get("repeats")
    return Repeat(*found) if found is not None else None


def seed_of(trial: "Trial | FrozenTrial") -> int | None:
    """The seed that a trial was given; None for the base run's."""
    repeat = repeat_of(trial)
    return repeat.seed if repeat is not None else None


def ended(study: "Study") -> "list[FrozenTrial]":
    """Finished trials that trained; suggestions that were rejected did not."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished() and not is_rejected(trial)]


def trained(study: "Study") -> "list[FrozenTrial]":
    """Those of the search, which is what `trials` counts; finalists that train again do not count."""
    return [trial for trial in ended(study) if repeat_of(trial) is None]


def search_alone(study: "Study") -> "Study":
    """The search's trials that trained to their end, copied into memory, for what looks at whole studies."""
    import optuna

    copied = optuna.create_study(study_name=study.study_name, directions=study.directions)
    copied.add_trials([trial for trial in trained(study) if trial.state.name == "COMPLETE"])
    return copied


def stages(study: "Study", plan: Plan) -> "dict[str, Study]":
    """The search's trials where they can be compared with each other: after the epochs that ASHA gives to all of them,
    and at their end, which only the promising ones see."""
    found = {"at the end": search_alone(study)}
    if (epoch := plan.grace_epochs) is not None:
        found = {f"after {epoch} epochs": _search_after(study, epoch), **found}
    return found


def _search_after(study: "Study", epoch: int) -> "Study":
    """The search's trials as if an early epoch had been their last."""
    import optuna

    copied = optuna.create_study(study_name=study.study_name, directions=study.directions)
    for trial in trained(study):
        if (value := trial.intermediate_values.get(epoch)) is not None:
            ended_there = optuna.create_trial(value=value, params=trial.params, distributions=trial.distributions)
            copied.add_trial(ended_there)
    return copied


def failed(study: "Study") -> "list[FrozenTrial]":
    """Trials that failed."""
    return [trial for trial in ended(study) if trial.state.name == "FAIL"]


def is_rejected(trial: "FrozenTrial") -> bool:
    """Whether a suggestion was refused before training, by the study's limits or for want of memory."""
    return "rejected" in trial.user_attrs


def is_refused(trial: "FrozenTrial") -> bool:
    """Whether a trial found too little memory where it was to train, so that another takes its place."""
    return "memory" in trial.constraints


def refused(study: "Study") -> "list[FrozenTrial]":
    """Trials that found too little memory."""
    return [trial for trial in study.get_trials(deepcopy=False) if is_refused(trial)]


def too_large(study: "Study") -> ConfigError:
    """Says that nothing fits into memory any more."""
    last = refused(study)[-1]
    return ConfigError(
        f"{REJECTED_IN_A_ROW} trials in a row do not fit into memory, the last of them, trial {last.number}, as "
        f"{last.user_attrs['error']}; narrow the space"
    )


def requeue(study: "Study") -> int:
    """Puts trials that a dead driver left RUNNING back in line and returns how many.

    Optuna asks waiting trials first and gives them the values that they had, under the same number; since a run's
    folder follows from its configuration, each goes on from its own newest checkpoint."""
    from optuna.trial import TrialState

    left = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for trial in left:
        _put_back(study, trial)
    return len(left)


def _put_back(study: "Study", trial: "FrozenTrial") -> None:
    """Optuna begins to count a trial's time anew when it is asked again, so that its time is not known any more."""
    from optuna.trial import TrialState

    study._storage.set_trial_user_attr(trial._trial_id, "parted", True)
    study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)


def settle(study: "Study") -> None:
    """Ends trials that a time budget cut short: PRUNED with what they measured, or, without that, back in line, as are
    finalists, which must train to their end, and trials of several objectives, of which TPE can judge no half."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if trial.intermediate_values and repeat_of(trial) is None and len(study.directions) == 1:
            study._storage.set_trial_user_attr(trial._trial_id, "stopped_by", "time_budget_s")
            study.tell(trial.number, state=TrialState.PRUNED)
        else:
            _put_back(study, trial)


def ranked(study: "Study", mode: str) -> "list[FrozenTrial]":
    """The search's trials that trained to their end, or, where none did, those that were stopped early; best first.

    Of equals the cheaper comes first, then the earlier."""
    sign = 1 if mode == "max" else -1
    for state in ("COMPLETE", "PRUNED"):
        trials = [trial for trial in trained(study) if trial.state.name == state and value_of(trial) is not None]
        if trials:
            return sorted(
                trials, key=lambda trial: (-sign * (value_of(trial) or 0.0), *(trial.values or [])[1:], trial.number)
            )
    return []


def value_of(trial: "FrozenTrial") -> float | None:
    """The metric that a trial is compared by; one that was stopped early has its last."""
    if trial.values:
        return trial.values[0]
    return trial.intermediate_values.get(trial.last_step) if trial.last_step is not None else None


def point_of(trial: "FrozenTrial") -> dict[str, Value]:
    """A trial's searched keys and their values."""
    return {key: decode(value) for key, value in trial.params.items()}


def rows(study: "Study") -> tuple[Row, ...]:
    """All trials but rejected suggestions, in order."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if not is_rejected(trial)]
    return tuple(_row(trial) for trial in sorted(trials, key=lambda trial: trial.number))


def _row(trial: "FrozenTrial") -> Row:
    is_parted = trial.user_attrs.get("parted", False)
    return Row(
        number=trial.number,
        state=trial.state.name,
        value=value_of(trial),
        epochs=trial.last_step or 0,
        elapsed_s=trial.duration.total_seconds() if trial.duration is not None and not is_parted else None,
        point=point_of(trial) or {key: decode(v) for key, v in trial.system_attrs.get("fixed_params", {}).items()},
        error=trial.user_attrs.get("error") if trial.state.name == "FAIL" else None,
        cost=trial.values[1] if trial.values and len(trial.values) > 1 else None,
        repeats=repeat.number if (repeat := repeat_of(trial)) is not None else None,
        seed=seed_of(trial),
    )
