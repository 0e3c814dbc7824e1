"""One suggestion -> one trained run: inside the Tune trial for small models, on Ray Train workers for others.

Either way it is `train(config, context)` in the trial's own run folder, so a trial that is asked again continues from
its newest checkpoint."""

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import ray.tune
import torch
from ray.tune.integration.ray_train import TuneReportCallback

from meamtm.config import RunConfig, from_flat
from meamtm.data.packed import read_card
from meamtm.distributed import make_trainer
from meamtm.errors import MeamtmError
from meamtm.model.memory import check_memory
from meamtm.tracking import JsonLines
from meamtm.training.checkpoint import newest, read_record
from meamtm.training.context import LocalContext, choose_device
from meamtm.training.lock import held
from meamtm.training.notes import following
from meamtm.training.run import run_folder
from meamtm.training.train import train

RELEASE_S = 30.0
"""How long the process of an earlier attempt at the same trial may take to die."""


def run_trial(suggestion: dict[str, Any]) -> None:
    """Trains what `TruthfulSearch.suggest` returned; Tune's function.

    What the user can put right would go wrong again, so it is only reported; after other errors Tune may retry."""
    run = from_flat(suggestion["run"])
    try:
        if run.scale.most_workers > 0:
            _train_on_workers(run)
        else:
            _train_here(run)
    except MeamtmError as error:
        ray.tune.report({"failure": str(error)})
    except Exception as error:
        cause = next(iter(getattr(error, "worker_failures", {}).values()), error)  # of a Ray Train run
        ray.tune.report({"failure": f"{type(cause).__name__}: {cause}".splitlines()[0]})
        raise


class TrialContext:
    """A run inside a Tune trial: a plain run whose epochs Tune hears of."""

    rank = 0
    world_size = 1

    def __init__(self, local: LocalContext) -> None:
        self.local = local
        self.device = local.device
        self.has_reported = False

    def resume_from(self) -> Path | None:
        """Names the newest complete checkpoint in the trial's run folder."""
        return self.local.resume_from()

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None = None) -> None:
        """Publishes the checkpoint, then waits for Tune, which may end the trial here by SystemExit."""
        self.local.report(metrics, checkpoint)
        if metrics:
            self.has_reported = True
            published = {"checkpoint_path": str(self.local.folder / checkpoint.name)} if checkpoint is not None else {}
            ray.tune.report({**metrics, **published})

    def should_stop(self) -> bool:
        """Never asks to stop: Tune ends a trial where it reports."""
        return False


def _train_here(run: RunConfig) -> None:
    torch.set_num_threads(run.scale.threads or max(1, int(run.scale.cpus_per_worker)))
    folder, device = run_folder(run), choose_device(run.scale)
    card = read_card(run.data.path)
    check_memory(run, len(card.classes), card.num_clips, device)
    with held(folder, RELEASE_S), closing(JsonLines(folder / "metrics.jsonl")) as lines:
        lines.start({}, {}, from_step=_epochs_done(run))
        context = TrialContext(LocalContext(folder, device, sinks=[lines]))
        metrics = train(run, context)
        if not context.has_reported:  # it was finished already when its driver died
            ray.tune.report(metrics)


def _train_on_workers(run: RunConfig) -> None:
    folder = run_folder(run)
    with held(folder, RELEASE_S), closing(JsonLines(folder / "metrics.jsonl")) as lines:
        lines.start({}, {}, from_step=_epochs_done(run))
        with following(folder, [lines]):
            metrics = make_trainer(run, callbacks=[TuneReportCallback()]).fit().return_value
        assert isinstance(metrics, dict), "every worker returns the last metrics"
        ray.tune.report(metrics)  # again, since the callback's last report may come after the end of this function


def _epochs_done(run: RunConfig) -> int:
    found = newest(run_folder(run))
    return int(read_record(found)["epoch"]) if found is not None else 0
