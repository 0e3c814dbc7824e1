"""The `meamtm` command. With `screen` and `tables` it alone prints; commands import what is heavy, so help is quick."""

import io
import logging
import sys
from collections.abc import Iterator
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meamtm import tables
from meamtm.errors import MeamtmError
from meamtm.screen import bar, counting, end_at_once, epoch_bar, numbers, run_bars, run_commands, steps, stop_on_signal

if TYPE_CHECKING:
    from meamtm.inference.predict import Answer


class Dataset(StrEnum):
    """Published data sets that `meamtm download` knows."""

    ESC50 = "esc50"


MOST_CLASSES = 20
"""So many names are shown when a set has been packed."""
app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="A small folder of labelled sounds becomes a good classifier: pack, train, evaluate, predict.",
)
Changes = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="changed settings, as `meamtm show` names them")
]
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of differences from the defaults")]
Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="run folder or checkpoint folder")]
Checkpoints = Annotated[
    Path,
    typer.Argument(metavar="CHECKPOINT", help="run or checkpoint folder; or 'runs/NAME-*', in quotes, for an ensemble"),
]


def main() -> None:
    """Runs the command."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    logging.getLogger("meamtm").setLevel(logging.INFO)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may hold what no screen can show
    run_commands(app, "meamtm")


@app.command()
def synth(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to write")],
    clips_per_class: Annotated[int, typer.Option(help="clips of each of the 10 classes")] = 40,
    clip_s: Annotated[float, typer.Option(help="length of a clip, s")] = 2.0,
    seed: Annotated[int, typer.Option(min=0, help="another seed makes other sounds")] = 0,
) -> None:
    """Write the built-in sound set as audio files and a CSV."""
    from meamtm.data.synth import write_synth

    with counting("writing sounds") as progress:
        write_synth(out, clips_per_class=clips_per_class, clip_s=clip_s, seed=seed, progress=progress)
    typer.echo(f"{10 * clips_per_class} clips of {clip_s:g} s, 10 classes, 5 folds: {out}")


@app.command()
def download(
    dataset: Annotated[Dataset, typer.Argument(metavar="DATASET", help="esc50: 2,000 clips of 50 classes, 600 MB")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder to make")],
    source: Annotated[str | None, typer.Option("--from", help="its archive: a file, or another URL")] = None,
) -> None:
    """Download a published data set and read every clip of it; the same command again goes on."""
    from meamtm.data.download import ESC50_URL, download_esc50

    match dataset:
        case Dataset.ESC50:
            with steps() as progress:
                num_clips = download_esc50(out, source or ESC50_URL, progress)
    typer.echo(f"{num_clips:,} clips, all of them readable: {out}\nmeamtm pack {out} data/{dataset.value}")


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="ESC-50-style folder, or one folder per class")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="data set to write")],
    manifest: Annotated[
        Path | None, typer.Option(help="CSV: path from SOURCE on, label, maybe fold, group, split; or like ESC-50's")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="an unusable file is an error")] = False,
) -> None:
    """Pack labelled sounds into a data set of Parquet files."""
    from meamtm.config import MelConfig
    from meamtm.data.pack import pack as pack_folder

    with counting("packing") as progress:
        card = pack_folder(source, out, manifest, strict=strict, progress=progress)
    has_split = card.has_split or not card.folds
    folds = "its own train/valid/test split" if has_split else f"{len(card.folds)} folds"
    labels = ", several labels a clip" if card.multi_label else ""
    rejected = f", {card.num_rejected} rejected (see {out / 'rejected.csv'})" if card.num_rejected else ""
    typer.echo(
        f"{card.num_clips} clips, {len(card.classes)} classes{labels}, {folds}, {card.total_s / 60:.1f} min{rejected}: "
        f"{out}"
    )
    typer.echo(f"classes: {', '.join(card.classes[:MOST_CLASSES])}{', ...' * (len(card.classes) > MOST_CLASSES)}")
    if not has_split and card.num_groups == card.num_clips:
        typer.echo(
            "each clip counts as a recording of its own; where several come from one, name it in a manifest's column "
            "`group`, or folds will share it"
        )
    if max(card.rates_hz) > (heard_hz := MelConfig().sample_rate_hz):
        typer.echo(
            f"recorded at up to {max(card.rates_hz):,} Hz; a model hears up to half of mel.sample_rate_hz, "
            f"{heard_hz // 2:,} Hz unless you raise that"
        )


@app.command()
def show(config: ConfigPath, changes: Changes = None) -> None:
    """Print the resolved settings and what they cost."""
    from meamtm.config import load, parse_changes

    resolved = load(config, parse_changes(changes or []))  # before torch is loaded: a mistake shows at once
    tables.print_settings(resolved)
    tables.print_cost(resolved)


@app.command()
def train(
    config: ConfigPath,
    changes: Changes = None,
    resume: Annotated[bool, typer.Option("--resume", help="require that there is something to continue")] = False,
) -> None:
    """Train, then test on the test fold; the same command again continues, or says that it is done."""
    from meamtm.config import load, parse_changes, run_folder

    settings = load(config, parse_changes(changes or []))  # before torch is loaded
    from meamtm.distributed import run
    from meamtm.tracking import how_to_open
    from meamtm.training.checkpoint import newest
    from meamtm.training.run import absolute

    settings = absolute(settings)
    if resume and newest(folder := run_folder(settings)) is None:
        raise MeamtmError(f"--resume: {folder} holds no checkpoint to continue; leave --resume out to begin")
    with stop_on_signal() as should_stop, bar() as progress:
        outcome = run(settings, (epoch_bar(progress, settings.num_epochs),), should_stop)
    if outcome.was_done:
        typer.echo("this run is done; nothing was trained. Change a setting or `name` for another one.")
    if outcome.evaluation is not None:
        tables.print_evaluation(outcome.evaluation)
    typer.echo(f"checkpoint  {outcome.checkpoint}\nrun folder  {outcome.folder}")
    if settings.tracking.mlflow and settings.tracking.uri:
        typer.echo(f"MLflow      {how_to_open(settings.tracking.uri)}")


@app.command()
def evaluate(
    checkpoint: Checkpoints,
    data: Annotated[str | None, typer.Option(help="another data set with the same classes")] = None,
    fold: Annotated[
        int | None, typer.Option(help="another fold that did not train it, such as data.valid_fold")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="CSV to write as well: what each clip was called")] = None,
) -> None:
    """Test a checkpoint on the fold that it never saw, or on other data; several also together, fold by fold."""
    from meamtm.inference.ensemble import evaluate_models
    from meamtm.training.predictions import gather_predictions, write_predictions

    _check_folder(out)
    with bar() as progress:
        found = evaluate_models(checkpoint, data, fold, partial(progress.track, description="testing"))
    if not checkpoint.expanduser().exists():  # but a pattern
        typer.echo(f"tested: {', '.join(str(each.checkpoint) for each in found)}", err=True)
    predictions = gather_predictions(found)
    tables.print_evaluations(found, predictions)
    if out is not None:
        write_predictions(out, predictions, found[0].classes)


@app.command()
def crossval(
    config: ConfigPath,
    changes: Changes = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each fold, with seeds from train.seed on")] = 1,
    folds: Annotated[str, typer.Option(help="folds to test, as 1,2; all by default")] = "",
) -> None:
    """Train and test on each fold in turn: mean and deviation; the same command again continues."""
    from meamtm.config import load, parse_changes

    settings = load(config, parse_changes(changes or []))  # before torch is loaded
    chosen = numbers("--folds", folds)
    from meamtm.crossval import cross_validate, plan_runs

    runs = {f"fold {fold}, seed {seed}": run for (fold, seed), run in plan_runs(settings, chosen, seeds).items()}
    with stop_on_signal() as should_stop, bar() as progress:
        heard = run_bars(progress, runs)
        result = cross_validate(settings, folds=chosen, num_seeds=seeds, heard=heard, should_stop=should_stop)
    tables.print_crossval(result)


@app.command()
def predict(
    checkpoint: Checkpoints,
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="audio files, or folders of them")],
    out: Annotated[Path | None, typer.Option(help="CSV to write instead of the table")] = None,
    each_window: Annotated[bool, typer.Option("--each-window", help="name each window, with its times")] = False,
) -> None:
    """Name the sounds in audio files."""
    from meamtm.inference.ensemble import load_models
    from meamtm.inference.predict import classify_files, classify_windows, find_audio, write_csv

    _check_folder(out)
    models, files = load_models(checkpoint), find_audio(paths)
    if not checkpoint.expanduser().exists():  # but a pattern
        typer.echo(f"ensemble of {len(models)}: {', '.join(str(saved.folder) for saved in models)}", err=True)
    heard = classify_windows(models, files) if each_window else ([each] for each in classify_files(models, files))
    answers, labels = _collect(heard, len(files)), models[0].labels
    if out is not None:
        write_csv(out, labels, answers)
        tables.print_written(out, answers)
    else:
        tables.print_answers(answers, labels)


@app.command()
def embed(
    checkpoint: Checkpoint,
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="audio files, or folders of them")],
    out: Annotated[Path, typer.Option(help="NumPy .npz file to write: path (file,), embedding (file, width)")],
) -> None:
    """Turn audio files into embeddings, for search, clustering or another classifier."""
    from meamtm.inference.ensemble import load_here
    from meamtm.inference.predict import embed_files, find_audio, write_npz

    _check_folder(out)
    if out.suffix != ".npz":
        raise MeamtmError(f"--out={out}: embeddings are written as a NumPy archive; name a file that ends in .npz")
    saved, files = load_here(checkpoint), find_audio(paths)
    answers = _collect(([each] for each in embed_files(saved, files)), len(files))
    for answer in answers:
        if answer.values is None:
            typer.echo(f"{answer.path}: {answer.problem}", err=True)
    num_files = write_npz(out, answers)
    width = next(len(answer.values) for answer in answers if answer.values is not None)
    typer.echo(f"{num_files} embeddings of width {width}: {out}")


def _check_folder(out: Path | None) -> None:
    """Finds out before the work, not after it, that its result has no place to go."""
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise MeamtmError(f"--out={out}: cannot be written; name a file in a folder that exists")


def _collect(answers: "Iterator[list[Answer]]", num_files: int) -> "list[Answer]":
    from meamtm.inference.predict import check_any

    with bar() as progress:
        collected = [each for file in progress.track(answers, num_files, description="listening") for each in file]
    check_any(collected)
    return collected


def script() -> None:
    """Runs the command line as a program of its own."""
    end_at_once(main)


if __name__ == "__main__":
    script()
