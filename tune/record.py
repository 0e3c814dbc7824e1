"""What Tune hears of its trials -> an MLflow run for each, below the study's own, and a line for the user.

All of it happens in the driver: one process writes to MLflow, so a SQLite file serves any number of trials, and a run
ends with its true state even when its worker was killed."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray.tune

from meamtm.errors import ServiceError
from meamtm.tracking import MLflowSink, Status
from tune.history import Outcome, judge, point_of, repeat_of, trained
from tune.plan import Plan
from tune.runs import end_all, end_child, start_child
from tune.search import TruthfulSearch
from tune.tables import describe

logger = logging.getLogger(__name__)


class Recorder(ray.tune.Callback):
    """Follows the trials of one search. `tell` takes one line per finished trial; `heed_signal` ends the search by
    KeyboardInterrupt once it has been told to stop."""

    def __init__(
        self,
        plan: Plan,
        search: TruthfulSearch,
        parent: MLflowSink | None,
        tags: Mapping[str, str],
        *,
        tell: Callable[[str], None],
        heed_signal: Callable[[], None],
    ) -> None:
        self.plan, self.search, self.parent, self.tags, self.tell = plan, search, parent, tags, tell
        self.heed_signal = heed_signal
        self.sinks: dict[str, MLflowSink] = {}
        self.began_s: dict[str, float] = {}
        self.logged: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leaves everything behind: Tune pickles its callbacks for a restore that the study's file makes needless."""
        return {}

    def on_step_begin(self, iteration: int, trials: Any, **info: Any) -> None:  # noqa: ARG002
        """Ends the search here if it has been told to stop: no file is being written."""
        self.heed_signal()

    def on_trial_start(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Opens the trial's MLflow run, or continues the one it had; tells what was refused before it."""
        while self.search.refusals:
            self.tell(f"{self.plan.name}: {self.search.refusals.pop(0)}")
        self.began_s.setdefault(trial.trial_id, time.monotonic())
        if trial.trial_id not in self.sinks:
            self._open(trial)

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any) -> None:  # noqa: ARG002
        """Logs an epoch."""
        epoch = int(result.get("epoch", 0))
        if epoch > self.logged.get(trial.trial_id, 0) and (sink := self.sinks.get(trial.trial_id)):
            self.logged[trial.trial_id] = epoch
            sink.log({key: value for key, value in result.items() if _is_metric(key, value)}, epoch)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Closes the run of a trial that ended, early or not."""
        self._end(trial, judge(trial.last_result, self.plan.config.metric, self.plan.num_epochs))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Closes the run of a trial that failed."""
        self._end(trial, "failed")

    def close(self, status: Status = "KILLED") -> None:
        """Ends the runs of trials that are still open, all at once."""
        end_all(self.sinks.values(), status)
        self.sinks.clear()

    def _open(self, trial: Any) -> None:
        if self.parent is None:
            return
        known = self.search.known(trial.trial_id)
        from_step = known.last_step or 0  # up to there the sink catches up by itself
        try:
            sink = start_child(self.plan, self.parent, known, self.tags, from_step)
        except ServiceError as error:
            logger.warning("trial %d is not in MLflow yet: %s", known.number, error)
            return
        self.sinks[trial.trial_id], self.logged[trial.trial_id] = sink, from_step
        self.search.note(trial.trial_id, "mlflow_run_id", str(sink.run_id))

    def _end(self, trial: Any, outcome: Outcome) -> None:
        known = self.search.known(trial.trial_id)
        error = known.user_attrs.get("error", "") if outcome in ("failed", "rejected") else ""
        if sink := self.sinks.pop(trial.trial_id, None):
            end_child(sink, outcome, error)
        value = (trial.last_result or {}).get(self.plan.config.metric)
        measured = error or f"{self.plan.config.metric} {value:.4f}"
        elapsed_s = time.monotonic() - self.began_s.get(trial.trial_id, time.monotonic())
        repeat = repeat_of(known)
        done = f"{len(trained(self.search.study)):>3}/{self.plan.config.trials}  trial {known.number:<3}"
        if repeat is not None:
            done = f"finalist {repeat.number:<3} seed {repeat.seed:<3}"
        spent = f"{known.last_step or 0} epochs  {elapsed_s:.0f} s"
        self.tell(f"{done} {outcome:<8}  {measured}  {spent}  {describe(point_of(known))}")


def _is_metric(key: str, value: Any) -> bool:
    return ("/" in key or key == "epoch") and isinstance(value, int | float)
