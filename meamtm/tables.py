"""What the `meamtm` command answers with: tables of settings, of tests and of files."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from meamtm.errors import MeamtmError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from meamtm.config import RunConfig
    from meamtm.crossval import CrossValidation
    from meamtm.inference.predict import Answer
    from meamtm.training.checkpoint import Labels
    from meamtm.training.evaluate import Evaluation
    from meamtm.training.predictions import Prediction

MOST_MISTAKEN = 10
"""Clips that are shown; the file in the folder has all."""

console = Console(markup=False, highlight=False)  # names of files and classes may hold [brackets]


def print_settings(config: "RunConfig") -> None:
    """Prints every key with its value and meaning; what differs from the defaults is bold."""
    from meamtm.config import RunConfig, describe, flatten, run_name

    defaults = flatten(RunConfig())
    table = Table("key", "value", "meaning", title=run_name(config), title_justify="left")
    for key, value in flatten(config).items():
        shown = "null" if value is None else str(value)  # as it is written
        table.add_row(key, shown, describe(RunConfig, key), style="bold" if value != defaults[key] else None)
    console.print(table)


def print_cost(config: "RunConfig") -> None:
    """Prints what the model costs, and what its training takes in memory and on disk."""
    from meamtm.model.cost import cost
    from meamtm.training.memory import checkpoint_bytes, peak_training_bytes

    num_labels = _num_labels(config)
    price, checkpoint_mb = cost(config, num_labels), checkpoint_bytes(config, num_labels) / 1e6
    typer.echo(
        f"{price.num_params:,} parameters, {price.num_tokens} tokens, "
        f"{price.num_macs / 1e6:,.0f} million MACs per clip, checkpoint {checkpoint_mb:,.1f} MB"
    )
    peak_mb = peak_training_bytes(config, num_labels, teachers=_teachers(config)) / 1e6
    typer.echo(f"training allocates {peak_mb:,.0f} MB at its peak, in each process, beside Python and its libraries")


def _num_labels(config: "RunConfig") -> int:
    """Counts the data set's classes, if it is there; ten otherwise."""
    from meamtm.data.packed import read_card

    try:
        return len(read_card(config.data.path).classes)
    except MeamtmError as error:
        typer.echo(f"{error}\nthe cost is given for 10 classes", err=True)
        return 10


def _teachers(config: "RunConfig") -> "list[RunConfig]":
    """Gives what the run's teachers are, if it has any and they are there."""
    from meamtm.training.run import absolute
    from meamtm.training.teacher import teacher_configs

    try:
        return teacher_configs(absolute(config)) if config.distill.teacher != "none" else []
    except MeamtmError as error:
        typer.echo(f"{error}\nmemory is given without a teacher", err=True)
        return []


def print_crossval(result: "CrossValidation") -> None:
    """Prints a row per fold, a column per seed, the classes, and mean and deviation."""
    import numpy as np

    columns = ("fold", *(f"seed {seed}" for seed in result.seeds), "mean")
    table = Table(*columns, title=f"test {result.score}", title_justify="left")
    for fold in result.folds:
        values = result.values(fold=fold)
        table.add_row(str(fold), *(f"{value:.4f}" for value in values), f"{sum(values) / len(values):.4f}")
    means = result.seed_means()
    table.add_section()
    table.add_row("mean", *(f"{value:.4f}" for value in means), f"{sum(means) / len(means):.4f}")
    console.print(table)
    if result.confusion is not None:
        _print_per_class(np.array(result.confusion), result.classes, result.counted)
    _print_mistaken(result.predictions())
    figures = result.figures()
    mean, std, std_of_seeds = (figures[f"crossval/{result.score}_{kind}"] for kind in ("mean", "std", "std_of_seeds"))
    spread = f" ± {std:.4f} over {len(result.rows)} runs" if len(result.rows) > 1 else ", of one run"
    typer.echo(f"test {result.score} {mean:.4f}{spread}")
    if len(means) > 1:
        typer.echo(f"a seed's mean over the folds varies by ± {std_of_seeds:.4f}")
    if result.ensemble is not None:
        typer.echo(f"ensemble of each fold's {len(means)} seeds: {result.score} {result.ensemble[result.score]:.4f}")
    typer.echo(f"folder      {result.folder}")


def print_evaluations(evaluations: "Sequence[Evaluation]", predictions: "Sequence[Prediction]") -> None:
    """Prints what a model does, or several alone and together; predictions are the evaluations', gathered."""
    if len(evaluations) == 1:
        print_evaluation(evaluations[0])
    else:
        print_ensemble(evaluations, predictions)


