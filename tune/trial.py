"""One suggestion -> one trained run for each fold: inside the Tune trial for small models, else on workers.

Either way it is `train(config, context)` in a run folder of its own, so a trial that is asked again continues from its
newest checkpoint."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from copy import copy
from pathlib import Path
from typing import Any

import ray.tune
import torch
from ray.tune.integration.ray_train import TuneReportCallback

from meamtm.config import RunConfig, from_flat, override, run_folder
from meamtm.distributed import make_trainer, most_here, needs
from meamtm.errors import MeamtmError, TooLargeError
from meamtm.tracking import JsonLines
from meamtm.training.checkpoint import newest, read_record
from meamtm.training.context import LocalContext, choose_device
from meamtm.training.evaluate import evaluate
from meamtm.training.heap import settle_for_good
from meamtm.training.lock import held
from meamtm.training.memory import check_memory
from meamtm.training.notes import following
from meamtm.training.run import report_again
from meamtm.training.train import train
from tune.folds import Folds

RELEASE_S = 30.0
"""How long the process of an earlier attempt at the same trial may take to die."""


def run_trial(suggestion: dict[str, Any]) -> None:
    """Trains what `TruthfulSearch.suggest` returned; Tune's function.

    What the user can put right would go wrong again, so it is only reported; after other errors Tune may retry."""
    runs, at_once = [from_flat(run) for run in suggestion["runs"]], suggestion["at_once"]
    folds = Folds(suggestion["metric"], runs[0].num_epochs)
    try:
        for run in runs:
            metrics = _train_on_workers(run, folds) if run.scale.most_workers > 0 else _train_here(run, folds, at_once)
            ray.tune.report(folds.end(metrics, _hits(run) if len(runs) > 1 else ""))
    except MeamtmError as error:
        ray.tune.report(_failure(error, runs, is_repeat=suggestion["is_repeat"]))
    except Exception as error:
        cause = next(iter(getattr(error, "worker_failures", {}).values()), error)  # of a Ray Train run
        if isinstance(cause, TooLargeError):
            ray.tune.report(_failure(cause, runs, is_repeat=suggestion["is_repeat"]))
            return
        ray.tune.report({"failure": f"{type(cause).__name__}: {cause}".splitlines()[0]})
        raise


class TrialContext:
    """A run inside a Tune trial: a plain run whose epochs Tune hears of."""

    rank = 0
    world_size = 1

    def __init__(self, local: LocalContext, tell: Callable[[dict[str, Any]], None]) -> None:
        self.local, self.tell = local, tell
        self.device = local.device

    def resume_from(self) -> Path | None:
        """Names the newest complete checkpoint in the trial's run folder."""
        return self.local.resume_from()

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None = None) -> None:
        """Publishes the checkpoint, then waits for Tune, which may end the trial here by SystemExit."""
        self.local.report(metrics, checkpoint)
        if metrics:
            published = {"checkpoint_path": str(self.local.folder / checkpoint.name)} if checkpoint is not None else {}
            self.tell({**metrics, **published})

    def should_stop(self) -> bool:
        """Never asks to stop: Tune ends a trial where it reports."""
        return False


class ReportFold(TuneReportCallback):
    """Tells Tune of a Ray Train run's epochs."""

    def __init__(self, folds: Folds) -> None:
        super().__init__()
        self._folds = copy(folds)  # as they are now: the last report may come when the next fold has begun

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Hears what all workers report, of which the first one's counts; the epoch of a stop has no metrics."""
        super().after_report(run_context, [self._folds.epoch(metrics[0]) if metrics[0] else {}], checkpoint)


def _failure(error: MeamtmError, runs: Sequence[RunConfig], *, is_repeat: bool) -> dict[str, Any]:
    """What is too large is rejected, so that another suggestion takes its place; but none takes that of a finalist, nor
    of what has trained already."""
    told: dict[str, Any] = {"failure": str(error)}
    if isinstance(error, TooLargeError) and not is_repeat and all(newest(run_folder(run)) is None for run in runs):
        told["excess"] = error.excess
    return told


def _train_here(run: RunConfig, folds: Folds, at_once: int) -> dict[str, float]:
    settle_for_good()
    torch.set_num_threads(run.scale.worker_threads)
    folder, device = run_folder(run), choose_device(run.scale)
    check_memory(run, device, min(at_once, most_here(needs(run.scale))) if at_once > 1 else 1)
    with held(folder, RELEASE_S), closing(JsonLines(folder / "metrics.jsonl")) as lines:
        lines.start({}, {}, from_step=_epochs_done(run))
        context = TrialContext(
            LocalContext(folder, device, sinks=[lines]), lambda metrics: ray.tune.report(folds.epoch(metrics))
        )
        report_again(context, folder)
        return train(run, context)


def _train_on_workers(run: RunConfig, folds: Folds) -> dict[str, float]:
    folder = run_folder(run)
    with held(folder, RELEASE_S), closing(JsonLines(folder / "metrics.jsonl")) as lines:
        lines.start({}, {}, from_step=_epochs_done(run))
        with following(folder, [lines]):
            metrics = make_trainer(run, callbacks=[ReportFold(folds)]).fit().return_value
        assert isinstance(metrics, dict), "every worker returns the last metrics"
        return metrics


def _hits(run: RunConfig) -> str:
    """Which clips of a trained run's validation fold its model names right; all labels, where there are several."""
    checkpoint = newest(run_folder(run))
    assert checkpoint is not None, "training ends with a checkpoint"
    # Where workers train, they have the GPUs, and this process has reserved none.
    here = override(run, {"scale.device": "cpu"}) if run.scale.most_workers > 0 else run
    found = evaluate(checkpoint, fold=run.data.valid_fold, here=here)
    right = found.probability.argmax(1) == found.target.argmax(1)
    if found.confusion is None:
        right = ((found.probability > 0.5) == (found.target > 0.5)).all(1)
    return "".join("01"[int(hit)] for hit in right)


def _epochs_done(run: RunConfig) -> int:
    found = newest(run_folder(run))
    return int(read_record(found)["epoch"]) if found is not None else 0
