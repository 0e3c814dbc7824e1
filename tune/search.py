"""Optuna's suggestions -> Ray Tune's trials, and the truth about each trial -> Optuna.

Ray's OptunaSearch tells Optuna that a trial which the scheduler stopped early is COMPLETE with its early value, and
drops NaN. Here it is PRUNED with the values of its epochs, a failed one is FAIL, and only a trial that reached its last
epoch is COMPLETE."""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from ray.tune.search.optuna import OptunaSearch

from meamtm.config import RunConfig, Value, flatten, run_folder, signature
from meamtm.data.packed import count_labels
from meamtm.errors import ConfigError
from meamtm.tracking import read_rows
from meamtm.training.checkpoint import newest, read_record
from meamtm.training.run import absolute
from tune.finalists import waiting_repeats
from tune.folds import Folds
from tune.history import (
    OUTCOMES,
    REJECTED_IN_A_ROW,
    failed,
    is_refused,
    is_rejected,
    judge,
    open_storage,
    point_of,
    repeat_of,
    seed_of,
    too_large,
)
from tune.limits import excess
from tune.plan import Plan
from tune.space import decode, encode

REPEATED_IN_A_ROW = 5
"""Suggestions made before, one after another, before the next ones are drawn at random: where a space has few points,
TPE names the best of them again and again."""
DRAWS = 1000
DIED = "its worker died"
"""What may go otherwise the next time."""

STATES = {outcome: TrialState[name] for name, outcome in OUTCOMES.items()} | {"rejected": TrialState.PRUNED}


