"""Probabilities and targets -> the numbers that people compare."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

Probability = Float[Tensor, "clip label"]
Target = Float[Tensor, "clip label"]


def scores(probability: Probability, target: Target, *, multi_label: bool) -> dict[str, float]:
    """Gives accuracy and macro-F1 in 0..1, the loss in nats and, for several labels a clip, mean average precision.

    Macro-F1 is the mean over the labels that some clip has or is given; of others nothing was asked."""
    from torchmetrics.functional import classification  # loads scipy, matplotlib and more, which takes seconds

    num_labels = target.shape[1]
    if multi_label:
        wanted = target.long()
        heard = wanted.any(0)  # (label,): of a label that no clip has, no precision is defined
        f1 = classification.multilabel_f1_score(probability, wanted, num_labels, average="none")  # (label,)
        columns = zip(probability.T[heard], wanted.T[heard], strict=True)
        precisions = [classification.binary_average_precision(column, truth) for column, truth in columns]
        values = {
            "accuracy": classification.multilabel_accuracy(probability, wanted, num_labels, average="micro"),
            "macro_f1": f1[heard | (probability > 0.5).any(0)].mean(),
            "map": torch.stack(precisions).mean(),
            "loss": torch.nn.functional.binary_cross_entropy(probability, target) * num_labels,
        }
    else:
        wanted = target.argmax(1)
        values = {
            "accuracy": classification.multiclass_accuracy(probability, wanted, num_labels, average="micro"),
            "macro_f1": classification.multiclass_f1_score(probability, wanted, num_labels, average="macro"),
            "loss": torch.nn.functional.nll_loss(probability.clamp_min(1e-12).log(), wanted),
        }
    return {name: float(value) for name, value in values.items()}


def confusion(probability: Probability, target: Target) -> Int[Tensor, "label label"]:
    """Counts clips by true class (row) and named class (column); one label per clip."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    return multiclass_confusion_matrix(probability, target.argmax(1), target.shape[1])
