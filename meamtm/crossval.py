"""A config -> what it is worth: each fold is tested by models that have not heard it, one per seed.

The folds that are tested choose nothing. Epochs are fixed beforehand, or with `train.keep=best` chosen on the next
fold, which then does not train."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from meamtm.config import RunConfig, flatten, override, run_folder, write_yaml
from meamtm.data.cache import open_clips
from meamtm.data.clips import Clips
from meamtm.data.packed import read_card
from meamtm.data.split import split_clips
from meamtm.distributed import Heard, run_all
from meamtm.errors import CheckpointError, DataError, ServiceError
from meamtm.files import whole_file
from meamtm.tracking import (
    confusion_figure,
    folds_figure,
    has_all,
    open_mlflow,
    per_class_table,
    resolve_uri,
    run_id_in,
    warn_of_rest,
)
from meamtm.training.checkpoint import newest, taught_by
from meamtm.training.evaluate import Evaluation
from meamtm.training.lock import held
from meamtm.training.predictions import (
    PREDICTIONS,
    Prediction,
    gather_predictions,
    read_predictions,
    score_predictions,
    write_predictions,
)
from meamtm.training.run import Outcome, absolute, is_tested, tags
from meamtm.training.teacher import find_teachers

SUMMARY = "crossval.json"


@dataclass(frozen=True)
class FoldRow:
    """What one run found on the fold that it had not heard."""

    fold: int
    seed: int
    run_folder: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class CrossValidation:
    """What a config is worth."""

    folder: str
    classes: tuple[str, ...]
    rows: tuple[FoldRow, ...]
    confusion: list[list[int]] | None
    """Answers by true class (row) and named class (column), over all rows; None where clips have several labels."""
    digest: str | None = None
    """Of the data set; None in a result of an earlier version."""
    ensemble: dict[str, float] | None = None
    """Metrics of the seeds' mean probabilities; None of one seed, and in a result of an earlier version."""

    @property
    def folds(self) -> list[int]:
        """Gives the folds that were tested, in order."""
        return sorted({row.fold for row in self.rows})

    @property
    def seeds(self) -> list[int]:
        """Gives the seeds that were trained with, in order."""
        return sorted({row.seed for row in self.rows})

    @property
    def score(self) -> str:
        """The metric that counts: mean average precision where clips have several labels, accuracy elsewhere."""
        return "accuracy" if self.confusion is not None else "map"

    @property
    def counted(self) -> str:
        """What the confusion matrix counts: with several seeds each clip comes as often."""
        return "clips" if len(self.seeds) == 1 else "answers"

    def values(self, fold: int | None = None, seed: int | None = None) -> list[float]:
        """Gives the score of each run, of one fold or one seed if named."""
        rows = (row for row in self.rows if fold in (None, row.fold) and seed in (None, row.seed))
        return [row.metrics[f"test/{self.score}"] for row in rows]

    def seed_means(self) -> list[float]:
        """Gives for each seed what the literature calls the result: its mean over the folds."""
        return [statistics.fmean(self.values(seed=seed)) for seed in self.seeds]

    def predictions(self) -> list[Prediction]:
        """Reads what the runs that had not heard a clip said of it, the most doubtful first."""
        return read_predictions(Path(self.folder) / PREDICTIONS)

    def figures(self) -> dict[str, float]:
        """Gives mean and standard deviation of each metric over all runs, that of the seeds' means, and the metrics of
        the seeds' ensemble."""
        found = {f"crossval/{self.score}_std_of_seeds": deviation(self.seed_means())}
        for key in self.rows[0].metrics:
            column = [row.metrics[key] for row in self.rows]
            name = f"crossval/{key.removeprefix('test/')}"
            found |= {f"{name}_mean": statistics.fmean(column), f"{name}_std": deviation(column)}
        return found | {f"crossval/ensemble_{key}": value for key, value in (self.ensemble or {}).items()}


