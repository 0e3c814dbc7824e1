"""Parameters -> optimizer, step number -> learning rate."""

import inspect
import math
from collections import Counter
from functools import partial
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, muon, param_groups_weight_decay  # type: ignore
from torch import Tensor, nn
from torch.optim import Optimizer

from meamtm.config import OptimConfig, RunConfig
from meamtm.errors import ConfigError
from meamtm.model.cnn import ConvNet
from meamtm.model.cost import weightless
from meamtm.model.encoder import Encoder
from meamtm.model.masked import MaskedPrediction
from meamtm.model.precision import is_bf16
from meamtm.model.transformer import AudioTransformer

Network = Encoder | ConvNet | MaskedPrediction


def make_optimizer(model: AudioTransformer | MaskedPrediction, config: RunConfig) -> Optimizer:
    """Builds timm's optimizer, without weight decay on biases, norms, position embeddings and a trained mel basis."""
    if isinstance(model, MaskedPrediction):
        return _build(model, [], config)
    return _build(model.encoder, list(model.mel.parameters()), config)


def count_state(config: RunConfig, num_labels: int = 10) -> int:
    """Counts the numbers that the optimizer keeps, by a step of weights that have no memory.

    AdamW keeps two for each weight, Muon one, and two for those that are no matrices. What looks at numbers in its step
    cannot be asked so, and counts as AdamW.
    """
    encoder = weightless(config, num_labels)
    with torch.device("meta"):
        basis = [nn.Parameter(torch.empty(config.mel.num_bands, config.mel.num_bins))] if config.mel.trainable else []
    optimizer = _build(encoder, basis, config)
    for group in optimizer.param_groups:
        if "ns_steps" in group:  # Muon's products keep nothing, and are a third of what memory's estimate takes
            group["ns_steps"] = 0
    num_alike = _keep_one_of_a_shape(optimizer)
    for weight in num_alike:
        weight.grad = torch.empty_like(weight)
    try:
        optimizer.step()
    except RuntimeError:
        return 2 * sum(weight.numel() for weight in (*encoder.parameters(), *basis))
    kept = ((weight, value) for weight, state in optimizer.state.items() for value in state.values())
    # Adagrad has made its state already, for all.
    return sum(num_alike.get(weight, 0) * value.numel() for weight, value in kept if isinstance(value, Tensor))


def _keep_one_of_a_shape(optimizer: Optimizer) -> dict[Tensor, int]:
    """Leaves of weights that are alike one, and says how many there were: blocks repeat themselves."""
    num_alike = {}
    for group in optimizer.param_groups:
        first = {weight.shape: weight for weight in reversed(group["params"])}
        shapes = Counter(weight.shape for weight in group["params"])
        group["params"] = list(first.values())
        num_alike |= {weight: shapes[shape] for shape, weight in first.items()}
    return num_alike


def _build(network: Network, basis: list[nn.Parameter], config: RunConfig) -> Optimizer:
    name, device = config.optim.name, next(network.parameters()).device
    groups = _groups(network, basis, config.optim)
    try:
        options = {} if device.type == "meta" else _fused(name)
        optimizer = create_optimizer_v2(groups, opt=name, lr=config.optim.lr, **options)
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"optim.name={name!r}: timm cannot build it ({error}); see timm.optim.list_optimizers()"
        ) from error
    if getattr(optimizer, "is_second_order", False):
        raise ConfigError(f"optim.name={name!r}: takes second derivatives, which training does not; name another")
    if isinstance(optimizer, muon.Muon) and not is_bf16(config, device):
        _multiply_in_float32(optimizer)
    return optimizer


def _multiply_in_float32(optimizer: muon.Muon) -> None:
    """Gives timm's Muon the precision that its function takes and its class has no option for: it would take bf16.

    On a processor without bf16 the default model's step takes 3 s so, in float32 a tenth of a second.
    """
    in_bf16 = muon.zeropower_via_newtonschulz
    in_float32 = partial(in_bf16, dtype=torch.float32)
    optimizer.register_step_pre_hook(lambda *_: setattr(muon, "zeropower_via_newtonschulz", in_float32))
    optimizer.register_step_post_hook(lambda *_: setattr(muon, "zeropower_via_newtonschulz", in_bf16))


def _groups(network: Network, basis: list[nn.Parameter], config: OptimConfig) -> list[dict[str, Any]]:
    """Sorts weights by what the optimizer does to them; the network's come first, at the full rate.

    Adam moves a weight by about its rate in each step. At a tenth of the default rate a thousand steps all in one
    direction move the root of the basis by 0.1, about what a triangle's peak has (0.04 to 0.18 for `slaney`): bands may
    change their form, and cannot be gone after a hundred steps.
    """
    groups = param_groups_weight_decay(network, config.weight_decay, no_weight_decay_list=network.no_weight_decay())
    mel = {
        "params": basis,
        "weight_decay": 0.0,
        "lr": config.mel_lr_scale * config.lr,
        "lr_scale": config.mel_lr_scale,
        "use_fallback": True,  # Muon would turn the matrix and fill its zeros; its fallback is AdamW
    }
    return [*groups, mel] if basis else groups


def _fused(name: str) -> dict[str, Any]:
    """Asks for one pass over all weights where the optimizer has it: AdamW takes a third of the time on a CPU."""
    known = inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters
    return {"fused": True} if "fused" in known else {}


def set_lr(optimizer: Optimizer, config: OptimConfig, step: int, num_steps: int, steps_per_epoch: int) -> float:
    """Sets the learning rate for a step (from 0) and returns it. The rate depends on the step alone, so a resumed run
    needs no scheduler state."""
    lr = config.lr * lr_factor(config, step, num_steps, steps_per_epoch)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def lr_factor(config: OptimConfig, step: int, num_steps: int, steps_per_epoch: int) -> float:
    """Gives the learning rate of a step as a fraction of the peak: a linear climb, then the schedule."""
    num_warmup = round(config.warmup * num_steps)
    if config.schedule == "onecycle":  # climbs along a cosine for at least 30 % of the run (Smith 2018)
        num_warmup = max(num_warmup, round(0.3 * num_steps))
        if step < num_warmup:
            return _cosine(1 / 25, 1.0, (step + 1) / num_warmup)
    if step < num_warmup:
        return (step + 1) / num_warmup
    done = (step - num_warmup) / max(num_steps - num_warmup, 1)
    match config.schedule:
        case "cosine" | "onecycle":
            return _cosine(1.0, config.final_ratio, done)
        case "step":
            return config.step_gamma ** ((step - num_warmup) // (config.step_epochs * steps_per_epoch))
        case "constant":
            return 1.0


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2
