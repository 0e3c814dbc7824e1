"""The loss of a clip is torch's own, with labels hard, mixed and smoothed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from meamtm.training.loss import clip_losses

LOGITS = 3 * torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 2])
SEVERAL = (torch.rand(7, 5, generator=torch.Generator().manual_seed(1)) < 0.4).float()


def one_hot(labels: Tensor = LABELS) -> Tensor:
    return F.one_hot(labels, 5).float()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_one_label_per_clip_gives_torchs_cross_entropy(smoothing: float) -> None:
    found = clip_losses(LOGITS, one_hot(), multi_label=False, smoothing=smoothing)
    expected = F.cross_entropy(LOGITS, LABELS, label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(found, expected)


def test_several_labels_give_the_sum_of_torchs_binary_cross_entropies() -> None:
    found = clip_losses(LOGITS, SEVERAL, multi_label=True, smoothing=0.0)
    expected = F.binary_cross_entropy(LOGITS.double().sigmoid(), SEVERAL.double(), reduction="none").sum(1)
    torch.testing.assert_close(found, expected.float())


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_mixed_target_gives_the_mixed_loss(multi_label: bool) -> None:
    first, second = one_hot(), one_hot(LABELS.roll(1))
    mixed = clip_losses(LOGITS, 0.3 * first + 0.7 * second, multi_label=multi_label, smoothing=0.1)
    apart = [clip_losses(LOGITS, target, multi_label=multi_label, smoothing=0.1) for target in (first, second)]
    torch.testing.assert_close(mixed, 0.3 * apart[0] + 0.7 * apart[1])


def test_smoothing_moves_several_labels_towards_a_half() -> None:
    certain = torch.tensor([[20.0, -20.0, -20.0]])
    target = torch.tensor([[1.0, 0.0, 0.0]])
    sharp = clip_losses(certain, target, multi_label=True, smoothing=0.0)
    smooth = clip_losses(certain, target, multi_label=True, smoothing=0.2)
    torch.testing.assert_close(smooth - sharp, torch.tensor([3 * 0.1 * 20]))  # a tenth of each label's logit


@pytest.mark.parametrize("multi_label", [False, True])
def test_huge_logits_give_finite_losses(multi_label: bool) -> None:
    losses = clip_losses(1e4 * LOGITS, one_hot(), multi_label=multi_label, smoothing=0.1)
    assert losses.shape == (7,)
    assert losses.isfinite().all()
