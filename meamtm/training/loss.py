"""Logits and targets -> the loss of each clip."""

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
