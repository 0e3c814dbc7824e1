"""A trial of several folds against the best one so far: who names fewer clips right, and not by luck, ends.

Both have heard the same clips in the same order, so each clip that only one of them names right is a toss of a coin if
they are equals (McNemar 1947). Finalists that train again run to their end."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.schedulers.async_hyperband import _Bracket

from tune.config import ACCURACY
from tune.history import ranked
from tune.plan import Plan

if TYPE_CHECKING:
    from optuna import Study


def luck(hits: str, others: str) -> float:
    """How probable it is that equals differ as much to the other's favour; hits are a 1 or 0 for each clip.

    Of the other's, as many count as there are of one's own. 1 where they agree on all clips."""
    lost = sum(mine < other for mine, other in zip(hits, others, strict=False))
    won = sum(mine > other for mine, other in zip(hits, others, strict=False))
    tosses = lost + won
    return sum(math.comb(tosses, heads) for heads in range(lost, tosses + 1)) / 2**tosses


class Race(TrialScheduler):
    """Goes before one of Ray's schedulers, which judges what it lets go on."""

    def __init__(self, plan: Plan, study: "Study", **options: Any) -> None:
        super().__init__(**options)
        self._plan, self._study = plan, study

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Says whether a trial goes on after an epoch."""
        if trial.config["is_repeat"]:
            return TrialScheduler.CONTINUE
        if result.get("hits") and self._is_beaten(result):
            return TrialScheduler.STOP
        return super().on_trial_result(tune_controller, trial, result)  # type: ignore[reportAbstractUsage]

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Hears how a trial ended; what finalists are worth at their end is no measure for the others' epochs."""
        if not trial.config["is_repeat"]:
            super().on_trial_complete(tune_controller, trial, result)  # type: ignore[reportAbstractUsage]

    def _is_beaten(self, result: Mapping[str, Any]) -> bool:
        if self._plan.config.metric != ACCURACY:
            return False  # a better loss or F1 may come with fewer hits
        best = next(iter(ranked(self._study, self._plan.config.mode)), None)
        if best is None:
            return False
        hits, others = result["hits"], best.user_attrs.get("hits", "")
        if len(others) <= len(hits) or luck(hits, others) >= self._plan.config.race_p:
            return False
        # Fewer hits may come with a better mean where folds differ in size, and the mean is what a trial is worth.
        return result[ACCURACY] < best.intermediate_values.get(result["epoch"], math.inf)


class PatientBracket(_Bracket):
    """Rungs that end nobody before enough trials have come to tell: of three trials about one goes on, so the third may
    be the first to end. Ray's own would end the second, whatever it is, if the first was better."""

    def __init__(self, *rungs: Any, begin: int, **options: Any) -> None:
        """Takes what Ray's takes, and the epoch after which it begins to count."""
        super().__init__(*rungs, **options)
        self._rungs = [(begin + epoch, recorded) for epoch, recorded in self._rungs]

    def cutoff(self, recorded: Mapping[str, float]) -> Any:
        """What a trial must reach at a rung, given the others there; None while there are too few."""
        return super().cutoff(recorded) if len(recorded) + 1 >= self.rf else None


class RacingASHA(Race, ASHAScheduler):
    """A race between folds, and successive halving (Li 2020) within the first."""

    def __init__(self, plan: Plan, study: "Study", **options: Any) -> None:
        super().__init__(plan, study, **options)
        begin = plan.base.pretrain.epochs  # a trial that guesses has nothing to be judged by
        rungs = (options["grace_period"] - begin, options["max_t"] - begin, options["reduction_factor"], 0)
        self._brackets = [PatientBracket(*rungs, begin=begin, stop_last_trials=options["stop_last_trials"])]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Takes a trial in, with the epochs that it had under an earlier driver: whatever was judged then is done."""
        super().on_trial_add(tune_controller, trial)
        known = self._study.trials[trial.config["number"]].intermediate_values
        for epoch, value in sorted(known.items()):
            self.on_trial_result(tune_controller, trial, {"epoch": epoch, self._plan.config.metric: value})


class RacingFIFO(Race, FIFOScheduler):
    """A race between folds alone."""
