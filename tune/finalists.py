"""Trials that train again with other seeds: which they are, and which trial they choose.

A trial that is the best of many was lucky too; what it is worth with seeds that did not choose it is free of that
(tune/history.py has the search itself)."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tune.history import Repeat, ended, is_rejected, ranked, repeat_of, rows, value_of
from tune.plan import Plan
from tune.result import pareto_fronts

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial


def enqueue_finalists(study: "Study", plan: Plan) -> None:
    """Puts the best trials of a search in line once more, each with the seeds after the base run's."""
    wanted = _wanted(study, plan)
    _withdraw(study, wanted)
    # What failed in an earlier command, for a full disk say, is tried once more.
    trials = study.get_trials(deepcopy=False)
    there = {repeat_of(trial) for trial in trials if trial.state.name != "FAIL" and not is_rejected(trial)}
    for repeat in wanted:
        if repeat not in there:
            study.enqueue_trial(study.trials[repeat.number].params, user_attrs={"repeats": repeat})


def finalist_seeds(plan: Plan) -> range:
    """Seeds with which finalists train again, those after the base run's; none where one trial alone would."""
    first = plan.base.train.seed + 1
    return range(first, first + (plan.config.finalist_seeds if plan.config.finalists > 1 else 0))


def missing_repeats(study: "Study", plan: Plan) -> list[Repeat]:
    """Finalists' runs that the choice has to do without, since they failed."""
    there = {repeat_of(trial) for trial in ended(study) if trial.state.name == "COMPLETE"}
    return [repeat for repeat in _wanted(study, plan) if repeat not in there]


def _wanted(study: "Study", plan: Plan) -> list[Repeat]:
    finalists = _finalists(study, plan)[: plan.config.finalists]
    return [Repeat(trial.number, seed) for trial in finalists for seed in finalist_seeds(plan)]


def _withdraw(study: "Study", wanted: Sequence[Repeat]) -> None:
    """Takes finalists' trials out of line that an earlier command wanted and this one does not."""
    from optuna.trial import TrialState

    for trial in waiting_repeats(study):
        if repeat_of(trial) not in wanted:
            study._storage.set_trial_user_attr(trial._trial_id, "rejected", "no finalist any more")
            study._storage.set_trial_state_values(trial._trial_id, TrialState.PRUNED)


def waiting_repeats(study: "Study") -> "list[FrozenTrial]":
    """Finalists' trials that are in line."""
    from optuna.trial import TrialState

    waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    return [trial for trial in waiting if repeat_of(trial) is not None]


def choose(study: "Study", plan: Plan) -> "FrozenTrial | None":
    """The best trial: of all that have trained again, the one whose repeats are best on average; what made it a
    finalist does not count."""
    trials = ranked(study, plan.config.mode)
    if not trials or plan.config.finalists == 1:
        return next(iter(trials), None)
    sign = 1 if plan.config.mode == "max" else -1
    again = {trial.number: repeats(study, trial.number) for trial in _finalists(study, plan)}
    means = {number: statistics.fmean(values) for number, values in again.items() if values}
    if not means:
        return trials[0]
    number = max(means, key=lambda number: (sign * means[number], -number))
    return next(trial for trial in trials if trial.number == number)


def repeats(study: "Study", number: int) -> list[float]:
    """What a finalist was worth each time that it trained again."""
    again = (trial for trial in ended(study) if (repeat := repeat_of(trial)) is not None and repeat.number == number)
    return [value for trial in again if trial.state.name == "COMPLETE" and (value := value_of(trial)) is not None]


def _finalists(study: "Study", plan: Plan) -> "list[FrozenTrial]":
    """Who may be chosen, best first; with a cost those on the Pareto front come before those just behind it, who may
    have had less luck."""
    if plan.config.cost is not None:
        trials = study.trials
        return [trials[row.number] for front in pareto_fronts(rows(study), plan.config.mode) for row in front]
    return [trial for trial in ranked(study, plan.config.mode) if trial.state.name == "COMPLETE"]
