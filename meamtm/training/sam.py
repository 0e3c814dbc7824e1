"""Sharpness-aware minimisation (Foret 2021): a step follows the gradient not of where the weights are, but of the worst
place near them, so that training settles where the loss is flat."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def worst_nearby(model: nn.Module, radius: float) -> Iterator[None]:
    """Moves the weights by `radius` along their gradients, which it takes, and puts them back afterwards, bit for bit.

    Batch norm's running statistics learn nothing from what is heard there.
    """
    weights = [weight for weight in model.parameters() if weight.grad is not None]
    places = [weight.detach().clone() for weight in weights]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    stride = radius / nn.utils.get_total_norm([_gradient(weight) for weight in weights]).clamp_min(1e-12)
    with torch.no_grad():
        for weight in weights:
            weight.addcmul_(_gradient(weight), stride)
    model.zero_grad(set_to_none=True)  # nothing else holds them, so that their memory is free again
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        with torch.no_grad():
            for weight, place in zip(weights, places, strict=True):
                weight.copy_(place)


def _gradient(weight: nn.Parameter) -> Tensor:
    assert weight.grad is not None, "weights without one stay where they are"
    return weight.grad
