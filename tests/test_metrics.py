"""Metrics are what their definitions say."""

import numpy as np
import pytest
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
def test_one_label_per_clip_is_scored_as_defined(seed: int) -> None:
    probability, target = guesses(seed)
    wanted, found, certain = target.argmax(1).numpy(), probability.argmax(1).numpy(), probability.double().numpy()
    expected = {
        "accuracy": (wanted == found).mean(),
        "macro_f1": np.mean([f1(wanted == label, found == label) for label in range(NUM_LABELS)]),
        "loss": -np.log(certain[np.arange(len(wanted)), wanted]).mean(),
    }
    assert scores(probability, target, multi_label=False) == pytest.approx(expected, abs=1e-5)
    pairs = [[((wanted == true) & (found == named)).sum() for named in range(NUM_LABELS)] for true in range(NUM_LABELS)]
    assert confusion(probability, target).tolist() == pairs


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_several_labels_per_clip_are_scored_as_defined(seed: int) -> None:
    probability, target = several(seed)
    wanted, found = target.numpy() == 1, probability.numpy() > 0.5
    likely = torch.where(target == 1, probability, 1 - probability).double()
    expected = {
        "accuracy": (wanted == found).mean(),
        "macro_f1": np.mean([f1(*columns) for columns in zip(wanted.T, found.T, strict=True)]),
        "map": np.mean([precision(*columns) for columns in zip(wanted.T, probability.numpy().T, strict=True)]),
        "loss": float(-likely.log().sum(1).mean()),
    }
    assert scores(probability, target, multi_label=True) == pytest.approx(expected, abs=1e-5)


def f1(wanted: np.ndarray, found: np.ndarray) -> float:
    """Harmonic mean of precision and recall of one label."""
    return 2 * (wanted & found).sum() / (wanted.sum() + found.sum())


def precision(wanted: np.ndarray, probability: np.ndarray) -> float:
    """Average precision of one label: at the rank of each clip that has it, how many before and with it do."""
    ranked = wanted[np.argsort(-probability)]
    return float((ranked.cumsum() / np.arange(1, len(ranked) + 1))[ranked].mean())


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


def test_a_class_that_no_clip_has_or_is_given_counts_for_nothing() -> None:
    target = torch.eye(3)[[0, 0, 1]]
    probability = torch.eye(3)[[0, 1, 1]]
    assert scores(probability, target, multi_label=False)["macro_f1"] == pytest.approx(2 / 3)


def test_clips_without_a_label_have_a_score_too() -> None:
    found = scores(torch.full((3, 2), 0.1), torch.zeros(3, 2), multi_label=True)
    assert (found["accuracy"], found["macro_f1"], found["map"]) == (1, 0, 0)


def test_of_one_label_that_is_asked_for_presence_counts_and_absence_does_not() -> None:
    target, probability = torch.tensor([[1.0, 0], [0, 0], [1, 0]]), torch.tensor([[0.9, 0.1], [0.8, 0.1], [0.2, 0.1]])
    found = scores(probability, target, multi_label=True)
    assert (found["macro_f1"], found["map"]) == (pytest.approx(0.5), pytest.approx((1 + 2 / 3) / 2))


@pytest.mark.parametrize("num_clips", [1, 60])
def test_few_clips_of_many_classes_are_scored_without_a_word(num_clips: int) -> None:
    """Where scikit-learn might take classes for numbers; a warning fails a test."""
    target = torch.eye(50)[torch.arange(num_clips) % 50]
    assert scores(target, target, multi_label=False) == {"accuracy": 1, "macro_f1": 1, "loss": 0}
    assert confusion(target, target).sum() == num_clips
    assert scores(target, target, multi_label=True)["map"] == 1
