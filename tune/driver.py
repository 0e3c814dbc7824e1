"""A plan -> its missing trials, trained on a Ray cluster: resources, early stopping, and what happens when it is told
to stop."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import ray
import ray.tune
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from meamtm.config import ScaleConfig
from meamtm.distributed import (
    check_resources,
    connect,
    connected_for_now,
    named_address,
    needs,
    room_for,
    room_with_memory,
)
from meamtm.errors import ConfigError
from meamtm.tracking import MLflowSink
from meamtm.training.memory import LIBRARIES_BYTES, needed_bytes
from meamtm.training.run import absolute
from tune.history import requeue, settle, trained
from tune.interrupt import between_steps
from tune.plan import Plan
from tune.race import RacingASHA, RacingFIFO
from tune.record import Recorder
from tune.search import TruthfulSearch
from tune.trial import run_trial

if TYPE_CHECKING:
    from optuna import Study

QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the other output engine does not know verbose=0
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # copies of what metrics.jsonl holds, as CSV, JSON and TensorBoard
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours ends every run truthfully, and in time
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that fails reports its reason and no metric
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a path means the same everywhere
}
"""Environment defaults for Ray in this process and in its workers; a value that the user has set stays."""


NOTHING = {"memory": 1.0}
"""A byte: what a trial reserves that only waits for its Ray Train workers; Ray refuses a reservation of nothing."""


def run_trials(
    plan: Plan, parent: MLflowSink | None, tags: Mapping[str, str], tell: Callable[[str], None], num_trials: int
) -> None:
    """Runs so many trials; raises what ended the search early, with every trial back in line."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with _log_of_ray(plan.folder / "ray.log"), between_steps() as heed_signal, _cluster(plan.base.scale):
        heed_signal()
        search = TruthfulSearch(plan, count_at_once(plan))
        recorder = Recorder(plan, search, parent, tags, tell=tell, heed_signal=heed_signal)
        try:
            _make_tuner(plan, search, recorder, num_trials).fit()
            search.check_failures()
            if search.exhausted is not None:
                tell(f"{plan.name}: {search.exhausted}, so the search ends; widen the space")
            settle(search.study)
        finally:
            requeue(search.study)
            recorder.close("KILLED")


def _make_tuner(plan: Plan, search: TruthfulSearch, recorder: Recorder, num_trials: int) -> ray.tune.Tuner:
    scale = plan.base.scale
    return ray.tune.Tuner(
        ray.tune.with_resources(run_trial, needs(scale) if scale.most_workers == 0 else NOTHING),
        tune_config=ray.tune.TuneConfig(
            search_alg=search,
            scheduler=make_scheduler(plan, search.study),
            num_samples=num_trials,
            # One trial more than there is room for would be suggested without knowing how the others end.
            max_concurrent_trials=min(search.at_once, num_trials),
            time_budget_s=plan.config.time_budget_s,
            reuse_actors=scale.most_workers == 0,
            trial_dirname_creator=lambda trial: f"trial-{trial.config['number']:04d}-{trial.trial_id}",
        ),
        run_config=ray.tune.RunConfig(
            name=time.strftime("%Y%m%d-%H%M%S"),
            storage_path=str(plan.folder / "ray"),
            callbacks=[recorder],
            failure_config=ray.tune.FailureConfig(max_failures=scale.max_failures if scale.most_workers == 0 else 0),
            verbose=0,
        ),
    )


def make_scheduler(plan: Plan, study: "Study") -> TrialScheduler:
    """ASHA in the first fold and a race after each, or neither where cheap trials are sought too.

    ASHA remembers the trials of earlier drivers, and judges no epoch twice of those that go on."""
    if plan.config.cost is not None:
        return FIFOScheduler()
    if plan.grace_epochs is None:
        return RacingFIFO(plan, study)
    scheduler = RacingASHA(
        plan,
        study,
        time_attr="epoch",
        metric=plan.config.metric,
        mode=plan.config.mode,
        max_t=plan.base.num_epochs - 1,  # a trial that has reached its last epoch is left to end by itself
        grace_period=plan.grace_epochs,
        reduction_factor=plan.config.asha.reduction,
        stop_last_trials=False,
    )
    for trial in trained(study):
        config = {"number": trial.number, "is_repeat": False}
        earlier: Any = SimpleNamespace(trial_id=f"earlier-{trial.number}", config=config)
        controller: Any = None
        scheduler.on_trial_add(controller, earlier)
    return scheduler


def count_at_once(plan: Plan) -> int:
    """Counts trials that train at once: what the study says, or as many as processors, GPUs and memory have room for.

    Memory is that of the largest start point, or where there is none, of the base run. A GPU's is shared by
    `scale.gpus_per_worker`, and several workers are looked at by themselves."""
    scale = plan.base.scale
    check_resources(scale)
    if plan.config.max_concurrent is not None:
        return plan.config.max_concurrent
    wanted = needs(scale)
    if scale.most_workers > 0:
        return max(1, room_for(wanted) // scale.most_workers)
    if "GPU" in wanted:
        return room_for(wanted)
    runs = [plan.trial(0, point) for point in plan.config.start] or [plan.base]
    return room_with_memory(wanted, LIBRARIES_BYTES + max(needed_bytes(absolute(run)) for run in runs))


@contextmanager
def _cluster(scale: ScaleConfig) -> Iterator[None]:
    if (named_address(scale.address) or "").startswith("ray://"):
        raise ConfigError(
            "scale.address=ray://...: a study runs on the cluster itself, not through a client; name HOST:6379, or "
            "submit the study as a job (`python -m jobs submit`)"
        )
    with connected_for_now():
        connect(scale.address, dashboard=scale.most_workers > 0)  # which frees the resources of stopped Ray Train runs
        yield


@contextmanager
def _log_of_ray(path: Path) -> Iterator[None]:
    """Sends what Ray logs in this process to a file, off the user's screen."""
    logger = logging.getLogger("ray")
    before, file = (logger.handlers, logger.propagate), logging.FileHandler(path)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger.handlers, logger.propagate = [file], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before
        file.close()
