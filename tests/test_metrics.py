"""Metrics are scikit-learn's."""

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meamtm.training.metrics import confusion, scores

NUM_LABELS = 5


def guesses(seed: int, num_clips: int = 40) -> tuple[Tensor, Tensor]:
    """Probabilities that are right more often than by chance, and one label per clip; every label occurs."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.cat((torch.arange(NUM_LABELS), torch.randint(NUM_LABELS, (num_clips,), generator=generator)))
    target = torch.nn.functional.one_hot(label, NUM_LABELS).float()
    return (torch.randn(target.shape, generator=generator) + target).softmax(1), target


def several(seed: int, num_clips: int = 40) -> tuple[Tensor, Tensor]:
    """Independent probabilities, and any number of labels per clip; every label occurs."""
    generator = torch.Generator().manual_seed(seed)
    target = (torch.rand(num_clips, NUM_LABELS, generator=generator) < 0.3).float()
    target = torch.cat((torch.eye(NUM_LABELS), target))
    return (torch.randn(target.shape, generator=generator) + target).sigmoid(), target


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_one_label_per_clip_is_scored_as_scikit_learn_does(seed: int) -> None:
    probability, target = guesses(seed)
    wanted, found, certain = target.argmax(1).numpy(), probability.argmax(1).numpy(), probability.double().numpy()
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(wanted, found),
        "macro_f1": sklearn.metrics.f1_score(wanted, found, average="macro"),
        "loss": sklearn.metrics.log_loss(wanted, certain / certain.sum(1, keepdims=True)),
    }
    assert scores(probability, target, multi_label=False) == pytest.approx(expected, abs=1e-5)
    assert confusion(probability, target).tolist() == sklearn.metrics.confusion_matrix(wanted, found).tolist()


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_several_labels_per_clip_are_scored_as_scikit_learn_does(seed: int) -> None:
    probability, target = several(seed)
    wanted, found = target.int().numpy(), (probability > 0.5).int().numpy()
    likely = torch.where(target == 1, probability, 1 - probability).double()
    expected = {
        "accuracy": float((wanted == found).mean()),
        "macro_f1": sklearn.metrics.f1_score(wanted, found, average="macro"),
        "map": sklearn.metrics.average_precision_score(wanted, probability.numpy(), average="macro"),
        "loss": float(-likely.log().sum(1).mean()),
    }
    assert scores(probability, target, multi_label=True) == pytest.approx(expected, abs=1e-5)


def test_perfect_answers_score_perfectly() -> None:
    target = torch.eye(NUM_LABELS)
    assert scores(target, target, multi_label=False) == {"accuracy": 1, "macro_f1": 1, "loss": 0}
    assert scores(target, target, multi_label=True) == {"accuracy": 1, "macro_f1": 1, "map": 1, "loss": 0}


def test_certain_and_wrong_answers_have_a_finite_loss() -> None:
    wrong = torch.eye(NUM_LABELS).roll(1, 0)
    for multi_label in (False, True):
        assert np.isfinite(scores(wrong, torch.eye(NUM_LABELS), multi_label=multi_label)["loss"])


def test_a_label_that_no_clip_has_counts_for_nothing() -> None:
    """As in a small validation fold."""
    probability, target = several(0)
    target = torch.nn.functional.pad(target, (0, 1))
    probability = torch.nn.functional.pad(probability, (0, 1), value=0.1)
    absent = scores(probability, target, multi_label=True)
    asked = scores(*several(0), multi_label=True)
    assert (absent["map"], absent["macro_f1"]) == pytest.approx((asked["map"], asked["macro_f1"]))
    assert np.isfinite(list(absent.values())).all()
    wrongly_given = scores(probability.index_fill(1, torch.tensor([NUM_LABELS]), 0.9), target, multi_label=True)
    assert wrongly_given["macro_f1"] == pytest.approx(asked["macro_f1"] * NUM_LABELS / (NUM_LABELS + 1))


def test_rows_of_the_confusion_are_true_and_columns_are_named() -> None:
    target = torch.nn.functional.one_hot(torch.tensor([0, 0, 1]), 3).float()
    probability = torch.nn.functional.one_hot(torch.tensor([0, 2, 1]), 3).float()
    assert confusion(probability, target).tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]
