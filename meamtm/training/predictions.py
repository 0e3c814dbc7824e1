"""What models said of clips that had not trained them -> predictions.csv, a line per clip, the most doubtful first.

Who has a few hundred clips can listen to those at the top: they are hard, or their label is wrong."""

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64

from meamtm.files import whole_file
from meamtm.training.evaluate import Evaluation
from meamtm.training.metrics import scores

PREDICTIONS = "predictions.csv"
HEADER = ("clip", "part", "label", "class", "models", "right", "confidence")


@dataclass(frozen=True)
class Prediction:
    """What one clip was called."""

    clip: str
    part: str
    """Where it belongs, such as a fold."""
    label: str
    """What it is; several labels are separated by `;`."""
    named: str
    """What the models call it on average: the most probable class, or, of several labels, all above one half."""
    num_models: int
    num_right: int
    """How many of the models name it right; of several labels, all of them."""
    confidence: float
    """Mean probability of its label, the self-confidence of Northcutt, Jiang and Chuang (2021, "Confident learning");
    of several labels, that of the worst answer, be the label there or not."""
    probability: tuple[float, ...]
    """Of each class, the mean over the models."""


def gather_predictions(evaluations: Sequence[Evaluation]) -> list[Prediction]:
    """Brings together what one model or several, one after the other, said of each clip; most doubtful first."""
    said = defaultdict(list)
    for evaluation in evaluations:
        for row, clip in enumerate(evaluation.clip_ids):
            said[clip].append((evaluation, row))
    found = [_predict(clip, answers) for clip, answers in said.items()]
    return sorted(found, key=lambda prediction: (prediction.confidence, prediction.clip))


def _predict(clip: str, answers: Sequence[tuple[Evaluation, int]]) -> Prediction:
    first, row = answers[0]
    is_multi_label = first.confusion is None
    wanted = first.target[row] > 0.5  # (label,)
    each = np.stack([evaluation.probability[row] for evaluation, row in answers])  # (model, label)
    probability = each.mean(axis=0)  # (label,)
    of_truth = np.where(wanted, probability, 1 - probability)  # (label,)
    confidence = of_truth.min() if is_multi_label else of_truth[wanted].sum()
    return Prediction(
        clip=clip,
        part=first.part,
        label=_join(first.classes, wanted),
        named=name_labels(probability, first.classes, multi_label=is_multi_label),
        num_models=len(answers),
        num_right=sum(bool((_named(one, is_multi_label) == wanted).all()) for one in each),
        confidence=float(confidence),
        probability=tuple(probability.tolist()),
    )


def score_predictions(
    predictions: Sequence[Prediction], classes: Sequence[str], *, multi_label: bool
) -> dict[str, float]:
    """Gives the metrics of the ensemble of the models: of each part, such as a fold, and then their mean."""
    found = []
    for part in by_part(predictions).values():
        probability = torch.tensor([each.probability for each in part])  # (clip, label)
        labels = [each.label.split(";") if multi_label else [each.label] for each in part]
        target = torch.tensor([[float(name in own) for name in classes] for own in labels])  # (clip, label)
        found.append(scores(probability, target, multi_label=multi_label))
    return {key: float(np.mean([each[key] for each in found])) for key in found[0]}


def by_part(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    """Gives the predictions of each part, such as a fold, in the order of their numbers."""
    parts: dict[str, list[Prediction]] = defaultdict(list)
    for each in predictions:
        parts[each.part].append(each)
    return dict(sorted(parts.items(), key=lambda part: (len(part[0]), part[0])))


def confusion_of(predictions: Sequence[Prediction], classes: Sequence[str]) -> Int64[np.ndarray, "label label"]:
    """Counts clips by true class (row) and the one that the models name together (column); one label per clip."""
    from sklearn.metrics import confusion_matrix

    return confusion_matrix([each.label for each in predictions], [each.named for each in predictions], labels=classes)


def name_labels(probability: Float[np.ndarray, " label"], classes: Sequence[str], *, multi_label: bool) -> str:
    """Names the most probable class, or, where a clip may have several, all above one half, separated by `;`."""
    return _join(classes, _named(probability, multi_label))


def _named(probability: Float[np.ndarray, " label"], is_multi_label: bool) -> Bool[np.ndarray, " label"]:
    if is_multi_label:
        return probability > 0.5
    return np.arange(len(probability)) == probability.argmax()


def _join(classes: Sequence[str], chosen: Bool[np.ndarray, " label"]) -> str:
    return ";".join(name for name, is_chosen in zip(classes, chosen, strict=True) if is_chosen)


def write_predictions(path: Path, predictions: Sequence[Prediction], classes: Sequence[str]) -> None:
    """Writes a line per clip: what it is, what it was called, by how many of the models, and each class's
    probability; whole or not at all."""
    with (
        whole_file(path) as scratch,
        scratch.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.writer(file)
        writer.writerow([*HEADER, *classes])
        for each in predictions:
            facts = (each.clip, each.part, each.label, each.named, each.num_models, each.num_right)
            numbers = (f"{value:.6f}" for value in (each.confidence, *each.probability))
            writer.writerow([*facts, *numbers])


def read_predictions(path: Path) -> list[Prediction]:
    """Reads the lines back; none where there is no such file, as in folders from before there was one."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file)
        next(lines)
        return [
            Prediction(clip, part, label, named, int(num_models), int(num_right), float(confidence), _floats(rest))
            for clip, part, label, named, num_models, num_right, confidence, *rest in lines
        ]


def _floats(words: Sequence[str]) -> tuple[float, ...]:
    return tuple(float(word) for word in words)