class TruthfulSearch(OptunaSearch):
    """Suggests the runs of a plan; its only memory is the study's file, so that any later driver continues it."""

    def __init__(self, plan: Plan, at_once: int = 1) -> None:
        super().__init__(
            space=plan.space,
            metric=plan.metrics,
            mode=plan.modes,
            study_name=plan.name,
            storage=open_storage(plan),
            sampler=make_sampler(plan, 0),
        )
        self.plan, self.at_once = plan, at_once
        self.exhausted: str | None = None
        """Why the search ended early: nothing new is suggested any more."""
        self.refusals: list[str] = []
        """Start points that were refused, of which the user has not been told."""
        self._before = {trial.number for trial in self._finished()}
        for point in plan.config.start:
            encoded = {key: encode(value) for key, value in point.items()}
            self.study.enqueue_trial(encoded, skip_if_exists=True)

    @property
    def study(self) -> optuna.Study:
        """The Optuna study behind the suggestions."""
        assert self._ot_study is not None
        return self._ot_study

    def suggest(self, trial_id: str) -> Any:
        """Returns what `run_trial` needs, or that the search is over where each suggestion repeats an earlier one.

        Raises ConfigError where nothing feasible is found or too much has failed."""
        self.check_failures()
        reason, num_repeated = None, 0
        for _ in range(REJECTED_IN_A_ROW):
            if num_repeated >= REPEATED_IN_A_ROW and not self._draw():
                self.exhausted = f"{DRAWS:,} points drawn at random were all tried or refused before"
                return self.FINISHED
            trial = self._ask()
            point = self.plan.space(trial)
            if self._turn_down(trial):
                num_repeated += 1
                continue
            reason = self._reject(trial, point)
            if reason is None:
                run = absolute(self.plan.trial(trial.number, point, seed_of(trial)))
                trial.set_user_attr("ray_trial_id", trial_id)
                trial.set_user_attr("signature", signature(run))
                self._ot_trials[trial_id] = trial
                runs = self.plan.runs(run)
                self._catch_up(trial, runs)
                return {
                    "number": trial.number,
                    "metric": self.plan.config.metric,
                    "is_repeat": repeat_of(trial) is not None,
                    "at_once": self.at_once,
                    "run": _without_address(run),
                    "runs": [_without_address(one) for one in runs],
                }
        if num_repeated:
            over = "" if reason is None else f", and the others build no run within the limits (the last: {reason})"
            self.exhausted = f"of {REJECTED_IN_A_ROW} suggestions in a row {num_repeated} repeat a trial{over}"
            return self.FINISHED
        raise ConfigError(
            f"limits: {REJECTED_IN_A_ROW} suggestions in a row build no run within them (the last: {reason}); "
            "loosen the limits or narrow the space"
        )

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Keeps an epoch's objective, checkpoint and hits, or the reason why a trial is about to fail."""
        self._keep(self._ot_trials[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tells Optuna how the trial ended."""
        trial = self._ot_trials.get(trial_id)
        if trial is None or trial_id in self._completed_trials:
            return
        self._completed_trials.add(trial_id)
        ended = "failed" if error else judge(result, self.plan.config.metric, self.plan.num_epochs)
        if result:
            self._keep(trial, result)
        if ended == "rejected" and result:
            trial.set_user_attr("rejected", result["failure"])
            trial.set_constraint("memory", result["excess"])
        if ended == "failed" and "error" not in trial.user_attrs:
            trial.set_user_attr("error", DIED if error else f"no finite {self.plan.config.metric} was reported")
        values = [result[self.plan.config.metric]] if result and ended == "complete" else None
        if values is not None and self.plan.config.cost is not None:
            values.append(self._cost(trial))
        self.study.tell(trial, values, state=STATES[ended])

    def check_failures(self) -> None:
        """Raises ConfigError where more trials have failed than a search survives; what failed before it began, for a
        full disk say, does not count."""
        gone = [trial for trial in failed(self.study) if trial.number not in self._before]
        if len(gone) > self.plan.config.max_failed_trials:
            last = gone[-1]
            raise ConfigError(
                f"max_failed_trials={self.plan.config.max_failed_trials}: {len(gone)} trials have failed, the last of "
                f"them, trial {last.number}, by: {last.user_attrs.get('error')}; mend what that names and give the "
                "same command again, or narrow the space"
            )
        latest = [trial for trial in self._finished() if trial.number not in self._before][-REJECTED_IN_A_ROW:]
        if len(latest) == REJECTED_IN_A_ROW and all(map(is_refused, latest)):
            raise too_large(self.study)

    def note(self, trial_id: str, key: str, value: str) -> None:
        """Attaches a fact to a trial that has not ended, such as its MLflow run."""
        self._ot_trials[trial_id].set_user_attr(key, value)

    def known(self, trial_id: str) -> FrozenTrial:
        """What the study's file holds of a trial."""
        return self.study._storage.get_trial(self._ot_trials[trial_id]._trial_id)

    def _finished(self) -> list[FrozenTrial]:
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]

    def _ask(self) -> optuna.Trial:
        # Randomness comes from the seed and the trial's number alone. One generator for all trials would begin again
        # in a resumed study and suggest its first trials a second time.
        trials = self.study.get_trials(deepcopy=False)
        number = min((trial.number for trial in trials if trial.state == TrialState.WAITING), default=len(trials))
        ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
        num_others = sum(is_rejected(trial) or repeat_of(trial) is not None for trial in ended)
        self.study.sampler = make_sampler(self.plan, number, num_others)
        if (repeat := next(iter(waiting_repeats(self.study)), None)) is not None:
            # Optuna would take the lowest number, which may be a trial that a time budget left in line.
            self.study._storage.set_trial_state_values(repeat._trial_id, TrialState.RUNNING)
            return optuna.Trial(self.study, repeat._trial_id)
        return self.study.ask()

    def _catch_up(self, trial: optuna.Trial, runs: Sequence[RunConfig]) -> None:
        """Reads epochs that a dead driver did not hear of; a run goes on after its checkpoint and skips them."""
        folds = Folds(self.plan.config.metric, self.plan.base.num_epochs)
        for run in runs:
            if (found := newest(run_folder(run))) is None:
                return
            record = read_record(found)
            for row in read_rows(run_folder(run) / "metrics.jsonl"):
                if row["step"] <= record["epoch"]:
                    self._keep(trial, folds.epoch(row))
            folds.end(record["metrics"] | {"epoch": record["epoch"]})

    def _cost(self, trial: optuna.Trial) -> float:
        from meamtm.model.cost import cost

        known = self.study._storage.get_trial(trial._trial_id)
        spent = cost(self.plan.trial(trial.number, point_of(known)), count_labels(self.plan.base.data.path))
        return float(getattr(spent, f"num_{self.plan.config.cost}"))

    def _reject(self, trial: optuna.Trial, point: Mapping[str, Value]) -> str | None:
        """Ends a suggestion that builds no run, or one over the limits, and returns why; Optuna learns to avoid it."""
        over, reason = excess(self.plan, trial.number, point)
        if not trial.constraints:
            trial.set_constraint("limits", over)
        if reason is not None:
            given = self.study._storage.get_trial(trial._trial_id).system_attrs.get("fixed_params")
            if given and "drawn" not in trial.user_attrs:
                point = {key: decode(value) for key, value in given.items()}
                self.refusals.append(f"the start point {point} is left out: {reason}")
            trial.set_user_attr("rejected", reason)
            self.study.tell(trial, state=TrialState.PRUNED)
        return reason

    def _turn_down(self, trial: optuna.Trial) -> bool:
        """Ends a suggestion that would repeat an earlier trial bit for bit; one whose worker died may be tried again.

        It is told as FAIL, of which TPE takes no notice: PRUNED would call the point a bad one."""
        if repeat_of(trial) is not None:
            return False
        for other in self.study.get_trials(deepcopy=False):
            same = other.number != trial.number and other.params == trial.params
            has_died = other.user_attrs.get("error") == DIED
            was_tried = is_refused(other) or not is_rejected(other)
            if same and was_tried and not has_died and repeat_of(other) is None:
                trial.set_user_attr("rejected", f"trial {other.number} is the same")
                self.study.tell(trial, state=TrialState.FAIL)
                return True
        return False

    def _draw(self) -> bool:
        """Puts a point in line that no trial has had, drawn at random; False where there seems to be none."""
        trials = self.study.get_trials(deepcopy=False)
        died = [trial.params for trial in trials if trial.user_attrs.get("error") == DIED]
        tried = [trial.params for trial in trials if died.count(trial.params) != 1]
        draws = optuna.create_study(sampler=RandomSampler(_seed(self.plan, len(trials))))
        for _ in range(DRAWS):
            drawn = draws.ask()
            self.plan.space(drawn)
            if drawn.params not in tried:
                self.study.enqueue_trial(drawn.params, user_attrs={"drawn": True})
                return True
        return False

    def _keep(self, trial: optuna.Trial, result: Mapping[str, Any]) -> None:
        for attribute, key in {"error": "failure", "checkpoint": "checkpoint_path", "hits": "hits"}.items():
            if result.get(key):
                trial.set_user_attr(attribute, result[key])
        value, epoch = result.get(self.plan.config.metric), result.get("epoch")
        if value is not None and epoch is not None and math.isfinite(value):
            # Written past Trial.report, which warns when a resumed trial measures an epoch again.
            self.study._storage.set_trial_intermediate_value(trial._trial_id, int(epoch), float(value))


def _without_address(run: RunConfig) -> dict[str, Value]:
    """What Tune passes on, and keeps in files: the driver alone talks to MLflow, whose address may hold a password."""
    return flatten(run) | {"tracking.uri": None}


def make_sampler(plan: Plan, number: int, num_others: int = 0) -> TPESampler:
    """TPE whose random state belongs to one trial; conditional spaces are searched group by group.

    Optuna counts all trials among those before which it does not learn, others than the search's too: suggestions that
    were refused, and finalists that trained again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of `group`, there since Optuna 2.8
        return TPESampler(
            seed=_seed(plan, number),
            n_startup_trials=plan.config.startup_trials + num_others,
            multivariate=True,
            group=plan.space.is_conditional,
        )


def _seed(plan: Plan, number: int) -> int:
    return int(np.random.SeedSequence([plan.config.seed, number]).generate_state(1)[0])
