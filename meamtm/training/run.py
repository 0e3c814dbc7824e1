"""One config -> a run folder with a trained, tested and recorded model, in this process."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from meamtm import __version__
from meamtm.config import RunConfig, flatten, is_uri, override, run_folder, run_name, signature, write_yaml
from meamtm.data.cache import open_clips
from meamtm.data.clips import Clips
from meamtm.data.packed import read_card
from meamtm.data.split import Split, split_clips
from meamtm.errors import ConfigError, MeamtmError
from meamtm.files import whole_file
from meamtm.model.pretrained import Borrowed, borrow
from meamtm.model.transformer import AudioTransformer
from meamtm.tracking import (
    Sink,
    Sinks,
    commit_of_this_code,
    confusion_figure,
    curves_figure,
    has_all,
    open_mlflow,
    open_sink,
    per_class_table,
    read_rows,
    resolve_uri,
    warn_of_rest,
)
from meamtm.training.checkpoint import Labels, check_origin, newest, read_record
from meamtm.training.context import Context, LocalContext, choose_device
from meamtm.training.evaluate import Evaluation, evaluate
from meamtm.training.lock import held
from meamtm.training.memory import check_memory
from meamtm.training.notes import REPORTS, left_reports
from meamtm.training.optim import make_optimizer
from meamtm.training.predictions import PREDICTIONS, gather_predictions, write_predictions
from meamtm.training.prepare import training_loader
from meamtm.training.teacher import find_teachers
from meamtm.training.train import train


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves behind."""

    folder: Path
    checkpoint: Path
    metrics: dict[str, float]
    """Of the last epoch."""
    evaluation: Evaluation | None
    """None where no clip is held out."""
    was_done: bool = False
    """Whether nothing was left to train."""


def run_here(
    config: RunConfig, extra_sinks: Sequence[Sink] = (), should_stop: Callable[[], bool] = lambda: False
) -> Outcome:
    """Trains in this process, tests on the test fold and records both; a finished run is only tested once more."""
    config = absolute(config)
    if (done := recall(config)) is not None:
        return done
    if config.scale.threads is not None:
        torch.set_num_threads(config.scale.threads)
    device = choose_device(config.scale)
    with open_record(config) as sinks:
        context = LocalContext(run_folder(config), device, (sinks, *extra_sinks), should_stop)
        report_again(context, context.folder)
        return conclude(config, train(config, context), sinks)


def report_again(context: Context, folder: Path) -> None:
    """Reports epochs up to the newest checkpoint that the record lacks: the last one, of a process that died after
    publishing it and before it told, and what workers left whose driver had died. Later ones are trained again."""
    found = context.resume_from()
    record = {"epoch": 0, "metrics": {}} if found is None else read_record(found)
    told = {row["step"] for row in read_rows(folder / "metrics.jsonl")}
    left = [metrics for metrics in left_reports(folder) if metrics["epoch"] <= record["epoch"]]
    for metrics in [*left, record["metrics"]]:
        if metrics and metrics["epoch"] not in told:
            context.report(metrics)
            told.add(metrics["epoch"])
    (folder / REPORTS).unlink(missing_ok=True)


def conclude(config: RunConfig, metrics: dict[str, float], sinks: Sinks) -> Outcome:
    """Tests the newest checkpoint on the test fold, once, and records the result."""
    folder = run_folder(config)
    checkpoint = newest(folder)
    assert checkpoint is not None, "training ends with a checkpoint"
    evaluation = evaluate(checkpoint, here=config) if _holds_out(config) else None
    if evaluation is not None:
        sinks.log(evaluation.metrics, int(metrics["epoch"]))
    curves_figure(read_rows(folder / "metrics.jsonl"), folder / "curves.png")
    if evaluation is not None:
        record_evaluation(evaluation, folder / "test")
    _hand_over(folder, sinks)
    return Outcome(folder, checkpoint, metrics, evaluation)


def recall(config: RunConfig) -> Outcome | None:
    """Gives what a finished run found, and sends MLflow what it lacks of it."""
    if (done := finished(config)) is not None:
        send_rest(config)
    return done


def finished(config: RunConfig) -> Outcome | None:
    """Tells what the run found, if its last epoch is trained and, where clips are held out, tested.

    Raises CheckpointError if a data set of the same name, but not the same clips, has taught it so far.
    """
    folder = run_folder(config)
    checkpoint = newest(folder)
    if checkpoint is None:
        return None
    card = read_card(config.data.path)
    check_origin(checkpoint, Labels(card.classes, card.multi_label, card.digest), config.data.path)
    record = read_record(checkpoint)
    if record["epoch"] < config.num_epochs or (_holds_out(config) and not is_tested(config)):
        return None
    evaluation = evaluate(checkpoint, here=config) if _holds_out(config) else None
    return Outcome(folder, checkpoint, record["metrics"], evaluation, was_done=True)


