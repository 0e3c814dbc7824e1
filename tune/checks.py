"""A plan -> what must hold of its data and teachers, said before anything starts."""

from collections.abc import Iterable

from meamtm.config import override
from meamtm.errors import CheckpointError, ConfigError
from tune.config import ACCURACY, MAP
from tune.finalists import finalist_seeds
from tune.plan import Plan
from tune.result import Row
from tune.runs import run_folder_of


def check_data(plan: Plan) -> dict[str, str]:
    """Opens the data, so that what is wrong with it is said before anything starts, and returns all runs' tags."""
    from meamtm.data.cache import open_clips
    from meamtm.training.run import absolute, check_split, tags

    base = absolute(plan.base)
    clips = open_clips(base.data, base.mel.sample_rate_hz)
    if clips.multi_label and plan.config.metric == ACCURACY:
        raise ConfigError(
            f"objective={ACCURACY}: clips of {base.data.path} have several labels, and who hears none is right about "
            "all that are absent; set objective=valid/map or valid/macro_f1"
        )
    if not clips.multi_label and plan.config.metric == MAP:
        raise ConfigError(
            f"objective={MAP}: clips of {base.data.path} have one label each, for which it is not computed; set "
            f"objective={ACCURACY} or valid/macro_f1"
        )
    if clips.has_split and plan.config.inner_folds:
        raise ConfigError(
            f"inner_folds={list(plan.config.inner_folds)}: {base.data.path} has a split of its own, so folds decide "
            "nothing; set inner_folds=[], and the valid clips of that split choose"
        )
    searched = plan.space.ranges.get("train.keep")
    keeps_best = base.train.keep == "best" or (searched is not None and searched.contains("best"))
    if keeps_best:
        reason = (
            "compares trials by their last epoch, which would not be the one that is kept"
            if clips.has_split
            else "trains its best trial again on the validation clips too, so nothing is left to choose its epoch"
        )
        raise ConfigError(f"train.keep=best: a study {reason}; set train.keep=last")
    there = sorted(set(clips.folds.tolist()))
    if strange := [fold for fold in plan.config.inner_folds if fold not in there]:
        raise ConfigError(
            f"inner_folds={list(plan.config.inner_folds)}: {base.data.path} has no clip in fold {strange[0]}; name "
            f"folds that it has: {', '.join(map(str, there))}"
        )
    for run in plan.runs(base):
        if len(check_split(run, clips).valid) > 0:
            continue
        if clips.has_split:
            raise ConfigError(
                f"data.path={base.data.path}: no clip of its split is for validation, on which a study chooses; pack "
                "it with some clips in `valid`"
            )
        raise ConfigError(
            "data.valid_fold=None: a study chooses on an inner validation fold, never on data.test_fold "
            f"({base.data.test_fold}); set data.valid_fold to another fold, or inner_folds"
        )
    shared = tags(base)
    del shared["signature"]  # each run has its own
    return shared


def check_teachers(plan: Plan) -> None:
    """Looks for the teacher of every run that the study may come to, so that the last is not missed after the others:
    of each seed of a trial's folds, and of what is chosen."""
    from meamtm.training.run import absolute
    from meamtm.training.teacher import find_teachers

    base = absolute(plan.base)
    for seed in (base.train.seed, *finalist_seeds(plan)):
        for run in plan.runs(override(base, {"train.seed": seed})):
            find_teachers(run)
    find_teachers(absolute(plan.chosen({})))


def check_digest(plan: Plan, known: str | None, digest: str) -> None:
    """Refuses to compare trials that were trained on different data."""
    if known not in (None, digest):
        raise CheckpointError(
            f"{plan.folder}: its trials were trained on other data than {plan.base.data.path!r} (digest {known}, not "
            f"{digest}); set another name, or remove that folder"
        )


def digest_of_trials(plan: Plan, trials: Iterable[Row]) -> str | None:
    """Asks the checkpoints of a study of an earlier version, which did not keep the digest itself."""
    for row in trials:
        for run in plan.runs(plan.trial(row.number, row.point, row.seed)) if row.state != "WAITING" else ():
            if run_folder_of(run).exists():
                from meamtm.training.checkpoint import taught_by

                if (digest := taught_by(run_folder_of(run))) is not None:
                    return digest
    return None
