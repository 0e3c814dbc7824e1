"""Logits, and targets or teachers' logits -> the loss of each clip."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def clip_losses(
    logits: Float[Tensor, "batch label"], target: Float[Tensor, "batch label"], *, multi_label: bool, smoothing: float
) -> Float[Tensor, " batch"]:
    """Gives cross-entropy for one label per clip, or the sum of binary ones for several; targets may be mixed.

    Losses come clip by clip, so that ranks with unequal shares of a batch can still weigh each clip alike.
    """
    if multi_label:
        smooth = target * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, smooth, reduction="none").sum(1)
    return F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")


def distillation_losses(
    logits: Float[Tensor, "batch label"],
    teacher_logits: Float[Tensor, "batch label"],
    *,
    multi_label: bool,
    temperature: float,
) -> Float[Tensor, " batch"]:
    """Gives the Kullback-Leibler divergence of answers from a teacher's, nats, summed over labels where clips have
    several; at any temperature gradients keep their size (Hinton 2015, section 2.1)."""
    both = (logits / temperature, teacher_logits / temperature)
    if multi_label:
        ours, theirs = (torch.stack((F.logsigmoid(each), F.logsigmoid(-each)), 2) for each in both)
    else:
        ours, theirs = (each.log_softmax(1) for each in both)
    return temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).flatten(1).sum(1)


def logits_together(
    answers: Sequence[Float[Tensor, "batch label"]], *, multi_label: bool, temperature: float
) -> Float[Tensor, "batch label"]:
    """Gives logits that say, at a temperature, the mean of the probabilities that several say at it."""
    if len(answers) == 1:
        return answers[0]
    each = torch.stack(tuple(answers)) / temperature
    if multi_label:
        mean = F.logsigmoid(each).logsumexp(0) - F.logsigmoid(-each).logsumexp(0)
    else:
        mean = each.log_softmax(2).logsumexp(0) - math.log(len(answers))
    return temperature * mean
