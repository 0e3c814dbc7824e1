"""A run or several -> models: to be asked together, or to be told what they are worth, alone and together."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from meamtm.config import ScaleConfig
from meamtm.errors import CheckpointError, DataError
from meamtm.training.checkpoint import Saved, checkpoint_in, is_trained, load_model, read_labels
from meamtm.training.context import choose_device
from meamtm.training.evaluate import Evaluation, evaluate
from meamtm.training.predictions import Prediction, by_part, score_predictions

logger = logging.getLogger(__name__)
Meaning = tuple[tuple[str, ...], bool]
"""The classes that a model names, and whether a clip may have several."""


@dataclass(frozen=True)
class Part:
    """What the models of one part, such as a fold, do on its clips."""

    name: str
    num_clips: int
    num_models: int
    alone: float
    """Accuracy, or mean average precision where clips have several labels: the mean over the models."""
    together: float
    """The same of their mean probabilities."""


def find_models(place: Path) -> list[Path]:
    """Names the model of a run or checkpoint folder: that place itself; or the checkpoints of all that a pattern such
    as runs/mine-* matches, each once.

    A match that has no checkpoint, or is not trained to its end, is left out with a warning; one that is named by
    itself is taken with one. Raises CheckpointError where nothing is left, or a checkpoint is damaged.
    """
    place = place.expanduser()  # in quotes no shell has done that
    if place.exists() or not set("*?[") & set(str(place)):
        if (checkpoint := checkpoint_in(place)) is not None and not is_trained(checkpoint):
            logger.warning("%s is not trained to its end; the same command as before goes on", place)
        return [place]
    found = []
    for match in sorted(map(Path, glob(str(place)))):  # noqa: PTH207 - anywhere in a path, absolute or not
        if (checkpoint := checkpoint_in(match)) is None:
            logger.warning("%s is left out: it holds no checkpoint", match)
        elif not is_trained(checkpoint):
            logger.warning("%s is left out: it is not trained to its end", match)
        else:
            found.append(checkpoint)
    found = list({checkpoint.resolve(): checkpoint for checkpoint in found}.values())  # a link is no second model
    if not found:
        raise CheckpointError(f"CHECKPOINT={place}: no trained run matches; name others, as runs/NAME-*")
    return found


def load_here(folder: Path) -> Saved:
    """Reads a model back, as `load_model` does, onto this machine's GPU if it has one."""
    saved = load_model(folder)
    saved.model.to(choose_device(ScaleConfig()))
    return saved


def load_models(place: Path) -> list[Saved]:
    """Reads the model of a run or checkpoint folder, or an ensemble: those that a pattern means.

    Raises CheckpointError where models do not name the same classes.
    """
    found = find_models(place)
    if len(found) > 1:
        labels = {each: read_labels(each) for each in found}
        _check_same({each: (its.classes, its.multi_label) for each, its in labels.items()}, place)
    return [load_here(each) for each in found]


def evaluate_models(
    place: Path,
    data_path: str | None = None,
    fold: int | None = None,
    track: Callable[[Sequence[Path]], Iterable[Path]] = iter,
) -> list[Evaluation]:
    """Tests the model of a run or checkpoint folder, or each that a pattern means, as `evaluate` does.

    Of several, one that has no clip there which it never heard is left out with a warning. Raises DataError where that
    leaves none, and CheckpointError where models are tested on different data, or on parts of it that overlap.
    """
    found = find_models(place)
    if len(found) == 1:
        return [evaluate(found[0], data_path, fold)]
    tested: list[Evaluation] = []
    refused: list[DataError] = []
    for each in track(found):
        try:
            tested.append(evaluate(each, data_path, fold))
        except DataError as error:
            logger.warning("%s is left out: %s", each, error)
            refused.append(error)
    if not tested:
        raise refused[0]
    _check_comparable(tested, place)
    return tested


def parts_of(evaluations: Sequence[Evaluation], predictions: Sequence[Prediction]) -> list[Part]:
    """Tells what the models of each part do; predictions are the evaluations', gathered."""
    classes, multi_label = evaluations[0].classes, evaluations[0].confusion is None
    parts = []
    for name, clips in by_part(predictions).items():
        alone = [each.score for each in evaluations if each.part == name]
        together = score_predictions(clips, classes, multi_label=multi_label)["map" if multi_label else "accuracy"]
        parts.append(Part(name, len(clips), len(alone), sum(alone) / len(alone), together))
    return parts


def _check_same(meanings: Mapping[Path, Meaning], place: Path) -> None:
    first, meaning = next(iter(meanings.items()))
    for other, its_meaning in meanings.items():
        if its_meaning != meaning:
            raise CheckpointError(
                f"CHECKPOINT={place}: {first} and {other} differ in their classes, or in how many a clip may have, so "
                "their answers cannot be averaged; name runs of one data set"
            )


def _check_comparable(tested: Sequence[Evaluation], place: Path) -> None:
    """Refuses to bring together what was said of different data, or of a clip in two parts of them."""
    _check_same({each.checkpoint: (each.classes, each.confusion is None) for each in tested}, place)
    seen: dict[str, Evaluation] = {}  # by clip
    for each in tested:
        if each.digest != tested[0].digest:
            raise CheckpointError(
                f"CHECKPOINT={place}: {tested[0].checkpoint} and {each.checkpoint} are tested on different data; name "
                "runs of one data set, or other data by --data"
            )
        for clip in each.clip_ids:
            if (other := seen.setdefault(clip, each)).part != each.part:
                raise CheckpointError(
                    f"CHECKPOINT={place}: {other.checkpoint} is tested on {other.part} and {each.checkpoint} on "
                    f"{each.part}, which overlap; name a fold that none of them heard by --fold"
                )