def print_evaluation(evaluation: "Evaluation") -> None:
    """Prints what a checkpoint does on clips that it has never met, and how well it knows each class."""
    score = "test/map" if evaluation.confusion is None else "test/accuracy"  # what counts comes first
    metrics = {score: evaluation.metrics[score], **evaluation.metrics}
    figures = (f"{key.removeprefix('test/')} {value:.4f}" for key, value in metrics.items())
    typer.echo(f"test on {evaluation.part}: {len(evaluation.clip_ids)} clips, {', '.join(figures)}")
    if evaluation.confusion is None:
        typer.echo("map is the mean average precision of the classes; accuracy is of labels, most of which are absent")
        return
    _print_per_class(evaluation.confusion, evaluation.classes)


def print_ensemble(evaluations: "Sequence[Evaluation]", predictions: "Sequence[Prediction]") -> None:
    """Prints what several models do, each on clips that it has never met, and what those of a part, such as a fold, do
    together; predictions are the evaluations', gathered."""
    from meamtm.inference.ensemble import parts_of
    from meamtm.training.predictions import confusion_of, score_predictions

    classes, multi_label = evaluations[0].classes, evaluations[0].confusion is None
    score, parts = "map" if multi_label else "accuracy", parts_of(evaluations, predictions)
    table = Table("test on", "clips", "models", f"mean {score}", "together")
    for part in parts:
        numbers = (f"{value:.4f}" for value in (part.alone, part.together))
        table.add_row(part.name, str(part.num_clips), str(part.num_models), *numbers)
    console.print(table)
    if not multi_label:
        _print_per_class(confusion_of(predictions, classes), classes)
    _print_mistaken(predictions)
    figures = score_predictions(predictions, classes, multi_label=multi_label).items()
    alone = sum(part.alone for part in parts) / len(parts)
    typer.echo(f"one at a time: {score} {alone:.4f}, the mean over {len(parts)} parts of the data")
    typer.echo(f"together: {', '.join(f'{key} {value:.4f}' for key, value in figures)}")
    if all(part.num_models == 1 for part in parts):
        typer.echo("each part has one model, so nothing is averaged; train other seeds, as crossval --seeds 3 does")


def print_answers(answers: "Sequence[Answer]", labels: "Labels") -> None:
    """Prints the class of each file or window and the next best one, or why it could not be heard; where a clip may
    have several labels, all that are above one half and the best of the others."""
    classes = labels.classes
    table = Table("file", "class", "probability", "next")
    table.columns[0].overflow = "fold"
    for answer in answers:
        place = str(answer.path)
        if answer.span_s is not None:
            place += " {:.1f}-{:.1f} s".format(*answer.span_s)
        if answer.values is None:
            table.add_row(place, answer.problem, "", "", style="dim")
            continue
        order = [int(label) for label in answer.values.argsort()[::-1]]
        num_named = int((answer.values > 0.5).sum()) if labels.multi_label else 1
        shares = " ".join(f"{answer.values[label]:.3f}" for label in order[:num_named])
        next_best = "".join(
            f"{classes[label]} {answer.values[label]:.3f}" for label in order[num_named : num_named + 1]
        )
        named = ";".join(classes[label] for label in order[:num_named])
        table.add_row(place, named, shares, next_best)
    console.print(table)


def print_written(out: Path, answers: "Sequence[Answer]") -> None:
    """Prints how many files, or windows of files, are answered in a CSV, and how many not."""
    heard = [answer for answer in answers if answer.values is not None]
    files = f"{len(heard)} files"
    if any(answer.span_s for answer in heard):
        files = f"{len(heard)} windows of {len({answer.path for answer in heard})} files"
    num_unheard = len(answers) - len(heard)
    unheard = f" ({num_unheard} could not be heard, and are listed with the reason)" if num_unheard else ""
    typer.echo(f"{files}{unheard}: {out}")


def _print_mistaken(predictions: "Sequence[Prediction]") -> None:
    """Prints the first of the clips that no model named right; they are hard, or their label is wrong."""
    mistaken = [each for each in predictions if each.num_right == 0]
    if not mistaken:
        return
    table = Table("clip", "label", "named", "confidence in its label", title_justify="left")
    table.title = (
        f"{len(mistaken)} of {len(predictions)} clips that no model named right: hard, or is their label wrong?"
    )
    table.columns[0].overflow = "fold"
    for each in mistaken[:MOST_MISTAKEN]:
        table.add_row(each.clip, each.label, each.named, f"{each.confidence:.3f}")
    console.print(table)


def _print_per_class(confusion: "NDArray[np.int64]", classes: "Sequence[str]", counted: str = "clips") -> None:
    from meamtm.tracking import per_class

    table = Table("class", "precision", "recall", "F1", counted)
    for row in per_class(confusion, classes):
        scores = (f"{row[key]:.2f}" for key in ("precision", "recall", "f1"))
        table.add_row(str(row["class"]), *scores, f"{row['support']:g}")
    console.print(table)