def deviation(values: Sequence[float]) -> float:
    """Gives the standard deviation of a sample; of one value, which has none, 0."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def cross_validate(
    config: RunConfig,
    *,
    folds: Sequence[int] = (),
    num_seeds: int = 1,
    heard: Heard = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> CrossValidation:
    """Trains and tests a config on each fold (or those named) with seeds from `train.seed` on, and records the result.

    Each of these is a plain run, so the same call continues what was interrupted, and more seeds add to what is there.
    Raises DataError for a fold that does not exist, and whatever stops a run.
    """
    config = absolute(config)
    runs = plan_runs(config, folds, num_seeds)
    some = () if not folds or set(folds) == set(find_folds(config)) else sorted(set(folds))
    return evaluate_runs(config, crossval_folder(config, some, num_seeds), runs, heard, should_stop)


def evaluate_runs(
    config: RunConfig,
    folder: Path,
    runs: Mapping[tuple[int, int], RunConfig],
    heard: Heard = lambda *_: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> CrossValidation:
    """Trains and tests the runs of each fold and seed, and keeps the result in a folder, under what it is about."""
    digest = read_card(config.data.path).digest
    if (done := _read(folder)) is not None and _covers(done, runs) and not _lacks_predictions(done):
        _check_digest(done, digest, config.data.path)
        if config.tracking.mlflow and not has_all(folder, resolve_uri(config.tracking)):
            with held(folder):
                _tell_mlflow(config, done)
        return done
    for run in runs.values():  # one that has no teacher is told now, not after the others have trained
        if not is_tested(run):
            find_teachers(run)
    with held(folder):
        outcomes = run_all(list(runs.values()), heard, should_stop)
        predictions = gather_predictions([_evaluation(outcome) for outcome in outcomes])
        result = _gather(folder, dict(zip(runs, outcomes, strict=True)), digest, predictions)
        _write(config, result, predictions)
        if config.tracking.mlflow:
            _tell_mlflow(config, result)
    return result


def plan_runs(config: RunConfig, folds: Sequence[int], num_seeds: int) -> dict[tuple[int, int], RunConfig]:
    """Gives the run of each fold and seed; with `train.keep=best` the next fold around validates."""
    clips = open_clips(config.data, config.mel.sample_rate_hz)
    there = _folds_of(clips, config.data.path)
    if lacking := sorted(set(folds) - set(there)):
        raise DataError(
            f"--folds: {config.data.path} has no fold {lacking[0]}; choose from {', '.join(map(str, there))}"
        )
    if config.train.keep == "best" and len(there) < 3:
        raise DataError(f"train.keep=best: needs three folds, and {config.data.path} has two; set train.keep=last")
    runs = {}
    for seed in range(config.train.seed, config.train.seed + num_seeds):
        for fold in sorted(set(folds)) or there:
            inner = there[(there.index(fold) + 1) % len(there)] if config.train.keep == "best" else None
            changes = {"data.test_fold": fold, "data.valid_fold": inner, "train.seed": seed}
            runs[fold, seed] = override(config, changes)
    for run in runs.values():  # a class that lies in one fold alone is told now, not after the others have trained
        split_clips(clips, run.data)
    return runs


def find_folds(config: RunConfig) -> list[int]:
    """Gives the folds of a data set, in order; raises DataError where there is nothing to cross."""
    return _folds_of(open_clips(config.data, config.mel.sample_rate_hz), config.data.path)


def _folds_of(clips: Clips, path: str) -> list[int]:
    if clips.has_split:
        raise DataError(f"data.path={path}: has its own split; `meamtm train` tests on that")
    there = [int(fold) for fold in np.unique(clips.folds)]
    if len(there) < 2:
        raise DataError(f"data.path={path}: has one fold; pack at least two clips or groups of each class")
    return there


def crossval_folder(config: RunConfig, some_folds: Sequence[int] = (), num_seeds: int = 1) -> Path:
    """Names the folder of a cross-validation's result: that of the config without its folds. With several seeds, or of
    some folds alone, it is another one, so that what was found once is not replaced by less."""
    name = f"{config.name}-crossval"
    if some_folds:
        name += f"-folds-{'-'.join(map(str, some_folds))}"
    if num_seeds > 1:
        name += f"-seeds-{num_seeds}"
    return run_folder(override(config, {"name": name, "data.test_fold": None, "data.valid_fold": None}))


def _covers(done: CrossValidation, runs: Mapping[tuple[int, int], RunConfig]) -> bool:
    rows = {(row.fold, row.seed): Path(row.run_folder) for row in done.rows}
    return rows == {key: run_folder(run) for key, run in runs.items()} and all(path.exists() for path in rows.values())


def _check_digest(done: CrossValidation, digest: str, path: str) -> None:
    known = done.digest or taught_by(Path(done.rows[0].run_folder))
    if known not in (None, digest):
        raise CheckpointError(
            f"{done.folder} was found on other data than {path!r} (digest {known}, not {digest}); set another name, or "
            "remove that folder and its runs"
        )


def _lacks_predictions(done: CrossValidation) -> bool:
    """Whether a result of an earlier version lacks predictions, and its runs' checkpoints are there to make them."""
    if (Path(done.folder) / PREDICTIONS).exists():
        return False
    return all(newest(Path(row.run_folder)) is not None for row in done.rows)