@contextmanager
def open_record(config: RunConfig) -> Iterator[Sinks]:
    """Keeps the run's record from where its newest checkpoint left it: config.yaml, metrics.jsonl and MLflow.

    What would stop the run before its first step, be it in the data, the config or the tracking server, is an error
    before anything is written. So is another process that trains the same run (BusyError).
    """
    folder, marks = run_folder(config), tags(config)
    with held(folder):
        found = newest(folder)
        borrowed = _check(config, is_new=found is None)
        sinks = open_sink(config.tracking, folder, run_name(config))
        sinks.start(flatten(config), marks, from_step=int(read_record(found)["epoch"]) if found else 0)
        with sinks:
            write_yaml(folder / "config.yaml", flatten(config))
            if borrowed is not None:
                with whole_file(folder / "pretrained.json") as scratch:
                    scratch.write_text(json.dumps(asdict(borrowed), indent=1))
            yield sinks


def _check(config: RunConfig, *, is_new: bool) -> Borrowed | None:
    """Makes what training makes, to see whether folds, batches, bands, optimizer and a new run's weights can be had."""
    clips = open_clips(config.data, config.mel.sample_rate_hz)
    split = check_split(config, clips)
    if config.train.keep == "best" and len(split.valid) == 0:
        raise ConfigError(
            f"train.keep=best: no clip to choose the epoch on (data.valid_fold={config.data.valid_fold}); set "
            f"data.valid_fold to a fold that is not the test fold, or train.keep=last"
        )
    training_loader(config, clips, split.train, world_size=max(config.scale.most_workers, 1))
    find_teachers(config)
    if config.scale.most_workers == 0:
        check_memory(config, choose_device(config.scale))
    model = AudioTransformer(config, len(clips.classes))
    make_optimizer(model, config)
    return borrow(model.encoder, config.encoder) if is_new and config.encoder.pretrained != "none" else None


def check_split(config: RunConfig, clips: Clips) -> Split:
    """Splits the clips; raises ConfigError where a test is wanted and the data set's own split has no clip for it."""
    split = split_clips(clips, config.data)
    if _holds_out(config) and len(split.test) == 0:
        raise ConfigError(
            f"data.test_fold={config.data.test_fold}: {config.data.path} has a split of its own, in which no clip is "
            "for testing; set data.test_fold=null, and nothing is tested"
        )
    return split


def send_rest(config: RunConfig) -> None:
    """Sends MLflow what it has not taken of a finished run; whatever prevents that costs a warning."""
    folder = run_folder(config)
    if not config.tracking.mlflow or has_all(folder, resolve_uri(config.tracking)):
        return
    try:
        with held(folder):
            sink = open_mlflow(config.tracking, folder, run_name(config))
            marks = tags(config) if sink.run_id is None else {}  # a run that is known has those of when it was trained
            sink.start(flatten(config), marks, from_step=config.num_epochs)
            with sink:
                _hand_over(folder, sink)
    except MeamtmError as error:
        warn_of_rest(folder, error)


def _hand_over(folder: Path, sink: Sink | Sinks) -> None:
    """Gives copies of what a finished run has to show."""
    for name in ("config.yaml", "curves.png", "pretrained.json"):
        if (folder / name).exists():
            sink.artifact(folder / name)
    for path in sorted((folder / "test").glob("*")):
        sink.artifact(path, "test")


def record_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Writes each clip's prediction, the confusion matrix and the per-class table, and then the metrics, which say that
    the run is tested."""
    folder.mkdir(parents=True, exist_ok=True)
    write_predictions(folder / PREDICTIONS, gather_predictions([evaluation]), evaluation.classes)
    if evaluation.confusion is not None:
        confusion_figure(evaluation.confusion, evaluation.classes, folder / "confusion.png")
        per_class_table(evaluation.confusion, evaluation.classes, folder / "per_class.csv")
    with whole_file(folder / "metrics.json") as scratch:
        scratch.write_text(json.dumps(evaluation.metrics, indent=1))


def tags(config: RunConfig) -> dict[str, str]:
    """Says which code and which data a run is made of."""
    return {
        "signature": signature(config),
        "data_digest": read_card(config.data.path).digest,
        "git_commit": commit_of_this_code(),
        "meamtm_version": __version__,
    }


def absolute(config: RunConfig) -> RunConfig:
    """Resolves every relative path against the current folder, since Ray's workers live in others."""
    changes: dict[str, str] = {"runs_dir": str(Path(config.runs_dir).expanduser().resolve())}
    if not config.data.cache_dir.startswith("~"):  # which is each node's and each user's own
        changes["data.cache_dir"] = str(Path(config.data.cache_dir).resolve())
    if not is_uri(config.data.path):
        # Not resolved: its name is part of what the run is, and a link's target may have another one.
        changes["data.path"] = str(Path(config.data.path).expanduser().absolute())
    if (path := config.encoder.pretrained_path) is not None:  # nor this: a link's target may have no suffix
        changes["encoder.pretrained"] = str(path.expanduser().absolute())
    if config.distill.teacher != "none":
        changes["distill.teacher"] = str(Path(config.distill.teacher).expanduser().absolute())
    if config.tracking.mlflow:
        changes["tracking.uri"] = resolve_uri(config.tracking)
    return override(config, changes)


def is_tested(config: RunConfig) -> bool:
    """Tells whether a run's test is on record; its metrics are written last."""
    return (run_folder(config) / "test" / "metrics.json").exists()


def _holds_out(config: RunConfig) -> bool:
    return config.data.test_fold is not None
