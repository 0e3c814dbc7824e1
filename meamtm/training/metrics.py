"""Probabilities and targets -> the numbers that people compare."""

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

Probability = Float[Tensor, "clip label"]
Target = Float[Tensor, "clip label"]


def scores(probability: Probability, target: Target, *, multi_label: bool) -> dict[str, float]:
    """Gives accuracy and macro-F1 in 0..1, the loss in nats and, for several labels a clip, mean average precision.

    Macro-F1 is the mean over the labels that some clip has or is given; of others nothing was asked. Tensors are on the
    CPU."""
    from sklearn.metrics import accuracy_score, average_precision_score, f1_score  # loads scipy, which takes a second

    if multi_label:
        wanted, found = target.numpy() > 0.5, probability.numpy() > 0.5  # (clip, label)
        heard = wanted.any(axis=0)  # (label,): of a label that no clip has, no precision is defined
        asked = np.flatnonzero(heard | found.any(axis=0))  # labels, by number
        values = {
            "accuracy": accuracy_score(wanted.ravel(), found.ravel()),
            "macro_f1": f1_score(wanted, found, labels=asked, average="macro") if len(asked) else 0.0,
            "map": average_precision_score(wanted[:, heard], probability.numpy()[:, heard]) if heard.any() else 0.0,
            "loss": torch.nn.functional.binary_cross_entropy(probability, target) * target.shape[1],
        }
    else:
        wanted, found = target.argmax(1), probability.argmax(1)  # (clip,)
        values = {
            "accuracy": accuracy_score(wanted, found),
            "macro_f1": f1_score(wanted, found, average="macro"),
            "loss": torch.nn.functional.nll_loss(probability.clamp_min(1e-12).log(), wanted),
        }
    return {name: float(value) for name, value in values.items()}


def confusion(probability: Probability, target: Target) -> Int[Tensor, "label label"]:
    """Counts clips by true class (row) and named class (column); one label per clip."""
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(target.argmax(1), probability.argmax(1), labels=range(target.shape[1]))
    return torch.from_numpy(counts)