def _gather(
    folder: Path, outcomes: Mapping[tuple[int, int], Outcome], digest: str, predictions: Sequence[Prediction]
) -> CrossValidation:
    rows, matrices, classes = [], [], ()
    for (fold, seed), outcome in outcomes.items():
        evaluation = _evaluation(outcome)
        rows.append(FoldRow(fold, seed, str(outcome.folder), evaluation.metrics))
        matrices.append(evaluation.confusion)
        classes = evaluation.classes
    total = None if matrices[0] is None else np.sum(matrices, axis=0).tolist()
    has_seeds = len({seed for _, seed in outcomes}) > 1
    ensemble = score_predictions(predictions, classes, multi_label=total is None) if has_seeds else None
    return CrossValidation(str(folder), classes, tuple(rows), total, digest, ensemble)


def _evaluation(outcome: Outcome) -> Evaluation:
    assert outcome.evaluation is not None, "each run of a cross-validation holds a fold out"
    return outcome.evaluation


def _write(config: RunConfig, result: CrossValidation, predictions: Sequence[Prediction]) -> None:
    folder = Path(result.folder)
    write_yaml(folder / "config.yaml", flatten(config))
    write_predictions(folder / PREDICTIONS, predictions, result.classes)
    if result.confusion is not None:
        matrix = np.array(result.confusion)
        confusion_figure(matrix, result.classes, folder / "confusion.png", result.counted)
        per_class_table(matrix, result.classes, folder / "per_class.csv")
    by_fold = {fold: result.values(fold=fold) for fold in result.folds}
    folds_figure(by_fold, f"test {result.score}", folder / "folds.png")
    with whole_file(folder / SUMMARY) as scratch:
        scratch.write_text(json.dumps(asdict(result) | {"figures": result.figures()}, indent=1), encoding="utf-8")


def _read(folder: Path) -> CrossValidation | None:
    path = folder / SUMMARY
    if not path.exists():
        return None
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    rows = tuple(FoldRow(**row) for row in fields["rows"])
    classes, later = tuple(fields["classes"]), (fields.get(key) for key in ("digest", "ensemble"))
    return CrossValidation(fields["folder"], classes, rows, fields["confusion"], *later)


def _tell_mlflow(config: RunConfig, result: CrossValidation) -> None:
    """Records the result as a run of its own, with the folds' runs below it; whatever prevents that costs a warning."""
    folder = Path(result.folder)
    marks = tags(config) | {"folds": str(result.folds), "seeds": str(result.seeds)}
    try:
        sink = open_mlflow(config.tracking, folder, folder.name)
        sink.start(flatten(config), marks)
        sink.log(result.figures(), len(result.rows))
        for path in sorted(folder.glob("[!.]*.*")):
            sink.artifact(path)
        sink.adopt([run_id for row in result.rows if (run_id := run_id_in(Path(row.run_folder), sink.uri)) is not None])
        sink.close()
    except ServiceError as error:
        warn_of_rest(folder, error)
