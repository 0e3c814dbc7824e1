"""A study file -> what its way of choosing is worth: for each fold a study of its own, which never hears that fold, and
what it chooses is trained again and tested there.

Nested cross-validation (Stone 1974; Varma 2006). Studies and runs are those of `python -m tune` and `meamtm train`, so
the same call continues what was interrupted, and a study that was run before counts."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from meamtm.config import RunConfig, override
from meamtm.crossval import CrossValidation, evaluate_runs, find_folds
from meamtm.distributed import Heard
from meamtm.errors import ConfigError, DataError
from meamtm.files import whole_file
from meamtm.training.run import absolute
from tune.plan import Plan, load_plan
from tune.result import Result
from tune.study import Tell, run_study

CHOICES = "choices.csv"


@dataclass(frozen=True)
class Nested:
    """A study for each fold that is to be tested."""

    plans: dict[int, Plan]
    folder: Path
    """Of the result, beside those of the studies; the same whichever folds are tested."""

    def runs(self, results: Mapping[int, Result], num_seeds: int) -> dict[tuple[int, int], RunConfig]:
        """Gives the run of each fold and seed: what its study chose; the first seed's is the study's own last run."""
        found = {}
        for step in range(num_seeds):
            for fold, plan in self.plans.items():
                best = absolute(plan.chosen(results[fold].best_row.point))
                seed = best.train.seed + step
                found[fold, seed] = override(best, {"train.seed": seed})
        return found


def plan_nested(path: str | Path, words: Sequence[str] = (), folds: Sequence[int] = ()) -> Nested:
    """Turns a study file's test fold and inner folds round together, to each fold of the data set or to those named.

    So the study that the file itself describes is one of them, if it names a test fold. Raises ConfigError where it
    names no inner fold, and DataError for a fold that does not exist."""
    plan = load_plan(path, words)
    data = plan.base.data
    there = find_folds(absolute(plan.base))
    inner = plan.config.inner_folds or ((data.valid_fold,) if data.valid_fold is not None else ())
    if not inner:
        raise ConfigError("data.valid_fold=None: a study chooses on an inner validation fold; set it, or inner_folds")
    test = data.test_fold if data.test_fold is not None else there[0]
    if lacking := sorted({test, *inner, *folds} - set(there)):
        raise DataError(f"{data.path} has no fold {lacking[0]}; choose from {', '.join(map(str, there))}")

    def turned(fold: int) -> Plan:
        by = there.index(fold) - there.index(test)
        others = [there[(there.index(one) + by) % len(there)] for one in inner]
        choosing = f"inner_folds={others}" if plan.config.inner_folds else f"data.valid_fold={others[0]}"
        return load_plan(path, [*words, f"data.test_fold={fold}", choosing])

    studies = Path(plan.config.studies_dir).expanduser().resolve()
    folder = studies / f"{plan.config.name}-nested-{turned(there[0]).signature}"
    return Nested({fold: turned(fold) for fold in sorted(set(folds)) or there}, folder)


def choose_each(nested: Nested, tell: Tell) -> dict[int, Result]:
    """Runs what is missing of each study, one after the other; `tell` takes lines for the user."""
    results = {}
    for number, (fold, plan) in enumerate(nested.plans.items(), 1):
        tell(f"study {number}/{len(nested.plans)}: {plan.name}, which never hears fold {fold}")
        results[fold] = run_study(plan, tell)
    return results


def evaluate_nested(
    nested: Nested,
    results: Mapping[int, Result],
    num_seeds: int = 1,
    heard: Heard = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> CrossValidation:
    """Trains and tests each study's choice with so many seeds, and keeps what was chosen beside the result."""
    nested.folder.mkdir(parents=True, exist_ok=True)
    _write_choices(results, nested.folder / CHOICES)
    base = next(iter(nested.plans.values())).base
    shown = absolute(override(base, {"data.test_fold": None, "data.valid_fold": None}))
    return evaluate_runs(shown, nested.folder, nested.runs(results, num_seeds), heard, should_stop)


def _write_choices(results: Mapping[int, Result], path: Path) -> None:
    keys = list(dict.fromkeys(key for result in results.values() for key in result.best_row.point))
    with whole_file(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["fold", "study", "trial", next(iter(results.values())).objective, *keys])
        for fold, result in results.items():
            best = result.best_row
            writer.writerow([fold, result.study, best.number, best.value, *(best.point.get(key, "") for key in keys)])
