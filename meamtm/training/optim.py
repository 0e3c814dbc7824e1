"""Parameters -> optimizer, step number -> learning rate."""

import inspect
import math
from typing import Any

from timm.optim import create_optimizer_v2, get_optimizer_class, param_groups_weight_decay  # type: ignore
from torch.optim import Optimizer

from meamtm.config import OptimConfig
from meamtm.errors import ConfigError
from meamtm.model.transformer import AudioTransformer


def make_optimizer(model: AudioTransformer, config: OptimConfig) -> Optimizer:
    """Builds timm's optimizer, without weight decay on biases, norms, position embeddings and a trained mel basis."""
    try:
        optimizer = create_optimizer_v2(_groups(model, config), opt=config.name, lr=config.lr, **_fused(config.name))
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"optim.name={config.name!r}: timm cannot build it ({error}); see timm.optim.list_optimizers()"
        ) from error
    return optimizer


def _groups(model: AudioTransformer, config: OptimConfig) -> list[dict[str, Any]]:
    """Sorts weights by what the optimizer does to them; the encoder's come first, at the full rate.

    Adam moves a weight by about its rate in each step. At a tenth of the default rate a thousand steps all in one
    direction move the root of the basis by 0.1, about what a triangle's peak has (0.04 to 0.18 for `slaney`): bands may
    change their form, and cannot be gone after a hundred steps.
    """
    encoder = model.encoder
    groups = param_groups_weight_decay(encoder, config.weight_decay, no_weight_decay_list=encoder.no_weight_decay())
    mel = {
        "params": list(model.mel.parameters()),
        "weight_decay": 0.0,
        "lr": config.mel_lr_scale * config.lr,
        "lr_scale": config.mel_lr_scale,
        "use_fallback": True,  # Muon would turn the matrix and fill its zeros; its fallback is AdamW
    }
    return [*groups, mel] if mel["params"] else groups


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
